"""The specification of a walk over the vocabulary: the plan decides it once, and all code below follows it."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch

from windkern.shard import Cut
from windkern.transform import LogitTransform

_TYPES = {  # annotations of the fields, and their types in the schema of an op
    "bool": "bool",
    "float": "float",
    "float | None": "float?",
    "int": "int",
    "str": "str",
    "torch.dtype": "ScalarType",
    "tuple[bool, ...]": "bool[]",
}


@dataclass(frozen=True)
class WalkSpec:
    """The decisions of a plan; each field is an argument of the registered ops, under the same name."""

    gear: str  # scoring, frozen_head, frozen_body or trained
    operand: torch.dtype  # of the products
    hidden_grad: tuple[bool, ...]  # by block: which gradients are wanted
    weight_grad: tuple[bool, ...]
    bias_grad: bool
    entropy: bool  # whether the entropy is an output
    scale: float
    softcap: float | None
    temperature: float
    slab_width: int
    slabs_kept: int  # for backward
    slabs_at_once: int  # per product, of slabs that are not kept
    product_columns: int  # per product of backward, of columns that are kept
    row_block: int  # rows of one forward product; 0: all
    tile_columns: int  # of a forward in fused tiles; 0: it walks slabs
    fused: bool  # kernels multiply and take the exponentials at once: no slab of logits is written
    factored: bool  # backward multiplies exponentials; dz is written only for an upstream on lse
    wide_dz: bool  # dz is written in the dtype of the product library; else in that of the operands
    backend: str  # of the row kernels
    masks: bool = True  # targets may be ignored: their rows of the hidden states are copied, as zeros
    # These describe a head that is sharded over processes, see `windkern.shard.Cut`:
    group: str = ""  # "": the head is whole
    streams: bool = False
    vocab_start: int = 0
    vocab_size: int = 0  # of the whole head
    reduce_dtype: torch.dtype = torch.float32
    least_rows: int = 0  # the walk is padded to these: when streamed, all ranks walk over as many row blocks

    @property
    def transform(self) -> LogitTransform:
        return _transform(self.scale, self.softcap, self.temperature)

    def of(self, transform: LogitTransform, cut: Cut | None = None, rows: int = 0, *, masks: bool = True) -> WalkSpec:
        """Return the same decisions with this transform, and for a sharded head its cut and the most rows of a rank.

        `masks` says whether targets may be ignored.
        """
        given: dict[str, Any] = {"scale": transform.scale, "softcap": transform.softcap}
        given |= {"temperature": transform.temperature, "masks": masks}
        if cut is not None:
            given |= {"group": cut.group, "streams": cut.streams, "vocab_start": cut.start}
            given |= {"vocab_size": cut.vocab_size}
            given |= {"reduce_dtype": cut.reduce_dtype or torch.promote_types(self.operand, torch.float32)}
        if cut is not None and cut.streams:  # all ranks read slab after slab, whatever each keeps
            given |= {"slabs_at_once": 1, "product_columns": self.slab_width}
            given |= {"least_rows": max(1, self.padded_rows(rows) if self.row_block else 1)}
        return dataclasses.replace(self, **given)

    @property
    def merges(self) -> bool:
        """Whether ranks hold different parts of the vocabulary and the same rows."""
        return bool(self.group) and not self.streams

    @property
    def offset_tiles(self) -> int:
        """Number of offsets of a row in a slab that is kept for dz."""
        return -(-self.slab_width // self.tile_columns) if self.tile_columns else 1

    @property
    def saves_logits(self) -> bool:
        """Whether forward keeps logits instead of exponentials.

        Reason: the entropy's gradient -P (log P + H) cancels near a uniform distribution, and log P of a rounded
        exponential is off by the rounding.
        """
        return self.entropy and self.slabs_kept > 0

    def slabs(self, vocab_size: int) -> list[tuple[int, int]]:
        starts = range(0, vocab_size, self.slab_width)
        return [(start, min(start + self.slab_width, vocab_size)) for start in starts]

    def kept_columns(self, vocab_size: int) -> int:
        return min(vocab_size, self.slabs_kept * self.slab_width)

    def padded_rows(self, rows: int) -> int:
        """Return the rows of the walk: whole row blocks where products have fixed tiles."""
        padded = -(-rows // self.row_block) * self.row_block if self.row_block else rows
        return max(padded, self.least_rows)

    def head_rows(self, rows: int) -> int:
        """Return the rows of the head to walk over, given the `rows` on this rank."""
        return self.vocab_size if self.streams else rows

    def values(self) -> tuple:
        """Return the fields in their order, as arguments of an op."""
        return tuple(getattr(self, name) for name in _NAMES)

    @classmethod
    def schema(cls) -> str:
        return ", ".join(f"{_TYPES[str(field.type)]} {field.name}" for field in dataclasses.fields(cls))


def gear_in(values: tuple) -> str:
    """Return the gear in the values of a specification."""
    return values[0]


# Reason: a call passes its specification through two ops, while the GPU waits for the first launch.
_transform = functools.lru_cache(maxsize=256)(LogitTransform)
_NAMES = tuple(field.name for field in dataclasses.fields(WalkSpec))


def row_stride(columns: int) -> int:
    """Return the elements from one row of a kept matrix to the next: rows are aligned for any vocabulary.

    Hazard: a column of rows that are a multiple of a KiB apart lies in few sets of a cache, and products that pass down
    the columns take up to 1.3 times as long. Remedy: rows are an odd multiple of 64 elements apart.
    """
    blocks = -(-columns // 64)
    return 64 * (blocks | 1 if blocks >= 32 else blocks)
