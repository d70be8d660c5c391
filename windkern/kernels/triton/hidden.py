"""Triton kernels at both ends of backward: the factors of the rows, and the rows of dhidden in their final dtype."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from windkern.kernels.contract import HiddenGrad
from windkern.kernels.torch import rows as torch_rows
from windkern.kernels.triton.launch import ROW_POINTERS, or_unused
from windkern.kernels.triton.launcher import launch

BLOCK, WARPS = 1024, 4  # columns and warps of a program
_VECTORS = [*ROW_POINTERS, "upstream_ptr", "factor_ptr", "at_target_ptr", "rows_ptr"]


@triton.jit(do_not_specialize_on_alignment=_VECTORS)
def row_factors_kernel(
    upstream_ptr,
    total_ptr,
    targets_ptr,  # (M,)
    factor_ptr,  # (M,) out
    hidden_ptr,  # (M, columns)
    scaled_ptr,  # (M, columns) out
    hidden_stride,
    scaled_stride,
    columns,
    slope,
    BLOCK: tl.constexpr,
):
    blocks = tl.maximum(tl.cdiv(columns, BLOCK), 1)
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    ignored = tl.load(targets_ptr + row) < 0
    factor = -slope * (tl.load(upstream_ptr + row) / tl.load(total_ptr + row))
    factor = tl.where(ignored, 0.0, factor)
    tl.store(factor_ptr + row, factor, mask=block == 0)
    place = block * BLOCK + tl.arange(0, BLOCK)
    inside = place < columns
    # Hazard: an ignored row can hold NaN, and 0 * NaN is NaN in a product. Remedy: do not read it.
    values = tl.load(hidden_ptr + row * hidden_stride + place, mask=inside & (ignored == 0), other=0.0)
    scaled = values.to(factor.dtype) * factor
    tl.store(scaled_ptr + row * scaled_stride + place, scaled.to(scaled_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=_VECTORS)
def hidden_grad_kernel(
    sums_ptr,  # (M, columns)
    factor_ptr,
    at_target_ptr,  # (M,)
    head_ptr,  # (V, columns)
    targets_ptr,
    rows_ptr,  # (M,)
    out_ptr,  # (M or R, columns) out, may be sums
    sums_stride,
    head_stride,
    out_stride,
    columns,
    FACTOR: tl.constexpr,
    TARGET: tl.constexpr,
    SCATTERS: tl.constexpr,
    ROUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    place = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = place < columns
    target = tl.load(targets_ptr + row)
    scored = inside & (target >= 0)  # an ignored row can hold anything
    values = tl.load(sums_ptr + row * sums_stride + place, mask=scored, other=0.0)
    if FACTOR:
        values = values * tl.load(factor_ptr + row)
    if TARGET:
        found = tl.load(head_ptr + target * head_stride + place, mask=scored, other=0.0)
        values += tl.load(at_target_ptr + row) * found.to(ROUNDED).to(values.dtype)
    values = tl.where(scored, values, 0.0).to(out_ptr.dtype.element_ty)
    if SCATTERS:
        tl.store(out_ptr + tl.load(rows_ptr + row) * out_stride + place, values, mask=scored)
    else:
        tl.store(out_ptr + row * out_stride + place, values, mask=inside)


def row_factors(
    upstream: Tensor,
    total: Tensor,
    targets: Tensor,
    slope: float,
    factor: Tensor,
    hidden: Tensor | None,
    scaled: Tensor | None,
) -> None:
    """Like `kernels.torch.rows.row_factors`, in one launch where rows are contiguous."""
    if hidden is not None and hidden.stride(1) != 1:
        torch_rows.row_factors(upstream, total, targets, slope, factor, hidden, scaled)
        return
    rows, columns = targets.shape[0], 0 if scaled is None else scaled.shape[1]
    if rows == 0:
        return
    hidden, scaled = or_unused(hidden, factor), or_unused(scaled, factor)
    launch(
        row_factors_kernel,
        rows * max(1, triton.cdiv(columns, BLOCK)),
        upstream,
        total,
        targets,
        factor,
        hidden,
        scaled,
        hidden.stride(0),
        scaled.stride(0),
        columns,
        # Reason: Triton passes floats in float32; a constant keeps all digits.
        tl.constexpr(slope) if factor.dtype == torch.float64 else slope,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


def write_hidden_grad(grad: HiddenGrad, targets: Tensor, rows: Tensor | None, out: Tensor) -> None:
    """Like `kernels.torch.rows.write_hidden_grad`, in one launch where rows are contiguous."""
    if grad.head is not None and grad.head.stride(1) != 1:
        torch_rows.write_hidden_grad(grad, targets, rows, out)
        return
    total = grad.total
    count, columns = out.shape[0] if rows is None else rows.shape[0], total.shape[1]
    if count == 0:
        return
    head = or_unused(grad.head, total)
    launch(
        hidden_grad_kernel,
        count * triton.cdiv(columns, BLOCK),
        total,
        or_unused(grad.factor, targets),
        or_unused(grad.at_target, targets),
        head,
        targets,
        or_unused(rows, targets),
        out,
        total.stride(0),
        head.stride(0),
        out.stride(0),
        columns,
        FACTOR=grad.factor is not None,
        TARGET=grad.head is not None,
        SCATTERS=rows is not None,
        ROUNDED=_triton_dtype(grad.rounded or total.dtype),
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


def _triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return getattr(tl, str(dtype).removeprefix("torch."))
