"""Measure Python's share of a call: CPU time per call and per slab, with a driver that launches nothing.

    python -m benchmarks.host [--rows 8] [--repeats 200]

Needs Triton but no GPU. Launchers and Triton's own launches are real; tensors are on the CPU, and each product is
a float32 one of 16 rows and columns, which takes about as long as submitting one to a GPU. Checks of values are left
out, as on a GPU. A call waits for its host if a GPU finishes a slab sooner than that, as with 512 rows or small heads.
The figures do not include the C code of a launch.
"""

from __future__ import annotations

import argparse
import contextlib
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

import windkern as wk
from windkern import backends, costs
from windkern.kernels import gemm
from windkern.ops import walk

HIDDEN = 16
COLUMNS = 256  # of a slab
VOCABS = (4096, 16384)  # few slabs, and many


class Gear(NamedTuple):
    """A kind of call: the gradients it wants, and its budget."""

    wanted: tuple[bool, bool]
    memory_budget: int


GEARS = {
    "trained, all kept": Gear((True, True), 1 << 40),
    "trained, recomputed": Gear((True, True), 0),  # each slab is walked twice
    "frozen head": Gear((True, False), 0),
    "scoring": Gear((False, False), 0),
}


class HandedOver(gemm.Products):
    """Runs the Python code of a GPU's bfloat16 products, but multiplies one small float32 matrix instead."""

    inside: ClassVar[float] = 0.0  # seconds of torch in them
    small: ClassVar[torch.Tensor] = torch.zeros(16, 16)

    def _mm(self, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        started = time.perf_counter()
        torch.mm(self.small, self.small, out=self.small)
        HandedOver.inside += time.perf_counter() - started
        return out

    def _addmm(self, total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        started = time.perf_counter()
        self.small.addmm_(self.small, self.small)
        HandedOver.inside += time.perf_counter() - started
        return total


class Host(NamedTuple):
    """Figures of one call: CPU seconds, those in Triton's launches and in torch's products, launches, and slabs."""

    seconds: float
    in_triton: float
    in_products: float
    launches: int
    slabs: int


def _plan(rows: int, vocab: int, gear: Gear) -> wk.Plan:
    grads = {"hidden_grad": gear.wanted[0], "weight_grad": gear.wanted[1]}
    options = {"total_rows": rows + 1, "memory_budget": gear.memory_budget, "device": "cpu"}
    return wk.plan(rows, HIDDEN, vocab, torch.bfloat16, **options, **grads)


def _call(rows: int, vocab: int, gear: Gear) -> Callable[[], None]:
    hidden = torch.randn(rows, HIDDEN).bfloat16().requires_grad_(gear.wanted[0])
    weight = torch.randn(vocab, HIDDEN).bfloat16().requires_grad_(gear.wanted[1])
    leaves = [leaf for leaf in (hidden, weight) if leaf.requires_grad]
    targets, upstream = torch.zeros(rows, dtype=torch.int64), torch.ones(rows)
    options = {"max_scored": rows, "memory_budget": gear.memory_budget, "backend": "triton"}

    def call() -> None:
        logps = wk.token_logps(hidden, weight, targets, **options).logps
        if leaves:
            torch.autograd.grad(logps, leaves, upstream)

    return call


@contextlib.contextmanager
def _no_checks_of_values() -> Iterator[None]:
    """Skip the checks, as on a GPU, where reading a value would wait for the device."""
    with mock.patch.object(backends, "checks_values", lambda device: False):
        yield


def measure(rows: int, vocabs: tuple[int, ...], gear: Gear, repeats: int, *, compiles: bool = True) -> list[Host]:
    """Return the 5th percentile over calls with compiled kernels, by vocabulary, as other work only adds to the times.

    Calls take turns, so that a change of the processor's speed hits all vocabularies alike.
    """
    from windkern.kernels.triton.launcher import launch

    calls, inside = [_call(rows, vocab, gear) for vocab in vocabs], [0.0]

    def timed(*arguments, **options):
        started = time.perf_counter()
        launch(*arguments, **options)
        inside[0] += time.perf_counter() - started

    handed = mock.patch.object(walk, "products_of", HandedOver)
    narrow = mock.patch.object(costs, "SLAB_BYTES_CPU", rows * COLUMNS * 4)
    with mock_driver.installed(compiles=compiles) as driver, handed, narrow, _no_checks_of_values():
        launches = []
        for call in calls:
            for _ in range(3):
                call()
            driver.launches.clear()
            call()
            launches.append(len(driver.launches))
        taken: list[list[list[float]]] = [[[], [], []] for _ in calls]
        for _ in range(repeats):
            for call, (whole, _, _) in zip(calls, taken, strict=True):
                started = time.process_time()
                call()
                whole.append(time.process_time() - started)
        with contextlib.ExitStack() as stack:
            for module in mock_driver.modules():
                if hasattr(module, "launch"):
                    stack.enter_context(mock.patch.object(module, "launch", timed))  # which takes time itself
            for _ in range(repeats):
                for call, (_, in_triton, in_products) in zip(calls, taken, strict=True):
                    inside[0] = HandedOver.inside = 0.0
                    call()
                    in_triton.append(inside[0])
                    in_products.append(HandedOver.inside)
        slabs = [_plan(rows, vocab, gear).num_slabs for vocab in vocabs]
    low = ([statistics.quantiles(each, n=20, method="inclusive")[0] for each in parts] for parts in taken)
    return [Host(*parts, *counts) for parts, *counts in zip(low, launches, slabs, strict=True)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=200)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    heads = f"{'us a slab':>10s} {'launches':>9s} {'products':>9s} {'rest':>7s} {'us beside slabs':>16s}"
    print(f"{'gear':20s} {'slabs':>9s} {heads}")
    for name, gear in GEARS.items():
        few, many = measure(chosen.rows, VOCABS, gear, chosen.repeats)
        more = many.slabs - few.slabs
        a_slab, in_triton, in_products = ((many[field] - few[field]) / more * 1e6 for field in range(3))
        parts = f"{in_triton:9.1f} {in_products:9.1f} {a_slab - in_triton - in_products:7.1f}"
        beside = few.seconds * 1e6 - few.slabs * a_slab
        print(f"{name:20s} {f'{few.slabs} .. {many.slabs}':>9s} {a_slab:10.1f} {parts} {beside:16.0f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
