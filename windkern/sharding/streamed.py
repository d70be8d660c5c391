"""Heads of FSDP2 whose slabs are sent to all ranks while the walk multiplies them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from windkern._checks import check_float_dtype, check_floating, shape_of
from windkern.shard import Cut, Shard
from windkern.sharding.ranks import RanksError

_HOW = (
    "make the head its own FSDP2 unit before the model, fully_shard(model.lm_head, ...) then fully_shard(model, ...), "
    "and pass its weight as it is outside its own forward; if the head is tied to the embedding, or whole for another "
    "reason, pass it to an op directly or through windkern.sharding.gathered"
)


def streamed(
    weight: Tensor | nn.Module,
    *,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
) -> Shard:
    """Make ops walk over a head that FSDP2 has sharded over data-parallel ranks, without gathering it.

        for slab k: the owner of slab k + 1 sends it to all ranks while every rank multiplies its own rows by slab k
        backward: the same again, and sum_r dweight_r / world of slab k goes to its owner while slab k + 1 is walked

    Each rank has its own hidden states, with any number of rows, even none. Log-probs and the gradient of the hidden
    states are those of `windkern.sharding.gathered`; the gradient of the head arrives as FSDP2 expects it, sharded like
    the parameter and averaged over the ranks. All ranks must make the same calls, backward included.

    Args:
        weight: (V, H) DTensor with placement Shard(0) on a one-dimensional mesh, or its FSDP2 unit (an nn.Linear after
            fully_shard): then both dtypes default to those of the unit's MixedPrecisionPolicy.
        param_dtype: in which slabs are sent and multiplied; None is that of the weight.
        reduce_dtype: in which the gradient is summed over the ranks; None is `param_dtype`, as in FSDP2.

    Returns:
        A `windkern.shard.Shard`, accepted wherever an op takes a weight, in tuples of blocks and in a `windkern.Head`.
        Its bias is a whole plain tensor, or a DTensor, which is gathered and whose gradient is averaged.

    Raises:
        TypeError: weight is not a DTensor, because FSDP2 has gathered it, or has another placement.
        ValueError: the mesh has several dimensions; from an op: the ranks want different gradients or options.
        windkern.sharding.RanksError: torch.distributed is not initialised; from an op: a rank does not take part within
            the group's timeout.

    Memory:
        The local parts of weight and gradient, two slabs of each in `param_dtype` and `reduce_dtype`, and the op's
        budget, for any V. A frozen head keeps the M rows of the targets besides its sums.

    Notes:
        FSDP2 gathers a head in the unit of the whole model in every forward: values and gradients are right with
        reshard_after_forward=True, which a tied head needs, but no memory is saved.

    Source:
        FSDP2: torch.distributed.fsdp.fully_shard; the walk is the online softmax over slabs.

    Example:
        >>> import windkern as wk
        >>> def nll(body, lm_head, inputs, targets):  # on every rank, both after fully_shard
        ...     return -wk.token_logps(body(inputs), wk.sharding.streamed(lm_head), targets).logps.mean()
    """
    head: Any = weight
    if isinstance(weight, nn.Module):
        unit_param, unit_reduce = _policy(weight)
        param_dtype, reduce_dtype = param_dtype or unit_param, reduce_dtype or unit_reduce
        head = weight.weight
    for name, dtype in (("param_dtype", param_dtype), ("reduce_dtype", reduce_dtype)):
        if dtype is not None:
            check_float_dtype(name, dtype)
    if not (dist.is_available() and dist.is_initialized()):
        raise RanksError("torch.distributed is not initialised; call torch.distributed.init_process_group first")
    if hasattr(head, "ds_id"):
        raise TypeError("weight is a parameter of DeepSpeed ZeRO-3; only windkern.sharding.gathered supports that")
    if not hasattr(head, "placements"):
        said = f"a plain tensor {shape_of(head)}" if isinstance(head, Tensor) else type(head).__name__
        raise TypeError(f"weight must be a DTensor sharded by FSDP2, got {said}; {_HOW}")
    mesh = head.device_mesh
    if mesh.ndim != 1:
        raise ValueError(
            f"weight must be a DTensor on a one-dimensional mesh, got {mesh.ndim} dimensions (HSDP, or FSDP2 with "
            "tensor parallelism); windkern.sharding.gathered supports those"
        )
    if not head.placements[0].is_shard(0):
        raise TypeError(f"weight must have placements (Shard(dim=0),), got {head.placements}; {_HOW}")
    check_floating("weight", head.to_local())
    return Shard(
        head,
        Cut(
            group=mesh.get_group().group_name,
            streams=True,
            start=0,
            vocab_size=head.shape[0],
            largest=head.shape[0],
            operand=param_dtype,
            reduce_dtype=reduce_dtype or param_dtype or head.dtype,
        ),
    )


def _policy(unit: nn.Module) -> tuple[torch.dtype | None, torch.dtype | None]:
    """Return param_dtype and reduce_dtype of an FSDP2 unit."""
    if not hasattr(unit, "_get_fsdp_state"):
        raise TypeError(f"weight must be a DTensor or an FSDP2 unit, got {type(unit).__name__}; {_HOW}")
    state = unit._get_fsdp_state()  # type: ignore[operator]  # a method that FSDP2 adds to the module
    return state._mp_policy.param_dtype, state._mp_policy.reduce_dtype
