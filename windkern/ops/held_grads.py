"""Gradients that `fused_loss` computes in forward and holds until backward asks for them."""

from __future__ import annotations

import torch
from torch import Tensor

from windkern import backends
from windkern.kernels import buffers
from windkern.kernels.contract import DZ_BINADES, HiddenGrad, RowKernels
from windkern.kernels.gemm import accumulator
from windkern.kernels.pages import in_huge_pages
from windkern.ops.gradients import power_of_two
from windkern.ops.inputs import Inputs, acc_dtype
from windkern.ops.rows import RowBlock

# Elements that are scaled at once on a CPU: this bounds the float32 copy.
_BLOCK = 1 << 20
# Rows that one program of a GPU multiplies by a scalar. Reason: it is mostly 1, and a program only has to see that.
_ROWS_AT_ONCE = 32


def _empty_like(tensor: Tensor) -> Tensor:
    return in_huge_pages(torch.empty_like(tensor, memory_format=torch.contiguous_format))


def _zeros_like(tensor: Tensor) -> Tensor:
    return _empty_like(tensor).zero_()


class HeldGradients:
    """The gradients of one `fused_loss`: dhidden by chunk, dweight and dbias summed, in float32 for several chunks.

    Each has the dtype of its tensor. float16 gradients are stored divided by a power of two: one per row of dhidden,
    and one for dweight.
    Hazard: the gradient of a loss that is scaled down by 1e-6 flushes to zero in float16, before backward multiplies by
    a loss scale. Remedy: stored values are near the top of the format, with their factor stored in float32.
    """

    def __init__(self, inputs: Inputs, wanted: dict, num_chunks: int, *, filled: bool):
        """`filled`: whether a chunk follows. The only one writes all of dweight."""
        weights = zip(inputs.weight, wanted["weight_grad"], strict=True)
        self.accumulates = num_chunks > 1 or any(flag and head.dtype == torch.float16 for head, flag in weights)
        acc = acc_dtype(inputs)
        self.kernels = backends.BACKENDS[inputs.backend].kernels()
        self.weight_dtypes = [head.dtype for head in inputs.weight]
        self.bias_dtype = None if inputs.bias is None else inputs.bias.dtype
        self.hidden = [
            _zeros_like(block) if flag else None
            for block, flag in zip(inputs.hidden, wanted["hidden_grad"], strict=True)
        ]
        self.hidden_scale = [
            block.new_zeros((block.shape[0], 1), dtype=acc) if flag and block.dtype == torch.float16 else None
            for block, flag in zip(inputs.hidden, wanted["hidden_grad"], strict=True)
        ]
        self.weight: list[Tensor | None] = []
        for head, flag in zip(inputs.weight, wanted["weight_grad"], strict=True):
            if flag and self.accumulates and head.dtype != acc:
                self.weight.append(buffers.zeros("accumulator", tuple(head.shape), acc, head.device))
            elif flag:
                make = _empty_like if filled and not self.accumulates else _zeros_like
                self.weight.append(make(head))
            else:
                self.weight.append(None)
        self.weight_scale: list[Tensor | None] = [None] * len(self.weight)
        self.bias = torch.zeros_like(inputs.bias, dtype=acc) if wanted["bias_grad"] else None

    def write_hidden(self, k: int, places: slice, grad: HiddenGrad, rows: Tensor | None, block: RowBlock) -> None:
        """Write dhidden of block k of the hidden states at `places`, from the compacted rows of `block`."""
        if self.hidden_scale[k] is not None:
            scored = block.scored.unsqueeze(1)
            whole = grad.total if grad.owned else buffers.track("dhidden", torch.empty_like(grad.total))
            whole = whole[: block.count]
            block.write(grad, None, whole)
            largest = torch.linalg.vector_norm(whole, torch.inf, dim=1, keepdim=True)
            scale = power_of_two(largest, DZ_BINADES[torch.float16])
            grad = HiddenGrad(whole.div_(scale))
            scale = torch.where(scored, scale, 0.0)
            place = self.hidden_scale[k][places]
            # Reason: spare rows of max_scored all point at one row and are zero, so adding them leaves it correct.
            place.copy_(scale) if rows is None else place.index_add_(0, rows, scale)
        block.write(grad, rows, self.hidden[k][places])

    def finish(self) -> None:
        """Convert the float32 sums to the dtypes of their tensors."""
        for k, dtype in enumerate(self.weight_dtypes):
            total = self.weight[k]
            if total is None or total.dtype == dtype:
                continue
            if dtype == torch.float16:
                largest = torch.linalg.vector_norm(total, torch.inf).view(1, 1)
                self.weight_scale[k] = power_of_two(largest, DZ_BINADES[torch.float16])
                total = total.div_(self.weight_scale[k])
            self.weight[k] = total.to(dtype)

    @property
    def is_scaled(self) -> bool:
        return any(scale is not None for scale in (*self.hidden_scale, *self.weight_scale))

    def times(self, upstream: Tensor, *, keep: bool) -> list[Tensor | None]:
        """Return the gradients of bias, hidden and weight blocks times a scalar; in place unless `keep`.

        Reason: the scalar is 1 if backward starts at the loss, and a pass over dweight costs as much as a tenth of a
        step. A CPU checks the scalar here; a GPU checks it in the kernel.
        """
        if not keep and upstream.device.type == "cpu" and bool(upstream == 1.0) and not self.is_scaled:
            return [None if self.bias is None else self.bias.to(self.bias_dtype), *self.hidden, *self.weight]
        grads = [None if self.bias is None else (self.bias * upstream).to(self.bias_dtype)]
        for values, scales in ((self.hidden, self.hidden_scale), (self.weight, self.weight_scale)):
            for value, scale in zip(values, scales, strict=True):
                with backends.on_device_of(upstream):
                    grads.append(None if value is None else _times(value, scale, upstream, keep, self.kernels))
        return grads


def _times(value: Tensor, scale: Tensor | None, upstream: Tensor, keep: bool, kernels: RowKernels) -> Tensor:
    if value.device.type != "cpu":  # the kernel skips rows whose factor is 1
        out, count = value.clone() if keep else value, value.shape[0]
        matrix = out if scale is not None or count % _ROWS_AT_ONCE else out.view(count // _ROWS_AT_ONCE, -1)
        factor = (upstream if scale is None else scale * upstream).expand(matrix.shape[0], 1).reshape(-1)
        kernels.rescale_rows(matrix, factor.to(accumulator(value.dtype)).contiguous())
        return out
    out = torch.empty_like(value) if keep else value
    if scale is None and value.dtype == upstream.dtype:
        return torch.mul(value, upstream, out=out)
    # Hazard: in a product with a scalar tensor, torch rounds the scalar to the low precision of the other factor.
    # Remedy: a float32 factor with dimensions, in blocks.
    factor = upstream.view(1, 1) if scale is None else scale * upstream
    step = max(1, _BLOCK // max(1, value.shape[1]))
    for first in range(0, value.shape[0], step):
        rows = slice(first, first + step)
        out[rows].copy_(value[rows] * (factor if factor.shape[0] == 1 else factor[rows]))
    return out
