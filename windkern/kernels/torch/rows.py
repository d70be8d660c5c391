"""Row kernels in plain PyTorch: the readable back end, on any device.

Each kernel works on blocks of rows so that temporaries stay small and, on a CPU, in cache. The slab is overwritten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from windkern.kernels import buffers
from windkern.kernels.contract import (
    PIVOT_ROOM,
    SETTLED_ROOM,
    Exps,
    HiddenGrad,
    Kept,
    RowState,
    RowStats,
    Settled,
    Slab,
    Unit,
    Upstream,
    kept_gain,
    kept_log_gain,
    other_slope,
    relative_slope,
    target_slope,
)
from windkern.kernels.torch.pairs import pair_terms, win_rates
from windkern.transform import LogitTransform

__all__ = [
    "column_sums",
    "exps_backward",
    "exps_forward",
    "finish_rows",
    "pair_terms",
    "rescale_rows",
    "row_factors",
    "segment_sum",
    "slab_backward",
    "slab_forward",
    "slab_forward_unit",
    "win_rates",
    "write_hidden_grad",
]

# Bytes of one block of rows: the second-level cache of a CPU core, or enough to fill a GPU.
BLOCK_BYTES = {"cpu": 1 << 20}
BLOCK_BYTES_GPU = 32 << 20


def block_rows(rows: int, width: int, device_type: str) -> int:
    size = BLOCK_BYTES.get(device_type, BLOCK_BYTES_GPU)
    return max(1, min(rows, size // (4 * width)))


def scratch_bytes(rows: int, width: int, itemsize: int, device_type: str) -> int:
    """Return the most temporary bytes that a kernel of this file holds at once."""
    return 3 * block_rows(rows, width, device_type) * width * itemsize


def _scratch_like(block: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return buffers.empty("scratch", tuple(block.shape), dtype or block.dtype, block.device)


def _row_blocks(z: Tensor) -> Iterator[slice]:
    rows, width = z.shape
    step = block_rows(rows, width, z.device.type)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _apply_transform(y: Tensor, bias: Tensor | None, transform: LogitTransform) -> None:
    """Transform logits (r, W) in place; a bias of -inf masks after any transform."""
    if bias is not None:
        y.add_(bias)
    if transform.softcap is not None:
        y.mul_(transform.scale / transform.softcap).tanh_().mul_(transform.softcap / transform.temperature)
        if bias is not None:
            y.masked_fill_(bias == -torch.inf, -torch.inf)
    elif not transform.is_identity:
        y.mul_(transform.slope_at_zero)


def _finite(maximum: Tensor) -> Tensor:
    """Replace a maximum of -inf by 0.

    Hazard: -inf - (-inf) is NaN where all entries so far are masked. Remedy: shift those by 0.
    """
    return torch.where(maximum == -torch.inf, 0.0, maximum)


def _target_column(targets: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the column of each row's target, clamped into this slab, and whether the target lies in the slab."""
    column = targets - start
    return column.clamp(0, width - 1).unsqueeze(1), (column >= 0) & (column < width)


def _exponentiate(y: Tensor, targets: Tensor, start: int, state: RowState, rows: slice) -> tuple[Tensor, ...]:
    """Replace y (r, W) by exp(y - its maximum), and add it to the running statistics.

    Returns the slab maximum, and the factors that rescale the old statistics and this slab to the new maximum.
    """
    run_max, run_sum, target_logit, entropy_sum = (None if part is None else part[rows] for part in state)
    column, inside = _target_column(targets, start, y.shape[1])
    target_logit.copy_(torch.where(inside, y.gather(1, column).squeeze(1), target_logit))
    slab_max = y.amax(1)
    new_max = torch.maximum(run_max, slab_max)
    old_factor = torch.exp(run_max - _finite(new_max))
    slab_factor = torch.exp(slab_max - _finite(new_max))
    y.sub_(_finite(slab_max).unsqueeze(1)).exp_()
    slab_sum = y.sum(1)
    if entropy_sum is not None:
        old_gap = torch.where(run_max == -torch.inf, 0.0, run_max - _finite(new_max))
        slab_gap = torch.where(slab_max == -torch.inf, 0.0, slab_max - _finite(new_max))
        slab_entropy = -torch.special.entr(y, out=_scratch_like(y)).sum(1)  # entr(e) = -e log e, and entr(0) = 0
        entropy_sum.copy_(
            old_factor * (entropy_sum + run_sum * old_gap) + slab_factor * (slab_entropy + slab_sum * slab_gap)
        )
    run_sum.copy_(run_sum * old_factor + slab_sum * slab_factor)
    run_max.copy_(new_max)
    return slab_max, old_factor, slab_factor


def slab_forward(slab: Slab, state: RowState, kept: Kept | None) -> None:
    """Run the online softmax over one slab, and fill `kept` unless it is None.

    Hazard: log of a rounded exp is off by the rounding, and a slope computed from it is noise where the cap is small.
    Remedy: multiply by the slope here, so that nothing is read back through a logarithm.
    """
    for rows in _row_blocks(slab.logits):
        y = slab.logits[rows]
        _apply_transform(y, slab.bias, slab.transform)
        slope = None
        if kept is not None and slab.transform.softcap is not None:
            slope = relative_slope(y, slab.transform, _scratch_like(y))
        slab_max, _, _ = _exponentiate(y, slab.targets[rows], slab.start, state, rows)
        if kept is not None:
            gain = kept_gain(kept.values.dtype)
            y = y if slope is None else y.mul_(slope)
            kept.values[rows].copy_(y if gain == 1.0 else y.mul_(gain))
            kept.offset[rows, 0] = slab_max - kept_log_gain(kept.values.dtype)


def slab_forward_unit(slab: Slab, state: RowState, unit: Unit) -> None:
    """Run the online softmax over one slab, and write the operands of the frozen head's products."""
    for rows in _row_blocks(slab.logits):
        outputs = (None if part is None else part[rows] for part in unit)
        block = slab.logits[rows], slab.bias, slab.targets[rows], slab.start, slab.transform
        _unit_block(*block, state, rows, *outputs)


def _unit_block(
    y: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    start: int,
    transform: LogitTransform,
    state: RowState,
    rows: slice,
    unit: Tensor,
    unit_entropy: Tensor | None,
    rescale: Tensor,
    max_step: Tensor | None,
) -> None:
    _apply_transform(y, bias, transform)
    slope = None
    if transform.softcap is not None:
        slope = relative_slope(y, transform, _scratch_like(y))
    old_max = state.run_max[rows].clone()
    slab_max, old_factor, slab_factor = _exponentiate(y, targets, start, state, rows)
    new_max = _finite(state.run_max[rows])
    rescale.copy_(old_factor)
    column, inside = _target_column(targets, start, y.shape[1])
    # Reason: W_y - sum P W cancels where the model is sure of the target, so the target's entry is added separately.
    y.scatter_(1, column, torch.where(inside.unsqueeze(1), 0.0, y.gather(1, column)))
    factor = (slab_factor * kept_gain(unit.dtype)).unsqueeze(1)
    if slope is not None:
        factor = slope.mul_(factor)
    if unit_entropy is not None:
        max_step.copy_(torch.where(old_max == -torch.inf, 0.0, old_max - new_max))
        gap = torch.where(slab_max == -torch.inf, 0.0, slab_max - new_max).unsqueeze(1)
        weighted = torch.special.entr(y, out=_scratch_like(y))
        unit_entropy.copy_(weighted.neg_().addcmul_(y, gap).mul_(factor))
    unit.copy_(y.mul_(factor))


def slab_backward(
    slab: Slab,
    kept: Kept | None,
    stats: RowStats,
    upstream: Upstream,
    row_scale: Tensor | None,
    dz: Tensor,
    dbias: Tensor | None,
) -> None:
    """dz = slope * (c_logp * onehot + P * (c_lse - c_logp - c_ent * (log P + entropy))), 0 in ignored rows."""
    bias, targets, transform = slab.bias, slab.targets, slab.transform
    src = slab.logits if kept is None else kept.values
    at_target = target_slope(stats, upstream, transform)
    factor = other_slope(stats, upstream) * transform.slope_at_zero
    ignored = _ignored(targets)
    if dbias is not None:
        dbias.zero_()
    for rows in _row_blocks(src):
        block_stats = RowStats(*(None if part is None else part[rows] for part in stats))
        block_offset = None if kept is None else kept.offset[rows]
        p, slope = _probabilities(src[rows], block_offset, bias, transform, block_stats)
        if upstream.entropy is None:
            p.mul_(factor[rows].unsqueeze(1))
        else:
            plogp = torch.special.entr(p, out=_scratch_like(p))
            p.mul_(factor[rows].unsqueeze(1))
            p.addcmul_(plogp, (upstream.entropy[rows] * transform.slope_at_zero).unsqueeze(1))
            del plogp
        if slope is not None:
            p.mul_(slope)
        _put_at_target(p, targets[rows], slab.start, at_target[rows])
        if ignored is not None:
            p.masked_fill_(ignored[rows], 0.0)
        if dbias is not None:
            dbias.add_(p.sum(0) if row_scale is None else row_scale[rows] @ p)
        if p.data_ptr() != dz[rows].data_ptr():
            dz[rows].copy_(p)
        del p, slope


def _ignored(targets: Tensor) -> Tensor | None:
    """Return the mask (M, 1) of ignored rows, or None on a CPU without any. (On a GPU, checking would block Python.)

    Hazard: an ignored row can hold NaN, and 0 * NaN is NaN. Remedy: select.
    """
    ignored = (targets < 0).unsqueeze(1)
    return ignored if targets.device.type != "cpu" or bool(ignored.any()) else None


def _put_at_target(values: Tensor, targets: Tensor, start: int, entry: Tensor) -> None:
    column, inside = _target_column(targets, start, values.shape[1])
    entry = torch.where(inside, entry, values.gather(1, column).squeeze(1))
    values.scatter_(1, column, entry.unsqueeze(1))


def exps_forward(slab: Slab, state: RowState, exps: Exps) -> None:
    """Run the online softmax over one slab, and write exp(y - pivot); rescale earlier columns where the pivot moves."""
    ignored = _ignored(slab.targets)
    for rows in _row_blocks(slab.logits):
        y, pivot = slab.logits[rows], exps.pivot[rows]
        _apply_transform(y, slab.bias, slab.transform)
        slab_max, _, _ = _exponentiate(y, slab.targets[rows], slab.start, state, rows)
        moves = (slab_max > pivot + PIVOT_ROOM) | ((pivot == -torch.inf) & (slab_max > -torch.inf))
        new = torch.where(moves, slab_max, pivot)
        factor = torch.where(moves & (pivot > -torch.inf), torch.exp(pivot - _finite(new)), 1.0)
        y.mul_(torch.exp(slab_max - _finite(new)).unsqueeze(1))
        # Reason: W_y - sum P W cancels where the model is sure of the target, so the target's entry is set separately.
        _put_at_target(y, slab.targets[rows], slab.start, torch.zeros_like(new))
        if ignored is not None:
            y.masked_fill_(ignored[rows], 0.0)
        values = exps.values[rows]
        if y.data_ptr() != values.data_ptr():
            values.copy_(y)
        if exps.earlier:
            shape = values.shape[0], exps.earlier
            rescale_rows(values.as_strided(shape, values.stride(), values.storage_offset() - exps.earlier), factor)
        if exps.moved is not None:
            exps.moved[rows] = factor
        pivot.copy_(new)


def exps_backward(slab: Slab, pivot: Tensor, entry: Tensor, values: Tensor) -> None:
    """values (M, W) = exp(y - pivot), `entry` (M,) at the target, 0 in ignored rows; may be the logits' memory."""
    ignored = _ignored(slab.targets)
    for rows in _row_blocks(slab.logits):
        y = slab.logits[rows]
        _apply_transform(y, slab.bias, slab.transform)
        y.sub_(pivot[rows].unsqueeze(1)).exp_()
        _put_at_target(y, slab.targets[rows], slab.start, entry[rows])
        if ignored is not None:
            y.masked_fill_(ignored[rows], 0.0)
        if y.data_ptr() != values[rows].data_ptr():
            values[rows].copy_(y)


def column_sums(values: Tensor, weights: Tensor, sums: Tensor) -> None:
    """sums (W,) = sum over rows of weights (M,) * values (M, W)."""
    sums.zero_()
    for rows in _row_blocks(values):
        block = values[rows]
        if block.dtype != sums.dtype:
            block = _scratch_like(block, sums.dtype).copy_(block)
        sums.add_(weights[rows] @ block)


def rescale_rows(sums: Tensor, factor: Tensor) -> None:
    """sums (M, H) *= factor (M,); on a CPU, blocks of rows whose factors are all 1 are skipped."""
    for rows in _row_blocks(sums):
        if sums.device.type != "cpu" or bool((factor[rows] != 1.0).any()):
            sums[rows].mul_(factor[rows].unsqueeze(1))


def finish_rows(
    state: RowState,
    targets: Tensor,
    log_sum: Tensor,
    logps: Tensor,
    lse: Tensor,
    settled: Settled | None,
    rescale: Callable[[Tensor, Tensor], None] = rescale_rows,
) -> None:
    """Write log(run_sum), log-probs and log-sum-exps of all rows, and settle the exponentials."""
    stats = RowStats(state.run_max, torch.log(state.run_sum, out=log_sum), state.target_logit, None)
    scored = targets >= 0
    logps.copy_(torch.where(scored, stats.logps, 0.0))
    lse.copy_(torch.where(scored, stats.run_max + log_sum, 0.0))
    if settled is not None:
        _settle(stats, state.run_sum, targets, settled, rescale)


def _settle(
    stats: RowStats, run_sum: Tensor, targets: Tensor, settled: Settled, rescale: Callable[[Tensor, Tensor], None]
) -> None:
    kept, pivot, total, entry, moves = settled
    if moves:
        new = torch.where(stats.run_max > pivot + SETTLED_ROOM, stats.run_max, pivot)
        if kept.shape[1]:
            never = (pivot == -torch.inf) | (new == pivot)
            rescale(kept, torch.where(never, 1.0, torch.exp(pivot - new)))
        pivot.copy_(new)
    # Reason: exp of the difference of two maxima is exact up to its rounding; exp(lse - pivot) is not.
    torch.mul(run_sum, torch.exp(stats.run_max - pivot), out=total)
    torch.mul(torch.expm1(stats.logps), total, out=entry)
    if kept.numel():
        inside = (targets >= 0) & (targets < kept.shape[1])
        # Reason: on a CPU, scatter_ makes a float32 copy of a whole 16-bit matrix.
        flat = kept.as_strided(((kept.shape[0] - 1) * kept.stride(0) + kept.shape[1],), (1,))
        place = torch.arange(kept.shape[0], device=kept.device) * kept.stride(0)
        place += targets.clamp(0, kept.shape[1] - 1)
        values = torch.where(inside, entry, flat.index_select(0, place))
        flat.index_copy_(0, place, values.to(kept.dtype))


def row_factors(
    upstream: Tensor,
    total: Tensor,
    targets: Tensor,
    slope: float,
    factor: Tensor,
    hidden: Tensor | None,
    scaled: Tensor | None,
) -> None:
    """factor = -slope * upstream / total, 0 in ignored rows; scaled = factor * hidden, rounded once."""
    torch.mul(torch.where(targets >= 0, upstream / total, 0.0), -slope, out=factor)
    if scaled is None:
        return
    ignored = _ignored(targets)
    torch.mul(hidden, factor.unsqueeze(1), out=scaled)
    if ignored is not None:
        scaled.masked_fill_(ignored, 0.0)


def write_hidden_grad(grad: HiddenGrad, targets: Tensor, rows: Tensor | None, out: Tensor) -> None:
    """Write factor * total + at_target * head[targets] to the rows of `out`, in blocks of rows."""
    count = out.shape[0] if rows is None else rows.shape[0]
    ignored = _ignored(targets)
    for block in _row_blocks(grad.total[:count]):
        part = grad.total[block]
        if not grad.owned:
            part = _scratch_like(part).copy_(part)
        if grad.factor is not None:
            part.mul_(grad.factor[block].unsqueeze(1))
        if grad.head is not None:
            found = buffers.track("scratch", grad.head.index_select(0, targets[block].clamp(min=0)))
            found = found.to(grad.rounded).to(part.dtype)
            part.addcmul_(found, grad.at_target[block].unsqueeze(1))
        if ignored is not None:
            part.masked_fill_(ignored[block], 0.0)
        if rows is not None:
            # Reason: spare rows of max_scored all point at one row and are zero, so adding them leaves it correct.
            out.index_add_(0, rows[block], part.to(out.dtype))
        elif part.data_ptr() != out[block].data_ptr():
            out[block].copy_(part)


def _probabilities(
    src: Tensor, offset: Tensor | None, bias: Tensor | None, transform: LogitTransform, stats: RowStats
) -> tuple[Tensor, Tensor | None]:
    """Return P (r, W) in place of the logits and the transform's relative slope; or their product, from kept values."""
    if offset is not None:
        p = _scratch_like(src, stats.run_max.dtype).copy_(src)
        return p.mul_(((offset.squeeze(1) - stats.run_max) - stats.log_sum).exp().unsqueeze(1)), None
    _apply_transform(src, bias, transform)
    slope = None if transform.softcap is None else relative_slope(src, transform, _scratch_like(src))
    # Reason: max and log(sum) are subtracted one after the other because their rounded sum would cost digits.
    return src.sub_(stats.run_max.unsqueeze(1)).sub_(stats.log_sum.unsqueeze(1)).exp_(), slope


def segment_sum(values: Tensor, bounds: Tensor) -> Tensor:
    """Sum values[bounds[s] : bounds[s + 1]] for each s, in one fixed order: (M,), (S + 1,) -> (S,)."""
    # Reason: with float64 partial sums, long sequences are exact to float32 rounding in any order of summation.
    sums = torch.segment_reduce(values.double(), "sum", offsets=bounds, initial=0.0, unsafe=True)
    return sums.to(values.dtype)
