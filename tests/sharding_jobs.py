"""What runs in each process of tests/sharding/, see tests/distributed_tools.py: checks that return what failed."""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from cases import GEARS, NARROW, SHAPES, UNLIMITED, VARIANTS, Problem
from tolerances import assert_within

import windkern as wk


class Checks:
    """Runs checks and remembers the first lines of what failed; a rank that fails goes on, as the others do."""

    def __init__(self):
        self.failed: list[str] = []
        self.count = 0

    def run(self, name: str, check: Callable[[], None]) -> None:
        self.count += 1
        try:
            check()
        except Exception as error:
            self.failed.append(f"{name}: {error!r:.600} {traceback.format_exc()[-600:]}")

    def report(self) -> dict:
        return {"failed": self.failed, "count": self.count}


def layouts(vocab: int, ranks: int) -> Iterator[list[tuple[int, int]]]:
    """Start and end of each rank's rows: nearly even, one rank without any, in another order than the ranks'."""
    if ranks == 1:
        yield [(0, vocab)]
        return
    step = -(-vocab // ranks)
    yield [(min(vocab, r * step), min(vocab, (r + 1) * step)) for r in range(ranks)]
    first = vocab // 3
    yield [(0, 0)] * (ranks - 2) + [(first, vocab), (0, first)]


@dataclass
class Cut:
    """Calls ops on this rank's rows of a whole head, whose gradient is whole again afterwards."""

    layout: list[tuple[int, int]]
    group: dist.ProcessGroup
    op: Callable = wk.token_logps

    def head(self, weight, bias):
        start, stop = self.layout[self.group.rank()]
        single = not isinstance(weight, tuple)
        blocks = tuple(
            wk.sharding.vocab_parallel(block[start:stop], self.group, start) for block in ((weight,) if single else weight)
        )
        return blocks[0] if single else blocks, None if bias is None else bias[start:stop]

    def __call__(self, hidden, weight, targets, *, bias=None, **options):
        head, bias = self.head(weight, bias)
        return self.op(hidden, head, targets, bias=bias, **options)


def whole(results: dict, group: dist.ProcessGroup) -> dict:
    """The same with the head's gradients added up over the ranks, each of which has some rows of it."""
    for name, value in results.items():
        if name.startswith(("dweight", "dbias")):
            wide = value.double()
            dist.all_reduce(wide, group=group)
            results[name] = wide.to(value.dtype)
    return results


def digest(values: dict) -> str:
    names = [name for name in values if not name.startswith(("dweight", "dbias"))]
    return hashlib.sha256(b"".join(values[name].contiguous().view(torch.uint8).numpy().tobytes() for name in names)).hexdigest()


def assert_one_value(value: str, group: dist.ProcessGroup) -> None:
    found = [None] * group.size()
    dist.all_gather_object(found, value, group=group)
    assert len(set(found)) == 1, "ranks differ in bits"


def parity(problem: Problem, dtype: torch.dtype, gear: str, cut: Cut, **options) -> None:
    """As the check of tests/ops/test_logprobs.py, on all ranks of the group."""
    ours = whole(problem.run(cut, dtype, gear, **options), cut.group)
    assert_one_value(digest(ours), cut.group)
    exact, plain = problem.exact(dtype, gear), problem.plain(dtype, gear)
    assert ours.keys() == exact.keys()
    apart = 1 + float(exact["entropy"].max()) if gear == "frozen_head" and "entropy" in exact else 1.0
    for name, value in ours.items():
        cancellation = apart if name.startswith("dhidden") and dtype == torch.float32 else 1.0
        assert_within(value, exact[name], plain[name], dtype, name, cancellation=cancellation)


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def gears(checks: Checks, group: dist.ProcessGroup, dtypes=DTYPES) -> None:
    for variant in VARIANTS:
        for gear in GEARS:
            if gear == "bias_only" and not VARIANTS[variant]["bias"]:
                continue
            shape = SHAPES["blocks" if variant in ("plain", "all") else "odd"]
            for k, dtype in enumerate(dtypes):
                problem = Problem(shape, variant)
                budget = (NARROW, problem.middle_budget(dtype, gear), UNLIMITED)[(k + len(variant)) % 3]
                for layout in layouts(shape.vocab, group.size()):
                    for seen in (problem.seen, ("logps",)):
                        some = replace(problem, seen=seen)
                        name = f"{variant} {gear} {dtype} {budget} {layout} {seen}"
                        cut = Cut(layout, group)
                        checks.run(name, lambda: parity(some, dtype, gear, cut, memory_budget=budget))
                    if gear == "scoring":
                        break


def first(folder: Path) -> dict:
    checks = Checks()
    gears(checks, dist.group.WORLD)
    return checks.report()
