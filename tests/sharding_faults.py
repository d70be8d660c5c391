"""Mistakes with a sharded head, and ranks that stop: run in processes like tests/sharding_jobs.py."""

from __future__ import annotations

import datetime
import json
import os
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from cases import SHAPES, Problem
from sharding_jobs import Checks, Cut, assert_caught, assert_raises, parity

import windkern as wk
from windkern.kernels.gemm import Products
from windkern.ops import rows, walk
from windkern.sharding import merge
from windkern.sharding.ranks import Ranks

vocab_parallel = wk.sharding.vocab_parallel


def parts(checks: Checks, rank: int) -> None:
    """Parts that do not fit together, reported by both ranks."""
    rows = torch.zeros(5, 3)
    wrong = {
        "leave a gap": lambda: vocab_parallel(rows, start=6 * rank),
        "overlap": lambda: vocab_parallel(rows, start=4 * rank),
        "beginning of the vocabulary": lambda: vocab_parallel(rows, start=1 + 5 * rank),
        "on all ranks of the group or on none": lambda: vocab_parallel(rows, start=None if rank else 0),
        "same dtype": lambda: vocab_parallel(rows.double() if rank else rows),
        "same hidden size": lambda: vocab_parallel(rows[:, rank:]),
        "no rows on any rank": lambda: vocab_parallel(rows[:0]),
        "0 or more": lambda: vocab_parallel(rows, start=-1),
    }
    for words, call in wrong.items():
        checks.run(words, assert_raises, ValueError, words, call)


def one_rank_only(checks: Checks, rank: int) -> None:
    """Something is wrong on rank 0 alone: it reports what, and the other rank reports which rank."""

    def call(weight, kind, words, **options):
        given = weight if rank == 0 else torch.zeros(5, 3)
        kind, words = (kind, words) if rank == 0 else (ValueError, "refused on rank 0")
        assert_raises(kind, words, lambda: vocab_parallel(given, **(options if rank == 0 else {})))

    zero3 = torch.zeros(0)
    zero3.ds_id = 7
    remedy = "gather it with windkern.sharding.gathered(weight)"
    checks.run("zero3", call, zero3, ValueError, remedy)
    checks.run("zero3 on every rank", assert_raises, ValueError, remedy, lambda: vocab_parallel(zero3))
    checks.run("integers", call, torch.zeros(5, 3, dtype=torch.int64), TypeError, "float64, float32")
    checks.run("vector", call, torch.zeros(5), ValueError, "(rows, hidden)")
    checks.run("list", call, [[1.0]], TypeError, "torch.Tensor")
    checks.run("dtype", call, torch.zeros(5, 3), TypeError, "reduce_dtype", reduce_dtype=torch.int64)


def arguments(checks: Checks, rank: int) -> None:
    """Arguments that an op refuses before any rank waits for another."""
    rows, hidden, targets = torch.zeros(5, 3), torch.zeros(2, 3), torch.tensor([0, 9])
    head = vocab_parallel(rows)
    pair = (torch.zeros(2, 3), torch.zeros(2, 3))
    other = dist.new_group([0, 1])
    wrong = {
        "bias must have shape (5,)": (ValueError, lambda: wk.token_logps(hidden, head, targets, bias=torch.zeros(10))),
        "targets must be in [0, 10)": (ValueError, lambda: wk.token_logps(hidden, head, targets + 1)),
        "weight[1] must be sharded like the other": (TypeError, lambda: wk.token_logps(pair, (head, rows), targets)),
        "weight[1] must be sharded like weight[0]": (
            ValueError,
            lambda: wk.token_logps(pair, (head, vocab_parallel(rows, other)), targets),
        ),
        "to match weight (5, 3)": (ValueError, lambda: wk.token_logps(hidden[:, :2], head, targets)),
        "belong": (ValueError, lambda: vocab_parallel(rows, dist.new_group([1 - rank]))),
        "process group that this rank": (ValueError, lambda: vocab_parallel(rows, "world")),
    }
    for words, (kind, call) in wrong.items():
        checks.run(words, assert_raises, kind, words, call)
    dist.destroy_process_group(other)


def dead_group(rank: int) -> None:
    group = dist.new_group([0, 1])
    head = vocab_parallel(torch.zeros(5, 3), group)
    dist.destroy_process_group(group)
    call = lambda: wk.token_logps(torch.zeros(2, 3), head, torch.tensor([0, 9]))  # noqa: E731
    assert_raises(wk.sharding.RanksError, "does not exist (any more)", call)


def other_calls(rank: int) -> None:
    """Ranks that call with different numbers of rows, zero included, or options get an error before they wait."""
    head = vocab_parallel(torch.zeros(5, 3))

    def call(rows: int, entropy: bool = False, wanted: bool = False):
        hidden = torch.zeros(rows, 3, requires_grad=wanted)
        return wk.token_logps(hidden, head, torch.zeros(rows, dtype=torch.long), entropy=entropy)

    assert_raises(ValueError, "rows (2 and 3)", lambda: call(2 + rank))
    assert_raises(ValueError, "rows (0 and 2)", lambda: call(2 * rank))
    assert_raises(ValueError, "entropy (0 and 1)", lambda: call(2, entropy=rank == 0))
    assert_raises(ValueError, "a gradient of hidden (0 and 1)", lambda: call(2, wanted=rank == 0))
    call(2)  # afterwards they continue together


def absent(rank: int) -> None:
    """Rank 1 does not call: rank 0 waits for the group's timeout."""
    group = dist.new_group([0, 1], timeout=datetime.timedelta(seconds=1))
    head = vocab_parallel(torch.zeros(5, 3))
    # Nothing else of this group may wait for a rank that has no turn.
    head = replace(head, cut=replace(head.cut, group=group.group_name))
    if rank == 0:
        call = lambda: wk.token_logps(torch.zeros(2, 3), head, torch.tensor([0, 9]))  # noqa: E731
        assert_raises(wk.sharding.RanksError, "all ranks of the group must make the same calls", call)
    dist.barrier()


def overlaps(rank: int) -> None:
    """The sum of dhidden starts before the products of dweight, and is waited for after them."""
    seen = []
    begin, product = Ranks.begin_sum, Products.weight_grad

    def begin_sum(self, *args):
        seen.append("begin")
        wait = begin(self, *args)
        return lambda: (seen.append("wait"), wait())

    def weight_grad(self, *args, **options):
        seen.append("dweight")
        product(self, *args, **options)

    head = vocab_parallel(torch.randn(300, 3, dtype=torch.float64).requires_grad_())
    hidden = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    try:
        Ranks.begin_sum, Products.weight_grad = begin_sum, weight_grad
        for budget, entropy in ((None, False), (0, False), (0, True)):
            del seen[:]
            out = wk.token_logps(hidden, head, torch.tensor([0, 9]), memory_budget=budget, entropy=entropy)
            sum(part.sum() for part in out if part is not None).backward()
            start = seen.index("begin")
            assert "dweight" in seen[start:] and seen[-1] == "wait", seen
    finally:
        Ranks.begin_sum, Products.weight_grad = begin, product


def faults(folder: Path) -> dict:
    checks, rank = Checks(), dist.get_rank()
    parts(checks, rank)
    one_rank_only(checks, rank)
    arguments(checks, rank)
    for check in (dead_group, overlaps, other_calls, absent):
        checks.run(check.__name__, check, rank)
    return checks.report()


def death(folder: Path) -> dict:
    """Rank 1 dies between forward and backward; rank 0 gets an error that names the step."""
    rank, checks = dist.get_rank(), Checks()
    head = vocab_parallel(torch.randn(5, 3).requires_grad_())
    hidden = torch.randn(2, 3, requires_grad=True)
    logps = wk.token_logps(hidden, head, torch.tensor([0, 9])).logps
    if rank == 0:
        words = "could not sum the gradient of the hidden states"
        checks.run("death", assert_raises, wk.sharding.RanksError, words, logps.sum().backward)
    (folder / f"death-{rank}.json").write_text(json.dumps(checks.report()))
    os._exit(0)  # skips the last barrier of the tools, which would never end


def teeth(folder: Path) -> dict:
    """Planted faults: each must fail the comparison that the real code passes, on at least one rank."""
    world, checks = dist.group.WORLD, Checks()
    layout = [(0, 400), (400, SHAPES["odd"].vocab)]

    def unscaled(original, parts, total):
        original(parts, total)
        total.run_sum.copy_(parts[:, 1].sum(0))

    def own_sum_only(original, self, values, what):
        original(self, values.clone(), what)()
        return lambda: None

    plants = {
        "sums of another unit": (merge, "_merge", unscaled, "trained", "plain"),
        "no sum of dhidden": (Ranks, "begin_sum", own_sum_only, "frozen_head", "plain"),
        "targets of another rank": (rows, "_of_shard", lambda _, labels, start, count: labels, "scoring", "plain"),
        "units of one rank's maximum": (walk, "_move_units", lambda *_: None, "frozen_head", "all"),
    }
    for name, (owner, attribute, broken, gear, variant) in plants.items():
        original = getattr(owner, attribute)

        def call(*args, original=original, broken=broken):
            return broken(original, *args)

        problem = Problem(SHAPES["odd"], variant, seen=("logps",) if variant == "plain" else Problem.seen)
        setattr(owner, attribute, call)
        caught = torch.zeros(())
        try:
            parity(problem, torch.float32, gear, Cut(layout, world))
        except AssertionError:
            caught += 1
        finally:
            setattr(owner, attribute, original)
        dist.all_reduce(caught)
        checks.run(name, assert_caught, float(caught))
    return checks.report()
