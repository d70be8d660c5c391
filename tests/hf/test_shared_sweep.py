"""Test which causal LMs share a prompt, as tiny random models: `pytest -m "slow or not slow"` on this file.

If the check allows sharing, it must be right for other lengths; docs/shared_prompts.md has the table of the results.
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
from windkern.hf.shared_check import sharing_of  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "shared_prompts.md"
# The models of the default suite: "" if the model shares, else words that the reason must contain.
FEW = {
    "bloom": "takes no position ids",
    "gemma3_text": "",
    "gpt_oss": "",
    "jamba": "",
    "llama4_text": "",
    "mamba": "",
    "opt": "",
    "qwen3_moe": "",
}
SHARE = {"gemma3_text", "gpt_oss", "llama4_text", "opt", "qwen3_moe"}
ENTRIES = model_zoo.entries()
TALLY: dict[str, str] = {}  # model type -> "shares", "not built", "unsupported" or the reason
pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers


def groups() -> tuple[list, list]:
    """Return groups that are longer than those of the check, every window (8) and every chunk."""
    random = torch.Generator().manual_seed(1)

    def ids(size: int) -> list[int]:
        return torch.randint(4, 120, (size,), generator=random).tolist()

    return [ids(11), ids(5)], [[ids(size) for size in sizes] for sizes in ((13, 0, 9), (4, 16, 1))]


def compare(model: nn.Module) -> None:
    """Compare values and gradients of shared rows with those of rows of one response."""
    given, upstream = groups(), torch.tensor([[1.0, -2.0, 0.5], [0.3, -0.7, 2.0]])
    shared, apart = (hf.group_logps(model, *given, shared_prompt=each) for each in ("always", "never"))
    torch.testing.assert_close(shared, apart, rtol=1e-4, atol=1e-4)
    parameters = [each for each in model.parameters() if each.requires_grad]
    pairs = [torch.autograd.grad((each * upstream).sum(), parameters, allow_unused=True) for each in (shared, apart)]
    largest = max(float(each.norm()) for each in pairs[1] if each is not None)
    for mine, other in zip(*pairs, strict=True):
        if other is not None:
            assert float((mine - other).norm()) <= 5e-3 * max(float(other.norm()), 1e-3 * largest)


def sweep(kind: str) -> str:
    try:
        model = model_zoo.build(kind, ENTRIES[kind])
        with torch.no_grad():
            model(input_ids=torch.tensor([[5, 6, 7, 8]]), attention_mask=torch.ones(1, 4, dtype=torch.int64))
    except Exception:  # of any kind: not ours to judge
        return "not built"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            sharing = sharing_of(hf_call.find(model))
        except hf.UnsupportedModelError:
            return "unsupported"
        if not sharing.holds:
            return sharing.reason
        compare(model)
    return "shares"


@pytest.mark.parametrize("kind", [kind for kind in FEW if kind in ENTRIES])
def test_a_few_of_them(kind):
    TALLY[kind] = sweep(kind)
    assert (TALLY[kind] == "shares") == (kind in SHARE), TALLY[kind]
    assert FEW[kind] in TALLY[kind]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", [kind for kind in ENTRIES if kind not in FEW])
def test_all_others(kind):
    TALLY[kind] = sweep(kind)


def short(reason: str) -> str:
    """Return a reason without numbers, names of errors and text in brackets."""
    for name, pattern in (
        ("carries a state from token to token", "carry a state"),
        ("takes no position ids", "takes no position ids"),
        ("positions are not counted from the first token", "does not take positions"),
        ("takes no such mask", "failed"),
        ("another mask or other positions of its own", "in one row"),
        ("rounding would hide a fault", "would hide"),
        ("attention takes no mask", "takes no mask of rows"),
    ):
        if re.search(pattern, reason):
            return name
    return reason


def table() -> str:
    found = collections.defaultdict(list)
    for kind, result in TALLY.items():
        found[result if result in ("shares", "not built", "unsupported") else short(result)].append(kind)
    lines = [f"transformers {transformers.__version__}", "", "| | number | model types |", "|---|---|---|"]
    for name, kinds in sorted(found.items(), key=lambda pair: -len(pair[1])):
        names = ", ".join(kind.replace(", images", " (images)") for kind in sorted(kinds))
        lines.append(f"| {name} | {len(kinds)} | {names} |")
    return "\n".join(lines)


@pytest.mark.slow
def test_the_table_is_that_of_the_page(capsys):
    """This runs last and reads the results of the others."""
    if len(TALLY) < len(ENTRIES):
        pytest.skip("only a part was run")
    with capsys.disabled():
        print(f"\n{table()}")
        for kind, result in sorted(TALLY.items()):
            if result not in ("shares", "not built", "unsupported"):
                print(f"{kind}: {result[:200]}")
    said = PAGE.read_text()
    if f"transformers {transformers.__version__}\n" in said:
        assert table() in said
