"""Facts about the kinds of samplers, by their names in a settings file, without loading them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A kind of sampler.

    Attributes:
        form: how a settings file names it.
        known: whether its complete responses are known beforehand, so that they can be scored before the first step.
        any_top_p: whether it can sample with top_p below 1.
        server: whether what follows the colon is only an address, which may change when a run is resumed.
        settings: keyword arguments that sampler_settings may hold.
    """

    form: str
    known: bool = False
    any_top_p: bool = False
    server: bool = False
    settings: tuple[str, ...] = ()


KINDS = {
    "transformers": Kind("transformers", any_top_p=True),
    "batched": Kind("batched"),
    "vllm": Kind(
        "vllm:URL", server=True, settings=("model", "folder", "transfer", "address", "tokens", "timeout", "attempts")
    ),
    "sglang": Kind("sglang:URL", server=True, settings=("folder", "tokens", "timeout", "attempts")),
    "openai": Kind("openai:URL", server=True, settings=("model", "timeout", "attempts", "concurrency")),
    "recorded": Kind("recorded:FILE", known=True),
}
_UNKNOWN = Kind("")


def kind_of(sampler: str) -> Kind:
    """Return the kind of the sampler that a settings file names; an empty kind if there is no such sampler.

    Example:
        >>> kind_of("recorded:answers.jsonl").known, kind_of("vllm:http://127.0.0.1:8000").known
        (True, False)
    """
    return KINDS.get(sampler.partition(":")[0], _UNKNOWN)
