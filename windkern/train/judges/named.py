"""The judge that a command line or a settings file names."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from windkern._checks import check_choice
from windkern.train.judges.classifiers import load_classifier
from windkern.train.judges.judge import Judge, RewardJudge, load_function, vader_judge
from windkern.train.judges.models import ModelPreference, ModelReward, PairJudge
from windkern.train.judges.recorded import RecordedJudge


def load_judge(
    specification: str, *, strength: float = 1.0, device: str = "cpu", settings: Mapping[str, object] | None = None
) -> Judge:
    """Return the judge a command line names.

        vader                      positive sentiment without repetition
        module:function            reward(prompts, responses) -> numbers
        reward-model:NAME          a sequence classifier with one label, folder or hub id
        pair-model:NAME            a cross-encoder of (prompt, first, second), folder or hub id
        recorded:FILE              scores or preferences in JSON lines

    Args:
        specification: one of the above.
        strength: of the Bradley-Terry link for rewards, per unit of reward.
        device: of models.
        settings: of models, keyword arguments of `ModelReward` (label, batch_size, max_length) or `ModelPreference`
            (template, label, batch_size, max_length); None for their defaults.

    Raises:
        ValueError: it is none of these, or what it names cannot be loaded, or a setting is not one of the judge's; the
            message says which.
        OSError: a model cannot be read.

    Example:
        >>> load_judge("math:sqrt").name
        'math:sqrt'
    """
    kind, _, name = specification.partition(":")
    if specification != "vader" and not name:
        raise ValueError(
            "judge must be vader, module:function, reward-model:NAME, pair-model:NAME or recorded:FILE, "
            f"got {specification!r}"
        )
    made_of = {"reward-model": ModelReward, "pair-model": ModelPreference}.get(kind)
    if made_of is None and settings:
        raise ValueError(f"judge_settings belong to reward-model:NAME and pair-model:NAME, got judge {specification!r}")
    if made_of is not None:
        known = [key for key, each in inspect.signature(made_of).parameters.items() if each.kind is each.KEYWORD_ONLY]
        for key in settings or {}:
            check_choice("a key of judge_settings", key, known)
        read = made_of(*load_classifier(name, device=device), **(settings or {}))
        return RewardJudge(read, strength=strength, name=name) if kind == "reward-model" else PairJudge(read, name=name)
    if specification == "vader":
        return vader_judge(strength)
    if kind == "recorded":
        return RecordedJudge(name, strength=strength)
    return RewardJudge(load_function(specification), strength=strength, name=specification)
