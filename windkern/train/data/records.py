"""Read and write recorded responses, with their rewards and preferences if there are any."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from windkern._files import to_json, write_text
from windkern.train.data.files import load
from windkern.train.data.prompts import prompt_from_json, prompt_to_json

_SUM_TOLERANCE = 1e-3  # of prefs[i][j] + prefs[j][i] = 1, for files with rounded numbers


@dataclass(frozen=True)
class Recorded:
    """One row: a prompt and N responses to it."""

    prompt: str  # or ChatPrompt
    responses: tuple[str, ...]
    rewards: tuple[float, ...] | None = None  # N
    prefs: tuple[tuple[float, ...], ...] | None = None  # N x N, chance that response i beats response j
    truncated: tuple[bool, ...] | None = None  # N, cut off before their end; None: none of them


def _strings(value: object, name: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(each, str) for each in value):
        raise ValueError(f'"{name}" must be a list of at least one string')
    return tuple(value)


def _numbers(value: Any, name: str, count: int) -> tuple[float, ...]:
    fits = isinstance(value, list) and len(value) == count
    if not fits or not all(
        isinstance(each, (int, float)) and not isinstance(each, bool) and math.isfinite(each) for each in value
    ):
        raise ValueError(f'"{name}" must be a list of {count} finite numbers, one for each response')
    return tuple(float(each) for each in value)


def _flags(value: Any, name: str, count: int) -> tuple[bool, ...]:
    if not isinstance(value, list) or len(value) != count or set(map(type, value)) - {bool}:
        raise ValueError(f'"{name}" must be a list of {count} booleans, one for each response')
    return tuple(value)


def _preferences(value: object, count: int) -> tuple[tuple[float, ...], ...]:
    if not isinstance(value, list) or len(value) != count:
        raise ValueError(f'"prefs" must be a list of {count} lists, one for each response')
    rows = tuple(_numbers(row, "prefs", count) for row in value)
    for i, row in enumerate(rows):
        for j, chance in enumerate(row):
            if not 0 <= chance <= 1 or abs(chance + rows[j][i] - 1) > _SUM_TOLERANCE:
                raise ValueError(
                    f'"prefs" must be chances with prefs[i][j] + prefs[j][i] = 1, got prefs[{i}][{j}] = {chance} and '
                    f"prefs[{j}][{i}] = {rows[j][i]}"
                )
    return rows


def _record(entry: object) -> Recorded:
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), (str, list)):
        raise ValueError('expected an object with a string under "prompt", or with a list of chat messages there')
    prompt = entry["prompt"] if isinstance(entry["prompt"], str) else prompt_from_json(entry["prompt"])
    responses = _strings(entry.get("responses"), "responses")
    count = len(responses)
    rewards = None if entry.get("rewards") is None else _numbers(entry["rewards"], "rewards", count)
    prefs = None if entry.get("prefs") is None else _preferences(entry["prefs"], count)
    truncated = None if entry.get("truncated") is None else _flags(entry["truncated"], "truncated", count)
    return Recorded(prompt, responses, rewards, prefs, truncated)


def records_of(prompts: Sequence[str], groups: Iterable) -> list[Recorded]:
    """Return the responses and verdicts of a run as rows.

    Args:
        prompts: training prompts.
        groups: `windkern.train.groups.Group`s, or objects with their `place`, `texts`, `truncated`, `prefs`, `rewards`.

    Example:
        >>> from windkern.train.groups import Group
        >>> group = Group(1, (1,), ((5, 2), (6,)), (False, True), ("a", "b"), None, (0.5, -1.0))
        >>> records_of(["p", "q"], [group])
        [Recorded(prompt='q', responses=('a', 'b'), rewards=(0.5, -1.0), prefs=None, truncated=(False, True))]
    """
    return [
        Recorded(
            prompts[each.place], each.texts, each.rewards, each.prefs, each.truncated if any(each.truncated) else None
        )
        for each in groups
    ]


def load_records(path: str | Path) -> list[Recorded]:
    """Return the rows of a file of recorded responses.

        {"prompt": "...", "responses": ["...", "..."], "rewards": [0.1, -2.0], "prefs": [[0.5, 0.9], [0.1, 0.5]]}

    Args:
        path: as for `windkern.train.data.loading.load_prompts`, but no plain text; in CSV and TSV all but the prompt
            are JSON. "prompt" is a string or a list of chat messages (`ChatPrompt`). "rewards", "prefs" and
            "truncated" (a boolean for each response; not in CSV and TSV) are optional; other fields are ignored. Texts
            keep the space around them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a row is not such an object (the message names the line and what is wrong), or there is none.
        MissingPackageError, OSError: as `load_prompts`.
    """
    return load(path, "recorded responses", _record)


def save_records(path: Path, records: Sequence[Recorded]) -> None:
    """Write a file that `load_records` reads; it is complete or absent."""
    lines = []
    for record in records:
        entry: dict[str, object] = {"prompt": prompt_to_json(record.prompt), "responses": list(record.responses)}
        if record.rewards is not None:
            entry["rewards"] = list(record.rewards)
        if record.prefs is not None:
            entry["prefs"] = [list(row) for row in record.prefs]
        if record.truncated is not None:
            entry["truncated"] = list(record.truncated)
        lines.append(to_json(entry) + "\n")
    write_text(path, "".join(lines))
