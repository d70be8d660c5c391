"""Products of bfloat16 operands with float32 results on a CPU, from csrc/: torch rounds the results to bfloat16."""

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
    """Return the fastest product on this CPU: "amx", "avx512bf16", or None where widening to float32 is faster.

    Reason: `vdpbf16ps` runs at twice the rate of float32 products on AMD, and at half of it on Intel.
    """
    # Reason: an older instruction set in WINDKERN_CPP_ISA stands for a machine without these products.
    if _cpp is None or os.environ.get("WINDKERN_CPP_ISA", "avx512") not in ("", "avx512"):
        return None
    names = _cpp.bf16_products()
    if "amx" in names:
        return "amx"
    return "avx512bf16" if "avx512bf16" in names and cpu_libraries.is_amd() else None


PRODUCT = _choose()


def packed_bytes(columns: int, inner: int) -> int:
    """Return the scratch bytes of a product: its right operand, packed in the order the inner loop reads it."""
    return -(-columns // _PANEL) * _PANEL * (-(-inner // 32)) * 64


def _operand(tensor: Tensor) -> tuple[Tensor, int, bool]:
    """Return the tensor that holds the matrix, its stride, and whether it holds the transpose, with contiguous rows."""
    rows, columns = tensor.shape
    if tensor.stride(1) == 1 or columns == 1:
        return tensor, tensor.stride(0), False
    if tensor.stride(0) == 1 or rows == 1:
        return tensor, tensor.stride(1), True
    tensor = buffers.track("cast", tensor.contiguous())
    return tensor, tensor.stride(0), False


def multiply(left: Tensor, right: Tensor, out: Tensor, *, accumulate: bool = False) -> Tensor:
    """out (M, N) = left (M, K) @ right (K, N) of bfloat16, or +=; out is float32 or bfloat16 (rounded once)."""
    (rows, inner), columns = left.shape, right.shape[1]
    if out.stride(1) != 1 or (accumulate and out.dtype != torch.float32):
        raise RuntimeError(f"a product needs contiguous rows and float32 sums, got {out.stride()} {out.dtype}")
    left, left_stride, left_transposed = _operand(left)
    right, right_stride, right_transposed = _operand(right)
    # 16 more elements, so that the first address can be aligned to 64 bytes.
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
