"""Triton kernels for the exponentials that are operands of backward's products: see `Exps` in contract.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from windkern.kernels import buffers
from windkern.kernels.contract import PIVOT_ROOM, Exps, RowState, Slab
from windkern.kernels.triton.launch import ROW_POINTERS, block_constants, or_unused, slab_pointers, wide_constants
from windkern.kernels.triton.launcher import launch
from windkern.kernels.triton.maths import finite, look_at_row, merge, transform_logit

COLUMN_SUM_ROWS = 1024  # rows per program of a column sum
_ROOM = tl.constexpr(PIVOT_ROOM)


@triton.jit
def rescale_row(row_ptr, columns_before, factor, BLOCK: tl.constexpr):
    """row *= factor; a row whose factor is 1 is not touched."""
    end = tl.where(factor == 1.0, 0, columns_before)
    for first in range(0, end, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < end
        values = tl.load(row_ptr + columns, mask=inside, other=0.0)
        scaled = values.to(factor.dtype) * factor
        tl.store(row_ptr + columns, scaled.to(values.dtype), mask=inside)


@triton.jit
def exps_block(
    z_ptr,
    bias_ptr,
    targets_ptr,
    target_ptr,
    values_ptr,
    row,
    z_stride,
    values_stride,
    width,
    start,
    earlier,
    run_max,
    run_sum,
    pivot,
    slope,
    cap_in,
    cap_out,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Pass up to BLOCK columns of a row: return its statistics and pivot, and the factor of what came earlier."""
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    e, _y, part_max, part_sum, none, _none, target, column, has_target = look_at_row(
        z_ptr,
        bias_ptr,
        targets_ptr,
        target_ptr,
        row,
        z_stride,
        width,
        start,
        slope,
        cap_in,
        cap_out,
        HAS_BIAS,
        CAPPED,
        False,
        BLOCK,
    )
    new_max, new_sum, _, _, _ = merge(run_max, run_sum, none, part_max, part_sum, none)
    tl.store(target_ptr + row, target, mask=has_target)
    fresh = pivot == float("-inf")
    moves = part_max > pivot + _ROOM
    new_pivot = tl.where(moves | fresh, part_max, pivot)
    factor = tl.where(moves & (fresh == 0), tl.exp(pivot - finite(new_pivot)), 1.0)
    values = e * tl.exp(part_max - finite(new_pivot))
    # Reason: W_y - sum P W cancels where the model is sure of the target, so the target's entry is set separately.
    # Hazard: an ignored row can hold NaN, and 0 * NaN is NaN in a product. Remedy: write zeros there.
    ignored = tl.load(targets_ptr + row) < 0
    values = tl.where((columns == column) | ignored, 0.0, values)
    values_row = values_ptr + row * values_stride
    tl.store(values_row + columns, values.to(values_ptr.dtype.element_ty), mask=inside)
    STEP: tl.constexpr = BLOCK if BLOCK < 2048 else 2048
    if WIDE:
        # Hazard: other warps have written earlier columns of this program. Remedy: a barrier. All take this branch.
        if factor != 1.0:
            tl.debug_barrier()
            rescale_row(values_row - earlier, earlier, factor, STEP)
    else:
        rescale_row(values_row - earlier, earlier, factor, STEP)
    return new_max, new_sum, new_pivot, factor


@triton.jit(do_not_specialize=["width", "start", "earlier"], do_not_specialize_on_alignment=ROW_POINTERS)
def exps_rows(
    z_ptr,  # (M, W) logits
    bias_ptr,  # (W,)
    targets_ptr,  # (M,) int64
    max_ptr,
    sum_ptr,
    target_ptr,  # (M,) running statistics
    values_ptr,  # (M, W) out, may be z: exp(y - pivot)
    pivot_ptr,  # (M,)
    moved_ptr,  # (M,) out
    z_stride,
    values_stride,
    width,
    start,
    earlier,  # columns before values in the same rows
    slope,
    cap_in,
    cap_out,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    MOVED: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,  # a row is wider than BLOCK
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if ALIGNED:
        width = width // 16 * 16  # tells the compiler that 16 divides it
    # Hazard: a warp may store a statistic before another warp has read it. Remedy: statistics are read before the
    # reductions, whose barriers come before any store.
    run_max, run_sum, pivot = tl.load(max_ptr + row), tl.load(sum_ptr + row), tl.load(pivot_ptr + row)
    old_pivot, moved = pivot, tl.full([], 1.0, pivot.dtype)
    if WIDE:
        end = width
    else:
        end = 1
    for first in range(0, end, BLOCK):
        run_max, run_sum, pivot, factor = exps_block(
            z_ptr + first,
            bias_ptr + first,
            targets_ptr,
            target_ptr,
            values_ptr + first,
            row,
            z_stride,
            values_stride,
            width - first,
            start + first,
            earlier + first,
            run_max,
            run_sum,
            pivot,
            slope,
            cap_in,
            cap_out,
            HAS_BIAS,
            CAPPED,
            WIDE,
            BLOCK,
        )
        moved = moved * factor
    tl.store(max_ptr + row, run_max)
    tl.store(sum_ptr + row, run_sum)
    tl.store(pivot_ptr + row, pivot)
    if MOVED:
        tl.store(moved_ptr + row, tl.where(old_pivot == float("-inf"), 1.0, moved))


@triton.jit(do_not_specialize=["width", "start"], do_not_specialize_on_alignment=ROW_POINTERS)
def again_rows(
    z_ptr,
    bias_ptr,
    targets_ptr,
    pivot_ptr,
    entry_ptr,  # (M,)
    values_ptr,  # (M, W) out, may be z
    z_stride,
    values_stride,
    width,
    start,
    slope,
    cap_in,
    cap_out,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if ALIGNED:
        width = width // 16 * 16  # tells the compiler that 16 divides it
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    z = tl.load(z_ptr + row * z_stride + columns, mask=inside, other=0.0)
    bias = z
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0)
    y = transform_logit(z, bias, slope, cap_in, cap_out, HAS_BIAS, CAPPED)
    values = tl.exp(y - tl.load(pivot_ptr + row))
    target = tl.load(targets_ptr + row)
    values = tl.where(columns == (target - start).to(tl.int32), tl.load(entry_ptr + row), values)
    values = tl.where(target < 0, 0.0, values)  # an ignored row can hold anything
    tl.store(values_ptr + row * values_stride + columns, values.to(values_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["columns"])
def rescale_kernel(sums_ptr, factor_ptr, stride, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    rescale_row(sums_ptr + row * stride, columns, tl.load(factor_ptr + row), BLOCK)


@triton.jit(do_not_specialize=["rows", "width"])
def column_sum_parts(
    values_ptr,
    weights_ptr,
    partial_ptr,
    stride,
    rows,
    width,
    ROWS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """partial (parts, W) = sums of weight * value, each over ROWS rows."""
    part = tl.program_id(1)
    columns = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = columns < width
    total = tl.zeros([BC], dtype=partial_ptr.dtype.element_ty)
    for first in range(0, ROWS, BR):
        row = (part * ROWS + first + tl.arange(0, BR)).to(tl.int64)
        mask = (row < rows)[:, None] & inside[None, :]
        d = tl.load(values_ptr + row[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(total.dtype)
        if WEIGHTED:
            d = d * tl.load(weights_ptr + row, mask=row < rows, other=0.0)[:, None]
        total += tl.sum(d, 0)
    tl.store(partial_ptr + part.to(tl.int64) * width + columns, total, mask=inside)


def exps_forward(slab: Slab, state: RowState, exps: Exps) -> None:
    """Like `kernels.torch.rows.exps_forward`."""
    z = slab.logits
    if z.shape[0] == 0:
        return
    launch(
        exps_rows,
        z.shape[0],
        *slab_pointers(slab),
        *state[:3],
        exps.values,
        exps.pivot,
        or_unused(exps.moved, exps.pivot),
        z.stride(0),
        exps.values.stride(0),
        z.shape[1],
        slab.start,
        exps.earlier,
        MOVED=exps.moved is not None,
        **wide_constants(slab, state.run_max.dtype, z.shape[1]),
    )


def exps_backward(slab: Slab, pivot: Tensor, entry: Tensor, values: Tensor) -> None:
    """Like `kernels.torch.rows.exps_backward`."""
    rows, width = values.shape
    if rows == 0:
        return
    constants = block_constants(slab, pivot.dtype, width)
    launch(
        again_rows,
        rows * triton.cdiv(width, constants["BLOCK"]),
        *slab_pointers(slab),
        pivot,
        entry,
        values,
        slab.logits.stride(0),
        values.stride(0),
        width,
        slab.start,
        **constants,
    )


def rescale_rows(sums: Tensor, factor: Tensor) -> None:
    """Like `kernels.torch.rows.rescale_rows`: one program per row, which returns at once if the factor is 1."""
    if sums.shape[0]:
        launch(rescale_kernel, sums.shape[0], sums, factor, sums.stride(0), sums.shape[1], BLOCK=1024, num_warps=4)


def column_sums(values: Tensor, weights: Tensor | None, sums: Tensor) -> None:
    """Like `kernels.torch.rows.column_sums`, in a fixed order; without weights, every row has weight 1."""
    rows, width = values.shape
    if rows == 0:
        sums.zero_()
        return
    parts = triton.cdiv(rows, COLUMN_SUM_ROWS)
    partial = buffers.empty("scratch", (parts, width), sums.dtype, values.device)
    column_sum_parts[(triton.cdiv(width, 128), parts)](
        values,
        or_unused(weights, values),
        partial,
        values.stride(0),
        rows,
        width,
        ROWS=COLUMN_SUM_ROWS,
        WEIGHTED=weights is not None,
        BR=32,
        BC=128,
        num_warps=4,
    )
    torch.sum(partial, 0, out=sums)
