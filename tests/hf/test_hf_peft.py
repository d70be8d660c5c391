"""windkern.hf on heads that PEFT changed, against plain autograd through the model's own logits."""

from __future__ import annotations

import pytest
import torch
from test_hf import build, by_logits
from torch import nn

peft = pytest.importorskip("peft")

import windkern as wk  # noqa: E402
from windkern import hf  # noqa: E402
from windkern.hf import head as hf_head  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # peft asks transformers this
    pytest.mark.filterwarnings("ignore:.*[tT]ied:UserWarning"),  # peft warns of saving, not of training
]


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return three sequences, one padded right: Gemma's attention gives NaN for left padding in float64."""
    ids = torch.randint(3, 61, (3, 9), generator=torch.Generator().manual_seed(1))
    attention, completion = torch.ones_like(ids), torch.zeros_like(ids)
    attention[1, 7:] = 0
    completion[:, 5:] = 1
    completion[1, 7:] = 0
    return ids, attention, completion


def lora(*targets: str, **options) -> peft.LoraConfig:
    return peft.LoraConfig(target_modules=list(targets), r=3, lora_alpha=5, **options)


def filled(model: nn.Module) -> nn.Module:
    """Return the same model in float64, with no adapter at zero and all weights trained."""
    generator = torch.Generator().manual_seed(2)
    for name, value in model.double().named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            with torch.no_grad():
                value += 0.3 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
    return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def exact_by_logits(model: nn.Module, ids, attention, completion) -> torch.Tensor:
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=attention, position_ids=positions).logits[:, :-1]
    tokens = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return torch.where(completion[:, 1:].bool(), tokens, 0.0).sum(-1)


def assert_as_autograd(model: nn.Module, ours=hf.sequence_logps) -> dict[str, torch.Tensor]:
    """Assert the values and all gradients of plain autograd, and return the gradients."""
    parameters, upstream = trained(model), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    found = []
    for function in (ours, exact_by_logits):
        torch.manual_seed(7)  # for the dropout
        value = function(model, *batch())
        gradients = torch.autograd.grad((value * upstream).sum(), list(parameters.values()), allow_unused=True)
        found.append((value.detach(), dict(zip(parameters, gradients, strict=True))))
    (value, got), (expected, want) = found
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    for name in parameters:
        assert (got[name] is None) == (want[name] is None), name
        if want[name] is not None:
            torch.testing.assert_close(got[name], want[name], rtol=1e-7, atol=1e-9, msg=name)
    return {name: value for name, value in got.items() if value is not None}


FAMILIES = ("Llama", "Gemma2", "Cohere", "Phi")  # plain, softcap and tied, scale and tied, bias


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [("lm_head",), ("lm_head", "q_proj", "v_proj")], ids=["head", "head and body"])
def test_lora_on_the_head_is_as_autograd(family, targets):
    model = filled(peft.get_peft_model(build(family), lora(*targets))).eval()
    gradients = assert_as_autograd(model)
    assert {"lora_A", "lora_B"} == {name.split(".")[-3] for name in gradients if "lm_head" in name}
    assert all(bool(value.any()) for value in gradients.values())
    assert any("q_proj" in name for name in gradients) == (len(targets) > 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_below_its_adapter_may_be_trained_too(family):
    model = filled(peft.get_peft_model(build(family), lora("lm_head"))).eval().requires_grad_(True)
    gradients = assert_as_autograd(model)
    assert len(gradients) == len(list(model.parameters()))


def two_adapters() -> nn.Module:
    model = peft.get_peft_model(build("Llama"), lora("lm_head", "q_proj"))
    model.add_adapter("other", peft.LoraConfig(target_modules=["lm_head"], r=2, lora_alpha=7, use_rslora=True))
    model.base_model.set_adapter(["default", "other"])
    return filled(model).eval()


def test_two_active_adapters_are_two_blocks():
    model = two_adapters()
    parts = hf.hidden_and_head(model)
    states, head = parts.blocks(torch.randn(2, 32, dtype=torch.float64))
    weights = head.weight
    assert [tuple(each.shape) for each in states] == [(2, 32), (2, 3), (2, 2)]
    assert [tuple(each.shape) for each in weights] == [(61, 32), (61, 3), (61, 2)]
    assert weights[0] is parts.weight and weights[2] is parts.lm_head.lora_B["other"].weight
    gradients = assert_as_autograd(model)
    assert sum("lm_head" in name for name in gradients) == 4


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_dropout_is_that_of_the_model(mode):
    model = filled(peft.get_peft_model(build("Llama"), lora("lm_head", "q_proj", lora_dropout=0.4)))
    assert_as_autograd(model.train(mode == "train"))
    torch.manual_seed(7)
    first = hf.sequence_logps(model, *batch())
    assert torch.equal(first, hf.sequence_logps(model, *batch())) == (mode == "eval")


def test_the_check_draws_no_random_numbers_and_leaves_modes_and_weights():
    model = filled(peft.get_peft_model(build("Llama"), lora("lm_head", lora_dropout=0.4))).train()
    state, weights = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    hf.hidden_and_head(model)
    assert torch.equal(state, torch.get_rng_state()) and all(module.training for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_adapters_are_looked_up_when_the_blocks_are_made():
    model = two_adapters()
    parts, hidden = hf.hidden_and_head(model), torch.randn(2, 32, dtype=torch.float64)
    expected = parts.lm_head(hidden)

    def logits() -> torch.Tensor:
        states, head = parts.blocks(hidden)
        if isinstance(states, torch.Tensor):
            assert states is hidden and head.weight is parts.weight
            return states @ head.weight.T
        return sum(state @ weight.T for state, weight in zip(states, head.weight, strict=True))

    torch.testing.assert_close(logits(), expected)
    with model.disable_adapter():
        torch.testing.assert_close(logits(), parts.lm_head(hidden))
        assert not torch.allclose(logits(), expected)
        assert_as_autograd(model.requires_grad_(True))
    model.set_adapter("other")
    assert len(parts.blocks(hidden)[0]) == 2
    torch.testing.assert_close(logits(), parts.lm_head(hidden))
    parts.lm_head.set_scale("other", 0.25)
    torch.testing.assert_close(logits(), parts.lm_head(hidden))
    model.base_model.set_adapter(["default", "other"])
    parts.lm_head.set_scale("other", 1.0)
    model.merge_adapter()
    assert isinstance(parts.blocks(hidden)[0], torch.Tensor)
    torch.testing.assert_close(logits(), expected)
    torch.testing.assert_close(hf.sequence_logps(model, *batch()), exact_by_logits(model, *batch()))
    model.base_model.disable_adapter_layers()
    below = logits()  # peft unmerges in a disabled layer's forward
    torch.testing.assert_close(below, parts.lm_head(hidden))
    assert not torch.allclose(below, expected)


def test_modules_to_save_is_the_trained_copy():
    model = peft.get_peft_model(build("Phi"), lora("q_proj", modules_to_save=["lm_head"]))
    model = filled(model).eval()
    parts = hf.hidden_and_head(model)
    copy = parts.lm_head.modules_to_save["default"]
    assert parts.weight is copy.weight and parts.bias is copy.bias and parts.weight.requires_grad
    gradients = assert_as_autograd(model)
    assert {"weight", "bias"} == {name.split(".")[-1] for name in gradients if "lm_head" in name}
    with model.disable_adapter():
        assert parts.weight is parts.lm_head.original_module.weight and parts.bias is parts.lm_head.original_module.bias
        torch.testing.assert_close(hf.sequence_logps(model, *batch()), exact_by_logits(model, *batch()))
    assert parts.weight is copy.weight


@pytest.mark.parametrize("family", ["Qwen2", "Gemma2"])
def test_a_tied_embedding_gets_both_of_its_gradients(family):
    model = build(family).double().eval()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    gradients = assert_as_autograd(model)
    embedding = next(value for name, value in gradients.items() if "embed" in name)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    apart = assert_as_autograd(model)
    use = next(value for name, value in apart.items() if "embed" in name)
    assert bool(use.any()) and bool(apart["lm_head.weight"].any())
    torch.testing.assert_close(embedding, use + apart["lm_head.weight"])


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens"], "r": 3},
        {"target_modules": ["q_proj"], "r": 3, "modules_to_save": ["embed_tokens"]},
    ],
    ids=["LoRA", "modules_to_save"],
)
def test_peft_with_tied_weights(options):
    model = peft.get_peft_model(build("Qwen2"), peft.LoraConfig(**options, ensure_weight_tying=True))
    gradients = assert_as_autograd(filled(model).eval())
    assert any("embed" in name for name in gradients)


def test_inside_the_loss_of_wind():
    model = filled(peft.get_peft_model(build("Gemma2"), lora("lm_head", "v_proj"))).eval().requires_grad_(True)
    ids = torch.randint(3, 61, (6, 8), generator=torch.Generator().manual_seed(1))
    attention, completion = torch.ones_like(ids), torch.zeros_like(ids)
    completion[:, 4:] = 1
    weights = torch.randn(2, 3, dtype=torch.float64)
    reference = torch.randn(2, 3, dtype=torch.float64) - 12

    def loss_fn(logps, weights, reference):
        return ((logps - reference) / 10 - weights).square().mean(1)

    parts = hf.hidden_and_head(model)
    states, head = parts.blocks(parts.hidden(ids, attention))
    targets = hf.completion_targets(ids, completion).view(2, 3, 8)
    ours = wk.fused_loss(
        loss_fn,
        tuple(each.view(2, 3, 8, -1) for each in states),
        head,
        targets,
        per_group={"weights": weights, "reference": reference},
    )
    theirs = loss_fn(exact_by_logits(model, ids, attention, completion).view(2, 3), weights, reference).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    parameters = list(model.parameters())
    got, want = (torch.autograd.grad(value, parameters) for value in (ours, theirs))
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("autocast", [False, True])
def test_adapters_of_another_dtype_are_served_as_peft_casts(autocast):
    exact = filled(peft.get_peft_model(build("Llama"), lora("lm_head"))).eval()
    expected = exact_by_logits(exact, *batch())
    base = build("Llama") if autocast else build("Llama").to(torch.bfloat16)
    model = peft.get_peft_model(base, lora("lm_head")).eval()  # keeps its adapters in float32
    model.load_state_dict(exact.state_dict())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, theirs = hf.sequence_logps(model, *batch()), by_logits(model, *batch())
    assert ours.dtype == torch.float32
    assert (ours - expected).abs().max() < 2 * (theirs - expected).abs().max() + 0.1
    torch.autograd.grad(ours.sum(), list(trained(model).values()))


@pytest.mark.parametrize("fault", ["no scale", "one block"])
def test_the_check_sees_a_wrong_block_although_adapters_start_at_zero(monkeypatch, fault):
    right = hf_head.blocks

    def wrong(head, hidden):
        states, weights = right(head, hidden)
        if fault == "one block":
            return states[:1], weights[:1]
        return (states[0], states[1] / head.scaling["default"]), weights

    monkeypatch.setattr(hf_head, "blocks", wrong)
    with pytest.raises(hf.UnsupportedModelError, match="blocks of its adapters default differ from its logits by"):
        hf.hidden_and_head(peft.get_peft_model(build("Llama"), lora("lm_head")))


def test_an_adapter_is_checked_once(monkeypatch):
    model, calls = two_adapters(), []
    right = hf_head._BothWays
    monkeypatch.setattr(hf_head, "_BothWays", lambda head: (calls.append(head), right(head))[1])
    model.set_adapter("default")
    for names in (["default"], ["default"], ["other"], ["default", "other"]):
        model.base_model.set_adapter(names)
        hf.hidden_and_head(model)
    assert len(calls) == 2


def test_other_adapters_on_the_head_say_what_would_do():
    cases = {
        r"DoraLinearVariant.*use_dora=False": lora("lm_head", use_dora=True),
        r"'default' has its own bias; set lora_bias=False": lora("lm_head", lora_bias=True),
        r"ia3.*only LoRA .* leave the head out of target_modules .* merge_and_unload": peft.IA3Config(
            target_modules=["lm_head"], feedforward_modules=[]
        ),
    }
    for message, configuration in cases.items():
        model = peft.get_peft_model(build("Phi"), configuration)
        with pytest.raises(hf.UnsupportedModelError, match=message):
            hf.hidden_and_head(model)
    tokens = peft.LoraConfig(target_modules=["q_proj"], r=2, trainable_token_indices=[3, 4])
    with pytest.raises(hf.UnsupportedModelError, match=r"TrainableTokensWrapper.*trainable_token_indices"):
        hf.hidden_and_head(peft.get_peft_model(build("Qwen2"), tokens))


def test_a_head_that_is_a_variant_only_when_active():
    model = peft.get_peft_model(build("Llama"), lora("lm_head", use_dora=True))
    with model.disable_adapter():
        parts = hf.hidden_and_head(model)
        assert isinstance(parts.blocks(torch.randn(1, 32))[0], torch.Tensor)
    with pytest.raises(hf.UnsupportedModelError, match="use_dora=False"):
        parts.blocks(torch.randn(1, 32))
