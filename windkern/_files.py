"""Write JSON that every reader accepts, in files that are complete or absent even after a power cut."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

ANEW = "restore it from a copy, or start another run in another output_dir"


class DamagedRecordError(ValueError):
    """Raised when a file does not hold what a run wrote to it. The message names the file and what to do."""

    def __init__(self, path: Path, why: object, way_out: str):
        super().__init__(f"{path} is damaged ({why}); {way_out}")


def to_json(content: object, **options: Any) -> str:
    """Return `content` as JSON of RFC 8259, in characters that UTF-8 can encode.

    Values that JSON cannot express are replaced by the nearest it can: NaN and infinities by null, half of a surrogate
    pair by U+FFFD. Python's own `json.dumps` writes them as they are, and other readers, pyarrow and browsers among
    them, then refuse the whole file.

    Args:
        content: dicts, lists, tuples, strings, numbers, booleans and None.
        options: as `json.dumps`; `default` must return one of these.

    Raises:
        TypeError: it holds something else, and no `default` is given.

    Example:
        >>> to_json({"loss": float("nan"), "text": "caf\u00e9"})
        '{"loss": null, "text": "caf\u00e9"}'
    """
    try:
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, **options)
        text.encode()
    except ValueError:
        return json.dumps(_plain(content), ensure_ascii=False, **options)
    return text


def _plain(content: object) -> object:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, str):
        return content.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(content, dict):
        return {_plain(key): _plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_plain(value) for value in content]
    return content


def write_json(path: Path, content: object) -> None:
    """Write a JSON file as `write_text` writes a text file.

    Args:
        path: the file; its folder is created if it does not exist.
        content: see `to_json`.

    Raises:
        OSError: the file cannot be written; the previous file is intact.
    """
    write_text(path, to_json(content))


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file so that a reader, or a crash, never sees half of it.

    Args:
        path: the file; its folder is created if it does not exist.
        text: the content.

    Raises:
        OSError: the file cannot be written; the previous file is intact.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        scratch.rename(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}; the previous file is intact") from error
    sync_dir(path.parent)


def read_json(path: Path, way_out: str = ANEW) -> Any:
    """Return the content of a JSON file, or None if it does not exist.

    Args:
        path: a UTF-8 file.
        way_out: what the user can do if it is damaged, for the message.

    Raises:
        DamagedRecordError: the file does not hold JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise DamagedRecordError(path, error, way_out) from error


def sync_dir(path: Path) -> None:
    """Make the entries of a directory survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_files(folder: Path) -> None:
    """Make a folder, and every file and folder below it, survive a power cut."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            sync_dir(path)
    sync_dir(folder)
