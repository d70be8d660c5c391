"""The prompt once for N responses: scoring and a fit step, shared, unshared and through TRL, in the same process.

    python -m benchmarks.bodies [--device cuda] [--models smollm2 stack] [--samples 3] [--out FILE]

Writes JSON into benchmarks/results/ and the picture docs/img/bodies.png. A step is forward and backward of all weights
for a given upstream on the log-probs, as every loss has one. "trl" is the path of TRL's DPO (two responses) and GRPO
(eight): rows of prompt and response, padded, through the model with TRL's fused head.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import windkern as wk
from benchmarks import record, timing
from benchmarks.step import SIZES
from windkern import hf

RESPONSE = 60
CASES = (*((prompt, count) for count in (2, 8) for prompt in (15, 60, 240)), (200, 8))
ROWS = 8  # sequences in a batch
WORK = ("score", "step")
PROVIDERS = ("shared", "unshared", "trl")
PICTURE = record.ROOT / "docs" / "img" / "bodies.png"
COLOURS = {"smollm2": "#1f5f8b", "stack": "#b0533b", "tiny": "#7f9fb8"}
Ids = tuple[list[list[int]], list[list[list[int]]]]


def make_model(name: str, device: str) -> nn.Module:
    """SmolLM2-135M, two layers of Llama-3.2-1B at random with a vocabulary of 32000, or a tiny one."""
    if name == "smollm2":
        from windkern.train.models import PACKAGED, load_model

        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        return load_model(PACKAGED, dtype=dtype, device=device)[0].eval()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = SIZES["tiny"] if name == "tiny" else {**SIZES["1b"], "num_hidden_layers": 2, "vocab_size": 32000}
    model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True)).to(device)
    return (model if device == "cpu" else model.bfloat16()).eval()


def make_ids(vocab: int, prompt: int, count: int) -> Ids:
    random = torch.Generator().manual_seed(prompt + count)

    def ids(size: int) -> list[int]:
        return torch.randint(3, vocab, (size,), generator=random).tolist()

    groups = ROWS // count
    return [ids(prompt) for _ in range(groups)], [[ids(RESPONSE) for _ in range(count)] for _ in range(groups)]


def ours(model: nn.Module, ids: Ids, way: str) -> Callable[[], Tensor]:
    return lambda: wk.hf.group_logps(model, *ids, shared_prompt=way)


def trl(model: nn.Module, ids: Ids) -> Callable[[], Tensor]:
    """(B, N) by the forward that TRL gives the models of its trainers."""
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
    """What is timed, by provider; each returns the log-probs."""
    upstream = torch.linspace(-1, 1, ROWS, device=model.device).view(len(ids[0]), -1)

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

    found = {"shared": measured(ours(model, ids, "always")), "unshared": measured(ours(model, ids, "never"))}
    try:
        found["trl"] = measured(trl(model, ids))
    except ImportError:
        print("trl is not installed; its path is left out", flush=True)
    return found


def tokens_of(model: nn.Module, ids: Ids) -> dict[str, int]:
    """What the body sees, by provider."""
    lengths = hf.lengths_of(*ids)
    shared = hf.make_layout(lengths, hf.layout_rules(model)).tokens
    apart = hf.make_layout(lengths, hf.LayoutRules(shared=False)).tokens
    return {"shared": shared, "unshared": apart, "trl": apart + ROWS}


def run_case(
    name: str, model: nn.Module, prompt: int, count: int, samples: int, results: record.Results, device: str
) -> None:
    ids = make_ids(model.config.vocab_size, prompt, count)
    tokens = tokens_of(model, ids)
    for work in WORK:
        calls, peaks, values = calls_of(model, ids, work), {}, {}
        for provider, call in calls.items():
            call()
            measured = timing.measure(call, device)
            peaks[provider], values[provider] = measured.peak_bytes, measured.result
        size = float(values["unshared"].abs().max())
        for provider, value in values.items():
            gap = float((value - values["unshared"]).abs().max()) / size
            if not gap <= (1e-4 if device == "cpu" else 0.02):
                raise RuntimeError(f"{provider} differs from unshared by {gap:.3g} of the size of a log-prob")
        timings = timing.interleave(calls, dict.fromkeys(calls, samples), device=device)
        for provider in calls:
            row: dict[str, Any] = {
                "case": f"bodies-{name}-p{prompt}-r{RESPONSE}-n{count}-{work}",
                "provider": provider,
                "status": "ok",
                "complete": True,
                "model": name,
                "prompt": prompt,
                "response": RESPONSE,
                "n": count,
                "work": work,
                "tokens": tokens[provider],
                "peak_bytes": peaks[provider],
                **timing.summary(timings[provider]),
                "reproduce": f"python -m benchmarks.bodies --device {device} --models {name}",
            }
            results.put(row)
            print(
                f"{name:8s} P={prompt:4d} R={RESPONSE} N={count} {work:6s} {provider:9s} {tokens[provider]:6d} tokens "
                f"{row['median_s']:8.3f} s {(peaks[provider] or 0) / 2**20:8.0f} MiB "
                f"{timing.summary(timings['unshared'])['median_s'] / row['median_s']:5.2f} x",
                flush=True,
            )
    model.zero_grad(set_to_none=True)
    results.save()


def plot(rows: list[dict], path: Path) -> None:
    """How much faster sharing is, over P / R."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    times = {(row["case"], row["provider"]): row["median_s"] for row in rows}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    for axis, work in zip(axes, WORK, strict=True):
        for (name, count), style in {
            (row["model"], row["n"]): "o-" if row["n"] == 8 else "o--" for row in rows
        }.items():
            mine = [row for row in rows if (row["model"], row["n"], row["work"]) == (name, count, work)]
            mine = sorted((row for row in mine if row["provider"] == "shared"), key=lambda row: row["prompt"])
            axis.plot(
                [row["prompt"] / row["response"] for row in mine],
                [times[row["case"], "unshared"] / row["median_s"] for row in mine],
                style,
                color=COLOURS[name],
                label=f"{name}, N = {count}",
                ms=4,
            )
        axis.axhline(1, color="#999999", lw=0.8)
        axis.set_xscale("log", base=2)
        axis.set_title({"score": "scoring", "step": "forward and backward"}[work], loc="left", fontsize=10)
        axis.set_xlabel("length of prompt / length of response")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("times faster than unshared")
    axes[0].legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", nargs="+", choices=tuple(COLOURS), default=("smollm2", "stack"))
    parser.add_argument("--cases", nargs="+", default=[f"{prompt}x{count}" for prompt, count in CASES], metavar="PxN")
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can use, and there is none")
    path = options.out or record.default_path("bodies", options.device)
    kind = "bodies" if options.device == "cpu" else "bodies-gpu"
    results = record.Results(path, kind, {"samples": options.samples}, append=True, device=options.device)
    for name in options.models:
        model = make_model(name, options.device)
        for case in options.cases:
            prompt, count = map(int, case.split("x"))
            run_case(name, model, prompt, count, options.samples, results, options.device)
    plot(results.data["rows"], options.picture)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
