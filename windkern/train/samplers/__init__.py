"""Samplers: the policy's own generate, servers, recorded responses; and the one that the settings of a run name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from windkern.train.config import WindConfig
    from windkern.train.samplers.sampler import Sampler


def make_sampler(config: WindConfig, tokenizer) -> Sampler | None:
    """The sampler that `config.sampler` names, None for the policy's own `generate`.

    Raises:
        ValueError: it names none; FileNotFoundError: there is no file of recorded responses.
    """
    from windkern.train.data.prompts import without_user
    from windkern.train.samplers.http import HttpSampler
    from windkern.train.samplers.recorded import RecordedSampler

    kind, _, name = config.sampler.partition(":")
    system = config.system if tokenizer.chat_template is not None else None
    if config.sampler == "transformers":
        return None
    if kind == "recorded" and name:
        return RecordedSampler(name, tokenizer, max_new_tokens=config.max_new_tokens, system=system)
    if kind in ("http", "https") and name:
        return HttpSampler(
            name if "://" in name else config.sampler,
            config.http_model or "policy",
            tokenizer,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            system=system,
        )
    raise ValueError(f"sampler must be transformers, recorded:FILE or http:URL, got {without_user(config.sampler)!r}")
