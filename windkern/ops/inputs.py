"""Check a caller's arguments, and turn them into flat, compacted rows."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from windkern import backends
from windkern._checks import (
    FLOATS,
    check_choice,
    check_count,
    check_floating,
    check_index,
    check_integer,
    check_same_device,
    check_shape,
    shape_of,
)
from windkern.head import Head
from windkern.kernels.gemm import accumulator
from windkern.ops.scored import scored_positions
from windkern.shard import Cut, Shard
from windkern.sharding.agreement import agreed
from windkern.sharding.ranks import Ranks
from windkern.sharding.whole import gathered_mean
from windkern.transform import LogitTransform

Blocks = Tensor | Sequence[Tensor]
Weight = Blocks | Shard | Sequence[Shard] | Head
IGNORED = -1  # targets of rows that are not scored, once the caller's ignore_index has been read


@dataclass
class Inputs:
    """Checked arguments, with R rows before and M rows after ignored ones are dropped."""

    hidden: list[Tensor]  # (R, H_k), in the caller's dtype
    weight: list[Tensor]  # (V, H_k); for a sharded head, this rank's rows
    bias: Tensor | None  # (V,)
    targets: Tensor  # (M,) int64, IGNORED where not scored
    rows: Tensor | None  # (M,) int64 positions among the R rows; None if none is dropped
    masks: bool  # whether targets may be IGNORED: their rows are copied, as zeros
    overflow: Tensor | None  # (R,) rows beyond max_scored, whose results become NaN
    lead: tuple[int, ...]  # shape of the caller's targets
    total_rows: int  # R
    operand: torch.dtype  # of the GEMMs
    transform: LogitTransform
    backend: str
    cut: Cut | None  # None if the head is whole

    @property
    def vocab_size(self) -> int:
        """Rows of the head to plan for; all ranks of a sharded head plan for the same number."""
        return self.weight[0].shape[0] if self.cut is None else self.cut.largest

    @property
    def streams(self) -> bool:
        return self.cut is not None and self.cut.streams

    @property
    def num_rows(self) -> int:
        return self.targets.shape[0]

    @property
    def hidden_sizes(self) -> tuple[int, ...]:
        return tuple(block.shape[-1] for block in self.hidden)

    @property
    def device(self) -> torch.device:
        return self.targets.device

    @property
    def copies_rows(self) -> bool:
        """Whether rows of the hidden states are copied before the walk, apart from a cast."""
        if self.rows is not None or self.masks or self.streams:
            return True
        if self.operand.itemsize != 2 or torch.compiler.is_compiling():
            return False
        return not backends.BACKENDS[self.backend].reads_in_place(self.hidden[0])

    @property
    def head_in_place(self) -> bool:
        """Whether kernels that multiply themselves read the head where it lies.

        Ranks of a sharded head must plan alike, whatever the addresses of their parts.
        """
        if self.cut is not None or torch.compiler.is_compiling():
            return not self.streams
        return backends.BACKENDS[self.backend].reads_in_place(self.weight[0])

    def grads(self) -> dict[str, Any]:
        """Return which gradients autograd will ask for, as arguments of `plan`."""
        enabled = torch.is_grad_enabled()
        return {
            "hidden_grad": tuple(enabled and block.requires_grad for block in self.hidden),
            "weight_grad": tuple(enabled and block.requires_grad for block in self.weight),
            "bias_grad": enabled and self.bias is not None and self.bias.requires_grad,
        }

    def planned(self) -> dict[str, Any]:
        """Return the arguments of `plan` that these inputs determine, except their sizes."""
        return {
            "dtype": self.operand,
            "hidden_dtype": tuple(block.dtype for block in self.hidden),
            "weight_dtype": tuple(head.dtype for head in self.weight),
            "head_in_place": self.head_in_place,
            "device": self.device.type,
            "capped": self.transform.softcap is not None,
            "backend": self.backend,
            **self.grads(),
        }

    def scatter(self, values: Tensor) -> Tensor:
        """Return results (M,) in the caller's shape, 0 where ignored."""
        if self.rows is not None:
            values = values.new_zeros(self.total_rows).index_add_(0, self.rows, values)
        if self.overflow is not None:
            values = torch.where(self.overflow, torch.nan, values)
        return values if len(self.lead) == 1 else values.view(self.lead)


def _as_blocks(name: str, value: Blocks) -> list[Tensor]:
    blocks = list(value) if isinstance(value, (tuple, list)) else [value]
    if not blocks:
        raise ValueError(
            f"{name} must be a tensor or a tuple of one block or more, got an empty {type(value).__name__}"
        )
    named = zip((name,) if len(blocks) == 1 else (f"{name}[{k}]" for k in range(len(blocks))), blocks, strict=True)
    return [check_floating(label, block) for label, block in named]


def _local_blocks(weight: Any) -> tuple[Blocks, Cut | None]:
    """Return this rank's rows of a sharded head, and how it is sharded; a whole head is returned as it is."""
    shards = list(weight) if isinstance(weight, (tuple, list)) else [weight]
    if not any(isinstance(each, Shard) for each in shards):
        return weight, None
    for k, each in enumerate(shards):
        if not isinstance(each, Shard):
            raise TypeError(
                f"weight[{k}] must be sharded like the other blocks, with windkern.sharding.vocab_parallel or "
                f"streamed, got {type(each).__name__}"
            )
        if each.cut != shards[0].cut:
            raise ValueError(f"weight[{k}] must be sharded like weight[0], {shards[0].cut}, got {each.cut}")
    return [each.local for each in shards], shards[0].cut


def _local_bias(bias: Tensor | None, cut: Cut | None) -> Tensor | None:
    """Return the entries of the bias that belong to this rank's rows."""
    if cut is None or not hasattr(bias, "to_local"):
        return bias
    return gathered_mean(bias) if cut.streams else bias.to_local()


def _check_blocks(hidden: list[Tensor], weight: list[Tensor], targets: Tensor, cut: Cut | None) -> None:
    if len(hidden) != len(weight):
        raise ValueError(f"hidden and weight must have the same number of blocks, got {len(hidden)} and {len(weight)}")
    lead = shape_of(targets)
    for k, (block, head) in enumerate(zip(hidden, weight, strict=True)):
        mark = f"[{k}]" if len(hidden) > 1 else ""
        if head.numel() == 0 and cut is None:
            raise ValueError(
                f"weight{mark} has no elements (shape {shape_of(head)}); a head partitioned by ZeRO-3 must be gathered "
                "first, e.g. with windkern.sharding.gathered(weight)"
            )
        if head.dim() != 2:
            raise ValueError(f"weight{mark} must have shape (vocab, hidden) as in nn.Linear, got {shape_of(head)}")
        if block.dim() == 0 or block.shape[-1] != head.shape[1]:
            raise ValueError(
                f"hidden{mark} must have last dimension {head.shape[1]} to match weight{mark} {shape_of(head)}, "
                f"got {shape_of(block)}"
            )
        if head.shape[0] != weight[0].shape[0]:
            raise ValueError(f"weight{mark} must have {weight[0].shape[0]} rows like weight[0], got {head.shape[0]}")
        if shape_of(block)[:-1] != lead:
            raise ValueError(
                f"targets must have shape {shape_of(block)[:-1]} (hidden{mark} {shape_of(block)} without its last "
                f"dimension), got {lead}"
            )
        check_same_device(f"hidden{mark}", block, "targets", targets)
        check_same_device(f"weight{mark}", head, "targets", targets)
    if targets.device.type == "meta":
        raise ValueError("hidden, weight and targets are on the meta device, which holds no values; move them")


def _refuse_forward_mode(tensors: list[Tensor]) -> None:
    """Raise for tensors with tangents, which would be dropped silently."""
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(each).tangent is not None for each in tensors):
        raise RuntimeError(
            "forward-mode differentiation (torch.func.jvp, torch.autograd.forward_ad) is not implemented for windkern; "
            "use reverse mode, or windkern.naive for small sizes"
        )


def _operand_dtype(hidden: list[Tensor], weight: list[Tensor], bias: Tensor | None) -> torch.dtype:
    """Return the autocast dtype under autocast, else that of the head (the widest if its blocks differ).

    Reason: a model calls lm_head(hidden.to(lm_head.weight.dtype)).
    """
    device_type = hidden[0].device.type
    dtypes = {tensor.dtype for tensor in (*hidden, *weight, *([] if bias is None else [bias]))}
    if torch.is_autocast_enabled(device_type) and torch.float64 not in dtypes:
        return torch.get_autocast_dtype(device_type)
    operand = functools.reduce(torch.promote_types, (head.dtype for head in weight))
    if bias is not None and bias.dtype == torch.float64 and operand != torch.float64:
        raise TypeError(
            f"bias must not be wider than the logits it is added to, which are float32 for a head in {operand}; got "
            "torch.float64; cast one of them"
        )
    return operand


def _checked_transform(scale: float, softcap: float | None, temperature: float, acc: torch.dtype) -> LogitTransform:
    """Return the transform, after a check that kernels can represent its factors."""
    transform = LogitTransform(scale, softcap, temperature)
    scale, softcap, temperature = transform.factors
    factors = {"scale / temperature": scale / temperature}
    if softcap is not None:
        factors |= {"scale / softcap": scale / softcap, "softcap / temperature": softcap / temperature}
    least = torch.finfo(acc).tiny
    for what, factor in factors.items():
        if not least <= factor <= 1 / least:
            raise ValueError(
                f"{what} must lie between {least:.3g} and {1 / least:.3g} to be computed in {acc}, got "
                f"{factor:.3g} (scale={scale:g}, softcap={softcap}, temperature={temperature:g})"
            )
    return transform


_kept_transform = functools.lru_cache(maxsize=256)(_checked_transform)


def _transform_of(factors: tuple[float, float | None, float], acc: torch.dtype) -> LogitTransform:
    """Return the checked transform; of plain numbers, the one that an earlier call has checked."""
    plain = all(type(each) in (float, NoneType) for each in factors) and not torch.compiler.is_compiling()
    return (_kept_transform if plain else _checked_transform)(*factors, acc)


def _parts_of(
    weight: Weight, bias: Tensor | None, factors: tuple[float, float | None, float]
) -> tuple[Any, Tensor | None, tuple[float, float | None, float]]:
    """Return the weight, the bias and the factors of the transform, which a Head brings along."""
    if not isinstance(weight, Head):
        return weight, bias, factors
    scale, softcap, temperature = factors
    others = {"bias": bias is not None, "scale": scale != 1.0, "softcap": softcap is not None}
    given = [name for name, other in {**others, "temperature": temperature != 1.0}.items() if other]
    if given:
        raise ValueError(f"{' and '.join(given)} must not be given with a windkern.Head, which has its own")
    return weight.weight, weight.bias, (weight.scale, weight.softcap, weight.temperature)


def prepare(
    hidden: Blocks,
    weight: Weight,
    targets: Tensor,
    *,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    max_scored: int | None,
    backend: str,
    entropy: bool = False,
    batch_invariant: bool = False,
    drop: bool = True,
) -> Inputs:
    """Check everything a caller can get wrong, flatten to rows, and drop the ignored ones."""
    check_integer("targets", targets)
    weight, bias, factors = _parts_of(weight, bias, (scale, softcap, temperature))
    local, cut = _local_blocks(weight)
    bias = _local_bias(bias, cut)
    blocks, heads = _as_blocks("hidden", hidden), _as_blocks("weight", local)
    _check_blocks(blocks, heads, targets, cut)
    _refuse_forward_mode([*blocks, *heads, *([] if bias is None else [bias])])
    if bias is not None:
        entries = heads[0].shape[0] if cut is None or not cut.streams else cut.vocab_size
        check_shape("bias", check_floating("bias", bias), (entries,))
        check_same_device("bias", bias, "targets", targets)
    operand = _operand_dtype(blocks, heads, bias) if cut is None or cut.operand is None else cut.operand
    transform = _transform_of(factors, accumulator(operand))
    check_choice("backend", backend, ["auto", *backends.BACKENDS])
    # Reason: a view of a tensor that requires a gradient costs its host twice, in forward and in backward.
    flat = [block if block.dim() == 2 else block.reshape(-1, block.shape[-1]) for block in blocks]
    given = labels = targets.reshape(-1).long().contiguous()  # kernels read row after row
    ignore_index = check_index("ignore_index", ignore_index)
    if backends.checks_values(labels.device):
        labels = torch.where(labels < 0, labels + IGNORED, labels)  # -1 stays an error
    rows, overflow = None, None
    keeps = not drop or (max_scored is None and must_keep_rows(targets))
    if keeps or max_scored is not None:
        scored = given != ignore_index
        if max_scored is not None:
            max_scored = check_max_scored(scored, max_scored)
        if keeps or labels.numel() > 0:
            labels = torch.where(scored, labels, IGNORED)
        # Reason: a comparison would fix the symbol of a dynamic size.
        if max_scored is not None and (torch.compiler.is_compiling() or max_scored < labels.numel()):
            rows, labels, overflow = first_scored(scored, labels, min(max_scored, labels.numel()))
    else:
        rows = scored_positions(given, ignore_index)  # on a GPU: the one synchronisation that max_scored avoids
        if rows is not None:
            labels = labels.index_select(0, rows)
    trains = torch.is_grad_enabled() and any(each.requires_grad for each in (*blocks, *heads, bias) if each is not None)
    facts = {"entropy": entropy, "capped": transform.softcap is not None, "batch_invariant": batch_invariant}
    may_fuse = backends.may_fuse(len(blocks), operand, trains=trains, **facts)
    return Inputs(
        hidden=flat,
        weight=heads,
        bias=bias,
        targets=labels,
        rows=rows,
        masks=drop and (keeps or max_scored is not None),
        overflow=overflow,
        lead=tuple(targets.shape),
        total_rows=flat[0].shape[0],
        operand=operand,
        transform=transform,
        backend=backends.resolve(backend, targets.device, operand, tiles=may_fuse),
        cut=cut,
    )


def must_keep_rows(targets: Tensor) -> bool:
    """Return whether all rows must stay, masked, because data-dependent sizes cannot be compiled or captured."""
    return torch.compiler.is_compiling() or (targets.is_cuda and torch.cuda.is_current_stream_capturing())


def check_max_scored(scored: Tensor, max_scored: object) -> int:
    """Raise if the bound is too small: always on a CPU, on a GPU only in debug mode (it synchronises)."""
    bound = check_count("max_scored", max_scored)
    if not torch.compiler.is_compiling() and backends.checks_values(scored.device):
        found = int(scored.sum())
        if found > bound:
            raise ValueError(f"max_scored must be at least the number of scored targets, {found}, got {bound}")
    return bound


def first_scored(scored: Tensor, labels: Tensor, max_scored: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return positions and targets of the first `max_scored` scored rows, and the mask of rows beyond the bound.

    No size depends on data. Spare places point at the first scored row (the last row if there is none), with an ignored
    target.
    """
    count, total = scored.cumsum(0), scored.shape[0]
    rows = torch.searchsorted(count, torch.arange(1, max_scored + 1, device=scored.device))
    filled = rows < total
    rows = torch.where(filled, rows, rows[:1].clamp(max=total - 1))
    return rows, torch.where(filled, labels.index_select(0, rows), IGNORED), scored & (count > max_scored)


def check_targets(targets: Tensor, vocab_size: int) -> None:
    """Raise for targets outside the vocabulary: always on a CPU, on a GPU only in debug mode (it synchronises)."""
    if targets.numel() == 0 or not backends.checks_values(targets.device):
        return
    low, high = int(targets.min()), int(targets.max())
    if low < IGNORED or high >= vocab_size:
        wrong = low - IGNORED if low < IGNORED else high
        raise ValueError(
            f"targets must be in [0, {vocab_size}) or equal ignore_index, got {wrong}; "
            f"weight has {vocab_size} rows (one for each vocabulary entry)"
        )


def settled(
    inputs: Inputs, grads: dict[str, Any], sizes: tuple[int, int], options: dict[str, int | None]
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Return the largest of each size over the ranks of a streamed head, and whether any rank wants dhidden, by block.

    Targets are checked here, so that the other ranks learn of a wrong one before they wait for a slab.
    """
    fault: ValueError | None = None
    try:
        check_targets(inputs.targets, inputs.vocab_size)
    except ValueError as error:
        fault = error
    equal = {f"a gradient of weight[{k}]": int(flag) for k, flag in enumerate(grads["weight_grad"])}
    equal |= {"a gradient of bias": int(grads["bias_grad"]), "dtype": FLOATS.index(inputs.operand)}
    equal |= {name: -1 if value is None else int(value) for name, value in options.items()}
    largest = [int(fault is not None), *sizes, *(int(flag) for flag in grads["hidden_grad"])]
    refused, *found = agreed(Ranks(inputs.cut.group), inputs.device, largest, equal)
    if fault is not None:
        raise fault
    if refused:
        raise ValueError("targets were refused on another rank of the streamed head; see the error there")
    return tuple(found[: len(sizes)]), tuple(bool(flag) for flag in found[len(sizes) :])


def acc_dtype(inputs: Inputs) -> torch.dtype:
    return accumulator(inputs.operand)
