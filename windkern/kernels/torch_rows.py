"""Row kernels in plain PyTorch: the readable back end, on any device.

Each works on blocks of rows so that temporaries stay small and, on a CPU, in cache. A slab `z` is overwritten.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from windkern.kernels import buffers
from windkern.kernels.contract import RowState, RowStats, Upstream, kept_gain, kept_log_gain
from windkern.kernels.torch_pairs import pair_terms, win_rates
from windkern.transform import LogitTransform

__all__ = [
    "other_slope",
    "pair_terms",
    "segment_sum",
    "slab_backward",
    "slab_forward",
    "slab_forward_unit",
    "target_slope",
    "win_rates",
]

# Bytes of one block of rows: the second-level cache of a CPU core, or enough to fill a GPU.
BLOCK_BYTES = {"cpu": 1 << 20}
BLOCK_BYTES_GPU = 32 << 20


def block_rows(rows: int, width: int, device_type: str) -> int:
    size = BLOCK_BYTES.get(device_type, BLOCK_BYTES_GPU)
    return max(1, min(rows, size // (4 * width)))


def scratch_bytes(rows: int, width: int, itemsize: int, device_type: str) -> int:
    """The most temporary memory any kernel of this file holds at once."""
    return 3 * block_rows(rows, width, device_type) * width * itemsize


def _scratch_like(block: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return buffers.empty("scratch", tuple(block.shape), dtype or block.dtype, block.device)


def _row_blocks(z: Tensor) -> Iterator[slice]:
    rows, width = z.shape
    step = block_rows(rows, width, z.device.type)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _apply_transform(y: Tensor, bias: Tensor | None, transform: LogitTransform) -> None:
    """In place: logits (r, W) to transformed logits; a -inf bias masks after any transform."""
    if bias is not None:
        y.add_(bias)
    if transform.softcap is not None:
        y.mul_(transform.scale / transform.softcap).tanh_().mul_(transform.softcap / transform.temperature)
        if bias is not None:
            y.masked_fill_(bias == -torch.inf, -torch.inf)
    elif not transform.is_identity:
        y.mul_(transform.slope_at_zero)


def _relative_slope(y: Tensor, transform: LogitTransform, out: Tensor) -> Tensor:
    """1 - tanh^2 of the transformed logits `y`: the transform's slope over its slope at zero."""
    # Reason: a saturated logit, tanh = 1, has slope exactly 0; so the rounded inverse must not be too small.
    torch.mul(y, transform.temperature / transform.softcap * (1 + 2 * torch.finfo(y.dtype).eps), out=out)
    # Hazard: a masked entry has y = -inf. Remedy: its slope is exactly 0, what tanh gives at -inf.
    return out.square_().neg_().add_(1.0).clamp_(min=0.0)


def _finite(maximum: Tensor) -> Tensor:
    """Hazard: -inf - (-inf) is NaN where all entries so far are masked. Remedy: shift those by 0."""
    return torch.where(maximum == -torch.inf, 0.0, maximum)


def _target_column(targets: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Column of each row's target in this slab, clamped into it, and whether it really lies there."""
    column = targets - start
    return column.clamp(0, width - 1).unsqueeze(1), (column >= 0) & (column < width)


def _exponentiate(y: Tensor, targets: Tensor, start: int, state: RowState, rows: slice) -> tuple[Tensor, ...]:
    """y (r, W) becomes exp(y - its maximum) and joins the running statistics.

    Returns the slab maximum, and the factors that carry the old statistics and this slab to the new maximum.
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


def slab_forward(
    z: Tensor,  # (M, W) float32 logits of columns start .. start + W, overwritten
    bias: Tensor | None,  # (W,)
    targets: Tensor,  # (M,) int64, negative where the row is ignored
    start: int,
    transform: LogitTransform,
    state: RowState,
    kept: Tensor | None,  # (M, W) operand dtype, out: exp(y - offset) * relative slope
    offset: Tensor | None,  # (M, 1) out
) -> None:
    """Online softmax over one slab; keeps what dz is made of without the entropy, where the plan has room for it.

    Hazard: log of a rounded exp is off by the rounding, and a slope made from that is noise where the cap is small.
    Remedy: the slope is multiplied in here; nothing is read back through a logarithm.
    """
    for rows in _row_blocks(z):
        y = z[rows]
        _apply_transform(y, bias, transform)
        slope = None
        if kept is not None and transform.softcap is not None:
            slope = _relative_slope(y, transform, _scratch_like(y))
        slab_max, _, _ = _exponentiate(y, targets[rows], start, state, rows)
        if kept is not None:
            gain = kept_gain(kept.dtype)
            y = y if slope is None else y.mul_(slope)
            kept[rows].copy_(y if gain == 1.0 else y.mul_(gain))
            offset[rows, 0] = slab_max - kept_log_gain(kept.dtype)


def slab_forward_unit(
    z: Tensor,  # (M, W), overwritten
    bias: Tensor | None,  # (W,)
    targets: Tensor,  # (M,)
    start: int,
    transform: LogitTransform,
    state: RowState,
    unit: Tensor,  # (M, W) operand dtype, out: gain * exp(y - run_max) * relative slope, 0 at the target
    unit_entropy: Tensor | None,  # (M, W) out: the same times (y - run_max)
    rescale: Tensor,  # (M,) out: factor for what was accumulated under the old maximum
    max_step: Tensor | None,  # (M,) out: old minus new maximum
) -> None:
    """Online softmax over one slab that also writes the GEMM operands of the frozen-head gradient."""
    for rows in _row_blocks(z):
        outputs = (None if part is None else part[rows] for part in (unit, unit_entropy, rescale, max_step))
        _unit_block(z[rows], bias, targets[rows], start, transform, state, rows, *outputs)


def _unit_block(y, bias, targets, start, transform, state, rows, unit, unit_entropy, rescale, max_step) -> None:
    _apply_transform(y, bias, transform)
    slope = None
    if transform.softcap is not None:
        slope = _relative_slope(y, transform, _scratch_like(y))
    old_max = state.run_max[rows].clone()
    slab_max, old_factor, slab_factor = _exponentiate(y, targets, start, state, rows)
    new_max = _finite(state.run_max[rows])
    rescale.copy_(old_factor)
    column, inside = _target_column(targets, start, y.shape[1])
    # Reason: W_y - sum P W cancels where the model is sure of the target; the target entry is added apart.
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


def target_slope(stats: RowStats, upstream: Upstream, transform: LogitTransform) -> Tensor:
    """d(loss) / d(logit before the transform) at each row's target, (M,): 1 - p comes from -expm1(logp)."""
    logps = stats.logps
    p = logps.exp()
    slope = torch.zeros_like(logps)
    if upstream.logp is not None:
        slope += upstream.logp * -torch.expm1(logps)
    if upstream.lse is not None:
        slope += upstream.lse * p
    if upstream.entropy is not None:
        # Hazard: a masked target has logp = -inf and p = 0. Remedy: p log p is 0 there.
        slope -= upstream.entropy * torch.where(p > 0, p * (logps + stats.entropy), 0.0)
    if transform.softcap is not None:
        slope *= _relative_slope(stats.target_logit, transform, torch.empty_like(slope))
    return slope * transform.slope_at_zero


def other_slope(stats: RowStats, upstream: Upstream) -> Tensor:
    """Factor of P at every entry but the target's, (M,), before the transform's slope; the log P term is apart."""
    factor = torch.zeros_like(stats.run_max)
    if upstream.logp is not None:
        factor -= upstream.logp
    if upstream.lse is not None:
        factor += upstream.lse
    if upstream.entropy is not None:
        factor -= upstream.entropy * stats.entropy
    return factor


def slab_backward(
    src: Tensor,  # (M, W): kept exp(y - offset) * relative slope, or logits (then overwritten)
    offset: Tensor | None,  # (M, 1) of a kept slab, which has no entropy upstream; None says src holds logits
    bias: Tensor | None,  # (W,)
    targets: Tensor,  # (M,)
    start: int,
    transform: LogitTransform,
    stats: RowStats,
    upstream: Upstream,
    row_scale: Tensor | None,  # (M,) what upstream was divided by, for dbias
    dz: Tensor,  # (M, W) operand dtype, out; may be src when that holds logits of the same dtype
    dbias: Tensor | None,  # (W,) out: the sum of dz over rows
) -> None:
    """dz = slope * (c_logp * onehot + P * (c_lse - c_logp - c_ent * (log P + entropy))), 0 in ignored rows."""
    at_target = target_slope(stats, upstream, transform)
    factor = other_slope(stats, upstream) * transform.slope_at_zero
    ignored = (targets < 0).unsqueeze(1)
    any_ignored = targets.device.type != "cpu" or bool(ignored.any())  # a GPU is not asked: Python would wait
    if dbias is not None:
        dbias.zero_()
    for rows in _row_blocks(src):
        block_stats = RowStats(*(None if part is None else part[rows] for part in stats))
        block_offset = None if offset is None else offset[rows]
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
        column, inside = _target_column(targets[rows], start, p.shape[1])
        entry = torch.where(inside, at_target[rows], p.gather(1, column).squeeze(1))
        p.scatter_(1, column, entry.unsqueeze(1))
        if any_ignored:
            # Hazard: an ignored row may hold NaN, and 0 * NaN is NaN. Remedy: select.
            p.masked_fill_(ignored[rows], 0.0)
        if dbias is not None:
            dbias.add_(p.sum(0) if row_scale is None else row_scale[rows] @ p)
        if p.data_ptr() != dz[rows].data_ptr():
            dz[rows].copy_(p)
        del p, slope


def _probabilities(
    src: Tensor, offset: Tensor | None, bias: Tensor | None, transform: LogitTransform, stats: RowStats
) -> tuple[Tensor, Tensor | None]:
    """P (r, W) in place of logits and the transform's relative slope; or their product in a copy of a kept slab."""
    if offset is not None:
        p = _scratch_like(src, stats.run_max.dtype).copy_(src)
        return p.mul_(((offset.squeeze(1) - stats.run_max) - stats.log_sum).exp().unsqueeze(1)), None
    _apply_transform(src, bias, transform)
    slope = None if transform.softcap is None else _relative_slope(src, transform, _scratch_like(src))
    # Reason: max and log(sum) are subtracted one after the other; their rounded sum would cost digits.
    return src.sub_(stats.run_max.unsqueeze(1)).sub_(stats.log_sum.unsqueeze(1)).exp_(), slope


def segment_sum(values: Tensor, bounds: Tensor) -> Tensor:
    """Sums of values[bounds[s] : bounds[s + 1]] for each s, in one fixed order: (M,), (S + 1,) -> (S,)."""
    # Reason: float64 partial sums make long sequences exact to float32 rounding whatever the order inside.
    sums = torch.segment_reduce(values.double(), "sum", offsets=bounds, initial=0.0, unsafe=True)
    return sums.to(values.dtype)
