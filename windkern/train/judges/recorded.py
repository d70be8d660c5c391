"""A judge that looks up what somebody has judged before, and the judge a command line names."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from windkern._checks import check_choice, check_number
from windkern.train.data.prompts import loosely
from windkern.train.data.records import load_records
from windkern.train.judges.classifiers import load_classifier
from windkern.train.judges.judge import Judge, RewardJudge, Verdict, bradley_terry, load_function, vader_judge
from windkern.train.judges.models import ModelPreference, ModelReward, PairJudge


class RecordedJudge:
    """A judge made of recorded preferences, or of recorded rewards and the Bradley-Terry link.

        P_ij = prefs[i][j],    else    P_ij = sigmoid(strength * (r_i - r_j))

    Responses are found by their text as it was recorded, else without the space around it; an answer that was never
    judged is an error, not a tie. So is one that was cut: what was judged is the whole of it.

    Args:
        path: JSON lines, see `windkern.train.data.records.load_records`; all lines with "prefs", or all with "rewards".
        strength: of the link for rewards, per unit of reward; positive.

    Raises:
        FileNotFoundError, ValueError: the file does not exist or a line is wrong; some lines have neither prefs nor
            rewards, or not the same as the others; when judging, a response or a pair is not in the file.
    """

    def __init__(self, path: str | Path, *, strength: float = 1.0):
        self.name = f"recorded in {Path(path).name}"
        self.strength = check_number("strength", strength, above=0)
        records = load_records(path)
        self.has_prefs = all(record.prefs is not None for record in records)
        if not self.has_prefs and any(record.rewards is None for record in records):
            raise ValueError(f'{path}: every line must have "prefs", or every line "rewards"')
        self._judged: dict[tuple[str, ...], float] = {}  # by prompt and response, or by prompt and two responses
        self._loosely: dict[tuple[str, ...], float] = {}  # the same, by what is left without the space around texts
        for record in records:
            prompt = str(record.prompt)
            if self.has_prefs:
                for i, row in enumerate(record.prefs):
                    for j, chance in enumerate(row):
                        self._add(chance, prompt, record.responses[i], record.responses[j])
            else:
                for text, reward in zip(record.responses, record.rewards, strict=True):
                    self._add(reward, prompt, text)

    def judge(self, prompts: Sequence[str], responses: Sequence[Sequence[str]]) -> Verdict:
        asked = [(str(prompt), group) for prompt, group in zip(prompts, responses, strict=True)]
        if self.has_prefs:
            prefs = [
                [[0.5 if a == b else self._found(prompt, a, b) for b in group] for a in group]
                for prompt, group in asked
            ]
            return Verdict(torch.tensor(prefs, dtype=torch.float32), None)
        rewards = [[self._found(prompt, text) for text in group] for prompt, group in asked]
        values = torch.tensor(rewards, dtype=torch.float32)
        return Verdict(bradley_terry(values, self.strength), values)

    def _add(self, value: float, *key: str) -> None:
        self._judged[key] = self._loosely[tuple(map(loosely, key))] = value

    def _found(self, *key: str) -> float:
        loose = tuple(map(loosely, key))
        if loose in self._loosely:
            return self._judged.get(key, self._loosely[loose])
        prompt, *texts = key
        what = "was not judged" if len(texts) == 1 else "were not compared"
        known = {text for of, *others in self._loosely if of == loose[0] for text in others}
        cut = any(text != other and other.startswith(text) for text in loose[1:] for other in known)
        hint = "; a longer one was: was this one cut by max_new_tokens?" if cut else ""
        raise ValueError(f"{self.name}: {' and '.join(map(repr, texts))} to {prompt!r} {what}{hint}")


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
