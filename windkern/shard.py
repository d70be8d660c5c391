"""One rank's part of a head that is sharded over processes; ops accept it wherever they take a weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """The rows of the head on this rank, and how the ranks work on them together."""

    group: str  # name of the process group, as torch resolves it
    streams: bool  # True: ranks hold different hidden states and pass slabs on; False: the same, and merge results
    start: int  # vocabulary entry of this rank's first row
    vocab_size: int  # of all ranks together
    largest: int  # most rows on any rank: all ranks plan for it
    operand: torch.dtype | None  # streamed: dtype in which slabs are sent and multiplied; None: that of the weight
    reduce_dtype: torch.dtype | None  # in which gradients are summed over the ranks; None: that of sums (float32)


@dataclass(frozen=True, eq=False)
class Shard:
    """This rank's rows of a head, made by `windkern.sharding.vocab_parallel` or `windkern.sharding.streamed`."""

    weight: Tensor  # (rows, H), or the DTensor that holds them
    cut: Cut

    @property
    def local(self) -> Tensor:
        """(rows, H), on the graph of `weight`."""
        return self.weight.to_local() if hasattr(self.weight, "to_local") else self.weight
