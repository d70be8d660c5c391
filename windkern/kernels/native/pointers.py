"""Helpers of the native back ends in Python: reasons for missing extensions, codes of dtypes and names, pointers."""

from __future__ import annotations

import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

PACKAGE = Path(__file__).parents[2]

DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
LINKS = {"bradley_terry": 0, "step": 1}
PAIR_LOSSES = {"square": 0, "logistic": 1, "hinge": 2}


def why_missing(name: str, error: ImportError) -> str:
    """Say why the extension `windkern.<name>` was not imported; warn if its file exists, since that is a fault."""
    files = sorted(path.name for path in PACKAGE.glob(f"{name}.*") if path.suffix in (".so", ".pyd"))
    if not files:
        return f"windkern was installed without its extension {name}"
    if any(f"{name}{suffix}" in files for suffix in EXTENSION_SUFFIXES):
        reason = f"windkern's extension {name} cannot be loaded ({error})"
    else:
        reason = f"windkern's extension {name} is for another Python ({', '.join(files)}, not {EXTENSION_SUFFIXES[0]})"
    warnings.warn(f"{reason}; another back end runs instead", RuntimeWarning, stacklevel=2)
    return reason


def address(tensor: Tensor | None) -> int:
    """Return the pointer of a contiguous tensor, 0 for None."""
    if tensor is None:
        return 0
    if not tensor.is_contiguous():
        raise RuntimeError(f"a row kernel needs contiguous memory, got strides {tensor.stride()}")
    return tensor.data_ptr()


def matrix(tensor: Tensor | None) -> tuple[int, int]:
    """Return the pointer of a matrix with contiguous rows, and its row stride in elements; zeros for None."""
    if tensor is None:
        return 0, 0
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise RuntimeError(f"a row kernel needs contiguous rows, got strides {tensor.stride()}")
    return tensor.data_ptr(), tensor.stride(0)


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)
