"""Measure one prompt for N responses: scoring and a fit step, shared, unshared and through TRL, in one process.

    python -m benchmarks.bodies [--device cuda] [--models smollm2 stack] [--minutes 8] [--append] [--out FILE]

Writes JSON into benchmarks/results/ after each cell, and the picture docs/img/bodies.png; when run again, it continues
where it stopped. A step is forward and backward of all weights for a given upstream gradient on the log-probs, as in
every loss. "shared" shares at any cost (`shared_prompt="always"`); `chosen` in a row says whether "auto" would. "trl"
is the path of TRL's DPO (two responses) and GRPO (eight): padded rows of prompt and response through the model with
TRL's fused head.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import windkern as wk
from benchmarks import bodies_report, record, timing
from benchmarks.step import SIZES
from windkern import hf

RESPONSE = 60
# Lengths of a prompt and numbers of responses, in the order of measurement; a batch is one group.
CASES = ((200, 8), *((prompt, count) for count in (8, 2) for prompt in (15, 60, 240)))
WORK = {"score": 1, "step": 3}  # with the operations of each as a multiple of the forward's
MODELS = ("smollm2", "stack", "1b", "tiny")
PICTURE = record.ROOT / "docs" / "img" / "bodies.png"
Ids = tuple[list[list[int]], list[list[list[int]]]]


def make_model(name: str, device: str) -> nn.Module:
    """Return SmolLM2-135M; a random Llama-3.2-1B, whole or two layers with a vocabulary of 32000; or a tiny model."""
    if name == "smollm2":
        from windkern.train.models import PACKAGED, load_model

        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        return load_model(PACKAGED, dtype=dtype, device=device)[0].eval()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {**SIZES["1b"], "num_hidden_layers": 2, "vocab_size": 32000} if name == "stack" else SIZES[name]
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))
    return (model if device == "cpu" else model.bfloat16()).eval()


def make_ids(vocab: int, prompt: int, count: int) -> Ids:
    random = torch.Generator().manual_seed(prompt + count)

    def ids(size: int) -> list[int]:
        return torch.randint(3, vocab, (size,), generator=random).tolist()

    return [ids(prompt)], [[ids(RESPONSE) for _ in range(count)]]


def ours(model: nn.Module, ids: Ids, way: str) -> Callable[[], Tensor]:
    return lambda: wk.hf.group_logps(model, *ids, shared_prompt=way)


def trl(model: nn.Module, ids: Ids) -> Callable[[], Tensor]:
    """Return a call for log-probs (B, N) by the forward that TRL adds to the models of its trainers."""
    from trl.trainer.utils import add_fused_lm_head

    if "forward" not in vars(model):
        add_fused_lm_head(model)
    device = model.device
    rows = [prompt + response for prompt, group in zip(*ids, strict=True) for response in group]
    tokens = torch.tensor(rows, device=device)
    labels = tokens.clone()
    labels[:, :-RESPONSE] = hf.IGNORE_INDEX
    given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}

    def call() -> Tensor:
        logps = model(**given, labels=labels, fused_lm_head=True).log_probs
        return logps.sum(-1).view(len(ids[0]), -1)

    return call


def calls_of(model: nn.Module, ids: Ids, work: str) -> dict[str, Callable[[], Tensor]]:
    """Return the timed calls by provider; each returns the log-probs."""
    upstream = torch.linspace(-1, 1, len(ids[1][0]), device=model.device)

    def measured(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def score() -> Tensor:
            with torch.no_grad():
                return forward()

        def step() -> Tensor:
            model.zero_grad(set_to_none=True)
            logps = forward()
            (logps * upstream).sum().backward()
            return logps.detach()

        return score if work == "score" else step

    if work == "step":
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)  # Reason: every step begins and ends with gradients
    found = {"shared": measured(ours(model, ids, "always")), "unshared": measured(ours(model, ids, "never"))}
    try:
        found["trl"] = measured(trl(model, ids))
    except ImportError:
        print("trl is not installed; its path is left out", flush=True)
    return found


def layouts_of(model: nn.Module, ids: Ids) -> tuple[dict[str, int], bool]:
    """Return the tokens that the body sees, by provider, and whether "auto" shares."""
    lengths = hf.lengths_of(*ids)
    shared = hf.make_layout(lengths, hf.layout_rules(model, shared_prompt="always"))
    apart = hf.make_layout(lengths, hf.LayoutRules(shared=False))
    chosen = hf.make_layout(lengths, hf.layout_rules(model)).is_shared
    rows = len(apart.rows)
    return {"shared": shared.tokens, "unshared": apart.tokens, "trl": apart.tokens + rows}, chosen


def measure_cell(
    calls: dict[str, Callable[[], Tensor]], seconds: float, device: str
) -> tuple[dict[str, list[float]], dict[str, int | None]]:
    """Return samples in seconds and peak bytes by provider, measured in rounds that take about `seconds` together.

    Raises:
        RuntimeError: the log-probs of the providers differ by more than rounding.
    """
    peaks: dict[str, int | None] = {}
    values: dict[str, Tensor] = {}
    firsts: dict[str, float] = {}
    for provider, call in calls.items():
        if device != "cpu":
            call()  # this compiles kernels
        firsts[provider], peaks[provider], values[provider] = timing.measure(call, device)
    size = float(values["unshared"].abs().max())
    for provider, value in values.items():
        gap = float((value - values["unshared"]).abs().max()) / size
        if not gap <= (1e-4 if device == "cpu" else 0.02):
            raise RuntimeError(f"{provider} differs from unshared by {gap:.3g} of the size of a log-prob")
    values.clear()
    share = (seconds - sum(firsts.values())) / len(calls)
    counts = {
        name: timing.further_samples(first, share, min(firsts.values())) if first <= max(share, timing.LONG_CALL) else 0
        for name, first in firsts.items()
    }
    most = max(peak or 0 for peak in peaks.values())
    samples = timing.interleave(calls, counts, device=device, peak_bytes=most)
    samples |= {name: [firsts[name]] for name, taken in samples.items() if not taken}
    for name in timing.disputed(samples):
        samples[name].append(timing.timed(calls[name], device)[0])
    return samples, peaks


def run_cell(
    name: str, model: nn.Module, prompt: int, count: int, work: str, seconds: float, results: record.Results
) -> None:
    """Measure one case and kind of work, and write the results."""
    device = model.device.type
    ids = make_ids(model.config.vocab_size, prompt, count)
    tokens, chosen = layouts_of(model, ids)
    samples, peaks = measure_cell(calls_of(model, ids, work), seconds, device)
    model.zero_grad(set_to_none=True)
    gc.collect()
    unshared = timing.summary(samples["unshared"])["median_s"]
    for provider, taken in samples.items():
        row: dict[str, Any] = {
            "case": case_of(name, prompt, count, work),
            "provider": provider,
            "status": "ok",
            "complete": True,
            "model": name,
            "prompt": prompt,
            "response": RESPONSE,
            "n": count,
            "work": work,
            "tokens": tokens[provider],
            "chosen": chosen,
            "peak_bytes": peaks[provider],
            **timing.summary(taken),
            "reproduce": f"python -m benchmarks.bodies --device {device} --models {name} --cases {prompt}x{count}",
        }
        results.put(row)
        print(
            f"{name:8s} P={prompt:4d} R={RESPONSE} N={count} {work:6s} {provider:9s} {tokens[provider]:6d} tokens "
            f"{row['median_s']:8.3f} s {(peaks[provider] or 0) / 2**20:8.0f} MiB {unshared / row['median_s']:5.2f} x",
            flush=True,
        )
    results.save()


def case_of(name: str, prompt: int, count: int, work: str) -> str:
    return f"bodies-{name}-p{prompt}-r{RESPONSE}-n{count}-{work}"


def run(models: list[str], cases: list[tuple[int, int]], minutes: float, results: record.Results, device: str) -> None:
    """Measure all missing cells in the time; each gets a share of the remaining time by its number of operations."""
    deadline = time.monotonic() + 60 * minutes
    cells = [(name, *case, work) for case in cases for name in models for work in WORK]
    cells = [cell for cell in cells if not results.is_complete(case_of(*cell), "unshared")]
    made = {name: make_model(name, device) for name in models if any(cell[0] == name for cell in cells)}
    costs = [count * (prompt + RESPONSE) * WORK[work] for _, prompt, count, work in cells]
    for place, (name, prompt, count, work) in enumerate(cells):
        left = deadline - time.monotonic()
        if left <= 0:
            print(f"no time left for {', '.join(case_of(*cell) for cell in cells[place:])}", flush=True)
            return
        seconds = left * costs[place] / sum(costs[place:])
        run_cell(name, made[name], prompt, count, work, seconds, results)


def _case(text: str) -> tuple[int, int]:
    prompt, count = map(int, text.split("x"))
    return prompt, count


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["smollm2", "stack"])
    parser.add_argument("--cases", nargs="+", type=_case, default=list(CASES), metavar="PxN")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all cells together (default: 8)")
    parser.add_argument("--append", action="store_true", help="add to a file that was made by other code")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can use, and there is none")
    path = options.out or record.default_path("bodies", options.device)
    kind = "bodies" if options.device == "cpu" else "bodies-gpu"
    settings = {"minutes": options.minutes, "response": RESPONSE}
    try:
        results = record.Results(path, kind, settings, append=options.append, device=options.device)
    except ValueError as error:
        parser.error(str(error))
    run(options.models, options.cases, options.minutes, results, options.device)
    bodies_report.draw(results.data, options.picture)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
