"""Measure the row and pair kernels of every back end on a GPU: time, and bandwidth as a share of a copy's.

python -m benchmarks.bandwidth --out out        # out/bandwidth.json and a table; exit 2 without a GPU

Bytes are the least that a kernel can move: every input and output of the contract once. A back end that moves more gets
a smaller share.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

import windkern as wk
from benchmarks import record
from windkern.kernels.contract import Exps, Kept, RowState, RowStats, Slab, Unit, Upstream
from windkern.kernels.gemm import accumulator
from windkern.transform import LogitTransform

# At most WIDEST_ROW columns. 512 x 16128 is a slab of a plan in NOTES.md; 8191 columns allow no 16-byte accesses.
SHAPES = ((8192, 8192), (2048, 16384), (512, 16128), (8192, 1024), (8192, 8191))
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
PAIR_SIZES = (256, 1024, 4096, 8192, 16384)
COPY_BYTES = 1 << 30
L2_FLUSH_BYTES = 256 << 20  # more than twice the second-level cache of any GPU


class Timer(Protocol):
    """Times calls; a test replaces it to run everything else without a GPU."""

    def seconds(self, call: Callable[[], Any], prepare: Callable[[], Any], samples: int) -> list[float]:
        """Return the seconds of `samples` calls, each after an untimed `prepare`."""

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """Return the peak memory of one call above the level before it."""


class EventTimer:
    """Times calls with CUDA events, flushing the second-level cache before each call."""

    def __init__(self) -> None:
        self.flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def seconds(self, call: Callable[[], Any], prepare: Callable[[], Any], samples: int) -> list[float]:
        for _ in range(3):
            prepare()
            call()
        taken = []
        for _ in range(samples):
            prepare()
            self.flush.zero_()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            stop.synchronize()
            taken.append(start.elapsed_time(stop) / 1e3)
        return taken

    def peak_bytes(self, call: Callable[[], Any]) -> int:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


@dataclass
class Matrices:
    """The tensors of one slab on a device, and the kernels as calls on them."""

    kernels: ModuleType
    rows: int
    width: int
    dtype: torch.dtype
    device: str
    logits: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator(self.device).manual_seed(0)
        acc = accumulator(self.dtype)
        shape = (self.rows, self.width)
        self.logits = torch.randn(shape, dtype=acc, device=self.device, generator=generator)
        self.z = torch.empty_like(self.logits)
        self.targets = torch.randint(0, self.width, (self.rows,), device=self.device, generator=generator)
        self.low = torch.empty(shape, dtype=self.dtype, device=self.device)
        self.state, self.rescale = self._new_state(), self.logits.new_empty(self.rows)
        self.kept = Kept(torch.empty_like(self.low), self.logits.new_empty(self.rows, 1))
        self.kernels.slab_forward(self.slab(self.fresh()), self.state, self.kept)
        self.stats = RowStats(self.state.run_max, self.state.run_sum.log(), self.state.target_logit, None)
        self.upstream = Upstream(torch.ones_like(self.rescale), None, None)
        self.state = self._new_state()

    def slab(self, logits: Tensor | None) -> Slab:
        return Slab(logits, None, self.targets, 0, IDENTITY)

    def _new_state(self) -> RowState:
        low = self.logits.new_full((self.rows,), -torch.inf)
        return RowState(low, self.logits.new_zeros(self.rows), low.clone(), None)

    def fresh(self) -> Tensor:
        """Restore the logits, which some back ends overwrite."""
        return self.z.copy_(self.logits)

    def calls(self) -> dict[str, tuple[Callable[[], None], int]]:
        """Return each call by name, with the bytes that it must move."""
        numbers, wide, item = self.rows * self.width, self.logits.element_size(), self.low.element_size()
        slab, nothing = self.slab(self.z), self.slab(None)
        backward = (self.stats, self.upstream, None)
        pivot = self.stats.run_max.clone()
        same = self.dtype == self.logits.dtype
        out = self.z if same else self.low
        k = self.kernels
        return {
            "forward scoring": (lambda: k.slab_forward(slab, self.state, None), numbers * wide),
            "forward exps": (
                lambda: k.exps_forward(slab, self.state, Exps(out, pivot, 0, None)),
                numbers * (wide + item),
            ),
            "backward exps": (
                lambda: k.exps_backward(slab, pivot, self.rescale, out),
                numbers * (wide + item),
            ),
            "forward kept": (lambda: k.slab_forward(slab, self.state, self.kept), numbers * (wide + item)),
            "forward unit": (
                lambda: k.slab_forward_unit(slab, self.state, Unit(out, None, self.rescale, None)),
                numbers * (wide + item),
            ),
            "backward kept": (
                lambda: k.slab_backward(nothing, self.kept, *backward, self.low, None),
                numbers * 2 * item,
            ),
            "backward recomputed": (
                lambda: k.slab_backward(slab, None, *backward, out, None),
                numbers * (wide + item),
            ),
        }


IDENTITY = LogitTransform()


def copy_rate(timer: Timer, samples: int, device: str, num_bytes: int) -> float:
    """Return the bytes per second of a copy on the device, counting both reads and writes."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    taken = timer.seconds(lambda: target.copy_(source), lambda: None, samples)
    return 2 * num_bytes / statistics.median(taken)


def row_results(
    timer: Timer, backend: str, shape: tuple[int, int], dtype: str, device: str, samples: int
) -> list[dict]:
    slab = Matrices(wk.backends.BACKENDS[backend].kernels(), *shape, DTYPES[dtype], device)
    rows = []
    for kernel, (call, num_bytes) in slab.calls().items():
        taken = timer.seconds(call, slab.fresh, samples)
        median = statistics.median(taken)
        rows.append(
            {
                "backend": backend,
                "kernel": kernel,
                "rows": shape[0],
                "width": shape[1],
                "dtype": dtype,
                "median_s": median,
                "samples_s": taken,
                "bytes": num_bytes,
                "bytes_per_s": num_bytes / median,
            }
        )
    return rows


def pair_results(timer: Timer, n: int, device: str, samples: int, largest_matrix: int) -> list[dict]:
    """Measure value and gradient of the logistic pair loss of n responses, and of the N x N expression if it fits."""
    generator = torch.Generator(device).manual_seed(n)
    scores = torch.randn(1, n, device=device, generator=generator).requires_grad_()
    rewards = torch.randn(1, n, device=device, generator=generator)

    def step(loss_of: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: torch.autograd.grad(loss_of(), scores)[0]

    calls = {
        backend: step(lambda name=backend: wk.pair_loss(scores, rewards=rewards, loss="logistic", backend=name))
        for backend in wk.backends.available(device)
    }
    if n <= largest_matrix:
        calls["n x n"] = step(lambda: wk.naive.pair_loss(scores, rewards=rewards, loss="logistic"))
    rows = []
    for name, call in calls.items():
        peak = timer.peak_bytes(call)
        taken = timer.seconds(call, lambda: None, samples)
        rows.append(
            {
                "backend": name,
                "kernel": "pair_loss",
                "n": n,
                "median_s": statistics.median(taken),
                "samples_s": taken,
                "peak_bytes": peak,
                "matrix_bytes": 4 * n * n,  # of one of the several N x N matrices of the expression
            }
        )
    return rows


def measure(
    timer: Timer,
    device: str,
    samples: int,
    *,
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    dtypes: tuple[str, ...] = tuple(DTYPES),
    pair_sizes: tuple[int, ...] = PAIR_SIZES,
    copy_bytes: int = COPY_BYTES,
    largest_matrix: int = 16384,
    save: Callable[[dict[str, Any]], None] = lambda data: None,
) -> dict[str, Any]:
    """Measure everything and return the content of the results file; print a line per row, save after each shape."""
    copy = copy_rate(timer, samples, device, copy_bytes)
    print(f"copy on the device: {copy / 1e9:.0f} GB/s")
    results: list[dict] = []
    data = {"schema": record.SCHEMA, "kind": "bandwidth", "copy_bytes_per_s": copy, "rows": results}
    for shape in shapes:
        for dtype in dtypes:
            for backend in wk.backends.available(device, DTYPES[dtype]):
                for row in row_results(timer, backend, shape, dtype, device, samples):
                    row["share_of_copy"] = row["bytes_per_s"] / copy
                    results.append(row)
                    place = f"{shape[0]} x {shape[1]} {dtype}"
                    print(
                        f"{place:18s} {row['kernel']:20s} {backend:7s} {1e6 * row['median_s']:9.1f} us "
                        f"{row['bytes_per_s'] / 1e9:7.0f} GB/s {100 * row['share_of_copy']:5.0f} %",
                        flush=True,
                    )
        save(data)
    for n in pair_sizes:
        for row in pair_results(timer, n, device, samples, largest_matrix):
            results.append(row)
            peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:9.1f} MiB"
            print(f"pairs N = {n:5d}  {row['backend']:7s} {1e6 * row['median_s']:9.1f} us {peak}", flush=True)
        save(data)
    return data


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of bandwidth.json")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU")
        return 2
    for name in wk.backends.BACKENDS:
        reason = wk.backends.why_not(name, "cuda")
        if reason is not None:
            print(f"{name} is left out: {reason}")
    run = {"runs": [record.run_info({"samples": options.samples}, device="cuda")]}
    measure(
        EventTimer(),
        "cuda",
        options.samples,
        dtypes=tuple(options.dtypes),
        save=lambda data: record.write_atomically(options.out / "bandwidth.json", {**data, **run}),
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
