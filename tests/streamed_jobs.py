"""Heads of FSDP2 that are streamed: run in processes as tests/sharding_jobs.py is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from cases import GEARS, NARROW, SHAPES, UNLIMITED, VARIANTS, Problem
from sharding_jobs import DTYPES, Checks, assert_raises
from tolerances import assert_within
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import windkern as wk


@dataclass
class Streamed:
    """Calls an op on this rank's rows of a problem, with the head cut over all ranks; results are whole again."""

    mesh: DeviceMesh
    keep: tuple[int, ...]  # rows of each rank, of the flattened targets

    @property
    def mine(self) -> slice:
        rank = dist.get_rank()
        return slice(sum(self.keep[:rank]), sum(self.keep[: rank + 1]))

    def __call__(self, hidden, weight, targets, *, bias=None, **options):
        single = not isinstance(weight, tuple)
        blocks = (weight,) if single else weight
        cut = tuple(self.cut(block) for block in blocks)
        shards = tuple(wk.sharding.streamed(block) for block in cut)
        states = (hidden,) if single else hidden
        states = tuple(block.reshape(-1, block.shape[-1])[self.mine] for block in states)
        bias = None if bias is None else self.cut(bias)
        return self.whole(
            wk.token_logps(
                states[0] if single else states,
                shards[0] if single else shards,
                targets.reshape(-1)[self.mine],
                bias=bias,
                **options,
            ),
            targets.shape,
        )

    def cut(self, leaf: Tensor) -> Tensor:
        """A DTensor of a whole leaf, whose gradient comes back to the leaf, times the ranks that it is the mean of."""
        return _Cut.apply(leaf, self.mesh)

    def whole(self, results, shape):
        return tuple(None if part is None else _Joined.apply(part, self.keep).view(shape) for part in results)


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, leaf, mesh):
        return distribute_tensor(leaf.detach(), mesh, [Shard(0)])

    @staticmethod
    def backward(ctx, grad):
        return grad.full_tensor() * dist.get_world_size(), None


class _Joined(torch.autograd.Function):
    """Results of all ranks, each of which gets back the gradient of its own."""

    @staticmethod
    def forward(ctx, part, keep):
        rank = dist.get_rank()
        ctx.mine = slice(sum(keep[:rank]), sum(keep[: rank + 1]))
        parts = [part.new_empty(rows) for rows in keep]
        for owner, each in enumerate(parts):
            each.copy_(part.detach() if owner == rank else each)
            dist.broadcast(each, owner)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.mine], None


def parity(problem: Problem, dtype: torch.dtype, gear: str, call: Streamed, **options) -> None:
    """Values and gradients of all ranks together, as the check of tests/ops/test_logprobs.py."""
    ours = problem.run(call, dtype, gear, **options)
    for name, value in ours.items():
        if name.startswith("dhidden"):
            dist.all_reduce(value)
    exact, plain = problem.exact(dtype, gear), problem.plain(dtype, gear)
    apart = 1 + float(exact["entropy"].max()) if gear == "frozen_head" and "entropy" in exact else 1.0
    for name, value in ours.items():
        cancellation = apart if name.startswith("dhidden") and dtype == torch.float32 else 1.0
        assert_within(value, exact[name], plain[name], dtype, name, cancellation=cancellation)


def gears(checks: Checks, mesh: DeviceMesh, dtypes: tuple[torch.dtype, ...]) -> None:
    world = dist.get_world_size()
    for variant in VARIANTS:
        for gear in GEARS:
            if gear == "bias_only" and not VARIANTS[variant]["bias"]:
                continue
            shape = SHAPES["blocks" if variant in ("plain", "all") else "odd"]
            rows = torch.Size(shape.lead).numel()
            for k, dtype in enumerate(dtypes):
                problem = Problem(shape, variant)
                budget = (NARROW, problem.middle_budget(dtype, gear), UNLIMITED)[(k + checks.count) % 3]
                keeps = (rows - 5, *[0] * (world - 2), 5), (*[0] * (world - 1), rows)
                for n, keep in enumerate(keeps if len(dtypes) > 1 else keeps[:1]):
                    some = replace(problem, seen=problem.seen if (n + checks.count) % 2 else ("logps",))
                    name = f"{variant} {gear} {dtype} {budget} {keep} {some.seen}"
                    checks.run(name, parity, some, dtype, gear, Streamed(mesh, keep), memory_budget=budget)


def streamed(folder: Path, kind: str) -> dict:
    checks = Checks()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    gears(checks, mesh, DTYPES if kind == "all" else (torch.bfloat16,))
    return checks.report()
