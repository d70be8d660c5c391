"""What the launchers of the Triton kernels share."""

from __future__ import annotations

import os

import torch
import triton.language as tl
from torch import Tensor

from windkern.transform import LogitTransform


def interprets() -> bool:
    """TRITON_INTERPRET=1: kernels run in Python, on a CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


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
