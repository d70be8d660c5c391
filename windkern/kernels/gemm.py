"""The three matrix products of a walk, each with float32 (float64 for float64) results.

    logits        z  (M, W)  = hidden (M, H) @ weight (W, H).T
    hidden_grad   dh (M, H) += dz (M, W) @ weight (W, H)
    weight_grad   dw (W, H)  = dz.T @ hidden (M, H)

There is one class for each library that runs them. The choice is static, by device, dtype and processor: nothing is
timed, and no global switch of torch is changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from windkern.kernels import buffers, cpu_libraries, cpu_products

# Reason: glibc reuses blocks of up to 32 MiB from its heap; larger ones cost fresh page faults in each call.
_HEAP_BLOCK = 32 << 20
# Reason: below this many multiply-adds, oneDNN's dispatch costs more than it gains.
_SMALL_PRODUCT = 1 << 21
# Bytes of exponentials, or of the head's rows, per product where oneDNN copies its left operand. Products over twice or
# half as many columns are not faster.
_COPIED_BYTES = 16 << 20
# The same where operands are repacked or widened.
_PREPARED_BYTES = 8 << 20


_probed: dict[str, bool] = {}


def _cuda_has(product: str) -> bool:
    """Return whether torch.mm or addmm returns float32 from bfloat16 operands on this build and GPU (probed once).

    Reason: torch 2.8 and 2.9 support it for mm but not for addmm.
    """
    if not torch.cuda.is_available():
        return True  # planning for a GPU from a machine without one
    if product not in _probed:
        try:
            probe = torch.zeros(16, 16, dtype=torch.bfloat16, device="cuda")
            total = torch.zeros(16, 16, dtype=torch.float32, device="cuda")
            if product == "mm":
                torch.mm(probe, probe, out_dtype=torch.float32, out=total)
            else:
                torch.addmm(total, probe, probe, out_dtype=torch.float32, out=total)
            _probed[product] = True
        except (TypeError, RuntimeError):
            _probed[product] = False
    return _probed[product]


# torch.compiler.assume_constant_result sets this attribute; calling it costs a second of imports.
_cuda_has._dynamo_marked_constant = True  # type: ignore[attr-defined]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _round_down(value: int, step: int) -> int:
    return max(step, value // step * step)


@dataclass(frozen=True)
class Products:
    """Products by torch.mm and addmm: float32 and float64 on any device, 16-bit operands on a GPU."""

    device_type: str
    operand: torch.dtype

    name: ClassVar[str] = "torch"
    words: ClassVar[str] = "torch"
    widens: ClassVar[bool] = False  # operands are widened before they are multiplied, slab by slab
    allocates: ClassVar[bool] = False  # the library returns its own result instead of filling ours

    @property
    def acc(self) -> torch.dtype:
        return accumulator(self.operand)

    @property
    def multiplied(self) -> torch.dtype:
        """The dtype of the inputs of a product."""
        return self.operand

    @property
    def mixes(self) -> bool:
        """Whether operands are narrower than results."""
        return self.multiplied != self.acc

    @property
    def adds(self) -> bool:
        """Whether a product accumulates in place; otherwise it needs a temporary."""
        return not (self.device_type == "cuda" and self.mixes) or _cuda_has("addmm")

    @property
    def said(self) -> str:
        """The library that multiplies, in words, and what costs memory or time there."""
        return self.words + ("" if self.adds else ", with a temporary for each sum (torch 2.10 and newer need none)")

    def prepared(self, tensor: Tensor) -> Tensor:
        """Return a caller's tensor rounded to the operands' dtype, then widened; no copy where the dtypes agree."""
        if tensor.dtype != self.operand:
            tensor = buffers.track("cast", tensor.to(self.operand, memory_format=torch.contiguous_format))
        return self.widened(tensor)

    def widened(self, tensor: Tensor) -> Tensor:
        """Return `tensor` in the dtype that is multiplied; no copy where it has that dtype."""
        return tensor if tensor.dtype == self.multiplied else buffers.track("cast", tensor.to(self.multiplied))

    def columns_at_once(self, rows: int, columns: int, inner: int) -> int:
        """Return how many of `columns` vocabulary columns one product of backward should take."""
        return columns

    def scratch_bytes(self, columns: int, inner: int) -> int:
        """Return the scratch bytes of a product with a right operand (inner, columns)."""
        return 0

    def copied_bytes(self, rows: int, columns: int) -> int:
        """Return the bytes of the copy that a product of backward takes of its (rows, columns) left operand."""
        return 0

    def writes(self, out_dtype: torch.dtype) -> bool:
        """Return whether dweight is written to its place directly, rounded once; else a float32 product is copied."""
        return out_dtype == self.multiplied or (out_dtype == self.acc and self.device_type != "cpu")

    def logits(self, hidden: Tensor, weight: Tensor, out: Tensor | None, *, add_to: Tensor | None = None) -> Tensor:
        """Write hidden (M, H) @ weight (W, H).T into `out`, or add it to `add_to` (M, W) in place where given."""
        self._count(hidden.shape[0], hidden.shape[1], weight.shape[0])
        if add_to is not None:
            return self._addmm(add_to, hidden, weight.t())
        if out is None:
            out = buffers.empty("slab", (hidden.shape[0], weight.shape[0]), self.acc, hidden.device)
        return self._mm(hidden, weight.t(), out)

    def hidden_grad(self, dz: Tensor, weight: Tensor, total: Tensor, *, first: bool = False) -> Tensor:
        """Return total (M, H) + dz (M, W) @ weight (W, H), without `total` if `first`; `total` may be overwritten."""
        self._count(dz.shape[0], dz.shape[1], weight.shape[1])
        return self._mm(dz, weight, total) if first else self._addmm(total, dz, weight)

    def weight_grad(self, dz: Tensor, hidden: Tensor, out: Tensor, *, accumulate: bool, gain: Tensor | None) -> None:
        """out (W, H) = gain * dz (M, W).T @ hidden (M, H), or += if `accumulate`; `gain` is a scalar tensor or None."""
        self._count(dz.shape[1], dz.shape[0], hidden.shape[1])
        if gain is None and not accumulate and self.writes(out.dtype):
            self._mm(dz.t(), hidden, out)
        elif gain is None and accumulate and out.dtype == self.acc and self.adds:
            self._addmm(out, dz.t(), hidden)
        else:
            product = buffers.empty("dweight", (dz.shape[1], hidden.shape[1]), self.acc, dz.device)
            self._place(self._mm(dz.t(), hidden, product), out, accumulate, gain)

    @staticmethod
    def _place(product: Tensor, out: Tensor, accumulate: bool, gain: Tensor | None) -> None:
        if gain is not None:
            product.mul_(gain)
        if accumulate:
            out.add_(product)
        else:
            out.copy_(product)

    @staticmethod
    def _count(rows: int, inner: int, columns: int) -> None:
        buffers.add_flops(2 * rows * inner * columns)

    def _mm(self, left: Tensor, right: Tensor, out: Tensor) -> Tensor:
        if out.dtype == left.dtype:
            return torch.mm(left, right, out=out)
        return torch.mm(left, right, out_dtype=out.dtype, out=out)

    def _addmm(self, total: Tensor, left: Tensor, right: Tensor) -> Tensor:
        if total.dtype == left.dtype:
            return total.addmm_(left, right)
        if self.adds:
            return torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
        product = buffers.empty("scratch", tuple(total.shape), total.dtype, total.device)
        return total.add_(self._mm(left, right, product))


@dataclass(frozen=True)
class WidenedProducts(Products):
    """Products that widen 16-bit operands slab by slab, where no library quickly multiplies them into float32 sums.

    Reason: on a CPU without instructions for them, torch multiplies 16-bit operands 20 to 40 times slower than widened
    ones; with such instructions it rounds each result to 16 bits.
    """

    name: ClassVar[str] = "widened"
    words: ClassVar[str] = "torch, widened to float32 slab by slab"
    widens: ClassVar[bool] = True

    @property
    def multiplied(self) -> torch.dtype:
        return self.acc

    def columns_at_once(self, rows: int, columns: int, inner: int) -> int:
        # The operand stays in the cache for the second product.
        return min(columns, _round_down(_PREPARED_BYTES // (4 * max(rows, inner)), 64))


@dataclass(frozen=True)
class OneDnnProducts(Products):
    """Products of float32 on an AMD CPU with AVX-512, where MKL runs its AVX2 code."""

    name: ClassVar[str] = "onednn"
    words: ClassVar[str] = "oneDNN"
    allocates: ClassVar[bool] = True

    def _uses(self, left: Tensor, columns: int) -> bool:
        rows, inner = left.shape
        fits = rows * columns * 4 <= _HEAP_BLOCK and rows * columns * inner >= _SMALL_PRODUCT
        return fits and left.dtype == torch.float32 and cpu_libraries.onednn_is_safe()

    def columns_at_once(self, rows: int, columns: int, inner: int) -> int:
        return min(columns, _round_down(_COPIED_BYTES // (4 * max(rows, inner)), 64))

    def copied_bytes(self, rows: int, columns: int) -> int:
        return rows * columns * 4  # they are columns of a wider matrix, or its transpose

    def logits(self, hidden: Tensor, weight: Tensor, out: Tensor | None, *, add_to: Tensor | None = None) -> Tensor:
        if add_to is not None or out is not None or not self._uses(hidden, weight.shape[0]):
            return super().logits(hidden, weight, out, add_to=add_to)
        self._count(hidden.shape[0], hidden.shape[1], weight.shape[0])
        return buffers.track("slab", torch.ops.mkldnn._linear_pointwise(hidden, weight, None, "none", [], ""))

    def hidden_grad(self, dz: Tensor, weight: Tensor, total: Tensor, *, first: bool = False) -> Tensor:
        if not self._uses(dz, weight.shape[1]):
            return super().hidden_grad(dz, weight, total, first=first)
        self._count(dz.shape[0], dz.shape[1], weight.shape[1])
        dz = self._dense(dz)
        if first:
            product = torch.ops.mkldnn._linear_pointwise(dz, weight.t(), None, "none", [], "")
        else:
            product = torch.ops.mkldnn._linear_pointwise.binary(dz, total, weight.t(), None, "add")
        return buffers.track("dhidden", product)

    @staticmethod
    def _dense(left: Tensor) -> Tensor:
        """Return `left`, or the copy that torch would make of it, so that it is counted."""
        return left if left.is_contiguous() else buffers.track("copy", left.contiguous())

    def writes(self, out_dtype: torch.dtype) -> bool:
        return not cpu_libraries.ONEDNN_WEIGHT_GRAD and super().writes(out_dtype)

    def weight_grad(self, dz: Tensor, hidden: Tensor, out: Tensor, *, accumulate: bool, gain: Tensor | None) -> None:
        fits = dz.shape[1] * hidden.shape[1] * 4 <= _HEAP_BLOCK
        if not (cpu_libraries.ONEDNN_WEIGHT_GRAD and fits and self._uses(dz, hidden.shape[1])):
            super().weight_grad(dz, hidden, out, accumulate=accumulate, gain=gain)
            return
        self._count(dz.shape[1], dz.shape[0], hidden.shape[1])
        product = torch.ops.mkldnn._linear_pointwise(self._dense(dz.t()), hidden.t(), None, "none", [], "")
        self._place(buffers.track("dweight", product), out, accumulate, gain)


@dataclass(frozen=True)
class OwnProducts(Products):
    """Products of bfloat16 on a CPU with instructions for float32 sums of them (AMX, AVX512_BF16), from csrc/cpu."""

    name: ClassVar[str] = "own"
    words: ClassVar[str] = "windkern's own code"

    def columns_at_once(self, rows: int, columns: int, inner: int) -> int:
        return min(columns, _round_down(_PREPARED_BYTES // (2 * max(rows, inner)), 64))

    def scratch_bytes(self, columns: int, inner: int) -> int:
        return cpu_products.packed_bytes(columns, inner) + 64

    def writes(self, out_dtype: torch.dtype) -> bool:
        return out_dtype in (torch.bfloat16, torch.float32)

    def _mm(self, left: Tensor, right: Tensor, out: Tensor) -> Tensor:
        return cpu_products.multiply(left, right, out)

    def _addmm(self, total: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return cpu_products.multiply(left, right, total, accumulate=True)


def products_of(device_type: str, operand: torch.dtype) -> Products:
    """Return the products for operands of a dtype on a device type."""
    if operand in (torch.bfloat16, torch.float16):
        if device_type == "cpu" and operand == torch.bfloat16 and cpu_products.PRODUCT is not None:
            return OwnProducts(device_type, operand)
        if device_type != "cuda" or not _cuda_has("mm"):
            return WidenedProducts(device_type, operand)
    if device_type == "cpu" and operand == torch.float32 and cpu_libraries.ONEDNN:
        return OneDnnProducts(device_type, operand)
    return Products(device_type, operand)
