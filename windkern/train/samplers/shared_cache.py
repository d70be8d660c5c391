"""Compute the keys and values of a prompt once for all of its responses."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

_NAMES = ("cache", "past_key_values")  # names of one argument of `generate`, which transformers has renamed
# Layers of a cache whose state is keys and values of tokens, so that rows of it can be copied and continued.
_LAYERS = {"DynamicLayer", "DynamicSlidingWindowLayer"}


class UnsharedCacheError(ValueError):
    """The cache of a model cannot be copied row by row and continued."""


def prompt_cache(
    model: Any, ids: Tensor, mask: Tensor, owner: Tensor, settings: GenerationConfig, *, synced: bool = False
) -> Mapping[str, object]:
    """Return what `generate` takes besides ids and mask so that each prompt is run once, except for its last token.

    Args:
        model: causal LM in eval mode, called without gradients.
        ids, mask: (S, P), prompts padded on the left, a row for each response; on the model's device.
        owner: (S,) numbers that rise where another prompt begins.
        settings: settings of the `generate` that follows.
        synced: as `synced_gpus` of `generate`.

    Returns:
        The cache with a row for each response, under the name that `generate` has for it. Empty where nothing is
        shared, or where a prompt is a single token.

    Raises:
        UnsharedCacheError: the model's cache is more than keys and values of tokens.
    """
    _, place, counts = owner.unique_consecutive(return_inverse=True, return_counts=True)
    first = (counts.cumsum(0) - counts).to(ids.device)
    if len(counts) == len(owner) or not bool((mask[first, :-1].sum(1) > 0).all()):
        return {}
    once = copy.deepcopy(settings)
    once.max_new_tokens, once.return_dict_in_generate = 1, True
    out = model.generate(
        input_ids=ids[first, :-1], attention_mask=mask[first, :-1], generation_config=once, synced_gpus=synced
    )
    name = next((name for name in _NAMES if out.get(name) is not None), None)
    if name is None or not {type(layer).__name__ for layer in getattr(out[name], "layers", (None,))} <= _LAYERS:
        raise UnsharedCacheError(f"the cache of {type(model).__name__} holds more than keys and values of tokens")
    cache = out[name]
    cache.batch_select_indices(place.to(ids.device))
    return {name: cache}
