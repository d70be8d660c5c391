"""windkern.hf against the logits of every causal LM of transformers, as tiny random models: `make test-models`.

A few of the models run in the default suite.
"""

from __future__ import annotations

import collections
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

import model_zoo  # noqa: E402

from windkern import hf  # noqa: E402
from windkern.hf import call as hf_call  # noqa: E402
from windkern.hf import check as hf_check  # noqa: E402

README = Path(__file__).parents[2] / "README.md"
# The models of the default suite, and what each of them tests.
FEW = {
    "bert": "dense, activation and norm before the head",
    "chameleon": "masks image tokens",
    "cohere2_vision": "its text part claims a scale that it does not apply",
    "hyperclovax": "multiplies by logits_scaling",
    "inkling_text": "cuts padded columns off",
    "kosmos-2.5": "a causal LM in a causal LM",
    "llama4_text": "base_model_prefix names another attribute",
    "mamba": "residual stream in float32 in a bfloat16 model",
    "minicpm3": "scales its hidden states by a field that others scale logits by",
    "mpt": "takes no position ids",
    "nemotron_h": "casts its logits",
    "nemotron_h_omni": "its head is that of a model inside it",
    "recurrent_gemma": "softcap under a name of its own",
    "rembert": "the head is narrower than the model",
    "roberta": "positions do not begin at 0",
    "diffusion_gemma": "refused: not from left to right",
    "dory": "refused: a learned scale for each token",
    "musicgen": "refused: a head for each codebook",
    "prophetnet": "refused: predicts several tokens",
}
ENTRIES = model_zoo.entries()
TALLY: dict[str, list[str]] = collections.defaultdict(list)
pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers


def batch(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return three rows: padded left, padded right with an empty completion, not padded."""
    ids = torch.randint(4, 120, (3, 9), generator=torch.Generator().manual_seed(1))
    attention, completion = torch.ones_like(ids), torch.zeros_like(ids)
    attention[0, :3] = 0
    attention[1, 7:] = 0
    ids[attention == 0] = getattr(model.config, "pad_token_id", None) or 0
    completion[:, 5:] = 1
    completion[1] = 0
    return ids, attention, completion


def own_logps(model: nn.Module, ids, attention, completion, positions: bool) -> torch.Tensor:
    """Return log-probs (S,) from the model's own logits."""
    out = model(**hf_call.inputs(model, ids, attention, positions=positions))
    logits = (out[0] if isinstance(out, tuple) else out.logits)[:, :-1].float()
    tokens = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return torch.where(completion[:, 1:].bool(), tokens, 0.0).sum(-1)


def gap(ours: torch.Tensor | None, theirs: torch.Tensor | None, least: float) -> float:
    ours, theirs = (torch.zeros(()) if each is None else each.float() for each in (ours, theirs))
    return float((ours - theirs).norm()) / max(float(theirs.norm()), least, 1e-30)


def compare(model: nn.Module, exact: torch.Tensor | None) -> torch.Tensor:
    """Assert that values and all gradients are those of the model's own logits, and return its own log-probs.

    Args:
        exact: log-probs of the same model in float32, if this one is in bfloat16.
    """
    if model.config.model_type == "reformer":  # takes gradients in training mode only
        model.requires_grad_(False)
    given, parameters = batch(model), [each for each in model.parameters() if each.requires_grad]
    positions = hf_check.verdict_of(hf_call.find(model)).positions
    theirs = own_logps(model, *given, positions)
    ours = hf.sequence_logps(model, *given)
    if exact is None:
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    else:
        rounding = float((theirs - exact).abs().max())
        assert float((ours - exact).abs().max()) <= 1.5 * rounding + 0.02 * (1 + float(exact.abs().max()))
    if not theirs.requires_grad:
        return theirs.detach()
    upstream = torch.tensor([1.0, -2.0, 0.5])
    got, want = (torch.autograd.grad((each * upstream).sum(), parameters, allow_unused=True) for each in (ours, theirs))
    largest = max(float(each.float().norm()) for each in want if each is not None)
    allowed = 2e-3 if exact is None else 0.1  # logits of the model itself are rounded to bfloat16
    names = [name for name, each in model.named_parameters() if each.requires_grad]
    for name, mine, other in zip(names, got, want, strict=True):
        assert gap(mine, other, (1e-3 if exact is None else 0.1) * largest) <= allowed, name
    return theirs.detach()


@torch.no_grad()
def failure(model: nn.Module) -> str | None:
    """Return the error that the model's own forward raises on text, which is not our fault."""
    if isinstance(model.get_output_embeddings(), nn.ModuleList):
        return None  # takes tokens of another form
    try:
        own_logps(model, *batch(model), positions=False)
    except Exception as error:  # of any kind
        return type(error).__name__
    return None


def built(kind: str) -> nn.Module | None:
    try:
        model = model_zoo.build(kind, ENTRIES[kind])
        why = failure(model)
    except Exception as error:  # of any kind
        why = type(error).__name__
    if why is not None:
        TALLY["not built"].append(f"{kind} ({why})")
    return model if why is None else None


def sweep(kind: str) -> None:
    model = built(kind)
    if model is None:
        pytest.skip("not built")
    expected, result = FEW.get(kind, ""), "wrong"
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            exact = compare(model, None)
        warned = [str(each.message) for each in said if "hidden states of" in str(each.message)]
        result, model = "wrong in bfloat16", model.bfloat16()
        runs = failure(model) is None
        if runs:
            compare(model, exact)
        result = "equal" + ", with a warning" * bool(warned) + ", in float32 alone" * (not runs)
    except hf.UnsupportedModelError as error:
        result = "refused"
        print(f"{kind}: {error}")
    finally:
        TALLY[result].append(kind)
    assert (result == "refused") == expected.startswith("refused") or not expected


@pytest.mark.parametrize("kind", [kind for kind in FEW if kind in ENTRIES])
def test_a_few_of_them(kind):
    sweep(kind)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", [kind for kind in ENTRIES if kind not in FEW])
def test_all_others(kind):
    sweep(kind)


def claim() -> str:
    counts = {name: len(TALLY[name]) for name in TALLY}
    same, total = sum(count for name, count in counts.items() if name.startswith("equal")), sum(counts.values())
    refused, missing = (counts.get(name, 0) for name in ("refused", "not built"))
    return (
        f"transformers {transformers.__version__}: of {total} architectures {total - missing} could be built, "
        f"{same} are equal, {refused} refused"
    )


@pytest.mark.slow
def test_the_count_is_that_of_the_readme(capsys):
    """This runs last and reads the results of the others."""
    if sum(map(len, TALLY.values())) < len(ENTRIES):
        pytest.skip("only a part was run")
    with capsys.disabled():
        print(f"\n{claim()}")
        for name, kinds in sorted(TALLY.items()):
            print(f"{name} ({len(kinds)}): {' '.join(sorted(kinds))}")
    assert not TALLY["wrong"] and not TALLY["wrong in bfloat16"]
    assert len(TALLY["refused"]) <= 10
    said = re.search(r"transformers \S+: of \d+ architectures .*? refused", " ".join(README.read_text().split()))
    assert said is not None
    if said[0].startswith(f"transformers {transformers.__version__}:"):
        assert said[0] == claim()
