"""A head cut over two processes: each holds half of the vocabulary and trains its rows; no process sees the whole.

    python examples/vocab_parallel.py            # two CPU processes, a few seconds
    torchrun --nproc-per-node 4 examples/vocab_parallel.py

Every process holds the same hidden states, as under tensor parallelism, and its own rows of the head and of the bias.
Targets are numbered as in the whole vocabulary. Log-probs and the gradient of the hidden states are those of the whole
head, with the same bits on all processes.
"""

from __future__ import annotations

import os
import sys
import tempfile

import torch
import torch.distributed as dist
from torch import Tensor, nn

import windkern as wk

VOCAB, HIDDEN, TOKENS = 5003, 64, 256  # 5003 rows: the parts differ in size


def make_batch() -> tuple[Tensor, Tensor]:
    """Inputs (T, H) and targets (T,) of a toy task, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(TOKENS, HIDDEN, generator=generator), torch.randint(VOCAB, (TOKENS,), generator=generator)


def train(steps: int) -> tuple[list[float], Tensor]:
    """Losses, and the log-probs (T,) at the end, of one of the processes; the group exists already."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # bodies begin alike on all ranks, and stay so: their gradients have the same bits
    body, start, stop = nn.Linear(HIDDEN, HIDDEN), rank * VOCAB // world, (rank + 1) * VOCAB // world
    whole = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(1)) / HIDDEN**0.5
    rows, bias = nn.Parameter(whole[start:stop].clone()), nn.Parameter(torch.zeros(stop - start))
    head = wk.Head(wk.sharding.vocab_parallel(rows, start=start), bias)
    optimizer, losses = torch.optim.AdamW([*body.parameters(), rows, bias], lr=1e-2), []
    inputs, targets = make_batch()
    for _ in range(steps):
        loss = -wk.token_logps(body(inputs), head, targets).logps.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        return losses, wk.token_logps(body(inputs), head, targets).logps


def run(rank: int, world: int, store: str, steps: int = 20) -> None:
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    losses, logps = train(steps)
    others = [torch.empty_like(logps) for _ in range(world)]
    dist.all_gather(others, logps)
    same = all(torch.equal(logps, each) for each in others)
    if rank == 0:
        print(f"{world} processes: loss {losses[0]:.3f} -> {losses[-1]:.3f} in {steps} steps")
        print("the log-probs of all ranks have the same bits" if same else "the log-probs of the ranks DIFFER")
    dist.barrier()
    dist.destroy_process_group()


def main() -> int:
    if "RANK" in os.environ:  # torchrun started us
        run(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "env://")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run, (2, f"file://{folder}/store"), nprocs=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
