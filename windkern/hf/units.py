"""Heads that are FSDP2 units of their own, and so lie in pieces until they are called.

Nothing here imports torch.distributed: a module is a unit only if somebody has imported FSDP2.
"""

from __future__ import annotations

import sys
from typing import Any

from windkern.hf.head import is_plain


def is_own_unit(head: Any) -> bool:
    """Whether FSDP2 cuts this head, a plain nn.Linear, apart from every other module, over a mesh of one dimension."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not isinstance(head, fsdp.FSDPModule) or not is_plain(head):
        return False
    state = head._get_fsdp_state()
    groups = [] if state._fsdp_param_group is None else [state._fsdp_param_group]
    own = [param.sharded_param for group in groups for param in group.fsdp_params]
    return len(state._modules) == 1 and bool(own) and all(each.device_mesh.ndim == 1 for each in own)


def in_pieces(head: Any) -> bool:
    """Whether this rank holds a part of the rows of a head that is a unit of its own, as `streamed` takes it."""
    return is_own_unit(head) and hasattr(head.weight, "placements") and head.weight.placements[0].is_shard(0)
