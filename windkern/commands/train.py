"""`windkern train`: do a run by settings from a file and the command line."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from windkern import recipes
from windkern.commands.loading import loading
from windkern.settings.options import add_options, filled, option

if TYPE_CHECKING:
    from windkern.display import Display
    from windkern.settings.run import RunConfig
    from windkern.train.config import WindConfig
    from windkern.value.trainer import ValueConfig

SUMMARY = "train a policy with WIND, or another loss, from a settings file or a recipe"


@dataclass(frozen=True)
class Options:
    """Options of the command line besides the settings file."""

    config: str | None = option(
        None, f"settings in YAML, or the name of a recipe: {', '.join(recipes.names())}", metavar="FILE"
    )
    override: list[str] | None = option(
        None, "changes to the file; the value in YAML, dots lead into mappings (peft.r=8)", metavar="KEY=VALUE"
    )
    output_dir: Path | None = option(None, "output folder; overrides the file", metavar="DIR")
    method: str | None = option(None, "training method; overrides the file", choices=("wind", "value"))
    report_to: str | None = option(None, "tensorboard, wandb, trackio ...; overrides the file", metavar="NAME")
    resume: bool = option(False, "continue from the newest complete checkpoint in the output folder")
    fields: bool = option(False, "list the keys of a settings file: type, default, meaning, range")
    all: bool = option(False, "with --fields: also the keys of transformers.TrainingArguments")
    json: bool = option(False, "with --fields: print JSON")
    init: bool = option(False, "print a commented settings file to start from")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command to its parser."""
    add_options(parser, Options)


def run(arguments: argparse.Namespace) -> int:
    """Train as the command line says; return 0 when the run is complete."""
    options = filled(Options, arguments)
    with loading(lines=not (options.fields or options.init)) as display:
        from windkern.train.models import require

        require("transformers", "accelerate", "yaml", "rich")
        assert display is not None  # rich is there
        if options.fields or options.init:
            display.stop()
            _explain(options)
            return 0
        return _run(options, display)


def _explain(options: Options) -> None:
    from windkern.settings import describe
    from windkern.settings.run import classes_of

    method = options.method or "wind"
    if options.init:
        print(describe.template(method), end="")
        return
    sections = describe.sections(*classes_of(method), everything=options.all)
    if options.json:
        print(json.dumps(describe.as_dicts(sections), indent=1))
        return
    from rich.console import Console

    console = Console()
    console.print(describe.listing(sections, console.width), soft_wrap=True)
    if not options.all:
        console.print("Every key of transformers.TrainingArguments works too: add --all to list them.", highlight=False)


def _run(options: Options, display: Display) -> int:
    from windkern.settings.run import load_settings
    from windkern.train.models import require

    if options.config is None:
        raise ValueError(f"--config must name a file or a recipe ({', '.join(recipes.names())}); --init prints a file")
    settings, config = load_settings(
        options.config,
        options.override or (),
        changes={} if options.report_to is None else {"report_to": options.report_to},
        output_dir=options.output_dir,
        method=options.method,
    )
    require(*settings.packages(config))
    from windkern.train.preconditions import check_reporting

    check_reporting(config)
    try:
        _START[settings.method](settings, config, resume=options.resume, display=display)
    finally:
        close_processes()
    return 0


def _start_wind(settings: RunConfig, config: WindConfig, *, resume: bool, display: Display) -> None:
    from windkern.train import launch

    launch.start(settings, config, resume=resume, display=display)


def _start_value(settings: object, config: ValueConfig, *, resume: bool, display: Display) -> None:
    from windkern.train.checkpoints.lock import owned_by_run
    from windkern.value.run import run_value

    with owned_by_run(config, warnings.warn if display is None else display.note):
        run_value(config, resume=resume, display=display)


# One function for each method of `windkern.settings.run`.
_START: dict[str, Callable[..., None]] = {"wind": _start_wind, "value": _start_value}


def close_processes() -> None:
    """Leave the process group, if there is one: gloo sometimes aborts if the interpreter does it."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
