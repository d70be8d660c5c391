"""Row kernels in CUDA C++ from csrc/cuda: they run on torch's current stream and neither allocate nor synchronise."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from windkern.kernels import buffers
from windkern.kernels.contract import (
    TILE_COLUMNS,
    Exps,
    HiddenGrad,
    Kept,
    RowState,
    RowStats,
    Settled,
    Slab,
    Unit,
    Upstream,
)
from windkern.kernels.native.pointers import DTYPES, LINKS, PAIR_LOSSES, address, contiguous, matrix, why_missing
from windkern.kernels.torch import rows as torch_rows

try:
    from windkern import _cuda
except ImportError as error:
    _cuda, _reason = None, why_missing("_cuda", error)

__all__ = [
    "column_sums",
    "exps_backward",
    "exps_forward",
    "finish_rows",
    "pair_terms",
    "rescale_rows",
    "row_factors",
    "segment_sum",
    "slab_backward",
    "slab_forward",
    "slab_forward_unit",
    "tile_exps_backward",
    "tile_exps_forward",
    "tile_forward",
    "win_rates",
    "write_hidden_grad",
]

# Numbers of 16 bits in the 16 bytes whose multiples the copy engine addresses.
_ALIGNED = 8
# Rows that one block sums for dbias, and the most partial sums of a column: 256 cost 3 % of a slab's traffic.
_DBIAS_ROWS = 32
_DBIAS_TILES = 256


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"it runs on an NVIDIA GPU, not on {device.type}"
    if _cuda is None:
        return (
            f"{_reason}; reinstall windkern with nvcc on PATH and WINDKERN_BUILD_CUDA=1 (pip's --no-cache-dir avoids "
            "an earlier wheel)"
        )
    if not torch.cuda.is_available():
        return _cuda.device_problem(0) or "this torch has no CUDA; install a CUDA build of torch"
    if torch.version.hip is not None:
        return "it runs on NVIDIA GPUs, but this torch is built for AMD GPUs"
    index = torch.cuda.current_device() if device.index is None else device.index
    return _cuda.device_problem(index) or None


def why_not_tiles(hidden_size: int, dtype: torch.dtype) -> str | None:
    """Return why the current GPU does not run the kernels that multiply themselves, or None if it does."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"they multiply bfloat16 and float16, not {dtype}"
    if hidden_size % _ALIGNED != 0:
        return f"they need a hidden size that is a multiple of {_ALIGNED}, got {hidden_size}"
    return _why_no_tiles()


def _why_no_tiles() -> str | None:
    if _cuda is None or not torch.cuda.is_available():
        return "there is no GPU, or windkern was built without CUDA"
    return _tiles_problem(torch.cuda.current_device())


@functools.cache
def _tiles_problem(index: int) -> str | None:
    return _cuda.tiles_problem(index) or None


def reads_in_place(matrix: Tensor) -> bool:
    """Return whether the copy engine reads rows of `matrix` where they lie: 16 bytes aligned, and each contiguous."""
    dense = matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]
    return dense and matrix.stride(0) % _ALIGNED == 0 and matrix.data_ptr() % 16 == 0


@contextmanager
def _queue_of(tensor: Tensor) -> Iterator[object]:
    """Yield the device and stream that torch would use for `tensor`, with that device current."""
    with torch.cuda.device(tensor.device):
        yield _cuda.Queue(tensor.device.index, torch.cuda.current_stream().cuda_stream)


def _slab(slab: Slab, values: Tensor) -> Any:
    """Return the arguments of `slab` for a kernel that reads or writes `values` (M, W) in the operand dtype."""
    return _described(slab, values.dtype, values.shape)


def _described(slab: Slab, operand: torch.dtype, shape: tuple[int, ...]) -> Any:
    return _cuda.Slab(
        DTYPES[operand],
        *shape,
        slab.start,
        *matrix(slab.logits),
        address(slab.bias),
        address(slab.targets),
        slab.transform.scale,
        slab.transform.softcap or 0.0,
        slab.transform.temperature,
    )


def slab_forward(slab: Slab, state: RowState, kept: Kept | None) -> None:
    """Like `kernels.torch.rows.slab_forward`."""
    values, offset = (None, None) if kept is None else kept
    arguments = _slab(slab, slab.logits if values is None else values)
    with _queue_of(slab.logits) as queue:
        _cuda.slab_forward(queue, arguments, *map(address, state), *matrix(values), address(offset))


def slab_forward_unit(slab: Slab, state: RowState, unit: Unit) -> None:
    """Like `kernels.torch.rows.slab_forward_unit`."""
    rows = map(address, (unit.rescale, unit.max_step))
    arguments = *matrix(unit.values), *matrix(unit.logged), *rows
    with _queue_of(slab.logits) as queue:
        _cuda.slab_forward_unit(queue, _slab(slab, unit.values), *map(address, state), *arguments)


def _readable(operand: Tensor) -> Tensor:
    """Return the operand of a kernel that multiplies, copied where the copy engine cannot address it."""
    if reads_in_place(operand):
        return operand
    return buffers.track("cast", operand.clone(memory_format=torch.contiguous_format))


def _operands(hidden: Tensor, weight: Tensor) -> Any:
    return _cuda.TileOperands(*matrix(hidden), *matrix(weight), hidden.shape[1])


def _tile_slab(slab: Slab, hidden: Tensor, weight: Tensor) -> Any:
    """Return the arguments of a slab without logits."""
    return _described(slab, hidden.dtype, (hidden.shape[0], weight.shape[0]))


def _parts(count: int, hidden: Tensor, weight: Tensor) -> Tensor:
    tiles = -(-weight.shape[0] // TILE_COLUMNS)
    return buffers.empty("tiles", (count, tiles, hidden.shape[0]), torch.float32, hidden.device)


_pinned = threading.local()  # memory of the host that a kernel writes, for one call at a time


def find_scored(targets: Tensor, ignore_index: int) -> Tensor | None:
    """Return the positions of targets (R,) other than `ignore_index`, or None if all are; waits for the GPU once."""
    if not hasattr(_pinned, "count"):
        _pinned.count = torch.empty(1, dtype=torch.int64, pin_memory=targets.is_cuda)
    positions, rows = torch.empty_like(targets), targets.shape[0]
    with _queue_of(targets) as queue:
        arguments = address(targets), ignore_index, rows, address(positions), address(_pinned.count)
        count = _cuda.find_scored(queue, *arguments)
    return None if count == rows else positions[:count]


def tile_forward(
    hidden: Tensor, weight: Tensor, slab: Slab, state: RowState, kept: Kept | None, *, fresh: bool = False
) -> None:
    """Do what a product and `slab_forward` do, without the slab: hidden (M, H), weight (W, H), `kept` None."""
    if 0 in (hidden.shape[0], weight.shape[0]):
        return
    hidden, weight = _readable(hidden), _readable(weight)
    parts = _parts(2 + (state.entropy_sum is not None), hidden, weight)
    with _queue_of(hidden) as queue:
        slab_arguments = _tile_slab(slab, hidden, weight)
        _cuda.score_tiles(queue, _operands(hidden, weight), slab_arguments, *map(address, state), address(parts), fresh)


def tile_exps_forward(
    hidden: Tensor, weight: Tensor, slab: Slab, state: RowState, exps: Exps, *, fresh: bool = False
) -> None:
    """Do what a product and `exps_forward` do, without the slab.

    A pivot begins at a logit of the row: at its target's, if the slab has it.
    """
    if 0 in (hidden.shape[0], weight.shape[0]):
        if exps.moved is not None:
            exps.moved.fill_(1.0)
        return
    hidden, weight = _readable(hidden), _readable(weight)
    parts = _parts(3, hidden, weight)
    arguments = *matrix(exps.values), address(exps.pivot), exps.earlier, address(exps.moved), address(parts)
    with _queue_of(hidden) as queue:
        slab_arguments = _tile_slab(slab, hidden, weight)
        operands = _operands(hidden, weight)
        _cuda.exps_tiles_forward(queue, operands, slab_arguments, *map(address, state), *arguments, fresh)


def tile_exps_backward(
    hidden: Tensor, weight: Tensor, slab: Slab, pivot: Tensor, entry: Tensor, values: Tensor
) -> None:
    """Do what a product and `exps_backward` do, without the slab."""
    if 0 in (hidden.shape[0], weight.shape[0]):
        return
    hidden, weight = _readable(hidden), _readable(weight)
    with _queue_of(hidden) as queue:
        arguments = address(pivot), address(entry), *matrix(values)
        operands = _operands(hidden, weight)
        _cuda.exps_tiles_backward(queue, operands, _tile_slab(slab, hidden, weight), *arguments)


def exps_forward(slab: Slab, state: RowState, exps: Exps) -> None:
    """Like `kernels.torch.rows.exps_forward`."""
    arguments = *matrix(exps.values), address(exps.pivot), exps.earlier, address(exps.moved)
    with _queue_of(slab.logits) as queue:
        _cuda.exps_forward(queue, _slab(slab, exps.values), *map(address, state), *arguments)


def exps_backward(slab: Slab, pivot: Tensor, entry: Tensor, values: Tensor) -> None:
    """Like `kernels.torch.rows.exps_backward`."""
    with _queue_of(values) as queue:
        _cuda.exps_backward(queue, _slab(slab, values), address(pivot), address(entry), *matrix(values))


def column_sums(values: Tensor, weights: Tensor, sums: Tensor) -> None:
    """Like `kernels.torch.rows.column_sums`."""
    tiles = _dbias_tiles(values.shape[0], values.shape[1], values.device.type)
    partial = buffers.empty("scratch", (tiles, values.shape[1]), sums.dtype, sums.device)
    arguments = *values.shape, *matrix(values), address(weights), address(sums), address(partial), tiles
    with _queue_of(values) as queue:
        _cuda.column_sums(queue, DTYPES[values.dtype], *arguments)


def rescale_rows(sums: Tensor, factor: Tensor) -> None:
    """Like `kernels.torch.rows.rescale_rows`: one block per row, which returns at once if the factor is 1."""
    with _queue_of(sums) as queue:
        _cuda.rescale_rows(queue, DTYPES[sums.dtype], *matrix(sums), address(factor), *sums.shape)


def finish_rows(
    state: RowState, targets: Tensor, log_sum: Tensor, logps: Tensor, lse: Tensor, settled: Settled | None
) -> None:
    """Like `kernels.torch.rows.finish_rows`, in one launch."""
    vectors = map(address, (*state[:3], targets, log_sum, logps, lse))
    dtype, arguments = log_sum.dtype, [0] * 7
    if settled is not None:
        kept, *rows, moves = settled
        dtype, arguments = kept.dtype, [*matrix(kept), kept.shape[1], *map(address, rows), moves]
    with _queue_of(log_sum) as queue:
        _cuda.finish_rows(queue, DTYPES[dtype], targets.shape[0], *vectors, *arguments)


def _strided(*matrices: Tensor | None) -> bool:
    """Return whether numbers of a row of any matrix lie apart."""
    return any(each is not None and each.shape[1] > 1 and each.stride(1) != 1 for each in matrices)


def row_factors(
    upstream: Tensor,
    total: Tensor,
    targets: Tensor,
    slope: float,
    factor: Tensor,
    hidden: Tensor | None,
    scaled: Tensor | None,
) -> None:
    """Like `kernels.torch.rows.row_factors`, in one launch where rows are contiguous."""
    if _strided(hidden, scaled):
        torch_rows.row_factors(upstream, total, targets, slope, factor, hidden, scaled)
        return
    with _queue_of(factor) as queue:
        _cuda.row_factors(
            queue,
            factor.dtype == torch.float64,
            targets.shape[0],
            0 if scaled is None else scaled.shape[1],
            *map(address, (upstream, total, targets)),
            slope,
            address(factor),
            *_any(hidden, factor.dtype),
            *_any(scaled, factor.dtype),
        )


def _any(tensor: Tensor | None, dtype: torch.dtype) -> tuple[int, int, int]:
    """Return the arguments of a matrix of any dtype; `dtype` is for None."""
    return DTYPES[dtype if tensor is None else tensor.dtype], *matrix(tensor)


def write_hidden_grad(grad: HiddenGrad, targets: Tensor, rows: Tensor | None, out: Tensor) -> None:
    """Like `kernels.torch.rows.write_hidden_grad`, in one launch where rows are contiguous."""
    total, head = grad.total, grad.head
    if _strided(total, head, out):
        torch_rows.write_hidden_grad(grad, targets, rows, out)
        return
    with _queue_of(total) as queue:
        _cuda.write_hidden_grad(
            queue,
            total.dtype == torch.float64,
            out.shape[0] if rows is None else rows.shape[0],
            total.shape[1],
            *matrix(total),
            *map(address, (grad.factor, grad.at_target)),
            DTYPES[grad.rounded or total.dtype],
            *_any(head, total.dtype),
            *map(address, (targets, rows)),
            *_any(out, total.dtype),
        )


def _dbias_tiles(rows: int, width: int, device_type: str) -> int:
    """Return the row tiles of the partial sums of dbias; they never take more scratch than the plan counts."""
    allowed = torch_rows.block_rows(rows, width, device_type)
    return max(1, min(-(-rows // _DBIAS_ROWS), _DBIAS_TILES, allowed))


def slab_backward(
    slab: Slab,
    kept: Kept | None,
    stats: RowStats,
    upstream: Upstream,
    row_scale: Tensor | None,
    dz: Tensor,
    dbias: Tensor | None,
) -> None:
    """Like `kernels.torch.rows.slab_backward`."""
    values, offset = (None, None) if kept is None else kept
    rows = map(address, (*stats, *upstream, row_scale))
    tiles, partial = 0, None
    if dbias is not None:
        tiles = _dbias_tiles(dz.shape[0], dz.shape[1], dz.device.type)
        partial = buffers.empty("scratch", (tiles, dz.shape[1]), dbias.dtype, dbias.device)
    outputs = *matrix(dz), address(dbias), address(partial), tiles
    with _queue_of(dz) as queue:
        _cuda.slab_backward(queue, _slab(slab, dz), *matrix(values), address(offset), *rows, *outputs)


def segment_sum(values: Tensor, bounds: Tensor) -> Tensor:
    """Like `kernels.torch.rows.segment_sum`."""
    sums = values.new_empty(bounds.shape[0] - 1)
    values, bounds = contiguous(values, bounds)
    with _queue_of(values) as queue:
        _cuda.segment_sum(queue, DTYPES[values.dtype], address(values), address(bounds), sums.shape[0], address(sums))
    return sums


def pair_terms(
    scores: Tensor, prefs: Tensor | None, rewards: Tensor | None, where: Tensor | None, link: str, loss: str
) -> tuple[Tensor, Tensor]:
    """Like `kernels.torch.pairs.pair_terms`."""
    scores, prefs, rewards, where = contiguous(scores, prefs, rewards, where)
    groups, n = scores.shape
    value, slope = scores.new_empty(groups), scores.new_empty(groups, n)
    scratch = buffers.empty("scratch", (groups, _cuda.pair_tiles(n)), torch.float64, scores.device)
    inputs = map(address, (scores, prefs, rewards, where))
    results = map(address, (value, slope, scratch))
    codes = LINKS[link], PAIR_LOSSES[loss]
    with _queue_of(scores) as queue:
        _cuda.pair_terms(queue, DTYPES[scores.dtype], groups, n, *inputs, *codes, *results)
    return value, slope


def win_rates(prefs: Tensor | None, rewards: Tensor | None, where: Tensor | None, link: str) -> Tensor:
    """Like `kernels.torch.pairs.win_rates`."""
    prefs, rewards, where = contiguous(prefs, rewards, where)
    given = prefs if rewards is None else rewards
    groups, n = given.shape[:2]
    rates = given.new_empty(groups, n)
    inputs = map(address, (prefs, rewards, where))
    with _queue_of(given) as queue:
        _cuda.win_rates(queue, DTYPES[given.dtype], groups, n, *inputs, LINKS[link], address(rates))
    return rates
