"""Row kernels in CUDA C++ from csrc/cuda: on torch's current stream, without allocation or synchronisation inside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from windkern.kernels import buffers, torch_rows
from windkern.kernels.contract import RowState, RowStats, Upstream
from windkern.kernels.native import DTYPES, LINKS, PAIR_LOSSES, address, contiguous, why_missing
from windkern.kernels.torch_rows import other_slope, target_slope
from windkern.transform import LogitTransform

try:
    from windkern import _cuda
except ImportError as error:
    _cuda, _reason = None, why_missing("_cuda", error)

__all__ = [
    "other_slope",
    "pair_terms",
    "segment_sum",
    "slab_backward",
    "slab_forward",
    "slab_forward_unit",
    "target_slope",
    "win_rates",
]

# Rows one block adds up for dbias, and the most partial sums of a column: 256 cost 3 % of a slab's traffic.
_DBIAS_ROWS = 32
_DBIAS_TILES = 256


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"it runs on an NVIDIA GPU, not on {device.type}"
    if _cuda is None:
        return (
            f"{_reason}; reinstall windkern with nvcc on PATH and WINDKERN_BUILD_CUDA=1 (pip's --no-cache-dir keeps it "
            "from taking an earlier wheel)"
        )
    if not torch.cuda.is_available():
        return _cuda.device_problem(0) or "this torch has no CUDA; install a CUDA build of torch"
    if torch.version.hip is not None:
        return "it runs on NVIDIA GPUs, and this torch is built for AMD ones"
    index = torch.cuda.current_device() if device.index is None else device.index
    return _cuda.device_problem(index) or None


@contextmanager
def _queue_of(tensor: Tensor) -> Iterator[object]:
    """Device and stream torch itself would use for `tensor`, that device being current inside."""
    with torch.cuda.device(tensor.device):
        yield _cuda.Queue(tensor.device.index, torch.cuda.current_stream().cuda_stream)


def _slab(operand: torch.dtype, logits: Tensor | None, shape, bias, targets, start: int, transform: LogitTransform):
    return _cuda.Slab(
        DTYPES[operand],
        shape[0],
        shape[1],
        start,
        address(logits),
        address(bias),
        address(targets),
        transform.scale,
        transform.softcap or 0.0,
        transform.temperature,
    )


def slab_forward(
    z: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    start: int,
    transform: LogitTransform,
    state: RowState,
    kept: Tensor | None,
    offset: Tensor | None,
) -> None:
    """As `torch_rows.slab_forward`; `z` stays as it is."""
    slab = _slab(z.dtype if kept is None else kept.dtype, z, z.shape, bias, targets, start, transform)
    with _queue_of(z) as queue:
        _cuda.slab_forward(queue, slab, *map(address, state), address(kept), address(offset))


def slab_forward_unit(
    z: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    start: int,
    transform: LogitTransform,
    state: RowState,
    unit: Tensor,
    unit_entropy: Tensor | None,
    rescale: Tensor,
    max_step: Tensor | None,
) -> None:
    """As `torch_rows.slab_forward_unit`."""
    slab = _slab(unit.dtype, z, z.shape, bias, targets, start, transform)
    outputs = map(address, (unit, unit_entropy, rescale, max_step))
    with _queue_of(z) as queue:
        _cuda.slab_forward_unit(queue, slab, *map(address, state), *outputs)


def _dbias_tiles(rows: int, width: int, device_type: str) -> int:
    """Row tiles of the partial sums of dbias, never more scratch than the plan allows for."""
    allowed = torch_rows.block_rows(rows, width, device_type)
    return max(1, min(-(-rows // _DBIAS_ROWS), _DBIAS_TILES, allowed))


def slab_backward(
    src: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    targets: Tensor,
    start: int,
    transform: LogitTransform,
    stats: RowStats,
    upstream: Upstream,
    row_scale: Tensor | None,
    dz: Tensor,
    dbias: Tensor | None,
) -> None:
    """As `torch_rows.slab_backward`."""
    kept = None if offset is None else src
    slab = _slab(dz.dtype, None if kept is not None else src, src.shape, bias, targets, start, transform)
    rows = map(address, (*stats, *upstream, row_scale))
    tiles, partial = 0, None
    if dbias is not None:
        tiles = _dbias_tiles(*src.shape, src.device.type)
        partial = buffers.empty("scratch", (tiles, src.shape[1]), dbias.dtype, dbias.device)
    outputs = address(dz), address(dbias), address(partial), tiles
    with _queue_of(src) as queue:
        _cuda.slab_backward(queue, slab, address(kept), address(offset), *rows, *outputs)


def segment_sum(values: Tensor, bounds: Tensor) -> Tensor:
    """As `torch_rows.segment_sum`."""
    sums = values.new_empty(bounds.shape[0] - 1)
    values, bounds = contiguous(values, bounds)
    with _queue_of(values) as queue:
        _cuda.segment_sum(queue, DTYPES[values.dtype], address(values), address(bounds), sums.shape[0], address(sums))
    return sums


def pair_terms(
    scores: Tensor, prefs: Tensor | None, rewards: Tensor | None, where: Tensor | None, link: str, loss: str
) -> tuple[Tensor, Tensor]:
    """As `torch_pairs.pair_terms`."""
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
    """As `torch_pairs.win_rates`."""
    prefs, rewards, where = contiguous(prefs, rewards, where)
    given = prefs if rewards is None else rewards
    groups, n = given.shape[:2]
    rates = given.new_empty(groups, n)
    inputs = map(address, (prefs, rewards, where))
    with _queue_of(given) as queue:
        _cuda.win_rates(queue, DTYPES[given.dtype], groups, n, *inputs, LINKS[link], address(rates))
    return rates
