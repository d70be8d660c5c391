"""The walk over vocabulary slabs: forward and backward of the log-probs of compacted rows, gear by gear."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from windkern.kernels import buffers
from windkern.kernels.contract import DZ_BINADES, RowState, RowStats, Upstream, kept_gain
from windkern.kernels.gemm import Gemm, accumulator
from windkern.transform import LogitTransform


@dataclass(frozen=True)
class Walk:
    """What a walk does, fixed before it starts; built from a `Plan`."""

    kernels: ModuleType  # row kernels of one back end
    gemm: Gemm
    transform: LogitTransform
    hidden_grad: tuple[bool, ...]
    weight_grad: tuple[bool, ...]
    bias_grad: bool
    entropy: bool
    slab_width: int
    slabs_kept: int
    row_block: int
    offset_tiles: int  # offsets of a row in a kept slab; above 1, forward runs in fused tiles
    frozen_head: bool

    def slabs(self, vocab_size: int) -> list[tuple[int, int]]:
        starts = range(0, vocab_size, self.slab_width)
        return [(start, min(start + self.slab_width, vocab_size)) for start in starts]


@dataclass
class Saved:
    """What forward leaves for backward: `kept` is one flat buffer of whole slabs, offsets (slabs_kept, M, tiles).

    With the entropy the slabs hold logits and there are no offsets.
    """

    stats: RowStats
    kept: Tensor
    offsets: Tensor
    units: list[Tensor]  # frozen head: (M, H_k) sums of P * slope * W without the target, then those of P * log P


def _bias_slab(walk: Walk, bias: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if bias is None else bias[start:stop].to(walk.gemm.acc).contiguous()


def _slab_logits(
    walk: Walk, hidden: list[Tensor], weight: list[Tensor], start: int, stop: int, out: Tensor | None
) -> Tensor:
    """Logits (R, W) of one slab: the products of all blocks add up in one float32 buffer."""
    z = None
    for block, head in zip(hidden, weight, strict=True):
        z = walk.gemm.logits(block, walk.gemm.prepared(head[start:stop]), out, add_to=z)
    return z


def _slab_buffer(walk: Walk, rows: int, width: int, device: torch.device) -> Tensor | None:
    return None if walk.gemm.allocates else buffers.empty("slab", (rows * width,), walk.gemm.acc, device)


def _view(buffer: Tensor | None, rows: int, width: int) -> Tensor | None:
    return None if buffer is None else buffer[: rows * width].view(rows, width)


def kept_columns(walk: Walk, vocab_size: int) -> int:
    return min(vocab_size, walk.slabs_kept * walk.slab_width)


class KeptLayout(NamedTuple):
    """The flat buffer of what forward keeps, and its offsets."""

    shape: tuple[int]
    dtype: torch.dtype
    offsets: tuple[int, int, int]


def kept_layout(sizes, operand: torch.dtype, rows: int, vocab_size: int) -> KeptLayout:
    """Exponentials in the operand dtype with offsets by slab; float32 logits where the entropy is an output.

    Reason: the entropy's gradient -P (log P + H) cancels near a uniform distribution, and log P of a rounded
    exponential is off by the rounding. `sizes` is a `Walk` or what one is made from.
    """
    shape = (rows * kept_columns(sizes, vocab_size),)
    if sizes.entropy:
        return KeptLayout(shape, accumulator(operand), (0, rows, sizes.offset_tiles))
    return KeptLayout(shape, operand, (sizes.slabs_kept, rows, sizes.offset_tiles))


def forward(walk: Walk, hidden: list[Tensor], weight: list[Tensor], bias: Tensor | None, targets: Tensor) -> Saved:
    """hidden_k (M, H_k), weight_k (V, H_k), bias (V,), targets (M,) with a negative one where the row is ignored."""
    M, V, device, acc = targets.shape[0], weight[0].shape[0], targets.device, walk.gemm.acc
    state = RowState(
        run_max=buffers.empty("rows", (M,), acc, device).fill_(-torch.inf),
        run_sum=buffers.zeros("rows", (M,), acc, device),
        target_logit=buffers.empty("rows", (M,), acc, device).fill_(-torch.inf),
        entropy_sum=buffers.zeros("rows", (M,), acc, device) if walk.entropy else None,
    )
    layout = kept_layout(walk, walk.gemm.operand, M, V)
    kept = buffers.empty("kept", layout.shape, layout.dtype, device)
    offsets = buffers.empty("kept", layout.offsets, acc, device)
    tiled = walk.offset_tiles > 1
    units: list[Tensor] = []
    if walk.frozen_head:
        for _ in range(1 + walk.entropy):
            for block, wanted in zip(hidden, walk.hidden_grad, strict=True):
                if wanted:
                    units.append(buffers.zeros("dhidden", tuple(block.shape), acc, device))
    operands = [walk.gemm.prepared(block) for block in hidden]
    slab_buffer = None if tiled else _slab_buffer(walk, walk.row_block, walk.slab_width, device)
    for first in range(0, M, max(1, walk.row_block)):
        rows = slice(first, min(first + walk.row_block, M))
        block_state = RowState(*(None if part is None else part[rows] for part in state))
        # One list, so that a product that returns its own result frees the one it replaces.
        block_units = units if walk.row_block >= M else [unit[rows] for unit in units]
        for index, (start, stop) in enumerate(walk.slabs(V)):
            size, width = rows.stop - rows.start, stop - start
            bias_slab = _bias_slab(walk, bias, start, stop)
            place = _kept_slab(walk, kept, M, index, width)[rows] if index < walk.slabs_kept else None
            exponentials = (None, None) if place is None or walk.entropy else (place, offsets[index][rows])
            results = bias_slab, targets[rows], start, walk.transform, block_state, *exponentials
            if tiled:
                slab = walk.gemm.prepared(weight[0][start:stop])
                walk.kernels.tile_forward(operands[0][rows], slab, *results)
                continue
            z = _view(slab_buffer, size, width)
            z = _slab_logits(walk, [operand[rows] for operand in operands], weight, start, stop, z)
            if place is not None and walk.entropy:
                place.copy_(z)  # now: the kernel overwrites the logits
            if walk.frozen_head:
                _unit_slab(walk, z, bias_slab, targets[rows], weight, start, block_state, block_units)
            else:
                walk.kernels.slab_forward(z, *results)
        if block_units is not units:
            for unit, block_unit in zip(units, block_units, strict=True):
                unit[rows].copy_(block_unit)
    entropy = None
    log_sum = state.run_sum.log()
    if walk.entropy:
        entropy = log_sum - state.entropy_sum / state.run_sum
    scale = kept_gain(walk.gemm.operand)
    for unit in units:
        unit.div_((state.run_sum * scale).unsqueeze(1))
    return Saved(RowStats(state.run_max, log_sum, state.target_logit, entropy), kept, offsets, units)


def _kept_slab(walk: Walk, kept: Tensor, rows: int, index: int, width: int) -> Tensor:
    first = rows * index * walk.slab_width
    return kept[first : first + rows * width].view(rows, width)


def _unit_slab(
    walk: Walk,
    z: Tensor,  # (R, W)
    bias: Tensor | None,
    targets: Tensor,
    weight: list[Tensor],
    start: int,
    state: RowState,
    units: list[Tensor],  # each (R, H_k), what has been summed so far; replaced in the list
) -> None:
    """Frozen head: add this slab's exp(y - run_max) @ weight to the unit gradients, rescaled to the new maximum."""
    rows, width = z.shape
    device, acc, operand = z.device, walk.gemm.acc, walk.gemm.operand
    unit = z if operand == acc else buffers.empty("unit", (rows, width), operand, device)
    unit_entropy = buffers.empty("unit", (rows, width), operand, device) if walk.entropy else None
    rescale = buffers.empty("rows", (rows,), acc, device)
    max_step = buffers.empty("rows", (rows,), acc, device) if walk.entropy else None
    walk.kernels.slab_forward_unit(
        z, bias, targets, start, walk.transform, state, unit, unit_entropy, rescale, max_step
    )
    heads = [head for head, wanted in zip(weight, walk.hidden_grad, strict=True) if wanted]
    for k, head in enumerate(heads):
        slab = walk.gemm.prepared(head[start : start + width])
        if walk.entropy:
            logged = len(heads) + k
            units[logged].addcmul_(units[k], max_step.unsqueeze(1)).mul_(rescale.unsqueeze(1))
            units[logged] = walk.gemm.hidden_grad(walk.gemm.prepared(unit_entropy), slab, units[logged])
        units[k].mul_(rescale.unsqueeze(1))
        units[k] = walk.gemm.hidden_grad(walk.gemm.prepared(unit), slab, units[k])


@dataclass
class Grads:
    """Gradients by block; None where none was wanted. dhidden_k is float32 (M, H_k) over compacted rows."""

    hidden: list[Tensor | None]
    weight: list[Tensor | None]
    bias: Tensor | None


def row_scale(upstream: Upstream, operand: torch.dtype, slope: float) -> Tensor | None:
    """float16 only: a power of two for each row, at least as large as its upstream gradients.

    Hazard: a coefficient of 1e-6 times a probability flushes to zero in float16. Remedy: dz is divided by this and
    the factor goes to the float32 dhidden and to the hidden operand of dweight.
    """
    if operand != torch.float16:
        return None
    parts = [part.abs() for part in upstream if part is not None]
    return power_of_two(torch.stack(parts).amax(0) * slope, DZ_BINADES[torch.float16])


def power_of_two(largest: Tensor, binades: int) -> Tensor:
    """A power of two that `largest` may be divided by to stay below 2^binades, elementwise.

    Reason: where there is nothing, the smallest is taken, so that an empty row does not set the scale of others.
    """
    exponent = torch.where(largest > 0, torch.ceil(torch.log2(largest)), -100.0).clamp(-100, 120)
    return torch.exp2(exponent - binades)


def backward(
    walk: Walk,
    upstream: Upstream,
    hidden: list[Tensor],
    weight: list[Tensor],
    bias: Tensor | None,
    targets: Tensor,
    saved: Saved,
    dweight: list[Tensor | None],
    dbias: Tensor | None,
    *,
    accumulate: bool,
) -> Grads:
    """Gradients of sum(upstream * outputs). dweight_k (V, H_k) and dbias (V,) are filled, or added to."""
    M, V, device = targets.shape[0], weight[0].shape[0], targets.device
    scale = row_scale(upstream, walk.gemm.operand, walk.transform.slope_at_zero)
    if scale is not None:
        upstream = Upstream(*(None if part is None else part / scale for part in upstream))
    totals = [
        buffers.zeros("dhidden", tuple(block.shape), walk.gemm.acc, device) if wanted else None
        for block, wanted in zip(hidden, walk.hidden_grad, strict=True)
    ]
    weight_operands, gain = _weight_operands(walk, hidden, scale)
    all_kept = kept_columns(walk, V) >= V
    operands = [] if all_kept else [walk.gemm.prepared(block) for block in hidden]
    needs_slab = not all_kept or walk.gemm.operand == walk.gemm.acc or walk.entropy
    slab_buffer = _slab_buffer(walk, M, walk.slab_width, device) if needs_slab else None
    dz_buffer = None
    if walk.gemm.operand != walk.gemm.acc:
        dz_buffer = buffers.empty("dz", (M * walk.slab_width,), walk.gemm.operand, device)
    for index, (start, stop) in enumerate(walk.slabs(V)):
        width = stop - start
        kept = _kept_slab(walk, saved.kept, M, index, width) if index < walk.slabs_kept else None
        z = _view(slab_buffer, M, width)
        if kept is not None and not walk.entropy:
            src, offset = kept, saved.offsets[index]
            dz = z if dz_buffer is None else _view(dz_buffer, M, width)
            if dz is None:
                dz = buffers.empty("slab", (M, width), walk.gemm.acc, device)
        else:
            offset = None
            if kept is None:
                src = _slab_logits(walk, operands, weight, start, stop, z)
            else:  # a copy: the kernel overwrites it
                src = (buffers.empty("slab", (M, width), walk.gemm.acc, device) if z is None else z).copy_(kept)
            dz = src if dz_buffer is None else _view(dz_buffer, M, width)
        del z
        dbias_slab = buffers.empty("rows", (width,), walk.gemm.acc, device) if walk.bias_grad else None
        bias_slab = _bias_slab(walk, bias, start, stop)
        walk.kernels.slab_backward(
            src, offset, bias_slab, targets, start, walk.transform, saved.stats, upstream, scale, dz, dbias_slab
        )
        del src
        if walk.bias_grad:
            dbias[start:stop] = dbias[start:stop] + dbias_slab if accumulate else dbias_slab
        dz_operand = walk.gemm.prepared(dz) if any(walk.hidden_grad) or any(walk.weight_grad) else None
        for k, head in enumerate(weight):
            if totals[k] is not None:
                slab = walk.gemm.prepared(head[start:stop])
                totals[k] = walk.gemm.hidden_grad(dz_operand, slab, totals[k])
            if dweight[k] is not None:
                walk.gemm.weight_grad(
                    dz_operand, weight_operands[k], dweight[k][start:stop], accumulate=accumulate, gain=gain
                )
        del dz, dz_operand
    for total in totals:
        if total is not None:
            if scale is not None:
                total.mul_(scale.unsqueeze(1))
            _zero_ignored(total, targets)
    return Grads(totals, dweight, dbias)


def _zero_ignored(total: Tensor, targets: Tensor) -> None:
    """Hazard: an ignored row may hold NaN. Remedy: its gradient is selected to be 0, whatever was summed."""
    total.masked_fill_((targets < 0).unsqueeze(1), 0.0)


def _weight_operands(
    walk: Walk, hidden: list[Tensor], scale: Tensor | None
) -> tuple[list[Tensor | None], Tensor | None]:
    """The hidden operand of dweight, row-scaled for float16, and the scalar that scaling left out."""
    if scale is None or not any(walk.weight_grad):
        wanted = zip(hidden, walk.weight_grad, strict=True)
        return [walk.gemm.prepared(block) if flag else None for block, flag in wanted], None
    gain = scale.amax() if scale.numel() else scale.new_ones(())
    relative = (scale / gain).unsqueeze(1)
    operands = [
        walk.gemm.prepared(buffers.track("cast", (block * relative).to(block.dtype))) if flag else None
        for block, flag in zip(hidden, walk.weight_grad, strict=True)
    ]
    return operands, gain


def backward_unit(
    walk: Walk, upstream: Upstream, hidden: list[Tensor], weight: list[Tensor], targets: Tensor, saved: Saved
) -> Grads:
    """Frozen head: dhidden = at_target * W_y + factor * unit - c_ent * unit_entropy, no product over the vocabulary."""
    slope = walk.transform.slope_at_zero
    stats = saved.stats
    at_target = walk.kernels.target_slope(stats, upstream, walk.transform)
    factor = walk.kernels.other_slope(stats, upstream)
    if upstream.entropy is not None:
        factor = factor + upstream.entropy * stats.log_sum  # log P = (y - max) - log_sum; units hold the first part
    safe_targets = targets.clamp(min=0)
    wanted = [k for k, flag in enumerate(walk.hidden_grad) if flag]
    totals: list[Tensor | None] = [None] * len(hidden)
    for place, k in enumerate(wanted):
        total = buffers.empty("dhidden", tuple(hidden[k].shape), walk.gemm.acc, targets.device)
        step = max(1, (1 << 20) // max(1, hidden[k].shape[1] * walk.gemm.acc.itemsize))
        for first in range(0, targets.shape[0], step):
            rows = slice(first, first + step)
            head_rows = buffers.track("scratch", weight[k].index_select(0, safe_targets[rows]))
            if head_rows.dtype != walk.gemm.operand:
                head_rows = head_rows.to(walk.gemm.operand)
            torch.mul(saved.units[place][rows], (factor[rows] * slope).unsqueeze(1), out=total[rows])
            total[rows].addcmul_(head_rows.to(walk.gemm.acc), at_target[rows].unsqueeze(1))
            if upstream.entropy is not None:
                logged = saved.units[len(wanted) + place]
                total[rows].addcmul_(logged[rows], (upstream.entropy[rows] * -slope).unsqueeze(1))
        _zero_ignored(total, targets)
        totals[k] = total
    return Grads(totals, [None] * len(weight), None)
