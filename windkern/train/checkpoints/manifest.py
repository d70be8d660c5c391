"""Record the files of a checkpoint, and verify that they are unchanged."""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

MANIFEST = "windkern_manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")
_SHARDED = ("pytorch_model_fsdp*", "global_step*")  # FSDP and DeepSpeed


class CorruptCheckpointError(RuntimeError):
    """A checkpoint's files are missing, cut short or changed; the message says which."""


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):  # Reason: hashlib.file_digest came with Python 3.11.
            digest.update(block)
    return digest.hexdigest()


def write_manifest(folder: Path) -> None:
    """Write size in bytes and sha256 of every file below `folder` into `windkern_manifest.json` there."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / MANIFEST:
            name = path.relative_to(folder).as_posix()
            files[name] = {"size": path.stat().st_size, "sha256": _digest(path)}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")


def verify(folder: Path, contents: bool = True) -> None:
    """Check that a checkpoint is what was written.

    Files that the manifest does not list are ignored: callbacks add some after the checkpoint is complete. A folder
    without a manifest, as transformers writes it, passes if trainer_state.json, which is written last, parses and has
    the step of the folder's name; weights exist, with every shard of an index; safetensors files are as long as their
    headers say; torch's files end with their directory; and the scheduler's state exists if the optimizer's does.
    Changed bytes inside such files go unnoticed.

    Args:
        folder: `.../checkpoint-N`.
        contents: whether to compare sha256; False compares sizes only, and reads only the manifest.

    Raises:
        CorruptCheckpointError: a file is missing or damaged; the message says which, and how.
    """
    try:
        if (folder / MANIFEST).exists():
            _verify_listed(folder, contents)
        else:
            _verify_plain(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpointError(f"it cannot be read: {type(error).__name__}: {error}") from error


def _verify_listed(folder: Path, contents: bool) -> None:
    files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    for name, written in files.items():
        path = folder / name
        if not path.is_file():
            raise CorruptCheckpointError(f"{name} is missing")
        if (size := path.stat().st_size) != written["size"]:
            raise CorruptCheckpointError(f"{name} has {size} bytes, but {written['size']} were written")
        if contents and _digest(path) != written["sha256"]:
            raise CorruptCheckpointError(f"{name} is not what was written (sha256 differs)")


def _verify_plain(folder: Path) -> None:
    if not (folder / "trainer_state.json").is_file():
        raise CorruptCheckpointError(f"no {MANIFEST} and no trainer_state.json")
    step = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    if (match := _NAME.fullmatch(folder.name)) and int(match[1]) != step:
        raise CorruptCheckpointError(f"trainer_state.json is from step {step}")
    indices = list(folder.glob("*.index.json"))
    for index in indices:
        for name in set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()):
            if not (folder / name).is_file():
                raise CorruptCheckpointError(f"{name} is missing")
    sharded = [path for pattern in _SHARDED for path in folder.glob(pattern)]
    if not indices and not sharded and not any((folder / name).is_file() for name in _WEIGHTS):
        raise CorruptCheckpointError("there are no weights")
    if (folder / "optimizer.pt").is_file() and not (folder / "scheduler.pt").is_file():
        raise CorruptCheckpointError("scheduler.pt is missing")
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            verify_safetensors(path)
        elif path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
            raise CorruptCheckpointError(f"{path.name} is cut short")


def verify_safetensors(path: Path) -> None:
    """Check that a safetensors file is as long as its header says, without reading its tensors.

    Raises:
        CorruptCheckpointError: the length differs; the message names the file.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")  # length of the header, which follows
        if 8 + length > path.stat().st_size:
            raise CorruptCheckpointError(f"{path.name} is cut short")
        header = json.loads(file.read(length))
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    if 8 + length + end != path.stat().st_size:
        raise CorruptCheckpointError(
            f"{path.name} has {path.stat().st_size} bytes, but its header says {8 + length + end}"
        )


def by_step(output_dir: str | os.PathLike) -> list[Path]:
    """Return the folders `checkpoint-N`, highest step first; an empty list if `output_dir` does not exist."""
    found = [(int(match[1]), path) for path in Path(output_dir).glob("*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True) if path.is_dir()]


def latest_checkpoint(output_dir: str | os.PathLike, warn: Callable[[str], None]) -> Path | None:
    """Return the newest complete checkpoint, None if no checkpoint is complete.

    Args:
        output_dir: holds `checkpoint-N` folders; may not exist.
        warn: called with "skipping ...: reason" for each checkpoint that is skipped, half-written ones included.

    Example:
        >>> print(latest_checkpoint("runs/none-yet", print))
        None
    """
    for half in sorted(Path(output_dir).glob(".saving-checkpoint-*")):
        warn(f"skipping {half}: it was not written to the end")
    for path in by_step(output_dir):
        try:
            verify(path)
        except CorruptCheckpointError as error:
            warn(f"skipping {path}: {error}")
        else:
            return path
    return None
