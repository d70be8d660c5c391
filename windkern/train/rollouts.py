"""Sampled and judged responses, kept on the disk block by block, so that a kill loses at most one block."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from windkern._checks import check_shape
from windkern.losses import check_prefs
from windkern.train.judges import Judge, Verdict, ask
from windkern.train.models import sync_dir
from windkern.train.sampler import Completions
from windkern.train.world import World


@dataclass(frozen=True)
class Rollout:
    """A prompt with N responses to it, and who wins."""

    place: int  # of the prompt in the list of prompts
    prompt_ids: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]  # N, tokens up to and including the end token
    truncated: tuple[bool, ...]  # N, no end token within the limit
    texts: tuple[str, ...]  # N
    prefs: tuple[tuple[float, ...], ...] | None = None  # N x N, once judged
    rewards: tuple[float, ...] | None = None  # N, where the judge has them

    @property
    def tokens(self) -> int:
        return sum(map(len, self.completions))


def rollouts_of(batch: Completions, places: Sequence[int]) -> list[Rollout]:
    """One rollout for each prompt of a batch."""
    count, found = batch.num_responses, []
    prompt_mask = batch.attention_mask & ~batch.completion_mask
    for k, place in enumerate(places):
        rows = range(k * count, (k + 1) * count)
        found.append(
            Rollout(
                place=place,
                prompt_ids=tuple(batch.input_ids[rows[0]][prompt_mask[rows[0]]].tolist()),
                completions=tuple(tuple(batch.input_ids[row][batch.completion_mask[row]].tolist()) for row in rows),
                truncated=tuple(batch.truncated[rows[0] : rows[-1] + 1].tolist()),
                texts=batch.texts[k],
            )
        )
    return found


def joined(first: Sequence[Rollout], second: Sequence[Rollout]) -> list[Rollout]:
    """Rollouts with the responses of two lists to the same prompts, the first's in front."""
    return [
        replace(
            one,
            completions=one.completions + two.completions,
            truncated=one.truncated + two.truncated,
            texts=one.texts + two.texts,
        )
        for one, two in zip(first, second, strict=True)
    ]


def verdict_of(rollouts: Sequence[Rollout]) -> Verdict | None:
    """The judgement of some rollouts as tensors, None where they were not judged."""
    if rollouts[0].prefs is None:
        return None
    prefs = torch.tensor([rollout.prefs for rollout in rollouts], dtype=torch.float32)
    if rollouts[0].rewards is None:
        return Verdict(prefs, None)
    return Verdict(prefs, torch.tensor([rollout.rewards for rollout in rollouts], dtype=torch.float32))


def judged(rollouts: Sequence[Rollout], prompts: Sequence[str], judge: Judge) -> list[Rollout]:
    """The rollouts with the judge's verdict.

    Raises:
        TypeError, ValueError: the verdict has another shape, or preferences that are none; then nothing is kept of it.
    """
    verdict = ask(judge, prompts, [rollout.texts for rollout in rollouts])
    shape = (len(rollouts), len(rollouts[0].texts))
    try:
        check_prefs(verdict.prefs)
        check_shape("prefs", verdict.prefs, (*shape, shape[1]))
        if verdict.rewards is not None:
            check_shape("rewards", verdict.rewards, shape)
    except (TypeError, ValueError) as error:
        raise type(error)(f"judge {judge.name!r}: {error}") from error
    return [
        replace(
            rollout,
            prefs=tuple(map(tuple, verdict.prefs[k].tolist())),
            rewards=None if verdict.rewards is None else tuple(verdict.rewards[k].tolist()),
        )
        for k, rollout in enumerate(rollouts)
    ]


def write_json(path: Path, content: object) -> None:
    """Write a JSON file that is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("w", encoding="utf-8") as file:
            json.dump(content, file, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        scratch.rename(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}; what was saved before is whole") from error
    sync_dir(path.parent)


def read_json(path: Path) -> object | None:
    """The content of a JSON file, None if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


class RolloutStore:
    """The blocks of rollouts under a folder, `iteration-NNNN/block-NNNN.json`.

    Args:
        folder: created where needed; all processes must see it.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def iteration(self, iteration: int) -> Path:
        return self.folder / f"iteration-{iteration:04d}"

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def has(self, folder: Path, block: int) -> bool:
        """Whether a block has been sampled; it is there as a whole or not at all."""
        return self._path(folder, block).is_file()

    def read(self, folder: Path, block: int) -> tuple[list[Rollout], bool]:
        """The rollouts of a block and whether they have been judged; nothing where there is no such block."""
        content = read_json(self._path(folder, block))
        if content is None:
            return [], False
        return [_rollout(entry) for entry in content["rollouts"]], content["judged"]

    def write(self, folder: Path, block: int, rollouts: Sequence[Rollout], judged: bool) -> None:
        content = {"judged": judged, "rollouts": [asdict(rollout) for rollout in rollouts]}
        write_json(self._path(folder, block), content)

    def _path(self, folder: Path, block: int) -> Path:
        return folder / f"block-{block:04d}.json"


def _rollout(entry: dict) -> Rollout:
    return Rollout(
        place=entry["place"],
        prompt_ids=tuple(entry["prompt_ids"]),
        completions=tuple(map(tuple, entry["completions"])),
        truncated=tuple(entry["truncated"]),
        texts=tuple(entry["texts"]),
        prefs=None if entry["prefs"] is None else tuple(map(tuple, entry["prefs"])),
        rewards=None if entry["rewards"] is None else tuple(entry["rewards"]),
    )


@dataclass(frozen=True)
class Block:
    """Prompts that are sampled and judged at once."""

    index: int
    places: tuple[int, ...]


def collect(
    world: World,
    store: RolloutStore,
    folder: Path,
    places: Sequence[int],
    block_size: int,
    sample: Callable[[Block], list[Rollout]],
    judge: Callable[[Block, list[Rollout]], list[Rollout]] | None,
    *,
    together: bool,
    begin: Callable[[str, int], None] = lambda name, done: None,
    advance: Callable[[int], None] = lambda prompts: None,
) -> list[Rollout]:
    """Return the rollouts of an iteration, in the order of `places`, on every process.

    Blocks do not depend on the number of processes, and what is sampled in a block depends on its index only, so one
    process and several sample the same. Blocks already on the disk are not sampled or judged again.

    Args:
        folder: of the iteration.
        places: prompts to answer.
        block_size: of them that make a block.
        sample: makes the rollouts of a block.
        judge: adds their verdict; None where the loss needs none.
        together: see `World.share`; then sampling and judging are two rounds, each with its own calls.
        begin: told before "sampling" or "judging" how many prompts are done already; not if all are.
        advance: told how many more are.
    """
    cuts = [tuple(places[first : first + block_size]) for first in range(0, len(places), block_size)]
    blocks = [Block(index, cut) for index, cut in enumerate(cuts)]
    missing = world.agree([block for block in blocks if not store.has(folder, block.index)])

    def sample_and_save(block: Block) -> None:
        rollouts = sample(block)
        if not store.has(folder, block.index):
            store.write(folder, block.index, rollouts, judged=False)
        if not together:
            judge_and_save(block)

    def judge_and_save(block: Block) -> None:
        rollouts, is_judged = store.read(folder, block.index)
        if judge is not None and not is_judged:
            store.write(folder, block.index, judge(block, rollouts), judged=True)

    def done(finished: Sequence[Block]) -> None:
        advance(sum(len(block.places) for block in finished))

    if missing:
        begin("sampling", len(places) - sum(len(block.places) for block in missing))
    world.share(missing, sample_and_save, together=together, done=done)
    if missing and together and judge is not None:
        begin("judging", 0)
        world.share(blocks, judge_and_save, done=done)
    else:  # all have been judged, unless an earlier process was killed while its judge was at work
        world.share(blocks, judge_and_save)
    found = world.share(blocks, lambda block: store.read(folder, block.index)[0])
    return [rollout for part in found for rollout in part]
