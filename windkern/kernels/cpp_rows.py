"""Row kernels in C++ from csrc/: OpenMP over rows, vectors chosen for the CPU at run time."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from windkern.kernels.contract import RowState, RowStats, Upstream
from windkern.kernels.native import DTYPES, LINKS, PAIR_LOSSES, address, contiguous, why_missing
from windkern.kernels.torch_rows import other_slope, target_slope
from windkern.transform import LogitTransform

try:
    from windkern import _cpp
except ImportError as error:
    _cpp, _reason = None, why_missing("_cpp", error)

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


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"it runs on a CPU, not on {device.type}"
    if _cpp is None:
        return (
            f"{_reason}; reinstall windkern with a C++17 compiler (g++ or clang) on PATH and without "
            "WINDKERN_BUILD_CPP=0 (pip's --no-cache-dir keeps it from taking an earlier wheel)"
        )
    if _kernels is None:
        return (
            f"WINDKERN_CPP_ISA={os.environ['WINDKERN_CPP_ISA']!r} names no instruction set of this CPU and build; "
            f"it has {', '.join(_cpp.instruction_sets())}"
        )
    return None


def _make_kernels():
    """The newest instruction set this CPU runs, or the one WINDKERN_CPP_ISA names; None where there is no such one."""
    names = [] if _cpp is None else _cpp.instruction_sets()
    name = os.environ.get("WINDKERN_CPP_ISA") or (names[0] if names else None)
    return _cpp.Kernels(name) if name in names else None


_kernels = _make_kernels()


def _slab(operand: torch.dtype, logits: Tensor | None, shape, bias, targets, start: int, transform: LogitTransform):
    return _cpp.Slab(
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
        torch.get_num_threads(),
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
    """As `torch_rows.slab_forward`."""
    slab = _slab(z.dtype if kept is None else kept.dtype, z, z.shape, bias, targets, start, transform)
    _kernels.slab_forward(slab, *map(address, state), address(kept), address(offset))


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
    _kernels.slab_forward_unit(slab, *map(address, state), *outputs)


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
    _kernels.slab_backward(slab, address(kept), address(offset), *rows, address(dz), address(dbias))


def segment_sum(values: Tensor, bounds: Tensor) -> Tensor:
    """As `torch_rows.segment_sum`."""
    sums = values.new_empty(bounds.shape[0] - 1)
    values, bounds = contiguous(values, bounds)
    _kernels.segment_sum(
        DTYPES[values.dtype],
        address(values),
        address(bounds),
        sums.shape[0],
        address(sums),
        torch.get_num_threads(),
    )
    return sums


def pair_terms(
    scores: Tensor, prefs: Tensor | None, rewards: Tensor | None, where: Tensor | None, link: str, loss: str
) -> tuple[Tensor, Tensor]:
    """As `torch_pairs.pair_terms`."""
    scores, prefs, rewards, where = contiguous(scores, prefs, rewards, where)
    groups, n = scores.shape
    value, slope = scores.new_empty(groups), scores.new_empty(groups, n)
    pointers = map(address, (scores, prefs, rewards, where))
    codes = LINKS[link], PAIR_LOSSES[loss]
    results = address(value), address(slope)
    _kernels.pair_terms(DTYPES[scores.dtype], groups, n, *pointers, *codes, *results, torch.get_num_threads())
    return value, slope


def win_rates(prefs: Tensor | None, rewards: Tensor | None, where: Tensor | None, link: str) -> Tensor:
    """As `torch_pairs.win_rates`."""
    prefs, rewards, where = contiguous(prefs, rewards, where)
    given = prefs if rewards is None else rewards
    groups, n = given.shape[:2]
    rates = given.new_empty(groups, n)
    pointers = map(address, (prefs, rewards, where))
    code = DTYPES[given.dtype]
    _kernels.win_rates(code, groups, n, *pointers, LINKS[link], address(rates), torch.get_num_threads())
    return rates
