"""Helpers shared by the launchers of the Triton kernels."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from windkern.kernels.contract import WIDEST_ROW, WIDEST_SLAB, Kept, Slab
from windkern.kernels.tuned import architecture, backward_config, row_warps
from windkern.transform import LogitTransform

WIDE_BLOCK = 8192  # columns of a block of a row that does not fit into registers
# Reason: a batch of another length moves these to other alignments; one compiled kernel must serve all of them.
ROW_POINTERS = ["max_ptr", "sum_ptr", "target_ptr", "targets_ptr", "entropy_ptr", "offset_ptr", "pivot_ptr"]
ROW_POINTERS += ["total_ptr", "entry_ptr"]


def interprets() -> bool:
    """Return whether TRITON_INTERPRET=1 makes kernels run in Python on a CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.lru_cache(maxsize=256)
def transform_numbers(transform: LogitTransform, dtype: torch.dtype) -> dict[str, object]:
    """Return the transform as kernel arguments for slabs of `dtype`."""
    capped = transform.softcap is not None
    numbers = {
        "slope": transform.slope_at_zero,
        "cap_in": transform.scale / transform.softcap if capped else 1.0,
        "cap_out": transform.softcap / transform.temperature if capped else 1.0,
    }
    if dtype == torch.float64:  # Triton passes floats in float32; a constant keeps all digits
        numbers = {name: tl.constexpr(value) for name, value in numbers.items()}
    return {**numbers, "CAPPED": capped}


def or_unused(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """Return `tensor`, or `stand_in` as a pointer that the kernel does not read."""
    return stand_in if tensor is None else tensor


def slab_pointers(slab: Slab) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, bias and targets."""
    return slab.logits, or_unused(slab.bias, slab.logits), slab.targets


def kept_pointers(kept: Kept | None, stand_in: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return values, offsets and the stride of the values."""
    return (stand_in, stand_in, 0) if kept is None else (kept.values, kept.offset, kept.values.stride(0))


def row_constants(slab: Slab, dtype: torch.dtype, width: int) -> dict[str, Any]:
    """Return numbers and constants of a kernel that computes in `dtype` with a row of a slab in registers."""
    return _constants(_row_config, slab.transform, dtype, slab.bias is not None, width, architecture())


def wide_constants(slab: Slab, dtype: torch.dtype, width: int) -> dict[str, Any]:
    """Return those of a kernel that passes over a row that does not fit into registers block by block."""
    return _constants(_wide_config, slab.transform, dtype, slab.bias is not None, width, architecture())


def block_constants(slab: Slab, dtype: torch.dtype, width: int) -> dict[str, Any]:
    """Return those of a kernel whose programs each take a block of a row, `BLOCK` columns wide."""
    return _constants(backward_config, slab.transform, dtype, slab.bias is not None, width, architecture())


# Reason: a launch waits for its host, so what all slabs of a walk share is computed once.
@functools.lru_cache(maxsize=1024)
def _constants(
    config: Callable[[int, str], tuple[int, int]],
    transform: LogitTransform,
    dtype: torch.dtype,
    has_bias: bool,
    width: int,
    arch: str,
) -> dict[str, Any]:
    block, warps = config(width, arch)
    sizes = {"ALIGNED": width % 16 == 0, "BLOCK": block, "num_warps": warps}
    if config is not backward_config:
        sizes["WIDE"] = block < width
    return {"HAS_BIAS": has_bias, **transform_numbers(transform, dtype), **sizes}


def _row_config(width: int, arch: str) -> tuple[int, int]:
    """Return columns and warps of a program that holds a whole row of `width` columns."""
    if width > WIDEST_ROW:
        raise RuntimeError(f"a slab of this Triton kernel is at most {WIDEST_ROW} columns wide, got {width}")
    block = triton.next_power_of_2(width)
    return block, row_warps(block, arch)


def _wide_config(width: int, arch: str) -> tuple[int, int]:
    """Return columns and warps of a program that passes over a row of any width."""
    if width > WIDEST_SLAB:
        raise RuntimeError(f"a slab of a Triton row kernel is at most {WIDEST_SLAB} columns wide, got {width}")
    return _row_config(width if width <= WIDEST_ROW else WIDE_BLOCK, arch)
