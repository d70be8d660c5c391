"""The three matrix products of a walk, each with float32 (float64 for float64) results.

    logits        z  (M, W)  = hidden (M, H) @ weight (W, H).T
    hidden_grad   dh (M, H) += dz (M, W) @ weight (W, H)
    weight_grad   dw (W, H)  = dz.T @ hidden (M, H)

Which library runs a product is a static choice by device, dtype and shape; nothing is timed and no global switch of
torch is touched.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from windkern.kernels import buffers, cpu_libraries, cpu_products

# Reason: glibc serves blocks up to 32 MiB from its heap again and again; above, each call pays fresh page faults.
_HEAP_BLOCK = 32 << 20
# Reason: below this many multiply-adds the dispatch of oneDNN costs more than it gains.
_SMALL_PRODUCT = 1 << 21


_probed: dict[str, bool] = {}


def _cuda_has_out_dtype() -> bool:
    """Whether torch.mm and addmm can return float32 from bfloat16 operands on this build and GPU (probed once)."""
    if not torch.cuda.is_available():
        return True  # planning for a GPU from a machine without one
    if "out_dtype" not in _probed:
        try:
            probe = torch.zeros(16, 16, dtype=torch.bfloat16, device="cuda")
            total = torch.mm(probe, probe, out_dtype=torch.float32)
            torch.addmm(total, probe, probe, out_dtype=torch.float32, out=total)
            _probed["out_dtype"] = True
        except (TypeError, RuntimeError):
            _probed["out_dtype"] = False
    return _probed["out_dtype"]


# What torch.compiler.assume_constant_result sets; that function costs a second of imports.
_cuda_has_out_dtype._dynamo_marked_constant = True


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Gemm:
    """The products for one device type and operand dtype, and what they have to copy."""

    device_type: str
    operand: torch.dtype

    @property
    def acc(self) -> torch.dtype:
        return accumulator(self.operand)

    @property
    def is_low_precision(self) -> bool:
        return self.operand in (torch.bfloat16, torch.float16)

    @property
    def packs(self) -> bool:
        """True where the products are ours: bfloat16 operands on a CPU that multiplies them into float32 sums."""
        return self.device_type == "cpu" and self.operand == torch.bfloat16 and cpu_products.PRODUCT is not None

    @property
    def widens(self) -> bool:
        """True where nothing fast multiplies this dtype into float32: operands are widened slab by slab.

        Reason: without instructions for it, torch multiplies 16-bit operands on a CPU 20 to 40 times slower than the
        widened ones; with them it rounds each product to 16 bits.
        """
        has_product = self.packs or (self.device_type == "cuda" and _cuda_has_out_dtype())
        return self.is_low_precision and not has_product

    @property
    def allocates(self) -> bool:
        """True where the library returns its own result instead of filling ours."""
        return self.device_type == "cpu" and self.acc == torch.float32 and cpu_libraries.ONEDNN

    def prepared(self, tensor: Tensor) -> Tensor:
        """`tensor` as the products want it: in the operands' dtype, widened where they are; a no-op where it is."""
        if tensor.dtype != self.operand:
            tensor = buffers.track("cast", tensor.to(self.operand))
        return buffers.track("cast", tensor.to(self.acc)) if self.widens else tensor

    def _use_onednn(self, left: Tensor, columns: int) -> bool:
        rows, inner = left.shape
        fits = rows * columns * 4 <= _HEAP_BLOCK and rows * columns * inner >= _SMALL_PRODUCT
        wanted = cpu_libraries.ONEDNN and left.dtype == torch.float32 and left.device.type == "cpu"
        return wanted and fits and cpu_libraries.onednn_is_safe()

    def logits(self, hidden: Tensor, weight: Tensor, out: Tensor | None, *, add_to: Tensor | None = None) -> Tensor:
        """hidden (M, H) @ weight (W, H).T, plus `add_to` (M, W) where given (then written in place)."""
        (rows, inner), width = hidden.shape, weight.shape[0]
        buffers.add_flops(2 * rows * inner * width)
        if add_to is not None:
            return self._addmm(add_to, hidden, weight.t())
        if self._use_onednn(hidden, width):
            return buffers.track("slab", torch.ops.mkldnn._linear_pointwise(hidden, weight, None, "none", [], ""))
        if out is None:
            out = buffers.empty("slab", (rows, width), self.acc, hidden.device)
        return self._mm(hidden, weight.t(), out)

    def packed_bytes(self, columns: int, inner: int) -> int:
        """Scratch of one product beside its operands and result."""
        return cpu_products.packed_bytes(columns, inner) + 64 if self.packs else 0

    def hidden_grad(self, dz: Tensor, weight: Tensor, total: Tensor) -> Tensor:
        """total (M, H) + dz (M, W) @ weight (W, H); the result replaces `total`, which may be overwritten."""
        rows, width = dz.shape
        inner = weight.shape[1]
        buffers.add_flops(2 * rows * inner * width)
        if self._use_onednn(dz, inner):
            summed = torch.ops.mkldnn._linear_pointwise.binary(dz, total, weight.t(), None, "add")
            return buffers.track("dhidden", summed)
        return self._addmm(total, dz, weight)

    def weight_grad(self, dz: Tensor, hidden: Tensor, out: Tensor, *, accumulate: bool, gain: Tensor | None) -> None:
        """out (W, H) = gain * dz (M, W).T @ hidden (M, H), or out += that; `gain` is a scalar tensor or None."""
        (rows, width), inner = dz.shape, hidden.shape[1]
        buffers.add_flops(2 * rows * inner * width)
        plain = gain is None and not accumulate
        if cpu_libraries.ONEDNN_WEIGHT_GRAD and self._use_onednn(dz, inner) and width * inner * 4 <= _HEAP_BLOCK:
            product = torch.ops.mkldnn._linear_pointwise(dz.t(), hidden.t(), None, "none", [], "")
            product = buffers.track("dweight", product)
        elif plain and (out.dtype == dz.dtype or self.packs):
            self._mm(dz.t(), hidden, out)
            return
        elif gain is None and accumulate and out.dtype == self.acc:
            self._addmm(out, dz.t(), hidden)
            return
        else:
            product = buffers.empty("dweight", (width, inner), self.acc, dz.device)
            product = self._mm(dz.t(), hidden, product)
        if gain is not None:
            product.mul_(gain)
        if accumulate:
            out.add_(product)
        else:
            out.copy_(product)

    def _mm(self, left: Tensor, right: Tensor, out: Tensor) -> Tensor:
        if self.packs and left.dtype == self.operand:
            return cpu_products.multiply(left, right, out)
        if out.dtype == left.dtype:
            return torch.mm(left, right, out=out)
        return torch.mm(left, right, out_dtype=out.dtype, out=out)

    def _addmm(self, total: Tensor, left: Tensor, right: Tensor) -> Tensor:
        if self.packs and left.dtype == self.operand:
            return cpu_products.multiply(left, right, total, accumulate=True)
        if total.dtype == left.dtype:
            return total.addmm_(left, right)
        return torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
