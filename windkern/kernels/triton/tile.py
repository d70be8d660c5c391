"""A forward whose logits never leave the registers: products of tiles with the online softmax as their epilogue.

One program computes a tile of logits (rows x columns) in float32 and writes its maximum, sum and entropy sum for each
row, the target's logit, and, where wanted, exp(y - maximum of the tile). A second kernel merges the tiles of a row in
order. The tiles lie on a fixed grid of the vocabulary, so a row's result depends on nothing but the row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from windkern.kernels import buffers
from windkern.kernels.contract import Kept, RowState, Slab, kept_gain, kept_log_gain
from windkern.kernels.triton.launch import interprets, transform_numbers
from windkern.kernels.triton.maths import finite, merge, relative_slope, transform_logit
from windkern.kernels.tuned import tile_config

_JOIN_ROWS = 16


@triton.jit(do_not_specialize=["rows", "width", "start", "tiles"])
def tile_kernel(
    hidden,  # (M, H), a pointer or a tensor descriptor
    weight,  # (W, H), the same
    bias_ptr,  # (W,)
    targets_ptr,  # (M,)
    max_ptr,
    sum_ptr,
    entropy_ptr,  # (M, tiles) out
    target_ptr,  # (M,) out
    kept_ptr,  # (M, W) out: exp(y - offset) * relative slope
    offset_ptr,  # (M, tiles) out
    rows,
    width,
    start,
    tiles,
    kept_stride,
    offset_stride,
    inner,
    hidden_stride,
    weight_stride,
    slope,
    cap_in,
    cap_out,
    gain,
    log_gain,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    ENTROPY: tl.constexpr,
    KEPT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WIDEN: tl.constexpr,  # the interpreter cannot multiply bfloat16
    BM: tl.constexpr,
    BV: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    # GROUP row tiles go through the vocabulary together: a tile of the head is read once for all of them.
    pid = tl.program_id(0)
    row_tiles = tl.cdiv(rows, BM)
    group = pid // (GROUP * tiles)
    first = group * GROUP
    members = tl.minimum(row_tiles - first, GROUP)
    row_tile = first + (pid % (GROUP * tiles)) % members
    tile = (pid % (GROUP * tiles)) // members

    m = row_tile * BM + tl.arange(0, BM)
    v = tile * BV + tl.arange(0, BV)
    in_rows = m < rows
    in_columns = v < width
    total = tl.zeros([BM, BV], dtype=tl.float32)
    for k in range(0, inner, BK):
        if DESCRIPTORS:
            a = hidden.load([row_tile * BM, k])
            b = weight.load([tile * BV, k])
        else:
            depth = k + tl.arange(0, BK)
            in_depth = depth < inner
            a = tl.load(
                hidden + m.to(tl.int64)[:, None] * hidden_stride + depth[None, :],
                mask=in_rows[:, None] & in_depth[None, :],
                other=0.0,
            )
            b = tl.load(
                weight + v.to(tl.int64)[:, None] * weight_stride + depth[None, :],
                mask=in_columns[:, None] & in_depth[None, :],
                other=0.0,
            )
        if WIDEN:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a, b.T, total, input_precision="ieee")

    bias = total
    if HAS_BIAS:
        bias = tl.load(bias_ptr + v, mask=in_columns, other=0.0)[None, :]
    y = transform_logit(total, bias, slope, cap_in, cap_out, HAS_BIAS, CAPPED)
    y = tl.where(in_columns[None, :], y, float("-inf"))
    column = (tl.load(targets_ptr + m, mask=in_rows, other=-1) - start).to(tl.int32)
    at_target = v[None, :] == column[:, None]
    target = tl.sum(tl.where(at_target, y, 0.0), 1)
    in_tile = (column >= tile * BV) & (column < tl.minimum(tile * BV + BV, width))
    tl.store(target_ptr + m, target, mask=in_rows & in_tile)

    part_max = tl.max(y, 1)
    gap = y - finite(part_max)[:, None]
    e = tl.exp(gap)
    place = m.to(tl.int64) * tiles + tile
    tl.store(max_ptr + place, part_max, mask=in_rows)
    tl.store(sum_ptr + place, tl.sum(e, 1), mask=in_rows)
    if ENTROPY:
        tl.store(entropy_ptr + place, tl.sum(tl.where(e > 0.0, e * gap, 0.0), 1), mask=in_rows)
    if KEPT:
        kept = e * gain
        if CAPPED:
            kept = kept * relative_slope(y, cap_out)
        tl.store(
            kept_ptr + m.to(tl.int64)[:, None] * kept_stride + v[None, :],
            kept.to(kept_ptr.dtype.element_ty),
            mask=in_rows[:, None] & in_columns[None, :],
        )
        tl.store(offset_ptr + m.to(tl.int64) * offset_stride + tile, part_max - log_gain, mask=in_rows)


@triton.jit(do_not_specialize=["rows", "tiles"])
def join_kernel(
    part_max_ptr,
    part_sum_ptr,
    part_entropy_ptr,  # (M, tiles)
    max_ptr,
    sum_ptr,
    entropy_ptr,  # (M,) running statistics
    rows,
    tiles,
    ENTROPY: tl.constexpr,
    BM: tl.constexpr,
):
    """Merge the tiles of each row, one after the other, into the running statistics."""
    m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    in_rows = m < rows
    run_max = tl.load(max_ptr + m, mask=in_rows, other=float("-inf"))
    run_sum = tl.load(sum_ptr + m, mask=in_rows, other=0.0)
    run_entropy = run_sum * 0.0
    part_entropy = run_entropy
    if ENTROPY:
        run_entropy = tl.load(entropy_ptr + m, mask=in_rows, other=0.0)
    for tile in range(0, tiles):
        place = m * tiles + tile
        part_max = tl.load(part_max_ptr + place, mask=in_rows, other=float("-inf"))
        part_sum = tl.load(part_sum_ptr + place, mask=in_rows, other=0.0)
        if ENTROPY:
            part_entropy = tl.load(part_entropy_ptr + place, mask=in_rows, other=0.0)
        run_max, run_sum, run_entropy, _, _ = merge(run_max, run_sum, run_entropy, part_max, part_sum, part_entropy)
    tl.store(max_ptr + m, run_max, mask=in_rows)
    tl.store(sum_ptr + m, run_sum, mask=in_rows)
    if ENTROPY:
        tl.store(entropy_ptr + m, run_entropy, mask=in_rows)


def _describable(tensor: Tensor) -> bool:
    """Return whether the tensor copy engine can address the tensor: its rows must be 16-byte aligned."""
    return (
        tensor.stride(1) == 1
        and tensor.data_ptr() % 16 == 0
        and tensor.stride(0) * tensor.element_size() % 16 == 0
        and tensor.numel() > 0
    )


def _has_copy_engine(tensor: Tensor) -> bool:
    if tensor.device.type != "cuda":
        return interprets()
    return torch.version.hip is None and torch.cuda.get_device_capability(tensor.device) >= (9, 0)


def tile_forward(
    hidden: Tensor,  # (M, H)
    weight: Tensor,  # (W, H) rows of the head from slab.start on
    slab: Slab,  # without logits
    state: RowState,
    kept: Kept | None,  # its offsets (M, tiles)
) -> None:
    """Do what a product and `slab_forward` do, without the slab; each tile has its own offset."""
    (rows, inner), width = hidden.shape, weight.shape[0]
    if rows == 0:
        return
    config = tile_config()
    tiles = triton.cdiv(width, config.columns)
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    described = _describable(hidden) and _describable(weight) and _has_copy_engine(hidden)
    operands = hidden, weight
    if described:
        operands = (
            TensorDescriptor.from_tensor(hidden, [config.rows, config.inner]),
            TensorDescriptor.from_tensor(weight, [config.columns, config.inner]),
        )
    entropy = state.entropy_sum is not None
    parts = buffers.empty("tiles", (2 + entropy, rows, tiles), torch.float32, hidden.device)
    part_entropy = parts[2] if entropy else parts[0]
    tile_kernel[(triton.cdiv(rows, config.rows) * tiles,)](
        *operands,
        hidden if slab.bias is None else slab.bias,
        slab.targets,
        parts[0],
        parts[1],
        part_entropy,
        state.target_logit,
        hidden if kept is None else kept.values,
        parts if kept is None else kept.offset,
        rows,
        width,
        slab.start,
        tiles,
        0 if kept is None else kept.values.stride(0),
        0 if kept is None else kept.offset.stride(0),
        inner,
        hidden.stride(0),
        weight.stride(0),
        gain=1.0 if kept is None else kept_gain(kept.values.dtype),
        log_gain=0.0 if kept is None else kept_log_gain(kept.values.dtype),
        HAS_BIAS=slab.bias is not None,
        ENTROPY=entropy,
        KEPT=kept is not None,
        DESCRIPTORS=described,
        WIDEN=interprets(),
        BM=config.rows,
        BV=config.columns,
        BK=config.inner,
        GROUP=config.group,
        num_warps=config.warps,
        num_stages=config.stages,
        **transform_numbers(slab.transform, hidden.dtype),
    )
    join_kernel[(triton.cdiv(rows, _JOIN_ROWS),)](
        parts[0],
        parts[1],
        part_entropy,
        state.run_max,
        state.run_sum,
        state.run_sum if state.entropy_sum is None else state.entropy_sum,
        rows,
        tiles,
        ENTROPY=entropy,
        BM=_JOIN_ROWS,
        num_warps=1,
    )
