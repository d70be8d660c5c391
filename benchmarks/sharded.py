"""Measure heads sharded over processes: time and peak memory of a rank, against the same work alone and peers.

    python -m benchmarks.sharded [--shape 512x576x49152] [--dtype fp32] [--processes 2] [--samples 7] [--out FILE]

Each process has one thread, and they communicate by gloo. With the vocabulary sharded over ranks that hold the same
rows ("tensor"), `vocab_parallel` is measured against the walk over a rank's own part alone, torch's `loss_parallel` on
DTensor logits, and the eager chunks of Liger's tensor-parallel op. With the rows split over ranks ("data"), `streamed`
is measured against the whole head on every rank, and `gathered`. Each sample starts at a barrier and is the time of the
slowest rank; the providers of a case alternate, and a ratio is the median of the ratios of the rounds. Peak memory is
what a call adds to a rank, gradients included. Writes JSON into benchmarks/results/, from which
`python -m benchmarks.readme` makes the table of docs/sharding.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import windkern as wk
from benchmarks import record, timing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODES = {"scoring": (False, False), "frozen": (True, False), "trained": (True, True)}
LOGIT_STD = 2.5
WRONG = 0.02  # relative error of the log-probs that stops the run
Call = Callable[[], Tensor]


def leaves(hidden: Tensor, weight: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    wants = MODES[mode]
    return hidden.detach().requires_grad_(wants[0]), weight.detach().requires_grad_(wants[1])


def step(logps_of: Callable[[], Tensor], upstream: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    """Compute log-probs, and the gradients of inputs that require them; return the log-probs."""
    logps = logps_of()
    wanted = [each for each in inputs if each.requires_grad]
    if wanted:
        torch.autograd.grad(logps, wanted, upstream)
    return logps.detach()


def torch_loss_parallel(hidden: Tensor, weight: DTensor, targets: Tensor, mesh: DeviceMesh) -> Tensor:
    from torch.distributed.tensor.parallel import loss_parallel

    logits = DTensor.from_local(hidden, mesh, [Replicate()]) @ weight.T
    with loss_parallel():
        losses = nn.functional.cross_entropy(
            logits.float(), DTensor.from_local(targets, mesh, [Replicate()]), reduction="none"
        )
    return -losses.to_local()


def liger_tensor_parallel(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Run the eager chunks of LigerFusedLinearScaledCrossEntropyTPFunction, bypassing its check for CUDA tensors."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import _apply_tp_fallback

    return -_apply_tp_fallback(hidden, weight, targets, 1.0, -100, False, dist.group.WORLD)


def tensor_calls(values: tuple[Tensor, ...], mode: str, mesh: DeviceMesh) -> dict[str, Call]:
    """Return calls with the same rows on all ranks, and the vocabulary split into equal parts."""
    hidden, weight, targets, upstream = values
    rank, world = dist.get_rank(), dist.get_world_size()
    part = weight.shape[0] // world
    hidden, local = leaves(hidden, weight[rank * part : (rank + 1) * part].clone(), mode)
    head = wk.sharding.vocab_parallel(local)
    cut = DTensor.from_local(local, mesh, [Shard(0)])
    given = upstream, (hidden, local)
    return {
        "own part alone": partial(step, lambda: wk.token_logps(hidden, local, targets % part).logps, *given),
        "vocab_parallel": partial(step, lambda: wk.token_logps(hidden, head, targets).logps, *given),
        "loss_parallel": partial(step, lambda: torch_loss_parallel(hidden, cut, targets, mesh), *given),
        "liger tp, eager": partial(step, lambda: liger_tensor_parallel(hidden, local, targets), *given),
    }


def data_calls(values: tuple[Tensor, ...], mode: str, mesh: DeviceMesh) -> dict[str, Call]:
    """Return calls with the rows split into equal parts, and the head whole or sharded like FSDP2."""
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = values[0].shape[0] // world
    mine = slice(rank * rows, (rank + 1) * rows)
    hidden, weight = leaves(values[0][mine], values[1], mode)
    targets, upstream = values[2][mine], values[3][mine]
    cut = nn.Parameter(distribute_tensor(weight.detach(), mesh, [Shard(0)]), requires_grad=MODES[mode][1])

    def gathered() -> Tensor:
        with wk.sharding.gathered(cut) as whole:
            return wk.token_logps(hidden, whole, targets).logps

    head = wk.sharding.streamed(cut)
    return {
        "whole head alone": partial(
            step, lambda: wk.token_logps(hidden, weight, targets).logps, upstream, (hidden, weight)
        ),
        "gathered": partial(step, gathered, upstream, (hidden, cut)),
        "streamed": partial(step, lambda: wk.token_logps(hidden, head, targets).logps, upstream, (hidden, cut)),
    }


def make_values(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    rows, size, vocab = shape
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, size, generator=generator).to(dtype)
    weight = torch.randn(vocab, size, generator=generator).mul_(LOGIT_STD / size**0.5).to(dtype)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    return hidden, weight, targets, torch.randn(rows, generator=generator)


def bounds(shape: tuple[int, int, int], dtype: torch.dtype, mode: str, world: int) -> dict[str, int]:
    """Return the bytes that our calls may add on a rank, by provider: the plan's, gradients, and slabs in flight."""
    rows, size, vocab = shape
    hidden_grad, weight_grad = MODES[mode]
    given = {"device": "cpu", "hidden_grad": hidden_grad, "weight_grad": weight_grad}
    part, mine = vocab // world, rows // world
    cut = wk.plan(rows, size, part, dtype, **given)
    streamed = wk.plan(mine, size, vocab, dtype, total_rows=mine + 1, **given)
    wide = dtype.itemsize * size
    merged = 4 * rows * (3 * world + 6)
    slabs = 2 * streamed.slab_width * wide * (1 + weight_grad)
    targets = mine * wide * (mode == "frozen")
    return {
        "vocab_parallel": cut.peak_bytes + merged + wide * (hidden_grad * rows + weight_grad * part),
        "streamed": streamed.peak_bytes + slabs + targets + wide * (hidden_grad * mine + weight_grad * part),
    }


def slowest(value: float) -> float:
    """Return the largest of a number over the ranks."""
    number = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


def measure(calls: dict[str, Call], samples: int, exact: Tensor, baseline: str) -> list[dict[str, Any]]:
    """Return one row for each provider; rows of providers that cannot run here say why."""
    rows: dict[str, dict[str, Any]] = {}
    taken: dict[str, list[float]] = {}
    for name, call in calls.items():
        try:
            call()  # Reason: in a first call, libraries set up their own buffers, which must not count
            measured = timing.measure(call)
        except (RuntimeError, ImportError, NotImplementedError) as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            rows[name] = {"provider": name, "status": "absent", "complete": True, "reason": why}
            continue
        gap = float((measured.result.double() - exact).norm() / exact.norm())
        if name != baseline and not gap < WRONG:
            raise RuntimeError(f"the log-probs of {name} are off by {gap:.2g} of their size")
        peak = None if measured.peak_bytes is None else int(slowest(measured.peak_bytes))
        rows[name] = {"provider": name, "status": "ok", "complete": True, "peak_bytes": peak}
        rows[name] |= {"alone": name == baseline, "errors": {} if name == baseline else {"logps": gap}}
        taken[name] = []
    for _ in range(samples):
        for name, seconds in taken.items():
            dist.barrier()
            seconds.append(slowest(timing.timed(calls[name])[0]))
    for name, seconds in taken.items():
        ratios = [one / other for one, other in zip(seconds, taken[baseline], strict=True)]
        rows[name] |= {**timing.summary(seconds), "times_alone": statistics.median(ratios)}
    return list(rows.values())


def exact_logps(values: tuple[Tensor, ...]) -> Tensor:
    """Return log-probs (M,) in float64 from float32 products, a few rows at a time."""
    hidden, weight, targets, _ = values
    parts = zip(hidden.float().split(64), targets.split(64), strict=True)
    return torch.cat([wk.naive.token_logps(part, weight.float(), few)[0].double() for part, few in parts])


def worker(rank: int, options: argparse.Namespace, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=options.processes)
    run(options)
    dist.barrier()
    dist.destroy_process_group()


def run(options: argparse.Namespace) -> None:
    """Run all cases in every process of the default group; the first process writes the results."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (options.processes,))
    dtype = DTYPES[options.dtype]
    values = make_values(options.shape, dtype)
    exact = exact_logps(values)
    rows = len(exact) // options.processes
    own = exact[rank * rows : (rank + 1) * rows]
    shape = "x".join(map(str, options.shape))
    results = None
    if rank == 0:
        settings = {name: getattr(options, name) for name in ("dtype", "processes", "samples")}
        settings |= {"shape": shape, "nice": os.nice(0)}  # the load is part of the machine's facts
        results = record.Results(options.out or record.default_path("sharded"), "sharded", settings, append=True)
    for mode in options.modes:
        cases = {
            "tensor": (tensor_calls, exact, "own part alone"),
            "data": (data_calls, own, "whole head alone"),
        }
        most = bounds(options.shape, dtype, mode, options.processes)
        for cut, (build, wanted, baseline) in cases.items():
            for row in measure(build(values, mode, mesh), options.samples, wanted, baseline):
                if results is None:
                    continue
                row |= {
                    "case": f"{shape}/{cut}/{mode}/{options.dtype}",
                    "shape": shape,
                    "cut": cut,
                    "mode": mode,
                    "dtype": options.dtype,
                    "processes": options.processes,
                    "bound_bytes": most.get(row["provider"]),
                    "reproduce": f"python -m benchmarks.sharded --shape {shape} --dtype {options.dtype}",
                }
                results.put(row)
                print(line(row), flush=True)
            if results is not None:
                results.save()


def line(row: dict[str, Any]) -> str:
    head = f"{row['cut']:<7} {row['mode']:<8} {row['provider']:<17}"
    if row["status"] != "ok":
        return f"{head} {row['reason']}"
    peak = "" if row["peak_bytes"] is None else f"  {row['peak_bytes'] / 2**20:8.1f} MiB"
    bound = "" if row["bound_bytes"] is None else f" of {row['bound_bytes'] / 2**20:.1f}"
    error = "".join(f"  error {value:.1e}" for value in row["errors"].values())
    return f"{head} {row['median_s']:8.3f} s  x {row['times_alone']:.2f}{peak}{bound}{error}"


def shape_of(text: str) -> tuple[int, int, int]:
    rows, size, vocab = map(int, text.split("x"))
    return rows, size, vocab


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharded", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=shape_of, default="512x576x49152", help="rows x hidden x vocabulary")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--modes", nargs="+", choices=tuple(MODES), default=list(MODES))
    parser.add_argument("--out", type=Path, metavar="FILE")
    return parser


def main(argv: list[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        given = options, f"{folder}/store"
        torch.multiprocessing.spawn(worker, given, nprocs=options.processes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
