"""Read what was measured on GPUs, by architecture: block sizes of the Triton kernels, and the faster back end.

It is in tuned.json, which `benchmarks/tune.py` writes.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch

PATH = Path(__file__).with_name("tuned.json")
_WARP = 32


class Tile(NamedTuple):
    """Blocks of the GEMM-fused forward."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    group: int  # row tiles that pass over the vocabulary side by side, for the second-level cache


@functools.cache
def table(architecture: str) -> dict:
    """The default entries, with those of the architecture over them."""
    entries = json.loads(PATH.read_text())
    return {**entries["default"], **entries.get(architecture, {})}


def architecture(index: int | None = None) -> str:
    """sm_90 or gfx942 of a GPU, the current one unless told which; "default" where there is none."""
    # Reason: every launch asks; torch.cuda.is_available asks the driver.
    if not (torch.cuda.is_initialized() or torch.cuda.is_available()):
        return "default"
    return _architecture_of(torch.cuda.current_device() if index is None else index)


@functools.cache
def _architecture_of(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    name = getattr(properties, "gcnArchName", "").split(":")[0]
    return name or f"sm_{properties.major}{properties.minor}"


def row_warps(block: int, arch: str | None = None) -> int:
    """Warps of a program that holds `block` columns in registers."""
    per_warp = _WARP * table(arch or architecture())["row_elements_per_thread"]
    return max(1, min(32, block // per_warp))


def backward_config(width: int, arch: str | None = None) -> tuple[int, int]:
    """Columns and warps of a backward program for a slab of `width` columns."""
    entry = table(arch or architecture())["backward"]
    block, warps = entry["block"], entry["warps"]
    while block > 128 and block >= 2 * width:
        block, warps = block // 2, max(1, warps // 2)
    return block, warps


def preferred(arch: str | None = None) -> tuple[str, ...]:
    """Back ends of a GPU, the one measured to be fastest first."""
    return tuple(table(arch or architecture())["prefer"])


def tile_config(arch: str | None = None) -> Tile:
    return Tile(**table(arch or architecture())["tile"])


def tile_hidden(arch: str | None = None) -> int:
    """Hidden sizes up to this run the GEMM-fused forward; 0 until it has been measured to win."""
    return table(arch or architecture())["tile_hidden"]


def tile_columns(hidden_size: int, dtype: torch.dtype, batch_invariant: bool) -> int | None:
    """Columns of a tile where a walk over a head runs tiles, for 16-bit operands; None where it walks slabs.

    Tiles run where they were measured to be faster, and wherever a row's results may depend on nothing but the row,
    which a library's product of a varying shape does not promise.
    """
    runs = dtype in (torch.bfloat16, torch.float16) and (batch_invariant or hidden_size <= tile_hidden())
    return tile_config().columns if runs else None
