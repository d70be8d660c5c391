"""Heads sharded by tensor parallelism: each rank holds some rows of the vocabulary, and all the same hidden states.

The plan of transformers (`tp_plan`) shards a head this way: it is a DTensor with placement Shard(0) on a mesh whose
dimension is named "tp".
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
    """Return whether the weight is sharded by rows over a mesh for tensor parallelism, and no other mesh."""
    if not hasattr(weight, "placements") or weight.device_mesh.mesh_dim_names != MESH:
        return False
    return weight.placements[0].is_shard(0)


def rows_of(linear: nn.Linear) -> Tensor | Shard:
    """Return the weight of a head for the ops: `vocab_parallel` of it if it is sharded, else the weight itself.

    The first call is collective: the ranks compare their parts.
    """
    weight = linear.weight
    if not is_cut(weight):
        return weight
    if linear not in _cuts:
        _cuts[linear] = vocab_parallel(weight).cut
    return Shard(weight, _cuts[linear])
