"""Several jobs in one start of the processes, and the benchmark of sharded heads; see tests/distributed_tools.py."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch
import torch.distributed as dist
from sharding_jobs import Checks, Cut, layouts

import windkern as wk


def several(folder: Path, *jobs: str) -> dict:
    """Run jobs one after another in the same processes, each `module:job` or `module:job:option`."""
    found = {}
    for job in jobs:
        module, name, *options = job.split(":")
        found[job] = getattr(importlib.import_module(module), name)(folder, *options)
    return found


def benchmark(folder: Path) -> list[dict]:
    """The rows of benchmarks/sharded.py on a shape that takes a moment."""
    from benchmarks import record, sharded

    out = folder / "sharded.json"
    sharded.run(sharded.make_parser().parse_args(["--shape", "16x8x64", "--samples", "2", "--out", str(out)]))
    dist.barrier()
    return record.read(out)["rows"]


def lora(group: dist.ProcessGroup) -> None:
    """A frozen head and an adapter sharded in the same way: gradients of hidden states, A and B."""
    generator = torch.Generator().manual_seed(2)
    hidden, weight, down, up = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((9, 8), (37, 8), (3, 8), (37, 3))
    )
    targets = torch.randint(0, 37, (9,), generator=generator)
    trained = [each.requires_grad_() for each in (hidden, down, up)]
    for layout in layouts(37, group.size()):
        found = []
        for op in (Cut(layout, group), wk.naive.token_logps):
            logps = op((hidden, 0.5 * hidden @ down.T), (weight, up), targets)[0]
            found.append([logps, *torch.autograd.grad(logps.square().sum(), trained)])
        dist.all_reduce(found[0][3], group=group)
        for mine, exact in zip(*found, strict=True):
            torch.testing.assert_close(mine, exact)


def adapters(folder: Path) -> dict:
    checks = Checks()
    checks.run("lora", lora, dist.group.WORLD)
    return checks.report()
