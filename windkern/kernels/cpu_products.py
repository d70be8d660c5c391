"""Products of bfloat16 operands with float32 sums on a CPU, from csrc/: torch has none that keeps the sums."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from windkern.kernels import buffers, cpu_libraries

try:
    from windkern import _cpp
except ImportError:
    _cpp = None

_PANEL = 64


def _choose() -> str | None:
    """The product this CPU is fastest with: "amx", "avx512bf16", or None where widening to float32 is faster.

    Reason: `vdpbf16ps` runs at twice the rate of float32 products on AMD, and at half of it on Intel.
    """
    # Reason: naming an older instruction set asks for a machine without these.
    if _cpp is None or os.environ.get("WINDKERN_CPP_ISA", "avx512") not in ("", "avx512"):
        return None
    names = _cpp.bf16_products()
    if "amx" in names:
        return "amx"
    return "avx512bf16" if "avx512bf16" in names and cpu_libraries.is_amd() else None


PRODUCT = _choose()


def packed_bytes(columns: int, inner: int) -> int:
    """Scratch of a product: its right operand in the order the inner loop reads it, in whole panels and tiles."""
    return -(-columns // _PANEL) * _PANEL * (-(-inner // 32)) * 64


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
        PRODUCT,
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
