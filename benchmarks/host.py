"""Measure Python's share of a call: CPU time per call and per slab, with a driver that launches nothing.

    python -m benchmarks.host [--rows 64] [--repeats 30]

Needs Triton but no GPU. Launchers, Triton's binder and its cache are real; tensors are on the CPU, and each product is
a float32 one so small that it takes about as long as submitting one to a GPU. Checks of values are left out, as on a
GPU. A call waits for its host if a GPU finishes a slab sooner than that, as with 512 rows or small heads. The figures
do not include the C code of a launch.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar, NamedTuple
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import mock_driver
import torch
from triton.runtime.jit import JITFunction

import windkern as wk
from windkern.kernels import gemm
from windkern.ops import inputs, walk
from windkern.ops import rows as row_blocks

HIDDEN = 16
VOCABS = (4096, 16384)  # few slabs, and many
GEARS = {"trained": (True, True), "frozen head": (True, False), "scoring": (False, False)}


class HandedOver(gemm.Products):
    """Runs the Python code of a GPU's bfloat16 products, but multiplies float32 matrices of the same shapes."""

    inside: ClassVar[float] = 0.0  # seconds of torch in them

    @staticmethod
    @functools.cache
    def _filled(rows: int, columns: int) -> torch.Tensor:
        return torch.zeros(rows, columns)

    def _time(self, product: Callable[..., torch.Tensor], left: torch.Tensor, right: torch.Tensor) -> None:
        operands, started = (self._filled(*left.shape), self._filled(*right.shape)), time.perf_counter()
        product(*operands)
        HandedOver.inside += time.perf_counter() - started

    def _mm(self, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        into = out if out.dtype == torch.float32 else self._filled(*out.shape)
        self._time(functools.partial(torch.mm, out=into), left, right)
        return out

    def _addmm(self, total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        self._time(total.addmm_, left, right)
        return total


class Host(NamedTuple):
    """Figures of one call: CPU seconds, those in Triton's launches and in torch's products, launches, and slabs."""

    seconds: float
    in_triton: float
    in_products: float
    launches: int
    slabs: int


def _plan(rows: int, vocab: int, wanted: tuple[bool, bool]) -> wk.Plan:
    grads = {"hidden_grad": wanted[0], "weight_grad": wanted[1]}
    options = {"total_rows": rows + 1, "memory_budget": 0, "device": "cpu"}
    return wk.plan(rows, HIDDEN, vocab, torch.bfloat16, **options, **grads)


def _call(rows: int, vocab: int, wanted: tuple[bool, bool]) -> Callable[[], None]:
    hidden = torch.randn(rows, HIDDEN).bfloat16().requires_grad_(wanted[0])
    weight = torch.randn(vocab, HIDDEN).bfloat16().requires_grad_(wanted[1])
    leaves = [leaf for leaf in (hidden, weight) if leaf.requires_grad]
    targets = torch.zeros(rows, dtype=torch.int64)

    def call() -> None:
        logps = wk.token_logps(hidden, weight, targets, max_scored=rows, memory_budget=0, backend="triton").logps
        if leaves:
            torch.autograd.grad(logps, leaves, torch.ones_like(logps))

    return call


@contextlib.contextmanager
def _no_checks_of_values() -> Iterator[None]:
    """Skip the checks, as on a GPU, where reading a value would wait for the device."""
    with (
        mock.patch.object(inputs, "check_max_scored", lambda scored, bound: bound),
        mock.patch.object(row_blocks, "check_targets", lambda targets, vocab_size: None),
        mock.patch.object(row_blocks, "_check_some_entry_is_open", lambda saved, bias, targets: None),
    ):
        yield


def measure(rows: int, vocab: int, wanted: tuple[bool, bool], repeats: int, *, compiles: bool = True) -> Host:
    """Return the 5th percentile over calls with compiled kernels, since other work only adds to the times."""
    call, inside, run = _call(rows, vocab, wanted), [0.0], JITFunction.run

    def timed(self, *arguments, **options):
        started = time.perf_counter()
        try:
            return run(self, *arguments, **options)
        finally:
            inside[0] += time.perf_counter() - started

    handed = mock.patch.object(walk, "products_of", HandedOver)
    with mock_driver.installed(compiles=compiles) as driver, handed, _no_checks_of_values():
        for _ in range(3):
            call()
        driver.launches.clear()
        call()
        launches, taken, in_triton, in_products = len(driver.launches), [], [], []
        JITFunction.run = timed
        try:
            for _ in range(repeats):
                inside[0] = HandedOver.inside = 0.0
                started = time.process_time()
                call()
                taken.append(time.process_time() - started)
                in_triton.append(inside[0])
                in_products.append(HandedOver.inside)
        finally:
            JITFunction.run = run
    slabs = _plan(rows, vocab, wanted).num_slabs
    found = (statistics.quantiles(each, n=20)[0] for each in (taken, in_triton, in_products))
    return Host(*found, launches, slabs)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=30)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    heads = f"{'us a slab':>10s} {'launches':>9s} {'products':>9s} {'rest':>7s}"
    print(f"{'gear':12s} {'slabs':>9s} {'us a call':>14s} {heads}")
    for gear, wanted in GEARS.items():
        few, many = (measure(chosen.rows, vocab, wanted, chosen.repeats) for vocab in VOCABS)
        more = many.slabs - few.slabs
        a_slab, in_triton, in_products = ((many[field] - few[field]) / more * 1e6 for field in range(3))
        slabs, seconds = f"{few.slabs} .. {many.slabs}", f"{1e6 * few.seconds:.0f} .. {1e6 * many.seconds:.0f}"
        parts = f"{in_triton:9.1f} {in_products:9.1f} {a_slab - in_triton - in_products:7.1f}"
        print(f"{gear:12s} {slabs:>9s} {seconds:>14s} {a_slab:10.1f} {parts}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
