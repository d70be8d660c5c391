"""Backward row kernels in Triton: kept probabilities or recomputed logits to dz, and the bias gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from windkern.kernels import buffers
from windkern.kernels.contract import RowStats, Upstream
from windkern.kernels.triton_launch import or_unused, transform_numbers
from windkern.kernels.triton_maths import one_minus_p, relative_slope, transform_logit
from windkern.kernels.tuned import backward_config, tile_config
from windkern.transform import LogitTransform

COLUMN_SUM_ROWS = 1024  # rows that one program of the bias gradient sums


@triton.jit
def _given(pointer, row, HAS: tl.constexpr, like):
    value = like * 0.0
    if HAS:
        value = tl.load(pointer + row)
    return value


@triton.jit
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
    BLOCK: tl.constexpr,
):
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
    source = tl.load(src_ptr + row * width + columns, mask=inside, other=0.0).to(log_sum.dtype)
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
        # Reason: max and log(sum) are subtracted one after the other; their rounded sum would cost digits.
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
    # Hazard: an ignored row may hold NaN, and 0 * NaN is NaN. Remedy: select.
    d = tl.where(target < 0, 0.0, d)
    tl.store(dz_ptr + row * width + columns, d.to(dz_ptr.dtype.element_ty), mask=inside)


@triton.jit
def column_sums(
    dz_ptr,
    scale_ptr,
    partial_ptr,
    rows,
    width,
    ROWS: tl.constexpr,
    SCALED: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """partial (parts, W): sums over ROWS rows each of scale * dz."""
    part = tl.program_id(1)
    columns = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = columns < width
    total = tl.zeros([BC], dtype=partial_ptr.dtype.element_ty)
    for first in range(0, ROWS, BR):
        row = (part * ROWS + first + tl.arange(0, BR)).to(tl.int64)
        mask = (row < rows)[:, None] & inside[None, :]
        d = tl.load(dz_ptr + row[:, None] * width + columns[None, :], mask=mask, other=0.0).to(total.dtype)
        if SCALED:
            d = d * tl.load(scale_ptr + row, mask=row < rows, other=0.0)[:, None]
        total += tl.sum(d, 0)
    tl.store(partial_ptr + part.to(tl.int64) * width + columns, total, mask=inside)


def slab_backward(
    src: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    targets: Tensor,
    start: int,
    transform: LogitTransform,
    stats: RowStats,
    upstream: Upstream,
    row_scale: Tensor | None,
    dz: Tensor,
    dbias: Tensor | None,
) -> None:
    """As `torch_rows.slab_backward`; `offset` may hold one number for each tile of columns."""
    rows, width = src.shape
    if rows == 0:
        if dbias is not None:
            dbias.zero_()
        return
    tiles = 1 if offset is None else offset.shape[1]
    block, warps = backward_config(width)
    backward_rows[(rows * triton.cdiv(width, block),)](
        src,
        or_unused(offset, src),
        or_unused(bias, src),
        targets,
        stats.run_max,
        stats.log_sum,
        stats.target_logit,
        or_unused(stats.entropy, src),
        or_unused(upstream.logp, src),
        or_unused(upstream.lse, src),
        or_unused(upstream.entropy, src),
        dz,
        width,
        start,
        tiles,
        KEPT=offset is not None,
        TILE=0 if tiles == 1 else tile_config().columns,
        HAS_BIAS=bias is not None,
        HAS_LOGP=upstream.logp is not None,
        HAS_LSE=upstream.lse is not None,
        HAS_ENT=upstream.entropy is not None,
        BLOCK=block,
        num_warps=warps,
        **transform_numbers(transform, stats.run_max.dtype),
    )
    if dbias is not None:
        _bias_gradient(dz, row_scale, dbias)


def _bias_gradient(dz: Tensor, row_scale: Tensor | None, dbias: Tensor) -> None:
    """dbias = sum over rows of row_scale * dz, in a fixed order."""
    rows, width = dz.shape
    parts = triton.cdiv(rows, COLUMN_SUM_ROWS)
    partial = buffers.empty("scratch", (parts, width), dbias.dtype, dz.device)
    column_sums[(triton.cdiv(width, 128), parts)](
        dz,
        or_unused(row_scale, dz),
        partial,
        rows,
        width,
        ROWS=COLUMN_SUM_ROWS,
        SCALED=row_scale is not None,
        BR=32,
        BC=128,
        num_warps=4,
    )
    torch.sum(partial, 0, out=dbias)
