"""Open the output folder of a run, which is new or resumed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import cast

from windkern._files import read_json, write_json
from windkern.train.checkpoints.identity import ResumeError, check_same
from windkern.train.checkpoints.manifest import by_step, latest_checkpoint
from windkern.train.config import WindConfig
from windkern.train.store import GroupStore

RUN = "run.json"  # says which run a folder belongs to


def check_unused(output_dir: Path, *, overwrite: bool) -> list[Path]:
    """Return the checkpoints of an earlier run, which may be deleted.

    Raises:
        ValueError: there are some, and `overwrite` is False.
    """
    found = sorted(output_dir.glob("checkpoint-*"))
    if found and not overwrite:
        raise ValueError(
            f"{output_dir} holds checkpoints of an earlier run ({found[-1].name}); resume it (--resume), or use "
            "another output_dir, or set overwrite to true to delete them"
        )
    return found


def check_first(step: int, output_dir: str | Path, resume: str | bool | None) -> None:
    """Raise if a trainer that has already trained is about to start from the beginning.

    Args:
        step: optimizer steps that the trainer has taken.
        output_dir: folder of its run.
        resume: whether to resume, or the checkpoint to resume from.

    Raises:
        ValueError: the trainer has taken steps, and there is no checkpoint to resume from.
    """
    if step and (not resume or (resume is True and latest_checkpoint(output_dir, lambda line: None) is None)):
        raise ValueError(
            f"This trainer has already trained for {step} steps. Resume from a checkpoint, or make a new trainer from "
            "the initial model."
        )


def open_run(
    config: WindConfig, store: GroupStore, identity: dict, resume: str | bool | None, warn: Callable[[str], None]
) -> None:
    """Make `output_dir` the folder of a run, either resumed or new.

    A new run deletes the files of an earlier one, its checkpoints only if `overwrite` is set.

    Args:
        config: settings of the run; the function is called on the first process.
        store: groups of the run.
        identity: see `identity_of`.
        resume: whether to resume, or the checkpoint to resume from.
        warn: called with one line that a user should know.

    Raises:
        ResumeError: the files there belong to another run, or nothing says to which.
        DamagedRecordError: the file that says so is damaged.
        ValueError: as `check_unused`.
    """
    output, path = Path(cast(str, config.output_dir)), store.folder / RUN  # transformers fills it in
    if not resume:
        for folder in check_unused(output, overwrite=config.overwrite):
            shutil.rmtree(folder)
        (output / "ref_logps.json").unlink(missing_ok=True)
        store.clear()
        write_json(path, identity)
        return
    checkpoint = None if resume is True else Path(resume)
    known = False
    for place in dict.fromkeys([output] if checkpoint is None else [output, checkpoint.parent]):
        file = place / store.folder.name / RUN
        if (found := read_json(file)) is not None:
            check_same(found, identity, str(place), file)
            known = True
    if not known and checkpoint is not None:
        warn(f"nothing says which run {checkpoint} belongs to; it is taken for one of this run")
    elif not known and by_step(output):
        raise ResumeError(
            f"{path} is missing, which says which run the checkpoints in {output} belong to; restore it, or start "
            "another run in another output_dir"
        )
    if not path.is_file():
        if not known:
            store.clear()
        write_json(path, identity)
