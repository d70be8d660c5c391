"""Products of bfloat16 operands with float32 sums on a CPU, from csrc/: torch has none that keeps the sums."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from windkern.kernels import buffers

try:
    from windkern import _cpp
except ImportError:
    _cpp = None

# Reason: naming an older instruction set asks for a machine without this one.
AVAILABLE = (
    _cpp is not None and _cpp.has_bf16_product() and os.environ.get("WINDKERN_CPP_ISA", "avx512") in ("", "avx512")
)
_PANEL = 64


def packed_bytes(columns: int, inner: int) -> int:
    """Scratch of a product: its right operand in the order the inner loop reads it."""
    return -(-columns // _PANEL) * _PANEL * (-(-inner // 2)) * 4


def _operand(tensor: Tensor) -> tuple[Tensor, int, bool]:
    """The matrix or its transpose, whichever has contiguous rows; the stride of those; whether it is the transpose."""
    rows, columns = tensor.shape
    if tensor.stride(1) == 1 or columns == 1:
        return tensor, tensor.stride(0), False
    if tensor.stride(0) == 1 or rows == 1:
        return tensor, tensor.stride(1), True
    tensor = buffers.track("cast", tensor.contiguous())
    return tensor, tensor.stride(0), False


def multiply(left: Tensor, right: Tensor, out: Tensor, *, accumulate: bool = False) -> Tensor:
    """out (M, N) = left (M, K) @ right (K, N), or += that, of bfloat16; out is float32 or bfloat16 (rounded once)."""
    (rows, inner), columns = left.shape, right.shape[1]
    if out.stride(1) != 1 or (accumulate and out.dtype != torch.float32):
        raise RuntimeError(f"a product needs contiguous rows and float32 sums, got {out.stride()} {out.dtype}")
    left, left_stride, left_transposed = _operand(left)
    right, right_stride, right_transposed = _operand(right)
    # One number more on each side for the 64 bytes its rows are aligned to.
    packed = buffers.empty("packed", (packed_bytes(columns, inner) // 4 + 16,), torch.int32, out.device)
    address = -(-packed.data_ptr() // 64) * 64
    _cpp.multiply_bf16(
        rows,
        columns,
        inner,
        left.data_ptr(),
        left_stride,
        left_transposed,
        right.data_ptr(),
        right_stride,
        right_transposed,
        out.data_ptr(),
        out.stride(0),
        out.dtype == torch.float32,
        accumulate,
        address,
        torch.get_num_threads(),
    )
    return out
