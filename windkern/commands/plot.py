"""`windkern plot`: draw the picture of a results file again."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from windkern.commands.loading import loading
from windkern.terminal import printable

SUMMARY = "draw the picture of a results file again"


def _draw_run(path: Path, content: dict) -> None:
    from windkern.train.evaluation.evaluate import Estimate, Evaluation
    from windkern.train.report import show as report
    from windkern.train.report.progress import Record

    final, settings = content["final"], content["settings"]
    if final is None:
        raise ValueError("this run had no held-out prompts (eval_dataset), so there is no win rate to draw")
    error = math.nan if final["win_rate_se"] is None else final["win_rate_se"]  # a single prompt has none
    result = Evaluation(win_rate=Estimate(final["win_rate"], error), reward=None, kl=None)
    rows: list[dict[str, Any]] = content["history"]
    history = [
        Record(**row | {key: math.nan for key, value in row.items() if value is None and key.endswith("_se")})
        for row in rows
    ]
    seed = settings.get("wind", settings).get("seed", 0)
    report.draw(path, history, result, f"{settings.get('loss', 'wind')} on {settings['model']}, seed {seed}")


def _draw_eval(path: Path, content: dict) -> None:
    from windkern.commands import evaluate as evaluation

    evaluation.draw(path, content)


def _draw_bandit(path: Path, content: dict) -> None:
    from windkern.commands import bandit_picture as picture

    picture.draw(path, content)


def _draw_value(path: Path, content: dict) -> None:
    from windkern.value import run as value

    value.draw(path, content)


KINDS: dict[str, Callable[[Path, dict], None]] = {
    "demo": _draw_run,
    "train": _draw_run,
    "value": _draw_value,
    "eval": _draw_eval,
    "bandit": _draw_bandit,
}


def read(path: Path) -> dict:
    """Return the content of a results file.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        ValueError: the file is not a JSON object with a known "kind".
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give a results file, such as {path / 'result.json'}")
    if not path.is_file():
        raise FileNotFoundError(f"results file {path} does not exist")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
    kind = content.get("kind") if isinstance(content, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f'{path} must be a results file with "kind" {", ".join(KINDS)}, got {kind!r}')
    return content


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command to its parser."""
    parser.add_argument(
        "results", type=Path, metavar="RESULTS.json", help="results file of train, demo, eval or bandit"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="file for the picture (default: beside RESULTS)")


def run(arguments: argparse.Namespace) -> int:
    """Draw the picture of a results file, and return 0."""
    with loading(lines=False):
        from windkern.train.models import require
    require("matplotlib")
    content = read(arguments.results)
    path = arguments.output or arguments.results.with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        KINDS[content["kind"]](path, content)
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"{arguments.results} is not a complete result of kind {content['kind']!r}: {type(error).__name__} {error}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{arguments.results}: {error}") from error
    print(f"picture {printable(os.path.relpath(path))}")
    return 0
