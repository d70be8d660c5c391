"""Write responses and verdicts as tables: a Parquet file per iteration, and tables in experiment trackers."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from windkern.train.models import require

TRACKERS = ("wandb", "trackio")  # trackers that show tables


def columns_of(iteration: int, step: int, prompts: Sequence[str], groups: Iterable) -> dict[str, list]:
    """Return the columns of a table with a row for each response.

    Args:
        iteration: counted from 1.
        step: optimizer steps taken before it.
        prompts: training prompts.
        groups: `windkern.train.groups.Group`s, or objects with their `place`, `texts`, `completions`, `truncated`,
            `prefs` and `rewards`.

    Returns:
        step, iteration, prompt, completion, tokens, truncated, win_rate (mean chance to beat the other responses to the
        prompt; None if they were not judged) and reward (None if the judge has none).

    Example:
        >>> from windkern.train.groups import Group
        >>> group = Group(0, (1,), ((5, 2), (6,)), (False, True), ("a", "b"), ((0.5, 0.9), (0.1, 0.5)), None)
        >>> table = columns_of(1, 0, ["p"], [group])
        >>> table["completion"], table["win_rate"], table["tokens"], table["reward"]
        (['a', 'b'], [0.9, 0.1], [2, 1], [None, None])
    """
    names = ("step", "iteration", "prompt", "completion", "tokens", "truncated", "win_rate", "reward")
    table: dict[str, list] = {name: [] for name in names}
    for group in groups:
        count = len(group.texts)
        table["step"] += [step] * count
        table["iteration"] += [iteration] * count
        table["prompt"] += [str(prompts[group.place])] * count
        table["completion"] += list(group.texts)
        table["tokens"] += [len(tokens) for tokens in group.completions]
        table["truncated"] += list(group.truncated)
        table["win_rate"] += [None] * count if group.prefs is None or count < 2 else _win_rates(group.prefs)
        table["reward"] += [None] * count if group.rewards is None else list(group.rewards)
    return table


def _win_rates(prefs: Sequence[Sequence[float]]) -> list[float]:
    return [sum((*row[:k], *row[k + 1 :])) / (len(row) - 1) for k, row in enumerate(prefs)]


def write_completions(folder: Path, table: dict[str, list]) -> Path:
    """Write a table as `completions_NNNNN.parquet`, NNNNN its iteration, and return the path.

    The file is written completely or not at all, and replaces one of the same iteration.

    Raises:
        MissingPackageError: pyarrow is not installed.
        OSError: it cannot be written.
    """
    require("pyarrow")
    import pyarrow
    from pyarrow import parquet

    kinds = {"win_rate": pyarrow.float64(), "reward": pyarrow.float64()}  # also where all are None
    made = pyarrow.table({name: pyarrow.array(values, type=kinds.get(name)) for name, values in table.items()})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"completions_{table['iteration'][0]:05d}.parquet"
    scratch = path.with_name(f".{path.name}.part")
    parquet.write_table(made, scratch)
    scratch.replace(path)
    return path


def track_completions(table: dict[str, list], report_to: Iterable[str]) -> list[str]:
    """Show a table in the running trackers that a run reports to, and return their names.

    Args:
        table: columns, as `columns_of` returns them.
        report_to: names of trackers; those without tables are passed over.
    """
    shown = []
    rows = [list(row) for row in zip(*table.values(), strict=True)]
    for name in TRACKERS:
        if name not in report_to or name not in sys.modules:
            continue
        tracker = importlib.import_module(name)
        if name == "wandb" and tracker.run is not None:
            tracker.log({"completions": tracker.Table(columns=list(table), data=rows)})
            shown.append(name)
        elif name == "trackio":
            pandas = importlib.import_module("pandas")
            tracker.log({"completions": tracker.Table(dataframe=pandas.DataFrame(table))})
            shown.append(name)
    return shown
