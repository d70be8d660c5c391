"""The Triton kernel that ends forward: the results of each row, and the exponentials as backward will see them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from windkern.kernels.contract import SETTLED_ROOM, RowState, Settled
from windkern.kernels.triton.launch import ROW_POINTERS
from windkern.kernels.triton.launcher import launch
from windkern.kernels.triton.maths import careful_exp, finite, one_minus_p

_ROOM = tl.constexpr(SETTLED_ROOM)


@triton.jit(
    do_not_specialize=["columns", "kept_stride"],
    do_not_specialize_on_alignment=[*ROW_POINTERS, "log_sum_ptr", "logps_ptr", "lse_ptr"],
)
def finish_kernel(
    max_ptr,
    sum_ptr,
    target_ptr,  # (M,) running statistics
    targets_ptr,  # (M,) int64
    log_sum_ptr,
    logps_ptr,
    lse_ptr,  # (M,) out
    kept_ptr,  # (M, columns) exp(y - pivot)
    pivot_ptr,
    total_ptr,  # (M,) out
    entry_ptr,  # (M,) out
    kept_stride,
    columns,
    SETTLES: tl.constexpr,
    MOVES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    run_max, run_sum, target = tl.load(max_ptr + row), tl.load(sum_ptr + row), tl.load(targets_ptr + row)
    log_sum = tl.log(run_sum)
    logp = (tl.load(target_ptr + row) - run_max) - log_sum
    tl.store(log_sum_ptr + row, log_sum)
    tl.store(logps_ptr + row, tl.where(target < 0, 0.0, logp))
    tl.store(lse_ptr + row, tl.where(target < 0, 0.0, run_max + log_sum))
    if SETTLES:
        pivot = tl.load(pivot_ptr + row)
        new, factor = pivot, tl.full([], 1.0, pivot.dtype)
        if MOVES:
            new = tl.where(run_max > pivot + _ROOM, run_max, pivot)
            factor = tl.where((pivot == float("-inf")) | (new == pivot), 1.0, careful_exp(pivot - finite(new)))
        total = run_sum * careful_exp(run_max - new)
        entry = -one_minus_p(logp) * total
        kept_row = kept_ptr + row * kept_stride
        # Hazard: two threads write the target's entry if it is set after its row is rescaled. Remedy: set it in there.
        end = tl.where(factor == 1.0, 0, columns)
        for first in range(0, end, BLOCK):
            place = first + tl.arange(0, BLOCK)
            values = tl.load(kept_row + place, mask=place < end, other=0.0)
            scaled = tl.where(place == target, entry, values.to(entry.dtype) * factor)
            tl.store(kept_row + place, scaled.to(values.dtype), mask=place < end)
        alone = (factor == 1.0) & (target >= 0) & (target < columns)
        tl.store(kept_row + target, entry.to(kept_ptr.dtype.element_ty), mask=alone)
        tl.store(total_ptr + row, total)
        tl.store(entry_ptr + row, entry)
        # Hazard: a warp may store the pivot before another warp has read it. Remedy: a barrier.
        tl.debug_barrier()
        tl.store(pivot_ptr + row, new)


def finish_rows(
    state: RowState, targets: Tensor, log_sum: Tensor, logps: Tensor, lse: Tensor, settled: Settled | None
) -> None:
    """Like `kernels.torch.rows.finish_rows`, in one launch."""
    rows = targets.shape[0]
    if rows == 0:
        return
    unused = settled is None
    launch(
        finish_kernel,
        rows,
        *state[:3],
        targets,
        log_sum,
        logps,
        lse,
        lse if unused else settled.kept,
        lse if unused else settled.pivot,
        lse if unused else settled.total,
        lse if unused else settled.entry,
        0 if unused else settled.kept.stride(0),
        0 if unused else settled.kept.shape[1],
        SETTLES=not unused,
        MOVES=not unused and settled.moves,
        BLOCK=1024,
        num_warps=4,
    )
