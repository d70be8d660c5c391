"""Attention masks of rows with several responses, in the form that a model's layers take.

One rule, `seen`, says which tokens a token sees. Dense masks evaluate the rule at all pairs of a row; FlexAttention,
which skips blocks of unseen pairs, gets the rule itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from windkern.hf.layout import GroupRows

# Kinds of layers, as transformers names them, and the number of the configuration that bounds what they see.
_BOUNDS = {"full_attention": None, "sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
DENSE = ("sdpa", "eager")  # implementations of attention that take any mask
FLEX = "flex_attention"  # takes the rule of a mask
FLEX_DEVICES = ("cuda",)  # Reason: torch has no backward of it on a CPU
Rule = Callable[[Tensor, Tensor, Tensor], Tensor]  # (row, query, key), columns of any shapes that broadcast, -> bool


@dataclass(frozen=True)
class MaskForm:
    """The kinds of attention in a model's layers, which take one mask, or a dict with a mask for each kind by name."""

    kinds: tuple[str, ...]
    by_name: bool

    def __str__(self) -> str:
        return f"a mask for each of {', '.join(self.kinds)}" if self.by_name else f"one mask ({self.kinds[0]})"


def text_config(base: nn.Module) -> Any:
    """Return the configuration of the part of a model that reads text."""
    config: Any = base.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def implementation(base: nn.Module) -> str:
    """Return the name of the attention implementation of the text part."""
    return getattr(text_config(base), "_attn_implementation", None) or "eager"


def kinds_of(base: nn.Module) -> tuple[str, ...]:
    """Return the kinds of layers that the configuration names, or implies if it names none."""
    config = text_config(base)
    found = getattr(config, "layer_types", None)
    if found:
        return tuple(sorted(set(found)))
    return ("sliding_attention",) if getattr(config, "sliding_window", None) else ("full_attention",)


def forms(base: nn.Module) -> tuple[MaskForm, ...]:
    """Return the forms in which the model may take masks, the most likely first; the check tries them."""
    kinds = tuple(kind for kind in kinds_of(base) if kind in _BOUNDS)
    found = [MaskForm(kinds, True)] if len(kinds) > 1 else []
    found += [MaskForm((kind,), by_name) for kind in kinds if len(kinds) == 1 for by_name in (False, True)]
    full = MaskForm(("full_attention",), False)
    return tuple(found if full in found else [*found, full])


def bounds_of(base: nn.Module) -> tuple[str, ...]:
    """Return the names of the configuration's numbers that bound what a token sees."""
    config = text_config(base)
    return tuple(name for name in _BOUNDS.values() if name and isinstance(getattr(config, name, None), int))


@contextmanager
def narrowed(base: nn.Module, size: int) -> Iterator[None]:
    """Narrow windows and chunks to `size` tokens while the context is open, so that a few tokens test them."""
    config = text_config(base)
    own = {name: getattr(config, name) for name in bounds_of(base)}
    try:
        for name, value in own.items():
            setattr(config, name, min(value, size))
        yield
    finally:
        for name, value in own.items():
            setattr(config, name, value)


def seen(rows: GroupRows, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Return whether the token in column `query` of a row sees the one in column `key`; the indices broadcast."""
    return (query >= key) & (query <= rows.last_reader[row, key])


def at_all_pairs(rows: GroupRows, rule: Rule) -> Tensor:
    """Evaluate a rule for each row, query and key: (rows, L, L) bool."""
    count, width = rows.input_ids.shape
    row, column = (torch.arange(size, device=rows.input_ids.device) for size in (count, width))
    return rule(row[:, None, None], column[:, None], column).expand(count, width, width)


def make_masks(base: nn.Module, form: MaskForm, rows: GroupRows) -> Any:
    """Make the `attention_mask` of a model, of shape (rows, 1, L, L), or a dict of them by kind of layer.

    Masks are boolean for `sdpa`, added to the scores for `eager`, and a `BlockMask` for `flex_attention`.
    """
    config = text_config(base)
    made: dict[str, object] = {}
    masks: dict[str, object] = {}
    for kind in form.kinds:
        name = _BOUNDS[kind]
        bound = getattr(config, name, None) if name else None
        rule = "full_attention" if bound is None or bound >= rows.longest else kind
        if rule not in made:
            made[rule] = _as_taken(base, rows, _rule(rule, bound, rows))
        masks[kind] = made[rule]
    return masks if form.by_name else masks[form.kinds[0]]


def _rule(kind: str, bound: int | None, rows: GroupRows) -> Rule:
    """Return the rule for pairs of tokens in layers of a kind.

    Sliding windows and chunks are measured in positions, not in columns, so that inside one response and its prompt
    they are the same as without the other responses.
    """
    plain, places = functools.partial(seen, rows), rows.position_ids

    def within_chunk(row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return plain(row, query, key) & (places[row, query] // bound == places[row, key] // bound)

    def within_window(row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return plain(row, query, key) & (places[row, query] - places[row, key] < bound)

    rules: dict[str, Rule] = {
        "full_attention": plain,
        "sliding_attention": within_window,
        "chunked_attention": within_chunk,
    }
    return rules[kind]


def _as_taken(base: Any, rows: GroupRows, rule: Rule) -> Any:
    attention = implementation(base)
    if attention == FLEX:
        return _block_mask(rows, rule)
    mask = at_all_pairs(rows, rule)[:, None]
    if attention != "eager":
        return mask
    dtype = base.dtype
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def _block_mask(rows: GroupRows, rule: Rule) -> object:
    from torch.nn.attention.flex_attention import create_block_mask

    def mask_mod(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return rule(row, query, key)

    count, width = rows.input_ids.shape
    return create_block_mask(mask_mod, count, None, width, width, device=rows.input_ids.device)
