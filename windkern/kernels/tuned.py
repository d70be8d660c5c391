"""Read what was measured on GPUs, by architecture: block sizes of the Triton kernels, and the fastest back end.

The file is tuned.json, which `benchmarks/tune.py` writes.
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
    group: int  # row tiles that go through the vocabulary together, for the second-level cache


@functools.cache
def table(architecture: str) -> dict:
    """Return the default entries, overridden by those of the architecture."""
    entries = json.loads(PATH.read_text())
    return {**entries["default"], **entries.get(architecture, {})}


def architecture(index: int | None = None) -> str:
    """Return the architecture of a GPU (None: the current one), such as sm_90 or gfx942; "default" without a GPU."""
    # Reason: every launch calls this, and torch.cuda.is_available asks the driver.
    if not (torch.cuda.is_initialized() or torch.cuda.is_available()):
        return "default"
    return _architecture_of(torch.cuda.current_device() if index is None else index)


@functools.cache
def _architecture_of(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    # Hazard: on an NVIDIA GPU gcnArchName is the name of the product.
    return f"sm_{properties.major}{properties.minor}"


def row_warps(block: int, arch: str | None = None) -> int:
    """Return the warps of a program that holds `block` columns in registers."""
    per_warp = _WARP * table(arch or architecture())["row_elements_per_thread"]
    return max(1, min(32, block // per_warp))


def backward_config(width: int, arch: str | None = None) -> tuple[int, int]:
    """Return the columns and warps of a backward program for a slab of `width` columns."""
    entry = table(arch or architecture())["backward"]
    block, warps = entry["block"], entry["warps"]
    while block > 128 and block >= 2 * width:
        block, warps = block // 2, max(1, warps // 2)
    return block, warps


def preferred(arch: str | None = None, *, tiles: bool = False) -> tuple[str, ...]:
    """Return the back ends of a GPU, the fastest in the measurements first.

    With `tiles`, they are those of a call that may keep its logits in registers, see `backends.may_fuse`.
    """
    entries = table(arch or architecture())
    return tuple(entries.get("prefer_tiles", entries["prefer"]) if tiles else entries["prefer"])


def tile_config(arch: str | None = None) -> Tile:
    return Tile(**table(arch or architecture())["tile"])


def tile_hidden(arch: str | None = None) -> int:
    """Return the largest hidden size that runs the GEMM-fused forward; 0 until it is measured to be faster."""
    return table(arch or architecture())["tile_hidden"]


def tile_columns(hidden_size: int, dtype: torch.dtype, batch_invariant: bool) -> int | None:
    """Return the columns of a tile if a walk runs in tiles (16-bit operands only); None if it walks slabs.

    A walk runs in tiles where they were measured to be faster, and wherever a row's result must depend on nothing but
    the row, which a library's product does not promise for varying shapes.
    """
    runs = dtype in (torch.bfloat16, torch.float16) and (batch_invariant or hidden_size <= tile_hidden())
    return tile_config().columns if runs else None
