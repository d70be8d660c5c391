"""One rank's part of a head that is cut over processes; ops accept it wherever they take a weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """Which rows of the head lie here, and how the ranks work on them together."""

    group: str  # name of the process group, as torch resolves it
    streams: bool  # ranks hold other hidden states and pass slabs round; else the same ones, and merge what they find
    start: int  # vocabulary entry of this rank's first row
    vocab_size: int  # of all ranks together
    largest: int  # most rows of a rank: what all ranks plan for
    operand: torch.dtype | None  # streamed: what slabs travel and are multiplied in; None: the dtype of the weight
    reduce_dtype: torch.dtype | None  # of the sums of gradients over the ranks; None: that of sums (float32)


@dataclass(frozen=True, eq=False)
class Shard:
    """This rank's rows of a head, made by `windkern.sharding.vocab_parallel` or `windkern.sharding.streamed`."""

    weight: Tensor  # (rows, H), or the DTensor that holds them
    cut: Cut

    @property
    def local(self) -> Tensor:
        """(rows, H), on the graph of `weight`."""
        return self.weight.to_local() if hasattr(self.weight, "to_local") else self.weight
