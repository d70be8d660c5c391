"""Row kernels in CUDA C++ from csrc/cuda: they run on torch's current stream and neither allocate nor synchronise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from windkern.kernels import buffers
from windkern.kernels.contract import Exps, Kept, RowState, RowStats, Settled, Slab, Unit, Upstream
from windkern.kernels.native.pointers import DTYPES, LINKS, PAIR_LOSSES, address, contiguous, matrix, why_missing
from windkern.kernels.torch import rows as torch_rows
from windkern.kernels.torch.rows import row_factors, write_hidden_grad

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
    "win_rates",
    "write_hidden_grad",
]

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


@contextmanager
def _queue_of(tensor: Tensor) -> Iterator[object]:
    """Yield the device and stream that torch would use for `tensor`, with that device current."""
    with torch.cuda.device(tensor.device):
        yield _cuda.Queue(tensor.device.index, torch.cuda.current_stream().cuda_stream)


def _slab(slab: Slab, values: Tensor) -> Any:
    """Return the arguments of `slab` for a kernel that reads or writes `values` (M, W) in the operand dtype."""
    return _cuda.Slab(
        DTYPES[values.dtype],
        *values.shape,
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
    """Like `kernels.torch.rows.finish_rows`, most of which it is."""
    torch_rows.finish_rows(state, targets, log_sum, logps, lse, settled, rescale_rows)


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
