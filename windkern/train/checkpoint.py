"""Checkpoints that are there as a whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from windkern.train.models import sync_dir, sync_files

_STATE, _WEIGHTS = "state.json", "weights.safetensors"


class CorruptCheckpointError(RuntimeError):
    """A checkpoint's files are missing, cut short or changed; the message says which."""


@dataclass
class Checkpoint:
    """What a run needs to go on as if it had not stopped."""

    iteration: int  # finished ones
    state: dict  # anything JSON holds: settings, history
    weights: dict[str, Tensor]  # float32


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def save(folder: Path, checkpoint: Checkpoint, keep: int = 2) -> Path:
    """Write `folder/iteration-NNNN` and delete all but the newest `keep`.

    The files go to a hidden folder first, are flushed to the disk, and the folder is renamed: a process that is killed
    at any point leaves the checkpoints before it as they were.

    Args:
        folder: created where needed.
        checkpoint: what to write.
        keep: at least 1; 2 leaves one to go back to if the newest is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"iteration-{checkpoint.iteration:04d}"
    scratch = folder / f".{target.name}.{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    save_file({name: value.detach().contiguous() for name, value in checkpoint.weights.items()}, scratch / _WEIGHTS)
    digests = {path.name: _digest(path) for path in sorted(scratch.iterdir())}
    state = {"iteration": checkpoint.iteration, "files": digests, "state": checkpoint.state}
    (scratch / _STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    sync_files(scratch)
    shutil.rmtree(target, ignore_errors=True)
    scratch.rename(target)
    sync_dir(folder)
    for old in [*_newest_first(folder)[keep:], *folder.glob(".iteration-*")]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def clear(folder: Path) -> None:
    """Delete the checkpoints in a folder, and nothing else there."""
    for old in [*folder.glob("iteration-*"), *folder.glob(".iteration-*")]:
        shutil.rmtree(old)


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("iteration-*"), reverse=True)


def _load(path: Path) -> Checkpoint:
    try:
        written = json.loads((path / _STATE).read_text(encoding="utf-8"))
        for name, digest in written["files"].items():
            if _digest(path / name) != digest:
                raise CorruptCheckpointError(f"{path / name} is not what was written (sha256 differs)")
        return Checkpoint(written["iteration"], written["state"], load_file(path / _WEIGHTS))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpointError(f"{path} cannot be read: {error}") from error


def load_latest(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest checkpoint that is whole, or None if there is none.

    Args:
        folder: as in `save`; may not exist.
        warn: called with one line for each damaged checkpoint that is passed over.
    """
    for path in _newest_first(folder):
        try:
            return _load(path)
        except CorruptCheckpointError as error:
            warn(f"skipping a damaged checkpoint: {error}")
    return None
