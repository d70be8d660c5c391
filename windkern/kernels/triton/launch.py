"""Helpers shared by the launchers of the Triton kernels."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from windkern.kernels.contract import WIDEST_SLAB, Kept, Slab
from windkern.kernels.tuned import architecture, backward_config, row_warps
from windkern.transform import LogitTransform

# Reason: a batch of another length moves these to other addresses; one compiled kernel must serve all of them.
ROW_POINTERS = ["max_ptr", "sum_ptr", "target_ptr", "targets_ptr", "entropy_ptr", "offset_ptr", "pivot_ptr"]


def interprets() -> bool:
    """TRITON_INTERPRET=1: kernels run in Python, on a CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.lru_cache(maxsize=256)
def transform_numbers(transform: LogitTransform, dtype: torch.dtype) -> dict[str, object]:
    """The transform as kernels take it for slabs of `dtype`."""
    capped = transform.softcap is not None
    numbers = {
        "slope": transform.slope_at_zero,
        "cap_in": transform.scale / transform.softcap if capped else 1.0,
        "cap_out": transform.softcap / transform.temperature if capped else 1.0,
    }
    if dtype == torch.float64:  # Triton passes numbers in float32; a constant keeps its digits
        numbers = {name: tl.constexpr(value) for name, value in numbers.items()}
    return {**numbers, "CAPPED": capped}


def or_unused(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """A pointer for an argument the kernel does not look at."""
    return stand_in if tensor is None else tensor


def slab_pointers(slab: Slab) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, bias and targets."""
    return slab.logits, or_unused(slab.bias, slab.logits), slab.targets


def kept_pointers(kept: Kept | None, stand_in: Tensor) -> tuple[Tensor, Tensor, int]:
    """Values, offsets and the stride of the values."""
    return (stand_in, stand_in, 0) if kept is None else (kept.values, kept.offset, kept.values.stride(0))


def row_constants(slab: Slab, dtype: torch.dtype, width: int) -> dict[str, Any]:
    """Numbers and constants of a kernel that holds a row of a slab in registers, which computes in `dtype`."""
    return _row_constants(slab.transform, dtype, slab.bias is not None, width, architecture())


def block_constants(slab: Slab, dtype: torch.dtype, width: int) -> dict[str, Any]:
    """The same of a kernel whose programs take a block of a row each, `BLOCK` columns wide."""
    return _block_constants(slab.transform, dtype, slab.bias is not None, width, architecture())


# Reason: a launch waits for its host, so what is the same for every slab of a walk is found once.
@functools.lru_cache(maxsize=1024)
def _row_constants(
    transform: LogitTransform, dtype: torch.dtype, has_bias: bool, width: int, arch: str
) -> dict[str, Any]:
    if width > WIDEST_SLAB:
        raise RuntimeError(f"a slab of a Triton row kernel is at most {WIDEST_SLAB} columns wide, got {width}")
    block = triton.next_power_of_2(width)
    sizes = {"ALIGNED": width % 16 == 0, "BLOCK": block, "num_warps": row_warps(block, arch)}
    return {"HAS_BIAS": has_bias, **transform_numbers(transform, dtype), **sizes}


@functools.lru_cache(maxsize=1024)
def _block_constants(
    transform: LogitTransform, dtype: torch.dtype, has_bias: bool, width: int, arch: str
) -> dict[str, Any]:
    block, warps = backward_config(width, arch)
    sizes = {"ALIGNED": width % 16 == 0, "BLOCK": block, "num_warps": warps}
    return {"HAS_BIAS": has_bias, **transform_numbers(transform, dtype), **sizes}
