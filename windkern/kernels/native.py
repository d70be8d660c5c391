"""What the native back ends share on the Python side: codes of dtypes and names, pointers of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
LINKS = {"bradley_terry": 0, "step": 1}
PAIR_LOSSES = {"square": 0, "logistic": 1, "hinge": 2}


def address(tensor: Tensor | None) -> int:
    """Pointer of a contiguous tensor, 0 for None."""
    if tensor is None:
        return 0
    if not tensor.is_contiguous():
        raise RuntimeError(f"a row kernel needs contiguous memory, got strides {tensor.stride()}")
    return tensor.data_ptr()


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)
