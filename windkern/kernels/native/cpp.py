"""Row kernels in C++ from csrc/, with OpenMP over rows and an instruction set chosen for the CPU at run time."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from windkern.kernels.contract import Exps, Kept, RowState, RowStats, Slab, Unit, Upstream
from windkern.kernels.native.pointers import DTYPES, LINKS, PAIR_LOSSES, address, contiguous, matrix, why_missing
from windkern.kernels.torch.rows import finish_rows, rescale_rows, row_factors, write_hidden_grad

try:
    from windkern import _cpp
except ImportError as error:
    _cpp, _reason = None, why_missing("_cpp", error)

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


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"it runs on a CPU, not on {device.type}"
    if _cpp is None:
        return (
            f"{_reason}; reinstall windkern with a C++17 compiler (g++ or clang) on PATH and without "
            "WINDKERN_BUILD_CPP=0 (pip's --no-cache-dir avoids an earlier wheel)"
        )
    if _kernels is None:
        return (
            f"WINDKERN_CPP_ISA={os.environ['WINDKERN_CPP_ISA']!r} is not an instruction set of this CPU and build; "
            f"these are: {', '.join(_cpp.instruction_sets())}"
        )
    return None


def _make_kernels():
    """Return kernels for the newest instruction set of this CPU, or the one in WINDKERN_CPP_ISA; None if unknown."""
    names = [] if _cpp is None else _cpp.instruction_sets()
    name = os.environ.get("WINDKERN_CPP_ISA") or (names[0] if names else None)
    return _cpp.Kernels(name) if name in names else None


_kernels = _make_kernels()


def _slab(slab: Slab, values: Tensor) -> Any:
    """Return the arguments of `slab` for a kernel that reads or writes `values` (M, W) in the operand dtype."""
    return _cpp.Slab(
        DTYPES[values.dtype],
        *values.shape,
        slab.start,
        *matrix(slab.logits),
        address(slab.bias),
        address(slab.targets),
        slab.transform.scale,
        slab.transform.softcap or 0.0,
        slab.transform.temperature,
        torch.get_num_threads(),
    )


def slab_forward(slab: Slab, state: RowState, kept: Kept | None) -> None:
    """Like `kernels.torch.rows.slab_forward`."""
    values, offset = (None, None) if kept is None else kept
    arguments = _slab(slab, slab.logits if values is None else values)
    _kernels.slab_forward(arguments, *map(address, state), *matrix(values), address(offset))


def slab_forward_unit(slab: Slab, state: RowState, unit: Unit) -> None:
    """Like `kernels.torch.rows.slab_forward_unit`."""
    rows = map(address, (unit.rescale, unit.max_step))
    arguments = *matrix(unit.values), *matrix(unit.logged), *rows
    _kernels.slab_forward_unit(_slab(slab, unit.values), *map(address, state), *arguments)


def exps_forward(slab: Slab, state: RowState, exps: Exps) -> None:
    """Like `kernels.torch.rows.exps_forward`."""
    arguments = *matrix(exps.values), address(exps.pivot), exps.earlier, address(exps.moved)
    _kernels.exps_forward(_slab(slab, exps.values), *map(address, state), *arguments)


def exps_backward(slab: Slab, pivot: Tensor, entry: Tensor, values: Tensor) -> None:
    """Like `kernels.torch.rows.exps_backward`."""
    _kernels.exps_backward(_slab(slab, values), address(pivot), address(entry), *matrix(values))


def column_sums(values: Tensor, weights: Tensor, sums: Tensor) -> None:
    """Like `kernels.torch.rows.column_sums`."""
    arguments = *values.shape, *matrix(values), address(weights), address(sums)
    _kernels.column_sums(DTYPES[values.dtype], *arguments, torch.get_num_threads())


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
    wide = dz.dtype == stats.run_max.dtype
    arguments = *matrix(values), address(offset), *rows, *matrix(dz), wide, address(dbias)
    _kernels.slab_backward(_slab(slab, dz if values is None else values), *arguments)


def segment_sum(values: Tensor, bounds: Tensor) -> Tensor:
    """Like `kernels.torch.rows.segment_sum`."""
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
    """Like `kernels.torch.pairs.pair_terms`."""
    scores, prefs, rewards, where = contiguous(scores, prefs, rewards, where)
    groups, n = scores.shape
    value, slope = scores.new_empty(groups), scores.new_empty(groups, n)
    pointers = map(address, (scores, prefs, rewards, where))
    codes = LINKS[link], PAIR_LOSSES[loss]
    results = address(value), address(slope)
    _kernels.pair_terms(DTYPES[scores.dtype], groups, n, *pointers, *codes, *results, torch.get_num_threads())
    return value, slope


def win_rates(prefs: Tensor | None, rewards: Tensor | None, where: Tensor | None, link: str) -> Tensor:
    """Like `kernels.torch.pairs.win_rates`."""
    prefs, rewards, where = contiguous(prefs, rewards, where)
    given = prefs if rewards is None else rewards
    groups, n = given.shape[:2]
    rates = given.new_empty(groups, n)
    pointers = map(address, (prefs, rewards, where))
    code = DTYPES[given.dtype]
    _kernels.win_rates(code, groups, n, *pointers, LINKS[link], address(rates), torch.get_num_threads())
    return rates
