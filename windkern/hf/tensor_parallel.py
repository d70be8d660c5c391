"""Heads that tensor parallelism has cut: each rank holds some rows of the vocabulary, and all the same hidden states.

transformers cuts a head so by its plan (`tp_plan`): a DTensor with placement Shard(0) on a mesh whose dimension is
named "tp".
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn

from windkern.shard import Cut, Shard
from windkern.sharding.vocab_parallel import vocab_parallel

MESH = ("tp",)
_cuts: weakref.WeakKeyDictionary[nn.Linear, Cut] = weakref.WeakKeyDictionary()


def is_cut(weight: Any) -> bool:
    """Whether it holds the rows of one rank of a mesh for tensor parallelism, and of no other mesh."""
    if not hasattr(weight, "placements") or weight.device_mesh.mesh_dim_names != MESH:
        return False
    return weight.placements[0].is_shard(0)


def rows_of(linear: nn.Linear) -> Tensor | Shard:
    """The weight of a head as the ops take it: what `vocab_parallel` makes of one that is cut, else as it is.

    The ranks compare their parts the first time, which all of them must come to.
    """
    weight = linear.weight
    if not is_cut(weight):
        return weight
    if linear not in _cuts:
        _cuts[linear] = vocab_parallel(weight).cut
    return Shard(weight, _cuts[linear])
