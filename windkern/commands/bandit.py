"""`windkern bandit`: WIND, iterative BOND, J-BOND and SPPO on the same contextual bandits, exact and sampled."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from windkern.commands.bandit_settings import BanditSettings
from windkern.commands.loading import loading
from windkern.settings.options import add_options, filled, option

if TYPE_CHECKING:
    from windkern.display import Display

SUMMARY = "WIND, iterative BOND, J-BOND and SPPO on the same contextual bandits, exact and sampled"


@dataclass(frozen=True)
class Output:
    """The place for the results."""

    output_dir: Path = option(Path("bandit"), "folder for picture and JSON", metavar="DIR")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command to its parser."""
    add_options(parser, Output)
    add_options(parser, BanditSettings)


def run(arguments: argparse.Namespace) -> int:
    """Run the experiment, write picture and JSON, and print the table; return 0."""
    with loading() as display:
        from windkern.train.models import require

        require("rich", "matplotlib")
        assert display is not None  # rich is there
        return _run(filled(BanditSettings, arguments), filled(Output, arguments).output_dir, display)


def _run(settings: BanditSettings, output: Path, display: Display) -> int:
    from windkern.commands.bandit_experiment import TARGET, exact_runs, experiment, final_table, sampled_runs
    from windkern.commands.bandit_picture import draw
    from windkern.display import clock

    output.mkdir(parents=True, exist_ok=True)
    runs = [f"exact {name}" for name in exact_runs(settings)] + [f"sampled {name}" for name in sampled_runs(settings)]
    began = time.perf_counter()
    with display:
        display.plan("game", settings.seeds, each={(name, ""): 1.0 for name in runs})
        display.print(
            f"{settings.seeds} games of {settings.contexts} contexts x {settings.responses} responses, link "
            f"{settings.link}, beta {settings.beta:g}, eta {settings.eta:g}; sampled: {settings.num_iterations} "
            f"iterations of {settings.groups} groups of {settings.group_size} in each context",
        )
        result = experiment(settings, display.phase)
    seconds = time.perf_counter() - began
    numbers, drawing = output / "bandit.json", output / "bandit.png"
    content = {"kind": "bandit", "settings": dataclasses.asdict(settings), "seconds": seconds, **result}
    numbers.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draw(drawing, content)
    display.print(rich=final_table(result))
    display.print("means ± standard errors over the games, at the last iteration; seconds per game")
    display.print(f"* drawn in each context until the exploitability is first below {TARGET:g} of the reference's")
    where = f"picture {os.path.relpath(drawing)}, numbers {os.path.relpath(numbers)}"
    display.print(f"{clock(display.elapsed)} in all; {where}")
    return 0
