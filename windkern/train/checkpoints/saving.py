"""Write complete checkpoints of a `transformers.Trainer` or none, and verify them before use.

transformers writes `checkpoint-N` in place: a kill or a full disk leaves half a folder, from which it would resume.
Here the files go to a hidden folder, get a manifest of digests, are flushed to the disk, and the folder is renamed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch.distributed as dist
from torch import nn
from transformers.trainer_utils import TrainOutput

from windkern._files import sync_dir, sync_files, to_json
from windkern.train.checkpoints.lock import owned_by_run
from windkern.train.checkpoints.manifest import (
    CorruptCheckpointError,
    by_step,
    latest_checkpoint,
    verify,
    write_manifest,
)
from windkern.train.report.notices import Notices
from windkern.train.report.progress import Unobserved

__all__ = ["AtomicCheckpoints", "CheckpointError", "CorruptCheckpointError", "latest_checkpoint"]

if TYPE_CHECKING:
    from transformers import Trainer as _Mixed
else:
    _Mixed = object

_STAGING = ".saving-"
# What torch.save and safetensors say, as RuntimeError and SafetensorError, if the system refused a write.
_FAILED_WRITE = ("PytorchStreamWriter failed", "unexpected pos", "I/O error", "No space left", "File too large")


class CheckpointError(OSError):
    """A checkpoint could not be written; the message says which, why, what is left and how to resume."""


def _reason(error: BaseException) -> str | None:
    """Return what the system said about a failed write, or None if `error` is of another kind."""
    said = str(error).splitlines()[0] if str(error) else ""
    if not isinstance(error, OSError) and not any(words in said for words in _FAILED_WRITE):
        return None
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause.strerror or str(cause)
        cause = cause.__cause__ or cause.__context__
    # Reason: what torch says names a line of its source.
    return "the system did not write all of a file" if "unexpected pos" in said or "Pytorch" in said else said


class AtomicCheckpoints(_Mixed):
    """Mixin for `transformers.Trainer`: `class MyTrainer(AtomicCheckpoints, transformers.Trainer)`.

    `train(resume_from_checkpoint=True)` resumes from the newest complete checkpoint, or starts from the beginning with
    a warning if there is none. A path is verified too. Rank 0 chooses for all.

    All ranks write to `.saving-checkpoint-N`; the main process renames it when every rank is done. If one rank fails,
    all raise. (Under FSDP and DeepSpeed writing is itself collective: the rank that fails raises at once, and the
    launcher ends those that wait for it.) `save_total_limit` counts complete checkpoints first, so that with 2 or more
    there is one to go back to; the best one is always kept. Pushes to the hub start after the rename.

    Example:
        >>> import transformers
        >>> class MyTrainer(AtomicCheckpoints, transformers.Trainer): ...

    Raises:
        FolderInUseError: another process trains in this folder; see `windkern.train.checkpoints.lock.owned`.
        CheckpointError: the disk is full, over quota or read-only; the half-written folder has been removed.
        CorruptCheckpointError: `train` was given the path of a checkpoint that is damaged.
    """

    notices = Notices(Unobserved())  # receives, on the first process, what a user should know about checkpoints
    _staging: Path | None = None  # while a checkpoint is being written
    _to_push: bool = False

    def _write_extra(self, folder: Path) -> None:
        """Write further files into a checkpoint; called on every rank, before the manifest is made."""

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging:
            self._to_push = True  # the folder has neither its manifest nor its name yet
        else:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        target = run_dir / f"checkpoint-{self.state.global_step}"
        staging = run_dir / f"{_STAGING}{target.name}"
        best_step = self.state.best_global_step
        self._to_push = False

        def prepare() -> None:
            if self.args.should_save:
                for old in run_dir.glob(f"{_STAGING}*"):
                    shutil.rmtree(old)
                (staging / target.name).mkdir(parents=True)

        def write() -> None:
            self._staging = staging
            # Hazard: with a best step transformers waits at a barrier, which a failed rank would not reach, and
            # takes the path in the staging folder for that of the best checkpoint.
            self.state.best_global_step = 0
            try:
                super(AtomicCheckpoints, self)._save_checkpoint(model, trial)
            finally:
                self._staging = None
                self.state.best_global_step = best_step
            self._write_extra(staging / target.name)

        def commit() -> None:
            self._name_the_best(run_dir)
            if self.args.should_save:
                state = staging / target.name / "trainer_state.json"
                self.state.save_to_json(str(state))
                state.write_text(to_json(json.loads(state.read_text(encoding="utf-8")), indent=2), encoding="utf-8")
                write_manifest(staging / target.name)
                sync_files(staging / target.name)
                if target.exists():
                    target.rename(staging / "replaced")
                (staging / target.name).rename(target)
                sync_dir(run_dir)
                shutil.rmtree(staging, ignore_errors=True)
                self._rotate(run_dir, target)

        collective = self.is_fsdp_enabled or self.is_deepspeed_enabled
        self._together(prepare, staging, target)
        self._together(write, staging, target, wait=not collective)
        self._together(commit, staging, target)
        if self._to_push:
            super()._push_from_checkpoint(str(target))

    def _together(self, step: Callable[[], None], staging: Path, target: Path, wait: bool = True) -> None:
        """Run `step` on every rank and return when all are done. If it failed anywhere, raise everywhere."""
        error, why = None, None
        try:
            step()
        except Exception as caught:
            error, why = caught, _reason(caught)
            if why is None:
                why = f"{type(caught).__name__}: {caught}"
        everywhere = [why]
        if self.args.world_size > 1 and (wait or error is None):
            everywhere = [None] * self.args.world_size
            dist.all_gather_object(everywhere, why)
        failed = next((text for text in everywhere if text), None)
        if failed is None:
            return
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        if error is not None and _reason(error) is None:
            raise error
        last = latest_checkpoint(target.parent, lambda line: None)
        left = f"{last} is the last complete one" if last else "there is no earlier one"
        problem = CheckpointError(f"cannot write {target}: {failed}; {left}; free space there and resume with --resume")
        problem.errno = getattr(error, "errno", None)
        raise problem from error

    def _name_the_best(self, run_dir: Path) -> None:
        step = self.state.best_global_step
        best = run_dir / f"checkpoint-{step}"
        if step and (step == self.state.global_step or best.is_dir()):
            self.state.best_model_checkpoint = str(best)

    def _rotate(self, run_dir: Path, newest: Path) -> None:
        limit = self.args.save_total_limit
        if limit is None or limit <= 0:
            return
        kept = {newest}
        if self.state.best_model_checkpoint is not None:
            kept.add(Path(self.state.best_model_checkpoint))
        others = [path for path in by_step(run_dir) if path not in kept]
        whole, damaged = [], []
        for path in others:
            try:
                verify(path, contents=False)
                whole.append(path)
            except CorruptCheckpointError:
                damaged.append(path)
        for path in [*whole, *damaged][max(0, limit - sum(path.is_dir() for path in kept)) :]:
            # Hazard: a kill in the middle would leave half a folder under a good name.
            doomed = run_dir / f"{_STAGING}removed-{path.name}"
            with contextlib.suppress(OSError):
                path.rename(doomed)
                shutil.rmtree(doomed)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as `transformers.Trainer` does, from a verified checkpoint and in a folder owned by this run."""
        with owned_by_run(self.args, self.notices):
            if resume_from_checkpoint:
                resume_from_checkpoint = self._choose(resume_from_checkpoint)
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _choose(self, wanted: str | os.PathLike | bool) -> str | None:
        answer: list = [None, None]  # path, what is wrong with it
        if self.args.process_index == 0:
            try:
                if wanted is True:
                    found = latest_checkpoint(cast(str, self.args.output_dir), self.notices)
                    answer[0] = str(found) if found else None
                    if found is None:
                        self.notices(
                            f"no complete checkpoint in {self.args.output_dir}: starting from the first step, with the "
                            "responses that are there"
                        )
                else:
                    verify(Path(cast(str, wanted)))
                    answer[0] = str(wanted)
            except Exception as error:
                answer[1] = error
        if self.args.world_size > 1:
            dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]
