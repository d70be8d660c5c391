"""Store the records of a run's iterations, and find files that have gone missing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from windkern._files import DamagedRecordError, read_json, write_json
from windkern.train.report.progress import Record
from windkern.train.store import GroupStore

_WITHOUT = "delete it, and the history leaves out its iteration"


class History:
    """The records of a run: one `record.json` for each finished iteration.

    Args:
        store: holds the iterations' folders.
        judged: whether the responses of an iteration are judged.
    """

    def __init__(self, store: GroupStore, *, judged: bool):
        self.store, self.judged = store, judged

    def path(self, iteration: int) -> Path:
        return self.store.iteration(iteration) / "record.json"

    def write(self, record: Record) -> None:
        write_json(self.path(record.iteration), record.as_dict())

    def read(self, iterations: int) -> list[Record]:
        """Return the stored records of the first `iterations` iterations.

        Raises:
            DamagedRecordError: a file is not a record.
        """
        found = []
        for iteration in range(1, iterations + 1):
            path = self.path(iteration)
            if (content := read_json(path, _WITHOUT)) is None:
                continue
            try:
                record = Record(**content)
            except TypeError as error:
                raise DamagedRecordError(path, error, _WITHOUT) from error
            # Reason: JSON cannot hold nan, the standard error of one prompt.
            known = [f"{each}_se" for each in ("win_rate", "kl") if content[each] is not None]
            lost: dict[str, Any] = {error: math.nan for error in known if content[error] is None}
            record = dataclasses.replace(record, **lost)
            if record.iteration != iteration or not all(_is_number(each) for each in content.values()):
                raise DamagedRecordError(path, f"it is not a record of iteration {iteration}", _WITHOUT)
            found.append(record)
        return found

    def missing(self, iteration: int, blocks: int) -> list[str]:
        """Return the names of missing files of a finished iteration.

        Args:
            iteration: counted from 1.
            blocks: number of blocks of an iteration.
        """
        folder = self.store.iteration(iteration)
        kinds = [self.store.path, self.store.verdict_path] if self.judged else [self.store.path]
        wanted = [path_of(folder, block) for path_of in kinds for block in range(blocks)]
        wanted += [folder / "scored.json", self.path(iteration)]
        return [f"{path.parent.name}/{path.name}" for path in wanted if not path.is_file()]

    def tell_missing(self, iterations: int, blocks: int, note: Callable[[str], None]) -> None:
        """Report missing files of finished iterations. The run itself no longer needs them.

        Args:
            iterations: number of finished iterations.
            blocks: number of blocks of an iteration.
            note: called with one line.
        """
        missing = [name for iteration in range(1, iterations + 1) for name in self.missing(iteration, blocks)]
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            note(
                f"missing in {self.store.folder}: {', '.join(missing[:5])}{more}; the run continues without them, "
                "and its account of those iterations is incomplete"
            )


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value))
