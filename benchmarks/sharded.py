"""Heads cut over processes: time and peak memory of a rank, beside the same work without the others and beside peers.

    python -m benchmarks.sharded [--shape 512x576x49152] [--dtype fp32] [--processes 2] [--samples 7] [--out FILE]

One thread a process, gloo. Vocabulary cut over ranks that hold the same rows ("tensor"): `vocab_parallel` beside the
walk over a rank's own part alone, torch's `loss_parallel` on DTensor logits, and the eager chunks of Liger's
tensor-parallel op. Rows cut over ranks ("data"): `streamed` beside the whole head on every rank, and `gathered`. Every
sample begins at a barrier and counts the slowest rank; all providers of a case alternate.
"""

from __future__ import annotations

import argparse
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
Call = Callable[[], Tensor]


def leaves(hidden: Tensor, weight: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    wants = MODES[mode]
    return hidden.detach().requires_grad_(wants[0]), weight.detach().requires_grad_(wants[1])


def step(logps_of: Callable[[], Tensor], upstream: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    """Log-probs, and gradients of the inputs that want them."""
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
    """The eager chunks of LigerFusedLinearScaledCrossEntropyTPFunction, past its check for CUDA tensors."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import _apply_tp_fallback

    return -_apply_tp_fallback(hidden, weight, targets, 1.0, -100, False, dist.group.WORLD)


def tensor_calls(values: tuple[Tensor, ...], mode: str, mesh: DeviceMesh) -> dict[str, Call]:
    """Same rows on all ranks; the vocabulary is cut into equal parts."""
    hidden, weight, targets, upstream = values
    rank, world = dist.get_rank(), dist.get_world_size()
    part = weight.shape[0] // world
    hidden, local = leaves(hidden, weight[rank * part : (rank + 1) * part].clone(), mode)
    head = wk.sharding.vocab_parallel(local)
    cut = DTensor.from_local(local, mesh, [Shard(0)])
    given = upstream, (hidden, local)
    calls = {
        "own part alone": partial(step, lambda: wk.token_logps(hidden, local, targets % part).logps, *given),
        "vocab_parallel": partial(step, lambda: wk.token_logps(hidden, head, targets).logps, *given),
        "loss_parallel": partial(step, lambda: torch_loss_parallel(hidden, cut, targets, mesh), *given),
        "liger tp, eager": partial(step, lambda: liger_tensor_parallel(hidden, local, targets), *given),
    }
    return calls


def data_calls(values: tuple[Tensor, ...], mode: str, mesh: DeviceMesh) -> dict[str, Call]:
    """The rows are cut into equal parts; the head is whole, or cut as FSDP2 cuts it."""
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


def slowest(value: float) -> float:
    """The largest of a number over the ranks."""
    number = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


def measure(calls: dict[str, Call], samples: int, exact: Tensor, baseline: str) -> list[dict[str, Any]]:
    """One row for each provider; providers that cannot run here say why."""
    rows: dict[str, dict[str, Any]] = {}
    for name, call in calls.items():
        try:
            measured = timing.measure(call)
        except (RuntimeError, ImportError, NotImplementedError) as error:
            rows[name] = {"provider": name, "absent": f"{type(error).__name__}: {error}"[:200]}
            continue
        gap = (measured.result.double() - exact).norm() / exact.norm()
        peak = -1 if measured.peak_bytes is None else slowest(measured.peak_bytes)
        rows[name] = {
            "provider": name,
            "peak_bytes": peak,
            "samples": [],
            "error": None if name == baseline else float(gap),
        }
    for _ in range(samples):
        for name, row in rows.items():
            if "samples" in row:
                dist.barrier()
                row["samples"].append(slowest(timing.timed(calls[name])[0]))
    for row in rows.values():
        if "samples" in row:
            row["median_s"] = statistics.median(row["samples"])
            row["over_baseline"] = row["median_s"] / statistics.median(rows[baseline]["samples"])
    return list(rows.values())


def worker(rank: int, options: argparse.Namespace, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=options.processes)
    mesh = init_device_mesh("cpu", (options.processes,))
    values = make_values(options.shape, DTYPES[options.dtype])
    exact = torch.cat(
        [
            wk.naive.token_logps(part.float(), values[1].float(), targets)[0].double()
            for part, targets in zip(values[0].split(64), values[2].split(64), strict=True)
        ]
    )
    rows = len(exact) // options.processes
    own = exact[rank * rows : (rank + 1) * rows]
    found: list[dict[str, Any]] = []
    for mode in options.modes:
        cases = {
            "tensor": (tensor_calls, exact, "own part alone"),
            "data": (data_calls, own, "whole head alone"),
        }
        for cut, (build, wanted, baseline) in cases.items():
            for row in measure(build(values, mode, mesh), options.samples, wanted, baseline):
                found.append({"cut": cut, "mode": mode, **row})
                if rank == 0:
                    print(line(found[-1]), flush=True)
    if rank == 0:
        settings = {name: getattr(options, name) for name in ("shape", "dtype", "processes", "samples")}
        document = {"schema": record.SCHEMA, "kind": "sharded", **record.run_info(settings), "rows": found}
        record.write_atomically(options.out or record.default_path("sharded"), document)
    dist.barrier()
    dist.destroy_process_group()


def line(row: dict[str, Any]) -> str:
    head = f"{row['cut']:<7} {row['mode']:<8} {row['provider']:<17}"
    if "absent" in row:
        return f"{head} {row['absent']}"
    peak = "" if row["peak_bytes"] < 0 else f"  {row['peak_bytes'] / 2**20:8.1f} MiB"
    error = "" if row["error"] is None else f"  error {row['error']:.1e}"
    return f"{head} {row['median_s']:8.3f} s  x {row['over_baseline']:.2f}{peak}{error}"


def shape_of(text: str) -> tuple[int, int, int]:
    rows, size, vocab = map(int, text.split("x"))
    return rows, size, vocab


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharded", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=shape_of, default="512x576x49152", help="rows x hidden x vocabulary")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--modes", nargs="+", choices=tuple(MODES), default=list(MODES))
    parser.add_argument("--out", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        given = options, f"{folder}/store"
        torch.multiprocessing.spawn(worker, given, nprocs=options.processes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
