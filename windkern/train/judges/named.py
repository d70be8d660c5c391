"""Load the judge that a command line or a settings file names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from windkern._checks import check_choice
from windkern.train.judges.classifiers import load_classifier
from windkern.train.judges.judge import Judge, RewardJudge, load_function, vader_judge
from windkern.train.judges.models import ModelPreference, ModelReward, PairJudge
from windkern.train.judges.recorded import RecordedJudge

_ALONE = {"vader": vader_judge}  # judges named by a single word: strength -> judge
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_judge(
    specification: str, *, strength: float = 1.0, device: str = "cpu", settings: Mapping[str, object] | None = None
) -> Judge:
    """Return the judge that a specification names.

        vader                      positive sentiment without repetition
        module:function            reward(prompts, responses) -> numbers
        reward-model:NAME          a sequence classifier with one label, folder or hub id
        pair-model:NAME            a cross-encoder of (prompt, first, second), folder or hub id
        pairrm:NAME                PairRM, such as llm-blender/PairRM-hf, folder or hub id
        llm:URL                    a language model behind a server of the OpenAI protocol
        recorded:FILE              scores or preferences in JSON lines

    Args:
        specification: one of the above.
        strength: strength of the Bradley-Terry link for rewards, per unit of reward.
        device: device of models, unless `settings` name another.
        settings: keyword arguments of the judge: of `ModelReward` (label, batch_size, max_length), `ModelPreference`
            (template, label, batch_size, max_length) or `PairRM` (batch_size, source_length), and for all three dtype
            (float32, bfloat16, float16), device, and quantization (arguments of transformers' BitsAndBytesConfig; not
            for PairRM); of `LanguageModelJudge` for llm. None for their defaults.

    Raises:
        ValueError: `specification` is not one of these, what it names cannot be loaded, or a setting is not one of the
            judge's; the message says which.
        OSError: a model cannot be read.

    Example:
        >>> load_judge("math:sqrt").name
        'math:sqrt'
    """
    kind, _, name = specification.partition(":")
    if specification not in _ALONE and not name:
        raise ValueError(
            f"judge must be {', '.join(_ALONE)}, module:function, reward-model:NAME, pair-model:NAME, pairrm:NAME, "
            f"llm:URL or recorded:FILE, got {specification!r}"
        )
    given: dict[str, Any] = dict(settings or {})
    if kind in ("reward-model", "pair-model", "pairrm"):
        return _model_judge(kind, name, strength, device, given)
    if kind == "llm":
        from windkern.train.judges.llm import LanguageModelJudge

        _check_keys(LanguageModelJudge, given, ())
        return LanguageModelJudge(name, **given)
    if given:
        raise ValueError(
            "judge_settings are for reward-model:NAME, pair-model:NAME, pairrm:NAME and llm:URL, got judge "
            f"{specification!r}"
        )
    if specification in _ALONE:
        return _ALONE[specification](strength)
    if kind == "recorded":
        return RecordedJudge(name, strength=strength)
    return RewardJudge(load_function(specification), strength=strength, name=specification)


def _model_judge(kind: str, name: str, strength: float, device: str, settings: dict) -> Judge:
    made_of: Any = {"reward-model": ModelReward, "pair-model": ModelPreference}.get(kind)
    load: Callable[..., tuple[Any, Any]] = load_classifier
    loading: tuple[str, ...] = ("dtype", "device", "quantization")
    if kind == "pairrm":
        from windkern.train.judges.pairrm import PairRM, load_pairrm

        made_of, load, loading = PairRM, load_pairrm, ("dtype", "device")
    _check_keys(made_of, settings, loading)
    options: dict[str, Any] = {"device": device} | {key: settings.pop(key) for key in loading if key in settings}
    if "dtype" in options:
        options["dtype"] = _DTYPES[check_choice("dtype of judge_settings", options["dtype"], tuple(_DTYPES))]
    read = made_of(*load(name, **options), **settings)
    if kind == "reward-model":
        return RewardJudge(read, strength=strength, name=name)
    return PairJudge(read, name=name)


def _check_keys(made_of: type, settings: Mapping[str, object], more: tuple[str, ...]) -> None:
    known = [key for key, each in inspect.signature(made_of).parameters.items() if each.kind is each.KEYWORD_ONLY]
    for key in settings:
        check_choice("a key of judge_settings", key, (*known, *more))
