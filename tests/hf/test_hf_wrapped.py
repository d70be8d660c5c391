"""windkern.hf on wrapped models: values and gradients, or an error that says what to do instead."""

from __future__ import annotations

import pytest
import torch
from distributed_tools import launch
from torch import nn

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

from distributed_jobs import WRAPPED, plain_steps  # noqa: E402
from test_hf import batch, build, by_logits  # noqa: E402

from windkern import hf  # noqa: E402
from windkern.hf import check as hf_check  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # peft asks transformers this
    pytest.mark.filterwarnings("ignore:.*[tT]ied:UserWarning"),  # peft warns of saving, not of training
]


def gradients(values: torch.Tensor, model: nn.Module) -> list[torch.Tensor]:
    loss = (values * torch.tensor([1.0, -2.0, 0.5])).sum()
    return list(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True))


def assert_as(ours: torch.Tensor, theirs: torch.Tensor, model: nn.Module) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for mine, other in zip(gradients(ours, model), gradients(theirs, model), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()) + 1e-7)


class Backend:
    """A backend for torch.compile that counts its graphs and runs them unchanged."""

    def __init__(self):
        self.graphs, self.calls = 0, 0

    def __call__(self, graph, inputs):
        self.graphs += 1

        def run(*args):
            self.calls += 1
            return graph.forward(*args)

        return run


@pytest.mark.filterwarnings("ignore")  # of torch.compile
@pytest.mark.parametrize("place", ["around", "in place"])
def test_compiled_models(place):
    model, backend = build("Llama").eval(), Backend()
    theirs = by_logits(model, *batch())
    if place == "in place":
        wrapped = model
        model.compile(backend=backend)
    else:
        wrapped = torch.compile(model, backend=backend)
    assert_as(hf.sequence_logps(wrapped, *batch()), theirs, model)
    graphs, calls = backend.graphs, backend.calls
    assert (calls > 0) == (place != "in place")  # the decoder is compiled, with the settings of the wrapper
    assert_as(hf.sequence_logps(wrapped, *batch()), theirs, model)
    assert backend.graphs == graphs  # and only once
    assert "forward" not in model.model.__dict__  # the replaced forward is restored
    assert (model._compiled_call_impl is not None) == (place == "in place")


class Outer(nn.Module):
    """A wrapper of an unknown kind."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **given):
        return self.module(**given)


def test_wrappers_that_nobody_knows():
    model = build("Gemma2").eval()
    assert_as(hf.sequence_logps(Outer(model), *batch()), by_logits(model, *batch()), model)
    with pytest.raises(hf.UnsupportedModelError, match=r"wrapped in Outer.*hf\.sequence_logps takes the wrapped"):
        hf.hidden_and_head(Outer(model))
    idle = Outer(model)
    idle.forward = lambda **given: torch.zeros(3)
    with pytest.raises(hf.UnsupportedModelError, match="Outer does not call the Gemma2ForCausalLM inside it"):
        hf.sequence_logps(idle, *batch())
    changing = Outer(model)
    changing.forward = lambda **given: (model(**given), 1)
    with pytest.raises(hf.UnsupportedModelError, match=r"Outer must return the output of the model inside .*got tuple"):
        hf.sequence_logps(changing, *batch())


@pytest.mark.parametrize("adapter", [False, True])
def test_prepared_by_accelerate_for_bfloat16(adapter, monkeypatch):
    model = build("Llama").eval()
    if adapter:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=2)).eval()
    plain, looks, look = by_logits(model, *batch()), [], hf_check._look
    monkeypatch.setattr(hf_check, "_look", lambda target: (looks.append(target), look(target))[1])
    hf.hidden_and_head(model)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    try:
        prepared = accelerator.prepare(model)
        theirs = by_logits(prepared, *batch())
        for each in (prepared, accelerator.unwrap_model(prepared)):
            ours = hf.sequence_logps(each, *batch())
            assert (ours - plain).abs().max() < 2 * (theirs - plain).abs().max() + 0.02
            assert not torch.allclose(ours, plain, rtol=1e-5, atol=1e-5)  # the autocast of the wrapper is on
            assert torch.equal(ours, hf.sequence_logps(each, *batch()))
        assert len(looks) == 2  # again under the autocast of the wrapper, and once for both
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("kind", ["cpu_offload", "disk_offload"])
def test_offloaded_models_are_scored_and_not_trained(kind, tmp_path):
    model = build("Phi").eval()
    with torch.no_grad():
        theirs = by_logits(model, *batch())
    places = {"offload_dir": str(tmp_path)} if kind == "disk_offload" else {}
    model = getattr(accelerate, kind)(model, execution_device=torch.device("cpu"), **places)
    with torch.no_grad():
        torch.testing.assert_close(hf.sequence_logps(model, *batch()), theirs, rtol=1e-5, atol=1e-5)
    with pytest.raises(hf.UnsupportedModelError, match=r"weights of PhiForCausalLM are offloaded.*no_grad"):
        hf.sequence_logps(model, *batch())
    for each in model.parameters():
        each.requires_grad_(False)
    torch.testing.assert_close(hf.sequence_logps(model, *batch()), theirs, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    return launch("wrapped", tmp_path_factory.mktemp("wrapped"))


@pytest.mark.parametrize("kind", WRAPPED)
def test_two_processes_train_as_one(ranks, kind):
    theirs = plain_steps(kind)
    assert theirs["logps"][0] != theirs["logps"][1]
    for rank in ranks:
        found = rank[kind]
        near = {"rtol": WRAPPED[kind], "atol": WRAPPED[kind]}
        torch.testing.assert_close(torch.tensor(found["logps"]), torch.tensor(theirs["logps"]), **near)
        assert found["weights"].keys() == theirs["weights"].keys()
        for name, value in theirs["weights"].items():
            torch.testing.assert_close(torch.tensor(found["weights"][name]), torch.tensor(value), **near, msg=name)
        assert "sequence_logps takes the wrapped model" in found["apart"]
        assert "module" not in found["apart"]


def test_log_probs_of_a_sharded_model_are_not_rounded(ranks):
    """FSDP2 can be set to return bfloat16, but sums of log-probs need more precision."""
    for rank in ranks:
        found = torch.tensor(rank["fsdp2, bfloat16"]["logps"])
        assert not torch.equal(found.bfloat16().float(), found)
