"""Heads that are their own FSDP2 units, and so stay sharded until they are called.

Nothing here imports torch.distributed: a module can be a unit only if FSDP2 is imported already.
"""

from __future__ import annotations

import sys
from typing import Any

from windkern.hf.head import is_plain


def is_own_unit(head: Any) -> bool:
    """Return whether this head, a plain nn.Linear, is its own FSDP2 unit, over a mesh of one dimension."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not isinstance(head, fsdp.FSDPModule) or not is_plain(head):
        return False
    state = head._get_fsdp_state()
    groups = [] if state._fsdp_param_group is None else [state._fsdp_param_group]
    own = [param.sharded_param for group in groups for param in group.fsdp_params]
    return len(state._modules) == 1 and bool(own) and all(each.device_mesh.ndim == 1 for each in own)


def in_pieces(head: Any) -> bool:
    """Return whether the head is its own unit and this rank holds a part of its rows, as `streamed` requires."""
    return is_own_unit(head) and hasattr(head.weight, "placements") and head.weight.placements[0].is_shard(0)
