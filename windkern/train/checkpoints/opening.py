"""How a run takes possession of its output folder: as the one that is resumed, or as a new one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from windkern._files import read_json, write_json
from windkern.train.checkpoints.identity import ResumeError, check_same, identity_of
from windkern.train.checkpoints.manifest import by_step
from windkern.train.parts import check_unused

if TYPE_CHECKING:
    from windkern.train.trainer import WindTrainer

RUN = "run.json"  # says which run a folder is of


def _identity(trainer: WindTrainer) -> dict:
    judge = trainer.judge
    return identity_of(
        trainer.args,
        trainer.model,
        trainer.processing_class,
        reference=trainer.reference.model if trainer.args.reference == "model" and trainer.reference else None,
        prompts=trainer.demonstrations or trainer.outer.prompts,
        heldout=trainer.eval_prompts,
        judge="" if judge is None else f"{judge.name}, strength {getattr(judge, 'strength', None)}",
        processes=trainer.world.size,
        weights=trainer.weights_at_start,
    )


def open_run(trainer: WindTrainer, resume: str | bool | None) -> None:
    """Make `output_dir` the folder of a run: of the one that is resumed, else of a new one.

    A new one deletes what an earlier one has left, checkpoints only if `overwrite` says so.

    Args:
        trainer: of the run, at its start; called on the first process.
        resume: whether, or from which checkpoint, a run goes on.

    Raises:
        ResumeError: what is there is of another run, or nothing says of which.
        DamagedRecordError: what says so is damaged.
        ValueError: as `check_unused`.
    """
    output, store, identity = Path(trainer.args.output_dir), trainer.store, _identity(trainer)
    path = store.folder / RUN
    if not resume:
        for folder in check_unused(output, overwrite=trainer.args.overwrite):
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
        trainer._warn(f"nothing says of which run {checkpoint} is; it is taken for one of this run")
    elif not known and by_step(output):
        raise ResumeError(
            f"{path} is missing, which says of what run the checkpoints in {output} are; restore it, or start another "
            "run in another output_dir"
        )
    if not path.is_file():
        if not known:
            store.clear()
        write_json(path, identity)
