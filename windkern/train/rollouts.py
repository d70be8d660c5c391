"""Sampled and judged responses, kept on the disk block by block, so that a kill loses at most one block."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from windkern._checks import check_shape
from windkern._files import DamagedRecordError, read_json, write_json
from windkern.losses import check_prefs
from windkern.train.judges.judge import Judge, Verdict, ask
from windkern.train.samplers.sampler import Completions
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
            if not verdict.rewards.isfinite().all():
                raise ValueError(
                    f"rewards must be finite, got {verdict.rewards[~verdict.rewards.isfinite()][0].item()}"
                )
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


AGAIN = "delete it, and its responses are sampled and judged again, the same ones"
BEGUN = (
    "the policy that made it has moved, so it cannot be made again: restore it from a copy, or delete the checkpoints "
    "inside its iteration and resume from one at the end of an iteration"
)


@dataclass(frozen=True)
class Block:
    """Prompts that are sampled and judged at once."""

    index: int
    places: tuple[int, ...]


def blocks_of(places: Sequence[int], size: int) -> list[Block]:
    """The places cut into blocks of `size`.

    Example:
        >>> blocks_of([4, 0, 2], 2)
        [Block(index=0, places=(4, 0)), Block(index=1, places=(2,))]
    """
    cuts = [tuple(places[first : first + size]) for first in range(0, len(places), size)]
    return [Block(index, cut) for index, cut in enumerate(cuts)]


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
        return self.path(folder, block).is_file()

    def read(self, folder: Path, block: Block, way_out: str = AGAIN) -> tuple[list[Rollout], bool]:
        """The rollouts of a block and whether they have been judged; nothing where there is no such block.

        Raises:
            DamagedRecordError: its file does not hold rollouts of the block's prompts.
        """
        path = self.path(folder, block.index)
        content = read_json(path, way_out)
        if content is None:
            return [], False
        try:
            found, judged = [_rollout(entry) for entry in content["rollouts"]], content["judged"]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DamagedRecordError(path, f"{type(error).__name__}: {error}", way_out) from error
        places = [rollout.place for rollout in found]
        if places != list(block.places) or not isinstance(judged, bool):
            why = f"it holds the prompts {places}, its block has {list(block.places)}"
            raise DamagedRecordError(path, why, way_out)
        return found, judged

    def write(self, folder: Path, block: int, rollouts: Sequence[Rollout], judged: bool) -> None:
        content = {"judged": judged, "rollouts": [asdict(rollout) for rollout in rollouts]}
        write_json(self.path(folder, block), content)

    def path(self, folder: Path, block: int) -> Path:
        return folder / f"block-{block:04d}.json"


def _row(values: object, kind: type, name: str, count: int | None = None) -> tuple:
    """A list of numbers or texts of one kind, as many as wanted."""
    if not isinstance(values, list) or set(map(type, values)) - {kind} or len(values) != (count or len(values)):
        raise ValueError(f"{name} must hold {'' if count is None else f'{count} '}{kind.__name__} values")
    return tuple(values)


def _rollout(entry: dict) -> Rollout:
    completions = tuple(_row(tokens, int, "completions") for tokens in entry["completions"])
    count = len(completions)
    if not count or not all(completions):
        raise ValueError("completions must hold tokens")
    prefs, rewards = entry["prefs"], entry["rewards"]
    if prefs is not None and len(prefs) != count:
        raise ValueError(f"prefs must hold {count} rows")
    return Rollout(
        place=entry["place"],
        prompt_ids=_row(entry["prompt_ids"], int, "prompt_ids"),
        completions=completions,
        truncated=_row(entry["truncated"], bool, "truncated", count),
        texts=_row(entry["texts"], str, "texts", count),
        prefs=None if prefs is None else tuple(_row(row, float, "prefs", count) for row in prefs),
        rewards=None if rewards is None else _row(rewards, float, "rewards", count),
    )


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
    begun: bool = False,
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
        begun: whether responses have been fitted already, so that all must be there.
        begin: told before "sampling" or "judging" how many prompts are done already; not if all are.
        advance: told how many more are.

    Raises:
        FileNotFoundError: `begun`, and a block is not there.
        DamagedRecordError: the file of a block is not what was written.
    """
    blocks, way_out = blocks_of(places, block_size), BEGUN if begun else AGAIN
    missing = world.agree([block for block in blocks if not store.has(folder, block.index)])
    if missing and begun:
        raise FileNotFoundError(f"{store.path(folder, missing[0].index)} is missing; {BEGUN}")

    def sample_and_save(block: Block) -> None:
        rollouts = sample(block)
        if not store.has(folder, block.index):
            store.write(folder, block.index, rollouts, judged=False)
        if not together:
            judge_and_save(block)

    def judge_and_save(block: Block) -> None:
        rollouts, is_judged = store.read(folder, block, way_out)
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
    found = world.share(blocks, lambda block: store.read(folder, block, way_out)[0])
    return [rollout for part in found for rollout in part]
