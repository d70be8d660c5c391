"""Measure time and peak memory of pair losses over N: `windkern.pair_loss` and the N x N expression in one process.

python -m benchmarks.pairs [--device cuda]      # JSON into benchmarks/results/, picture into docs/img/pairs.png
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import windkern as wk
from benchmarks import record, timing

SIZES = (256, 512, 1024, 2048, 4096, 8192, 16384)
LARGEST_MATRIX = 8192  # N x N float32 of a larger group, with autograd's copies, would take over 6 GiB
PICTURE = record.ROOT / "docs" / "img" / "pairs.png"
COLOURS = {"n x n": "#b0533b", "torch": "#7f9fb8", "cpp": "#1f5f8b", "triton": "#5b2a9d", "cuda": "#d9480f"}


def make_group(n: int, device: str) -> tuple[Tensor, Tensor]:
    made = {"generator": torch.Generator(device).manual_seed(n), "device": device}
    scores = torch.randn(1, n, **made).requires_grad_()
    return scores, torch.randn(1, n, **made)


def matrix_step(scores: Tensor, rewards: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return a step with the usual code: the N x N matrix of gaps and preferences."""

    def step():
        loss = wk.naive.pair_loss(scores, rewards=rewards, loss="logistic")
        return loss.detach(), torch.autograd.grad(loss, scores)[0]

    return step


def fused_step(backend: str) -> Callable:
    def build(scores: Tensor, rewards: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        def step():
            loss = wk.pair_loss(scores, rewards=rewards, loss="logistic", backend=backend)
            return loss.detach(), torch.autograd.grad(loss, scores)[0]

        return step

    return build


def steps_of(n: int, device: str) -> dict[str, Callable]:
    scores, rewards = make_group(n, device)
    builders = {"n x n": matrix_step} if n <= LARGEST_MATRIX else {}
    builders |= {name: fused_step(name) for name in wk.backends.available(device)}
    return {name: build(scores, rewards) for name, build in builders.items()}


def run_size(n: int, samples: int, results: record.Results, device: str = "cpu") -> None:
    steps = steps_of(n, device)
    scores, rewards = make_group(n, device)
    exact = None
    if n <= LARGEST_MATRIX // 4:
        exact = float(wk.naive.pair_loss(scores.detach().double(), rewards=rewards.double(), loss="logistic"))
    peaks = {}
    for name, step in steps.items():
        step()
        measured = timing.measure(step, device)
        peaks[name], value = measured.peak_bytes, float(measured.result[0])
        if exact is not None and abs(value - exact) > 1e-4 * abs(exact):
            raise RuntimeError(f"{name} at N = {n} gave {value}, exact {exact}")
    most = max(peak or 0 for peak in peaks.values())
    timings = timing.interleave(steps, dict.fromkeys(steps, samples), device=device, peak_bytes=most)
    for name in steps:
        summary = timing.summary(timings[name])
        row = {
            "case": f"pairs-n{n}",
            "provider": name,
            "status": "ok",
            "complete": True,
            "n": n,
            "peak_bytes": peaks[name],
            **summary,
            "reproduce": f"python -m benchmarks.pairs --device {device} --sizes {n}",
        }
        results.put(row)
        print(
            f"N = {n:6d}  {name:8s} {1e3 * summary['median_s']:9.2f} ms  {(peaks[name] or 0) / 2**20:8.1f} MiB",
            flush=True,
        )
    results.save()


def _label(name: str) -> str:
    return "N x N expression" if name == "n x n" else f"pair_loss, {name}"


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, colour in COLOURS.items():
        mine = sorted((row for row in rows if row["provider"] == name), key=lambda row: row["n"])
        if not mine:
            continue
        sizes = [row["n"] for row in mine]
        axes[0].plot(sizes, [1e3 * row["median_s"] for row in mine], "o-", color=colour, label=_label(name), ms=4)
        axes[1].plot(sizes, [max(row["peak_bytes"], 1 << 16) / 2**20 for row in mine], "o-", color=colour, ms=4)
    for axis, title in zip(axes, ("value and gradient, ms", "peak memory, MiB"), strict=True):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("responses N in one group")
        axis.grid(alpha=0.25)
    axes[0].legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can use, and there is none")
    path = options.out or record.default_path("pairs", options.device)
    kind = "pairs" if options.device == "cpu" else "pairs-gpu"
    results = record.Results(path, kind, {"samples": options.samples}, append=True, device=options.device)
    for n in options.sizes:
        run_size(n, options.samples, results, options.device)
    plot(results.data["rows"], options.picture)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
