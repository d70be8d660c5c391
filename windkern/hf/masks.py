"""Attention masks of rows with several responses, in the form that a model's layers take them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from windkern.hf.layout import GroupRows

# Kinds of layers by the names of transformers, and the number of the configuration that bounds what they see.
_BOUNDS = {"full_attention": None, "sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
DENSE = ("sdpa", "eager")  # implementations of attention that take any mask


@dataclass(frozen=True)
class MaskForm:
    """Kinds of attention of a model's layers: one mask for all of them, or one by the name of each kind."""

    kinds: tuple[str, ...]
    by_name: bool

    def __str__(self) -> str:
        return f"a mask for each of {', '.join(self.kinds)}" if self.by_name else f"one mask ({self.kinds[0]})"


def text_config(base: nn.Module) -> object:
    config = base.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def implementation(base: nn.Module) -> str:
    """Which attention the text part runs."""
    return getattr(text_config(base), "_attn_implementation", None) or "eager"


def kinds_of(base: nn.Module) -> tuple[str, ...]:
    """Names that transformers gives the layers of a model; of a model that names none, what its configuration says."""
    config = text_config(base)
    found = getattr(config, "layer_types", None)
    if found:
        return tuple(sorted(set(found)))
    return ("sliding_attention",) if getattr(config, "sliding_window", None) else ("full_attention",)


def forms(base: nn.Module) -> tuple[MaskForm, ...]:
    """How masks may have to be handed over, likeliest first; a model is tried to find out."""
    kinds = tuple(kind for kind in kinds_of(base) if kind in _BOUNDS)
    found = [MaskForm(kinds, True)] if len(kinds) > 1 else []
    found += [MaskForm((kind,), by_name) for kind in kinds if len(kinds) == 1 for by_name in (False, True)]
    full = MaskForm(("full_attention",), False)
    return tuple(found if full in found else [*found, full])


def bounds_of(base: nn.Module) -> tuple[str, ...]:
    """Numbers of the configuration that bound what a token sees, as far as the model has them."""
    config = text_config(base)
    return tuple(name for name in _BOUNDS.values() if name and isinstance(getattr(config, name, None), int))


@contextmanager
def narrowed(base: nn.Module, size: int) -> Iterator[None]:
    """Inside, windows and chunks of a model are `size` tokens, so that a few tokens show whether they are kept."""
    config = text_config(base)
    own = {name: getattr(config, name) for name in bounds_of(base)}
    try:
        for name, value in own.items():
            setattr(config, name, min(value, size))
        yield
    finally:
        for name, value in own.items():
            setattr(config, name, value)


def seen(rows: GroupRows) -> Tensor:
    """(rows, L, L) bool: query q sees key k."""
    column = torch.arange(rows.input_ids.shape[1], device=rows.input_ids.device)
    return (column[:, None] >= column) & (column[:, None] <= rows.last_reader[:, None, :])


def make_masks(base: nn.Module, form: MaskForm, rows: GroupRows) -> Tensor | dict[str, Tensor]:
    """What a model takes as `attention_mask`: (rows, 1, L, L), or such by the names of its kinds of layers.

    Boolean for `sdpa`, and added to the scores for `eager`. Sliding windows and chunks are measured in positions, not
    in columns: inside one response and its prompt they are what they are without the others.
    """
    config, plain = text_config(base), seen(rows)
    made: dict[str, Tensor] = {}
    for kind in form.kinds:
        bound = _BOUNDS[kind] and getattr(config, _BOUNDS[kind], None)
        if bound is None or bound >= rows.longest:
            kept = plain
        elif kind == "chunked_attention":
            chunk = rows.position_ids // bound
            kept = plain & (chunk[:, :, None] == chunk[:, None, :])
        else:
            distance = rows.position_ids[:, :, None] - rows.position_ids[:, None, :]
            kept = plain & (distance < bound)
        made[kind] = kept
    ready = {id(mask): _as_taken(base, mask) for mask in made.values()}
    masks = {kind: ready[id(mask)] for kind, mask in made.items()}
    return masks if form.by_name else masks[form.kinds[0]]


def _as_taken(base: nn.Module, mask: Tensor) -> Tensor:
    mask = mask[:, None]
    if implementation(base) != "eager":
        return mask
    dtype = base.dtype
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
