"""Heads whose vocabulary is sharded over ranks with the same hidden states (tensor parallelism)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from windkern._checks import FLOATS, check_floating, check_index, shape_of
from windkern.shard import Cut, Shard
from windkern.sharding.ranks import Ranks, RanksError

_REFUSED = -1  # in place of the first row: this rank cannot take part, so the others must not wait for it
_FOLLOWS = -2  # in place of the first row: this rank's rows follow those of the previous rank


def vocab_parallel(
    weight: Tensor,
    group: dist.ProcessGroup | None = None,
    start: int | None = None,
    *,
    reduce_dtype: torch.dtype | None = None,
) -> Shard:
    """Declare `weight` to be this rank's part of a head whose vocabulary is sharded over a group.

        log p(v | h) = z_v - log sum_r sum_{u on rank r} exp z_u,    z = transform(h @ weight.T + bias)

    Every rank calls the ops with the same hidden states, the same targets, numbered as in the whole vocabulary, and its
    own rows of the bias. Results and the gradient of the hidden states are those of the whole head, the same bits on
    all ranks; the gradient of the weight is that of the local rows and stays local. All ranks must make the same calls.

    This function is a collective, in which the ranks compare their parts. Call it once and keep the result, which holds
    `weight` itself and so follows its updates.

    Args:
        weight: (rows, H) the local rows, any number of them, even none; or a DTensor (V, H) with placement Shard(0) on
            a one-dimensional mesh, as in torch's tensor parallelism.
        group: of the ranks that share the vocabulary; None is the mesh's for a DTensor, else the default group.
        start: vocabulary entry of the first local row; None for rows that follow each other in the order of ranks.
        reduce_dtype: in which the gradient of the hidden states is summed over the ranks; None is float32 (float64 for
            a float64 head). The dtype of the hidden states halves that traffic.

    Returns:
        A `windkern.shard.Shard`, accepted wherever an op takes a weight, in tuples of blocks and in a `windkern.Head`.

    Raises:
        ValueError: the parts do not cover the vocabulary once, or differ in hidden size or dtype; this rank does not
            belong to `group`, or the mesh has another one; the weight is partitioned by ZeRO-3. If one rank is at
            fault, all raise.
        TypeError: weight is not a floating tensor, or is a DTensor with another placement.
        windkern.sharding.RanksError: torch.distributed is not initialised, or a rank does not take part within the
            group's timeout, here or in an op.

    Memory:
        No more than an op on the local rows takes, and up to 32768 rows of 16 bytes from each rank.

    Source:
        Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053), section 3; the merge is that of the online softmax.

    Example:
        >>> import windkern as wk
        >>> def nll(hidden, local_rows, targets):  # on every rank, after torch.distributed.init_process_group
        ...     head = wk.sharding.vocab_parallel(local_rows)
        ...     return -wk.token_logps(hidden, head, targets).logps.mean()
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RanksError("torch.distributed is not initialised; call torch.distributed.init_process_group first")
    fault: Exception | None = None
    first, local = _REFUSED, torch.zeros(0, 0)
    group = _group_of(weight, group)
    ranks = Ranks(group.group_name)
    try:
        first, local = _local_rows(weight, group, start)
        _check_reduce_dtype(reduce_dtype)
    except (TypeError, ValueError) as error:
        fault, first = error, _REFUSED
    own = (first, *local.shape, FLOATS.index(local.dtype) if local.dtype in FLOATS else _REFUSED)
    device = local.device if isinstance(weight, Tensor) else torch.device("cpu")
    table = ranks.gathered(torch.tensor(own, device=device), "compare the parts of the head").tolist()
    if fault is not None:
        raise fault
    starts = _starts(table)
    stops = [place + rows for place, (_, rows, _, _) in zip(starts, table, strict=True)]
    return Shard(
        weight,
        Cut(
            group=group.group_name,
            streams=False,
            start=starts[ranks.rank],
            vocab_size=max(stops),
            largest=max(rows for _, rows, _, _ in table),
            operand=None,
            reduce_dtype=reduce_dtype,
        ),
    )


def _group_of(weight: object, group: object) -> dist.ProcessGroup:
    """Return the process group of the ranks of a head.

    Hazard: the other ranks cannot learn that this rank raised here. Remedy: raise only for faults that all ranks have,
    or that leave this rank without a group.
    """
    mesh = getattr(weight, "device_mesh", None)
    if mesh is not None and mesh.ndim != 1:
        raise ValueError(
            f"weight must be a DTensor on a one-dimensional mesh, got {mesh.ndim} dimensions; take one with "
            "mesh['tp'], or pass weight.to_local() with the group of that dimension"
        )
    if group is None and mesh is not None:
        return mesh.get_group()
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            "group must be a process group that this rank belongs to, got "
            + ("one that it does not belong to" if group == dist.GroupMember.NON_GROUP_MEMBER else repr(group))
        )
    if mesh is not None and mesh.get_group().group_name != group.group_name:
        raise ValueError(
            f"group must be that of the mesh of the DTensor, {mesh.get_group().group_name!r}, or None, got "
            f"{group.group_name!r}"
        )
    return group


def _local_rows(weight: Any, group: dist.ProcessGroup, start: object) -> tuple[int, Tensor]:
    """Return the vocabulary entry of the first local row, or _FOLLOWS, and the rows."""
    if hasattr(weight, "ds_id"):
        raise ValueError(
            "weight is a parameter of DeepSpeed ZeRO-3, which partitions it by elements and not by rows; gather it "
            "with windkern.sharding.gathered(weight) and pass the result to the ops"
        )
    if start is not None:
        start = check_index("start", start)
        if start < 0:
            raise ValueError(f"start must be the vocabulary entry of the first local row, 0 or more, got {start}")
    if hasattr(weight, "placements"):
        if len(weight.placements) != 1 or not weight.placements[0].is_shard(0):
            raise TypeError(
                f"weight must be a DTensor with placements (Shard(dim=0),), got {weight.placements}; if it is whole on "
                "every rank, pass weight.to_local() to the ops"
            )
        count, world = weight.shape[0], group.size()
        # Shard(0) splits like torch.chunk.
        begin = min(count, -(-count // world) * weight.device_mesh.get_local_rank())
        if start not in (None, begin):
            raise ValueError(f"start must be {begin} or None for this DTensor, got {start}")
        return begin, check_floating("weight", weight.to_local())
    local = check_floating("weight", weight)
    if local.dim() != 2:
        raise ValueError(
            f"weight must have shape (rows, hidden), or (0, hidden) if this rank has no rows, got {shape_of(local)}"
        )
    return _FOLLOWS if start is None else start, local


def _check_reduce_dtype(dtype: object) -> None:
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"reduce_dtype must be float64, float32, bfloat16, float16 or None, got {dtype!r}")


def _starts(table: list[list[int]]) -> list[int]:
    """Return the first row of each rank; raise on all ranks if their rows do not form one vocabulary."""
    refused = [rank for rank, row in enumerate(table) if row[0] == _REFUSED]
    if refused:
        raise ValueError(f"weight was refused on rank {refused[0]}; see the error there")
    for name, place, said in (("hidden size", 2, str), ("dtype", 3, lambda code: str(FLOATS[code]))):
        found = [row[place] for row in table]
        if len(set(found)) > 1:
            raise ValueError(
                f"weight must have the same {name} on all ranks of the group, got "
                f"{', '.join(said(each) for each in found)}"
            )
    follows = [row[0] == _FOLLOWS for row in table]
    if any(follows) and not all(follows):
        raise ValueError("start must be given on all ranks of the group or on none, got it on some of them")
    starts, stop = [], 0
    for first, rows, _, _ in table:
        starts.append(stop if first == _FOLLOWS else first)
        stop += rows
    _check_cover([(start, start + row[1], rank) for rank, (start, row) in enumerate(zip(starts, table, strict=True))])
    return starts


def _check_cover(parts: list[tuple[int, int, int]]) -> None:
    """Raise unless the parts, each with start, end and rank, cover one vocabulary once."""
    stop, beside = 0, "the beginning of the vocabulary"
    for start, end, rank in sorted(part for part in parts if part[0] < part[1]):
        if start != stop:
            raise ValueError(
                f"start: the rows of rank {rank}, {start} to {end}, {'overlap' if start < stop else 'leave a gap'} "
                f"with {beside}; the parts must cover the vocabulary once (start=None lays them out in ranks' order)"
            )
        stop, beside = end, f"those of rank {rank}, which end at {end}"
    if stop == 0:
        raise ValueError("weight has no rows on any rank of the group")
