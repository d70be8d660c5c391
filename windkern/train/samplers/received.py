"""Answers kept on disk, so that a server need not answer twice after a failure or a kill."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path


def key_of(*parts: object) -> str:
    """Return a name for values that JSON can hold.

    Example:
        >>> key_of("/completions", {"n": 2}) == key_of("/completions", {"n": 2}) != key_of("/completions", {"n": 3})
        True
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class Received:
    """Answers by the keys of their requests, one file each.

    A file is complete once it has its name. A file that cannot be read counts as missing: the server is asked again.

    Args:
        folder: created with the first answer.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def get(self, key: str) -> object | None:
        """Return the answer to a request, None if there is none."""
        try:
            return json.loads(self._path(key).read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            return None

    def put(self, key: str, content: object) -> None:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Reason: write_text waits for the disk, which is too long for each of many answers that can be asked for again.
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        scratch.write_text(json.dumps(content), "utf-8")
        scratch.replace(path)

    def drop(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._path(key).unlink(missing_ok=True)

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"
