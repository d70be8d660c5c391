"""A judge that looks up recorded verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from windkern._checks import check_number
from windkern.train.data.prompts import loosely, shown
from windkern.train.data.records import load_records
from windkern.train.judges.judge import Verdict, bradley_terry

# Reason: a model gives a text that comes again in another batch other last digits, in bfloat16 all but two or three.
_ROUNDING, _SMALL = 1e-2, 1e-3  # relative, and absolute


class RecordedJudge:
    """A judge made from recorded preferences, or from recorded rewards and the Bradley-Terry link.

        P_ij = prefs[i][j],    else    P_ij = sigmoid(strength * (r_i - r_j))

    A response is looked up by its exact text, then by its text without surrounding space. A response that was never
    judged is an error, not a tie. So is a truncated response, because the verdict was on the whole of it.

    Args:
        path: JSON lines, see `windkern.train.data.records.load_records`; all lines with "prefs", or all with "rewards".
        strength: strength of the link for rewards, per unit of reward; positive.

    Raises:
        FileNotFoundError, ValueError: the file does not exist or a line is wrong; some lines have neither prefs nor
            rewards, or not the same as the others; a response or a pair has two verdicts that differ by more than
            rounding; when judging, a response or a pair is not in the file.
    """

    def __init__(self, path: str | Path, *, strength: float = 1.0):
        self.path, self.name = path, f"recorded in {Path(path).name}"
        self.strength = check_number("strength", strength, above=0)
        records = load_records(path)
        self.has_prefs = all(record.prefs is not None for record in records)
        if not self.has_prefs and any(record.rewards is None for record in records):
            raise ValueError(f'{path}: every line must have "prefs", or every line "rewards"')
        self._judged: dict[tuple[str, ...], float] = {}  # by prompt and response, or by prompt and two responses
        self._loosely: dict[tuple[str, ...], float] = {}  # the same, by texts without the space around them
        for record in records:
            prompt = str(record.prompt)
            for i, row in enumerate(record.prefs or () if self.has_prefs else ()):
                for j, chance in enumerate(row):
                    self._add(chance, prompt, record.responses[i], record.responses[j])
            if not self.has_prefs:
                for text, reward in zip(record.responses, record.rewards or (), strict=True):
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
        before = self._judged.get(key, value)
        if len(set(key[1:])) == len(key[1:]) and not math.isclose(before, value, rel_tol=_ROUNDING, abs_tol=_SMALL):
            prompt, *texts = key
            what = "was judged" if len(texts) == 1 else "were compared"
            raise ValueError(
                f"{self.path}: {' and '.join(map(shown, texts))} to {shown(prompt)} {what} twice, with {before} and "
                f"{value}; keep one of the two"
            )
        self._judged[key] = self._loosely[tuple(map(loosely, key))] = value

    def _found(self, *key: str) -> float:
        loose = tuple(map(loosely, key))
        if loose in self._loosely:
            return self._judged.get(key, self._loosely[loose])
        prompt, *texts = key
        what = "was not judged" if len(texts) == 1 else "were not compared"
        known = {text for of, *others in self._loosely if of == loose[0] for text in others}
        cut = any(text != other and other.startswith(text) for text in loose[1:] for other in known)
        hint = "; a longer one was: was this one cut by max_completion_length?" if cut else ""
        raise ValueError(f"{self.name}: {' and '.join(map(repr, texts))} to {prompt!r} {what}{hint}")
