"""What a server has answered already, on the disk, so that no failure and no kill makes it answer twice."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path


def key_of(*parts: object) -> str:
    """Return a name for what JSON can hold.

    Example:
        >>> key_of("/completions", {"n": 2}) == key_of("/completions", {"n": 2}) != key_of("/completions", {"n": 3})
        True
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class Received:
    """Answers by their requests, a file each.

    A file is there as a whole or not at all; one that cannot be read counts as not there: it can be asked for again.

    Args:
        folder: made where it is needed.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def get(self, key: str) -> object | None:
        """The answer to a request, None where there is none."""
        try:
            return json.loads(self._path(key).read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            return None

    def put(self, key: str, content: object) -> None:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
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
