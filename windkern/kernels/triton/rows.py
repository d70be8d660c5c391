"""The Triton back end: its forward row kernels, and the whole contract in `__all__`. All offsets have 64 bits.

A program of a forward kernel holds one whole row of a slab in registers, so it computes the maximum, the sums and the
kept values from one read. A row of more than `WIDEST_ROW` columns is read block by block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from windkern.kernels.contract import Kept, RowState, Slab, Unit, kept_gain, kept_log_gain
from windkern.kernels.triton.backward import slab_backward
from windkern.kernels.triton.exps import column_sums, exps_backward, exps_forward, rescale_rows
from windkern.kernels.triton.finish import finish_rows
from windkern.kernels.triton.hidden import row_factors, write_hidden_grad
from windkern.kernels.triton.launch import (
    ROW_POINTERS,
    kept_pointers,
    or_unused,
    row_constants,
    slab_pointers,
    wide_constants,
)
from windkern.kernels.triton.launcher import launch
from windkern.kernels.triton.maths import finite, look_at_row, merge, relative_slope
from windkern.kernels.triton.pairs import pair_terms, segment_sum, win_rates
from windkern.kernels.triton.tile import tile_forward

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
    "tile_forward",
    "win_rates",
    "write_hidden_grad",
]


@triton.jit(do_not_specialize=["width", "start"], do_not_specialize_on_alignment=ROW_POINTERS)
def forward_rows(
    z_ptr,  # (M, W) logits
    bias_ptr,  # (W,)
    targets_ptr,  # (M,) int64
    max_ptr,
    sum_ptr,
    target_ptr,
    entropy_ptr,  # (M,) running statistics
    kept_ptr,  # (M, W) out: exp(y - offset) * relative slope
    offset_ptr,  # (M, 1) out
    z_stride,
    kept_stride,
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
    KEPT: tl.constexpr,  # not where a row is wider than BLOCK
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,  # a row is wider than BLOCK
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if ALIGNED:
        width = width // 16 * 16  # tells the compiler that 16 divides it
    # Hazard: a warp may store a statistic before another warp has read it. Remedy: statistics are read before the
    # reductions, whose barriers come before any store.
    run_max, run_sum = tl.load(max_ptr + row), tl.load(sum_ptr + row)
    run_entropy = run_sum * 0.0
    if ENTROPY:
        run_entropy = tl.load(entropy_ptr + row)
    if WIDE:
        end = width
    else:
        end = 1
    for first in range(0, end, BLOCK):
        e, y, part_max, part_sum, part_entropy, _entropy, target, _column, has_target = look_at_row(
            z_ptr + first,
            bias_ptr + first,
            targets_ptr,
            entropy_ptr,
            row,
            z_stride,
            width - first,
            start + first,
            slope,
            cap_in,
            cap_out,
            HAS_BIAS,
            CAPPED,
            ENTROPY,
            BLOCK,
        )
        run_max, run_sum, run_entropy, _, _ = merge(run_max, run_sum, run_entropy, part_max, part_sum, part_entropy)
        tl.store(target_ptr + row, target, mask=has_target)
        if KEPT:
            columns = tl.arange(0, BLOCK)
            kept = e * gain
            if CAPPED:
                kept = kept * relative_slope(y, cap_out)
            tl.store(kept_ptr + row * kept_stride + columns, kept.to(kept_ptr.dtype.element_ty), mask=columns < width)
            tl.store(offset_ptr + row, part_max - log_gain)
    tl.store(max_ptr + row, run_max)
    tl.store(sum_ptr + row, run_sum)
    if ENTROPY:
        tl.store(entropy_ptr + row, run_entropy)


@triton.jit(do_not_specialize=["width", "start"], do_not_specialize_on_alignment=ROW_POINTERS)
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
    z_stride,
    unit_stride,
    logged_stride,
    width,
    start,
    slope,
    cap_in,
    cap_out,
    gain,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    ENTROPY: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,  # never: a program holds its whole row
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if ALIGNED:
        width = width // 16 * 16  # tells the compiler that 16 divides it
    # Hazard: a warp may store a statistic before another warp has read it. Remedy: statistics are read before the
    # reductions, whose barriers come before any store.
    run_max, run_sum = tl.load(max_ptr + row), tl.load(sum_ptr + row)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    e, y, part_max, part_sum, part_entropy, run_entropy, target, column, has_target = look_at_row(
        z_ptr,
        bias_ptr,
        targets_ptr,
        entropy_ptr,
        row,
        z_stride,
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
    new_max, new_sum, new_entropy, old_factor, part_factor = merge(
        run_max, run_sum, run_entropy, part_max, part_sum, part_entropy
    )
    weighted = e * (part_factor * gain)
    if CAPPED:
        weighted = weighted * relative_slope(y, cap_out)
    # Reason: W_y - sum P W cancels where the model is sure of the target, so the target's entry is added separately.
    weighted = tl.where(columns == column, 0.0, weighted)
    tl.store(unit_ptr + row * unit_stride + columns, weighted.to(unit_ptr.dtype.element_ty), mask=inside)
    if ENTROPY:
        shift = finite(new_max)
        part_step = tl.where(part_max == float("-inf"), 0.0, part_max - shift)
        logged = tl.where(e > 0.0, weighted * ((y - finite(part_max)) + part_step), 0.0)
        tl.store(logged_ptr + row * logged_stride + columns, logged.to(logged_ptr.dtype.element_ty), mask=inside)
        tl.store(step_ptr + row, tl.where(run_max == float("-inf"), 0.0, run_max - shift))
        tl.store(entropy_ptr + row, new_entropy)
    tl.store(target_ptr + row, target, mask=has_target)
    tl.store(rescale_ptr + row, old_factor)
    tl.store(max_ptr + row, new_max)
    tl.store(sum_ptr + row, new_sum)


def slab_forward(slab: Slab, state: RowState, kept: Kept | None) -> None:
    """Like `kernels.torch.rows.slab_forward`."""
    z = slab.logits
    if z.shape[0] == 0:
        return
    values, offset, stride = kept_pointers(kept, z)
    launch(
        forward_rows,
        z.shape[0],
        *slab_pointers(slab),
        *state[:3],
        or_unused(state.entropy_sum, z),
        values,
        offset,
        z.stride(0),
        stride,
        z.shape[1],
        slab.start,
        gain=1.0 if kept is None else kept_gain(values.dtype),
        log_gain=0.0 if kept is None else kept_log_gain(values.dtype),
        ENTROPY=state.entropy_sum is not None,
        KEPT=kept is not None,
        **(row_constants if kept is not None else wide_constants)(slab, state.run_max.dtype, z.shape[1]),
    )


def slab_forward_unit(slab: Slab, state: RowState, unit: Unit) -> None:
    """Like `kernels.torch.rows.slab_forward_unit`."""
    z = slab.logits
    if z.shape[0] == 0:
        return
    logged = or_unused(unit.logged, z)
    launch(
        unit_rows,
        z.shape[0],
        *slab_pointers(slab),
        *state[:3],
        or_unused(state.entropy_sum, z),
        unit.values,
        logged,
        unit.rescale,
        or_unused(unit.max_step, z),
        z.stride(0),
        unit.values.stride(0),
        logged.stride(0),
        z.shape[1],
        slab.start,
        gain=kept_gain(unit.values.dtype),
        ENTROPY=state.entropy_sum is not None,
        **row_constants(slab, state.run_max.dtype, z.shape[1]),
    )
