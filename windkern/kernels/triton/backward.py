"""Triton kernels for dz, from kept exponentials or recomputed logits, and for the bias gradient."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from windkern.kernels.contract import Kept, RowStats, Slab, Upstream
from windkern.kernels.triton.exps import column_sums
from windkern.kernels.triton.launch import ROW_POINTERS, block_constants, kept_pointers, or_unused
from windkern.kernels.triton.launcher import launch
from windkern.kernels.triton.maths import one_minus_p, relative_slope, transform_logit
from windkern.kernels.tuned import tile_config

_POINTERS = [*ROW_POINTERS, "log_sum_ptr", "c_logp_ptr", "c_lse_ptr", "c_ent_ptr"]


@triton.jit
def _given(pointer, row, HAS: tl.constexpr, like):
    value = tl.zeros_like(like)
    if HAS:
        value = tl.load(pointer + row)
    return value


@triton.jit(do_not_specialize=["width", "start", "tiles"], do_not_specialize_on_alignment=_POINTERS)
def backward_rows(
    src_ptr,  # (M, W) kept exp(y - offset) * relative slope, or logits
    offset_ptr,  # (M, tiles)
    bias_ptr,
    targets_ptr,
    max_ptr,
    log_sum_ptr,
    target_ptr,
    entropy_ptr,
    c_logp_ptr,
    c_lse_ptr,
    c_ent_ptr,
    dz_ptr,  # (M, W) out, may be src
    src_stride,
    dz_stride,
    width,
    start,
    tiles,
    slope,
    cap_in,
    cap_out,
    KEPT: tl.constexpr,
    TILE: tl.constexpr,  # columns that share an offset; 0: the whole row
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    HAS_LOGP: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_ENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if ALIGNED:
        width = width // 16 * 16  # tells the compiler that 16 divides it
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    run_max, log_sum = tl.load(max_ptr + row), tl.load(log_sum_ptr + row)
    c_logp = _given(c_logp_ptr, row, HAS_LOGP, log_sum)
    c_lse = _given(c_lse_ptr, row, HAS_LSE, log_sum)
    c_ent = _given(c_ent_ptr, row, HAS_ENT, log_sum)
    entropy = _given(entropy_ptr, row, HAS_ENT, log_sum)
    factor = (c_lse - c_logp - c_ent * entropy) * slope
    source = tl.load(src_ptr + row * src_stride + columns, mask=inside, other=0.0).to(log_sum.dtype)
    if KEPT:
        if TILE == 0:
            offset = tl.load(offset_ptr + row)
        else:
            offset = tl.load(offset_ptr + row * tiles + columns // TILE, mask=inside, other=0.0)
        d = source * tl.exp((offset - run_max) - log_sum) * factor
    else:
        bias = source
        if HAS_BIAS:
            bias = tl.load(bias_ptr + columns, mask=inside, other=0.0)
        y = transform_logit(source, bias, slope, cap_in, cap_out, HAS_BIAS, CAPPED)
        # Reason: max and log(sum) are subtracted one after the other because their rounded sum would cost digits.
        logp = (y - run_max) - log_sum
        p = tl.exp(logp)
        d = p * factor
        if HAS_ENT:
            d = d - tl.where(p > 0.0, p * logp * (c_ent * slope), 0.0)
        if CAPPED:
            d = d * relative_slope(y, cap_out)

    target_logit = tl.load(target_ptr + row)
    target_logp = (target_logit - run_max) - log_sum
    target_p = tl.exp(target_logp)
    entry = c_logp * one_minus_p(target_logp) + c_lse * target_p
    if HAS_ENT:
        entry = entry - tl.where(target_p > 0.0, c_ent * target_p * (target_logp + entropy), 0.0)
    if CAPPED:
        entry = entry * relative_slope(target_logit, cap_out)
    target = tl.load(targets_ptr + row)
    column = (target - start).to(tl.int32)
    d = tl.where(columns == column, entry * slope, d)
    # Hazard: an ignored row can hold NaN, and 0 * NaN is NaN. Remedy: select.
    d = tl.where(target < 0, 0.0, d)
    tl.store(dz_ptr + row * dz_stride + columns, d.to(dz_ptr.dtype.element_ty), mask=inside)


def slab_backward(
    slab: Slab,
    kept: Kept | None,
    stats: RowStats,
    upstream: Upstream,
    row_scale: Tensor | None,
    dz: Tensor,
    dbias: Tensor | None,
) -> None:
    """Like `kernels.torch.rows.slab_backward`; the kept offsets may be one number for each tile of columns."""
    rows, width = dz.shape
    if rows == 0:
        if dbias is not None:
            dbias.zero_()
        return
    tiles = 1 if kept is None else kept.offset.shape[1]
    src, offset, stride = kept_pointers(kept, slab.logits if kept is None else kept.values)
    constants = block_constants(slab, stats.run_max.dtype, width)
    launch(
        backward_rows,
        rows * triton.cdiv(width, constants["BLOCK"]),
        src,
        offset,
        or_unused(slab.bias, src),
        slab.targets,
        stats.run_max,
        stats.log_sum,
        stats.target_logit,
        *(or_unused(part, src) for part in (stats.entropy, *upstream)),
        dz,
        src.stride(0) if kept is None else stride,
        dz.stride(0),
        width,
        slab.start,
        tiles,
        KEPT=kept is not None,
        TILE=0 if tiles == 1 else tile_config().columns,
        HAS_LOGP=upstream.logp is not None,
        HAS_LSE=upstream.lse is not None,
        HAS_ENT=upstream.entropy is not None,
        **constants,
    )
    if dbias is not None:
        column_sums(dz, row_scale, dbias)
