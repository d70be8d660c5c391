"""Store the groups of an iteration: its responses and its verdicts, each written once.

    iteration-0001/block-0000.json     {"format": 2, "groups": [{place, prompt_ids, completions, truncated, texts}, ..]}
    iteration-0001/verdict-0000.json   {"format": 2, "verdicts": [{place, prefs, rewards}, ..]}, where a judge is asked
    iteration-0001/scored.json         {old_logps: [[..], ..], ref_logps: [[..], ..]}, for the responses that are fitted
    iteration-0001/responses.jsonl     prompts, responses and verdicts, once it is over: `recorded:FILE` reads them
    iteration-0001/record.json         metrics of the iteration, once it is over

`place` counts the training prompts from 0; `prefs[i][j]` is the chance that response i beats response j.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from windkern._files import DamagedRecordError, read_json, write_json
from windkern.train.groups import Group

FORMAT = 2  # version of a run's files; others are refused
AGAIN = "delete it, and what it held is sampled or judged again"
BEGUN = (
    "the policy that made it has changed, so it cannot be made again: restore it from a copy, or delete the "
    "checkpoints inside its iteration and resume from one at the end of an iteration"
)


@dataclass(frozen=True)
class Block:
    """Prompts that are sampled and judged at once."""

    index: int
    places: tuple[int, ...]


def blocks_of(places: Sequence[int], size: int) -> list[Block]:
    """Split places into blocks of `size`.

    Example:
        >>> blocks_of([4, 0, 2], 2)
        [Block(index=0, places=(4, 0)), Block(index=1, places=(2,))]
    """
    cuts = [tuple(places[first : first + size]) for first in range(0, len(places), size)]
    return [Block(index, cut) for index, cut in enumerate(cuts)]


class GroupStore:
    """Reads and writes blocks of groups under a folder.

    Args:
        folder: created if needed; all processes must see it.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def iteration(self, iteration: int) -> Path:
        """Return the folder of an iteration, counted from 1."""
        return self.folder / f"iteration-{iteration:04d}"

    def responses(self, iteration: int) -> Path:
        """Return the file of an iteration's responses and verdicts that `recorded:FILE` reads."""
        return self.iteration(iteration) / "responses.jsonl"

    def clear(self) -> None:
        """Delete everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def path(self, folder: Path, block: int) -> Path:
        """Return the file of a block's responses."""
        return folder / f"block-{block:04d}.json"

    def verdict_path(self, folder: Path, block: int) -> Path:
        """Return the file of the verdicts on a block."""
        return folder / f"verdict-{block:04d}.json"

    def has(self, folder: Path, block: int) -> bool:
        """Return whether a block has been sampled. Its file is complete or absent."""
        return self.path(folder, block).is_file()

    def write(self, folder: Path, block: int, groups: Sequence[Group]) -> None:
        """Write the responses of a block."""
        names = ("place", "prompt_ids", "completions", "truncated", "texts")
        entries = [{name: getattr(group, name) for name in names} for group in groups]
        write_json(self.path(folder, block), {"format": FORMAT, "groups": entries})

    def write_verdict(self, folder: Path, block: int, groups: Sequence[Group]) -> None:
        """Write the verdicts on the responses of a block."""
        entries = [{"place": group.place, "prefs": group.prefs, "rewards": group.rewards} for group in groups]
        write_json(self.verdict_path(folder, block), {"format": FORMAT, "verdicts": entries})

    def read(self, folder: Path, block: Block, way_out: str = AGAIN) -> list[Group]:
        """Return the groups of a block, with their verdicts if it was judged; an empty list if it was not sampled.

        Raises:
            DamagedRecordError: a file does not hold groups of the block's prompts.
        """
        groups = self._entries(self.path(folder, block.index), "groups", block, _group, way_out)
        if not groups:
            return []
        sizes = {group.place: len(group.completions) for group in groups}
        path = self.verdict_path(folder, block.index)
        verdicts = self._entries(path, "verdicts", block, lambda entry: _verdict(entry, sizes), way_out)
        if not verdicts:
            return groups
        return [replace(group, **verdict) for group, verdict in zip(groups, verdicts, strict=True)]

    def _entries(self, path: Path, name: str, block: Block, parse: Callable[..., Any], way_out: str) -> list:
        content = read_json(path, way_out)
        if content is None:
            return []
        try:
            if content["format"] != FORMAT:
                raise ValueError(f"it has format {content['format']!r}, but this release reads {FORMAT}")
            entries = content[name]
            places = [entry["place"] for entry in entries]
            found = [parse(entry) for entry in entries]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DamagedRecordError(path, f"{type(error).__name__}: {error}", way_out) from error
        if places != list(block.places):
            why = f"it holds the prompts {places}, but its block has {list(block.places)}"
            raise DamagedRecordError(path, why, way_out)
        return found


def _row(values: object, kind: type, name: str, count: int | None = None) -> tuple:
    """Return a list of `count` values of one kind as a tuple; raise if it is anything else."""
    if not isinstance(values, list) or set(map(type, values)) - {kind} or len(values) != (count or len(values)):
        raise ValueError(f"{name} must hold {'' if count is None else f'{count} '}{kind.__name__} values")
    return tuple(values)


def _group(entry: dict) -> Group:
    completions = tuple(_row(tokens, int, "completions") for tokens in entry["completions"])
    count = len(completions)
    if not count or not all(completions):
        raise ValueError("completions must hold tokens")
    return Group(
        place=entry["place"],
        prompt_ids=_row(entry["prompt_ids"], int, "prompt_ids"),
        completions=completions,
        truncated=_row(entry["truncated"], bool, "truncated", count),
        texts=_row(entry["texts"], str, "texts", count),
    )


def _verdict(entry: dict, sizes: dict[int, int]) -> dict[str, object]:
    count = sizes[entry["place"]]
    prefs, rewards = entry["prefs"], entry["rewards"]
    if not isinstance(prefs, list) or len(prefs) != count:
        raise ValueError(f"prefs must hold {count} rows")
    return {
        "prefs": tuple(_row(row, float, "prefs", count) for row in prefs),
        "rewards": None if rewards is None else _row(rewards, float, "rewards", count),
    }
