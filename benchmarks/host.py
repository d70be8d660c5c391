"""Measure Python's share of a call: CPU time per call and per slab, with a driver that launches nothing.

    python -m benchmarks.host [--rows 8] [--repeats 200]

Needs Triton but no GPU. Launchers and Triton's own launches are real; tensors are on the CPU, and each product is
a float32 one of 16 rows and columns, which takes about as long as submitting one to a GPU. Checks of values are left
out, as on a GPU. A call waits for its host if a GPU finishes a slab sooner than that, as with 512 rows or small heads.
The figures do not include the C code of a launch. The last column is a call without windkern's Python: an autograd
function over the same two ops, whose code makes the same buffers, launches and products, and nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import mock_driver
import torch

import windkern as wk
from windkern import backends, costs
from windkern.kernels import buffers, gemm
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
    count: ClassVar[int] = 0
    small: ClassVar[torch.Tensor] = torch.zeros(16, 16)

    def _mm(self, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        started = time.perf_counter()
        torch.mm(self.small, self.small, out=self.small)
        HandedOver.inside += time.perf_counter() - started
        HandedOver.count += 1
        return out

    def _addmm(self, total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        started = time.perf_counter()
        self.small.addmm_(self.small, self.small)
        HandedOver.inside += time.perf_counter() - started
        HandedOver.count += 1
        return total


class Host(NamedTuple):
    """Figures of one call: CPU seconds, in all and in parts, launches, and slabs."""

    seconds: float
    in_triton: float  # its launches
    in_products: float  # torch's
    bare: float  # CPU seconds without windkern's Python
    launches: int
    slabs: int


@dataclass
class Phase:
    """What forward or backward asked of torch and of Triton."""

    buffers: list[tuple] = field(default_factory=list)  # shapes and dtypes
    launches: list[tuple[tuple, dict]] = field(default_factory=list)
    products: int = 0

    def again(self) -> None:
        from windkern.kernels.triton.launcher import launch

        for shape, dtype in self.buffers:
            torch.empty(shape, dtype=dtype)
        for arguments, constants in self.launches:
            launch(*arguments, **constants)
        for _ in range(self.products):
            torch.mm(HandedOver.small, HandedOver.small, out=HandedOver.small)


def _plan(rows: int, vocab: int, gear: Gear) -> wk.Plan:
    grads = {"hidden_grad": gear.wanted[0], "weight_grad": gear.wanted[1]}
    options = {"total_rows": rows + 1, "memory_budget": gear.memory_budget, "device": "cpu"}
    return wk.plan(rows, HIDDEN, vocab, torch.bfloat16, **options, **grads)


def _inputs(rows: int, vocab: int, gear: Gear) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hidden states, head and targets."""
    hidden = torch.randn(rows, HIDDEN).bfloat16().requires_grad_(gear.wanted[0])
    weight = torch.randn(vocab, HIDDEN).bfloat16().requires_grad_(gear.wanted[1])
    return hidden, weight, torch.zeros(rows, dtype=torch.int64)


def _call(rows: int, vocab: int, gear: Gear) -> Callable[[], None]:
    hidden, weight, targets = _inputs(rows, vocab, gear)
    leaves, upstream = [leaf for leaf in (hidden, weight) if leaf.requires_grad], torch.ones(rows)
    options = {"max_scored": rows, "memory_budget": gear.memory_budget, "backend": "triton"}

    def call() -> None:
        logps = wk.token_logps(hidden, weight, targets, **options).logps
        if leaves:
            torch.autograd.grad(logps, leaves, upstream)

    return call


@contextlib.contextmanager
def _launching_through(function: Callable[..., None]) -> Iterator[None]:
    """Make all modules with kernels launch them by `function`."""
    with contextlib.ExitStack() as stack:
        for module in mock_driver.modules():
            if hasattr(module, "launch"):
                stack.enter_context(mock.patch.object(module, "launch", function))
        yield


def _recorded(call: Callable[[], None]) -> list[Phase]:
    """Return what forward and backward of `call` ask for."""
    from windkern.kernels.triton.launcher import launch

    phases, empty, grad = [Phase()], buffers.empty, torch.autograd.grad

    def made(name, shape, dtype, device):
        phases[-1].buffers.append((shape, dtype))
        return empty(name, shape, dtype, device)

    def launched(*arguments, **constants):
        phases[-1].launches.append((arguments, constants))
        launch(*arguments, **constants)

    def began(*arguments, **options):
        phases[-1].products, HandedOver.count = HandedOver.count, 0
        phases.append(Phase())
        return grad(*arguments, **options)

    HandedOver.count = 0
    grads = mock.patch.object(torch.autograd, "grad", began)
    with mock.patch.object(buffers, "empty", made), grads, _launching_through(launched):
        call()
    phases[-1].products = HandedOver.count
    return phases


class _Bare(torch.autograd.Function):
    """Like the autograd function of `token_logps`, over ops of the same arguments that only repeat a recording."""

    @staticmethod
    def forward(ctx, ops, spec, targets, hidden, weight):
        logps, lse, entropy, *saved, units = ops.logprobs_fwd([hidden], [weight], None, targets, None, *spec)
        ctx.save_for_backward(targets, entropy, *saved, hidden, weight, *units)
        ctx.ops, ctx.spec = ops, spec
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(saved[0])
        return logps, lse, entropy, saved[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, *_):
        targets, entropy, stats, kept, offsets, hidden, weight, *units = ctx.saved_tensors
        rest = stats, entropy, kept, offsets, units, *ctx.spec
        grads = ctx.ops.logprobs_bwd(upstream, None, None, [hidden], [weight], None, targets, None, *rest)
        return None, None, None, *(grad[0] if grad else None for grad in grads[:2])


_numbers = itertools.count()  # Reason: torch keeps an op by its name.


def _bare(rows: int, vocab: int, gear: Gear, call: Callable[[], None]) -> Callable[[], None]:
    """Return a call that makes the buffers, launches and products of `call` in two ops, without windkern's Python."""
    phases, none = _recorded(call), torch.empty(0)
    hidden, weight, targets = _inputs(rows, vocab, gear)
    leaves, upstream = [leaf for leaf in (hidden, weight) if leaf.requires_grad], torch.ones(rows)
    spec = _plan(rows, vocab, gear).walk.values()

    def fwd(*_):
        phases[0].again()
        return torch.empty(rows), torch.empty(rows), none, none, none, none, []

    def bwd(*_):
        phases[1].again()
        return *([torch.empty_like(leaf)] if leaf.requires_grad else [] for leaf in (hidden, weight)), none

    library = torch.library.Library(f"windkern_host_{next(_numbers)}", "FRAGMENT")
    ops = getattr(torch.ops, library.ns)
    for name, code in (("logprobs_fwd", fwd), ("logprobs_bwd", bwd)):
        library.define(str(getattr(torch.ops.windkern, name).default._schema).removeprefix("windkern::"))
        library.impl(name, code, "CompositeExplicitAutograd")

    def bare() -> None:
        if leaves:
            torch.autograd.grad(_Bare.apply(ops, spec, targets, hidden, weight)[0], leaves, upstream)
        else:
            ops.logprobs_fwd([hidden], [weight], None, targets, None, *spec)

    bare.library = library  # which ends with its last reference
    return bare


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
        bares = [_bare(rows, vocab, gear, call) for vocab, call in zip(vocabs, calls, strict=True)]
        taken: list[list[list[float]]] = [[[], [], [], []] for _ in calls]
        for _ in range(repeats):
            for pair, (whole, _, _, alone) in zip(zip(calls, bares, strict=True), taken, strict=True):
                for one, seconds in zip(pair, (whole, alone), strict=True):
                    started = time.process_time()
                    one()
                    seconds.append(time.process_time() - started)
        with _launching_through(timed):  # which takes time itself
            for _ in range(repeats):
                for call, (_, in_triton, in_products, _) in zip(calls, taken, strict=True):
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
    heads = f"{'us a slab':>10s} {'launches':>9s} {'products':>9s} {'rest':>7s} {'beside slabs':>13s} {'bare':>5s}"
    print(f"{'gear':20s} {'slabs':>9s} {heads}")
    for name, gear in GEARS.items():
        few, many = measure(chosen.rows, VOCABS, gear, chosen.repeats)
        more = many.slabs - few.slabs
        a_slab, in_triton, in_products = ((many[field] - few[field]) / more * 1e6 for field in range(3))
        parts = f"{in_triton:9.1f} {in_products:9.1f} {a_slab - in_triton - in_products:7.1f}"
        beside = few.seconds * 1e6 - few.slabs * a_slab
        bare = (few.bare - few.slabs * (many.bare - few.bare) / more) * 1e6
        slabs = f"{few.slabs} .. {many.slabs}"
        print(f"{name:20s} {slabs:>9s} {a_slab:10.1f} {parts} {beside:13.0f} {bare:5.0f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
