"""Find the longest sequence that a model has positions for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

_TABLES = ("position_embeddings", "position_embedding", "embed_positions", "wpe")


def position_tables(model: nn.Module) -> list[nn.Embedding]:
    """Return the tables of learned positions; the model cannot read longer sequences."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _TABLES
    ]


def positions_of(model: nn.Module) -> int | None:
    """Return how many tokens a model has positions for, None where its configuration does not say.

    That is `max_position_embeddings`, or more where its rotary embedding is stretched. RoBERTa and its relatives count
    from after the padding id, so they have fewer positions than their configuration says.
    """
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = getattr(config, "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1:
        return None
    tables = [table for table in position_tables(model) if table.padding_idx is not None]
    fewest = min([most, *(table.num_embeddings - table.padding_idx - 1 for table in tables)])
    return max([fewest, *_stretched(config, most)])


def _stretched(config: Any, most: int) -> Iterator[int]:
    """Yield the positions by each scaling of a rotary embedding; some models have one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for each in (rope, *rope.values()):
        scaled = isinstance(each, dict) and each.get("rope_type", each.get("type")) != "default"
        if scaled and isinstance(each.get("factor"), (int, float)):
            yield int(each["factor"] * (each.get("original_max_position_embeddings") or most))
