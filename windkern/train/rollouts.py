"""Sample and judge the groups of an iteration, block by block, so that a kill loses at most one block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from windkern._checks import check_shape
from windkern.losses import check_prefs
from windkern.train.groups import Group
from windkern.train.judges.judge import Judge, ask
from windkern.train.store import AGAIN, BEGUN, Block, GroupStore, blocks_of
from windkern.train.world import World


def judged(groups: Sequence[Group], prompts: Sequence[str], judge: Judge) -> list[Group]:
    """Return the groups with the judge's verdict.

    Raises:
        TypeError, ValueError: the verdict has the wrong shape, or holds values that are not preferences. It is then
            discarded.
    """
    verdict = ask(judge, prompts, [group.texts for group in groups])
    shape = (len(groups), len(groups[0].texts))
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
            group,
            prefs=tuple(map(tuple, verdict.prefs[k].tolist())),
            rewards=None if verdict.rewards is None else tuple(verdict.rewards[k].tolist()),
        )
        for k, group in enumerate(groups)
    ]


def collect(
    world: World,
    store: GroupStore,
    folder: Path,
    places: Sequence[int],
    block_size: int,
    sample: Callable[[Block], list[Group]],
    judge: Callable[[Block, list[Group]], list[Group]] | None = None,
    *,
    together: bool,
    begun: bool = False,
    begin: Callable[[str, int], None] = lambda name, done: None,
    advance: Callable[[int], None] = lambda prompts: None,
) -> list[Group]:
    """Return the groups of an iteration, in the order of `places`, on every process.

    Blocks do not depend on the number of processes, and what is sampled in a block depends on its index only, so one
    process and several sample the same. Blocks on disk are not sampled or judged again.

    Args:
        folder: folder of the iteration.
        places: prompts to answer.
        block_size: prompts in a block.
        sample: makes the groups of a block.
        judge: adds their verdict; None where the loss needs none.
        together: whether a forward of the model that samples communicates (see `World.share`); sampling and
            judging are then two rounds, each with its own calls.
        begun: whether responses have been fitted already, so that all must be stored.
        begin: called with "sampling" or "judging" and the number of prompts already done, unless all are.
        advance: called with the number of prompts just done.

    Raises:
        FileNotFoundError: `begun`, and a block is missing.
        DamagedRecordError: the file of a block is not what was written.
    """
    blocks, way_out = blocks_of(places, block_size), BEGUN if begun else AGAIN
    missing = world.agree([block for block in blocks if not store.has(folder, block.index)])
    if missing and begun:
        raise FileNotFoundError(f"{store.path(folder, missing[0].index)} is missing; {BEGUN}")
    known: dict[int, list[Group]] = {}  # groups of the blocks that this process has made

    def sample_and_keep(block: Block) -> None:
        groups = sample(block)
        if not store.has(folder, block.index):  # two processes may sample the last block together
            store.write(folder, block.index, groups)
        if not together:
            known[block.index] = groups
            judged_groups(block)

    def judged_groups(block: Block) -> list[Group]:
        groups = known.get(block.index) or store.read(folder, block, way_out)
        if judge is not None and groups[0].prefs is None:
            if begun:  # Reason: a judge need not give the same verdict again, and steps were taken on the first
                raise FileNotFoundError(f"{store.verdict_path(folder, block.index)} is missing; {BEGUN}")
            groups = known[block.index] = judge(block, groups)
            store.write_verdict(folder, block.index, groups)
        return groups

    def done(finished: Sequence[Block]) -> None:
        advance(sum(len(block.places) for block in finished))

    if missing:
        begin("sampling", len(places) - sum(len(block.places) for block in missing))
    world.share(missing, sample_and_keep, together=together, done=done)
    if missing and together and judge is not None:
        begin("judging", 0)
        found = world.share(blocks, judged_groups, done=done)
    else:  # all have been judged, unless an earlier process was killed while its judge was at work
        found = world.share(blocks, judged_groups)
    return [group for part in found for group in part]
