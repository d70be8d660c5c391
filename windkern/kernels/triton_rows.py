"""The Triton back end: its forward row kernels, and in `__all__` the whole contract. 64-bit offsets everywhere.

A program of a forward kernel holds one whole row of a slab in registers, so the maximum, the sums and what is kept
come from one read. A slab is at most 16384 columns wide (`windkern.plan.SLAB_COLUMNS`).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from windkern.kernels.contract import RowState, kept_gain, kept_log_gain
from windkern.kernels.torch_rows import other_slope, target_slope
from windkern.kernels.triton_backward import slab_backward
from windkern.kernels.triton_launch import or_unused, transform_numbers
from windkern.kernels.triton_maths import finite, merge, relative_slope, transform_logit
from windkern.kernels.triton_pairs import pair_terms, segment_sum, win_rates
from windkern.kernels.triton_tile import tile_columns, tile_forward
from windkern.kernels.tuned import row_warps
from windkern.transform import LogitTransform

__all__ = [
    "other_slope",
    "pair_terms",
    "segment_sum",
    "slab_backward",
    "slab_forward",
    "slab_forward_unit",
    "target_slope",
    "tile_columns",
    "tile_forward",
    "win_rates",
]

WIDEST = 16384


@triton.jit
def look_at_row(
    z_ptr,
    bias_ptr,
    targets_ptr,
    entropy_ptr,
    row,
    width,
    start,
    slope,
    cap_in,
    cap_out,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One read of a row of the slab: exp(y - maximum), the gaps in it, its statistics, and its target.

    Hazard: what is written later may be the slab. Remedy: the target is read before the reductions, whose barriers
    come before any store.
    """
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    z_row = z_ptr + row * width
    column = (tl.load(targets_ptr + row) - start).to(tl.int32)
    has_target = (column >= 0) & (column < width)
    target = tl.load(z_row + column, mask=has_target, other=0.0)
    z = tl.load(z_row + columns, mask=inside, other=0.0)
    bias, target_bias = z, target
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0)
        target_bias = tl.load(bias_ptr + column, mask=has_target, other=0.0)
    y = transform_logit(z, bias, slope, cap_in, cap_out, HAS_BIAS, CAPPED)
    y = tl.where(inside, y, float("-inf"))
    target = transform_logit(target, target_bias, slope, cap_in, cap_out, HAS_BIAS, CAPPED)
    part_max = tl.max(y, 0)
    gap = y - finite(part_max)
    e = tl.exp(gap)
    part_sum = tl.sum(e, 0)
    part_entropy = part_sum * 0.0
    run_entropy = part_entropy
    if ENTROPY:
        part_entropy = tl.sum(tl.where(e > 0.0, e * gap, 0.0), 0)
        run_entropy = tl.load(entropy_ptr + row)
    return e, gap, part_max, part_sum, part_entropy, run_entropy, target, column, has_target


@triton.jit
def forward_rows(
    z_ptr,  # (M, W) logits
    bias_ptr,  # (W,)
    targets_ptr,  # (M,) int64
    max_ptr,
    sum_ptr,
    target_ptr,
    entropy_ptr,  # (M,) running statistics
    kept_ptr,  # (M, W) out: exp(y - offset) * relative slope
    offset_ptr,  # (M,) out
    width,
    start,
    slope,
    cap_in,
    cap_out,
    gain,
    log_gain,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    ENTROPY: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    e, gap, part_max, part_sum, part_entropy, run_entropy, target, _column, has_target = look_at_row(
        z_ptr,
        bias_ptr,
        targets_ptr,
        entropy_ptr,
        row,
        width,
        start,
        slope,
        cap_in,
        cap_out,
        HAS_BIAS,
        CAPPED,
        ENTROPY,
        BLOCK,
    )
    new_max, new_sum, new_entropy, _, _ = merge(
        tl.load(max_ptr + row), tl.load(sum_ptr + row), run_entropy, part_max, part_sum, part_entropy
    )
    tl.store(target_ptr + row, target, mask=has_target)
    tl.store(max_ptr + row, new_max)
    tl.store(sum_ptr + row, new_sum)
    if ENTROPY:
        tl.store(entropy_ptr + row, new_entropy)
    if KEPT:
        kept = e * gain
        if CAPPED:
            kept = kept * relative_slope(gap + finite(part_max), cap_out)
        tl.store(kept_ptr + row * width + columns, kept.to(kept_ptr.dtype.element_ty), mask=inside)
        tl.store(offset_ptr + row, part_max - log_gain)


@triton.jit
def unit_rows(
    z_ptr,
    bias_ptr,
    targets_ptr,
    max_ptr,
    sum_ptr,
    target_ptr,
    entropy_ptr,
    unit_ptr,  # (M, W) out, may be z
    logged_ptr,  # (M, W) out
    rescale_ptr,
    step_ptr,  # (M,) out
    width,
    start,
    slope,
    cap_in,
    cap_out,
    gain,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    e, gap, part_max, part_sum, part_entropy, run_entropy, target, column, has_target = look_at_row(
        z_ptr,
        bias_ptr,
        targets_ptr,
        entropy_ptr,
        row,
        width,
        start,
        slope,
        cap_in,
        cap_out,
        HAS_BIAS,
        CAPPED,
        ENTROPY,
        BLOCK,
    )
    run_max = tl.load(max_ptr + row)
    new_max, new_sum, new_entropy, old_factor, part_factor = merge(
        run_max, tl.load(sum_ptr + row), run_entropy, part_max, part_sum, part_entropy
    )
    weighted = e * (part_factor * gain)
    if CAPPED:
        # Reason: y from the gap keeps one array less in registers; the gap is exact where the slope matters.
        weighted = weighted * relative_slope(gap + finite(part_max), cap_out)
    # Reason: W_y - sum P W cancels where the model is sure of the target; the target entry is added apart.
    weighted = tl.where(columns == column, 0.0, weighted)
    tl.store(unit_ptr + row * width + columns, weighted.to(unit_ptr.dtype.element_ty), mask=inside)
    if ENTROPY:
        shift = finite(new_max)
        part_step = tl.where(part_max == float("-inf"), 0.0, part_max - shift)
        logged = tl.where(e > 0.0, weighted * (gap + part_step), 0.0)
        tl.store(logged_ptr + row * width + columns, logged.to(logged_ptr.dtype.element_ty), mask=inside)
        tl.store(step_ptr + row, tl.where(run_max == float("-inf"), 0.0, run_max - shift))
        tl.store(entropy_ptr + row, new_entropy)
    tl.store(target_ptr + row, target, mask=has_target)
    tl.store(rescale_ptr + row, old_factor)
    tl.store(max_ptr + row, new_max)
    tl.store(sum_ptr + row, new_sum)


def _row_block(width: int) -> dict[str, int]:
    if width > WIDEST:
        raise RuntimeError(f"a slab of a Triton row kernel is at most {WIDEST} columns wide, got {width}")
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": row_warps(block)}


def slab_forward(
    z: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    start: int,
    transform: LogitTransform,
    state: RowState,
    kept: Tensor | None,
    offset: Tensor | None,
) -> None:
    """As `torch_rows.slab_forward`."""
    rows, width = z.shape
    if rows == 0:
        return
    forward_rows[(rows,)](
        z,
        or_unused(bias, z),
        targets,
        state.run_max,
        state.run_sum,
        state.target_logit,
        or_unused(state.entropy_sum, z),
        or_unused(kept, z),
        or_unused(offset, z),
        width,
        start,
        gain=1.0 if kept is None else kept_gain(kept.dtype),
        log_gain=0.0 if kept is None else kept_log_gain(kept.dtype),
        HAS_BIAS=bias is not None,
        ENTROPY=state.entropy_sum is not None,
        KEPT=kept is not None,
        **transform_numbers(transform, state.run_max.dtype),
        **_row_block(width),
    )


def slab_forward_unit(
    z: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    start: int,
    transform: LogitTransform,
    state: RowState,
    unit: Tensor,
    unit_entropy: Tensor | None,
    rescale: Tensor,
    max_step: Tensor | None,
) -> None:
    """As `torch_rows.slab_forward_unit`."""
    rows, width = z.shape
    if rows == 0:
        return
    unit_rows[(rows,)](
        z,
        or_unused(bias, z),
        targets,
        state.run_max,
        state.run_sum,
        state.target_logit,
        or_unused(state.entropy_sum, z),
        unit,
        or_unused(unit_entropy, z),
        rescale,
        or_unused(max_step, z),
        width,
        start,
        gain=kept_gain(unit.dtype),
        HAS_BIAS=bias is not None,
        ENTROPY=state.entropy_sum is not None,
        **transform_numbers(transform, state.run_max.dtype),
        **_row_block(width),
    )
