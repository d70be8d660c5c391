"""Command-line options made from dataclasses: types, defaults, help, and one name for one meaning."""

from __future__ import annotations

import argparse
import dataclasses
import doctest
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")

from windkern.commands import demo, evaluate, train
from windkern.commands.bandit_settings import BanditSettings
from windkern.commands.cli import build_parser
from windkern.losses import LOSSES
from windkern.settings import options, run
from windkern.train.config import WindConfig


def test_docstring_examples_run():
    failed, tried = doctest.testmod(options)
    assert tried and not failed


@dataclasses.dataclass
class Options:
    rows: int = options.option(3, "number of rows", metavar="N")
    share: float | None = options.option(None, "a share, 10 % or so (default: all)", metavar="X")
    names: list[str] | None = options.option(None, "names", metavar="NAME")
    extra: dict[str, object] | None = options.option(None, "extras", metavar="KEY=VALUE")
    wide: bool = options.option(False, "make it wide")
    hidden: int = 5


def parsed(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    options.add_options(parser, Options)
    return parser.parse_args(argv)


def test_options_are_made_of_fields_and_fill_them():
    assert options.filled(Options, parsed()) == Options()
    argv = (
        "--rows",
        "4",
        "--share",
        ".5",
        "--names",
        "a",
        "b",
        "--names",
        "c",
        "--extra",
        "label=1",
        "x=y=z",
        "--wide",
    )
    wanted = Options(4, 0.5, ["a", "b", "c"], {"label": 1, "x": "y=z"}, True)
    assert options.filled(Options, parsed(*argv)) == wanted
    assert options.given(Options, parsed("--rows", "3")) == {"rows": 3}
    parser = argparse.ArgumentParser()
    options.add_options(parser, Options)
    shown = " ".join(parser.format_help().split())
    assert "number of rows (default: 3)" in shown and "10 % or so (default: all)" in shown and "hidden" not in shown
    with pytest.raises(argparse.ArgumentError, match="must be KEY=VALUE, such as label=1, got 'label'"):
        parsed("--extra", "label")


def test_options_of_the_same_name_mean_the_same():
    """An option that sets a key of a settings file has that key's name."""
    trainer = {each.name for each in dataclasses.fields(WindConfig)}
    assert set(options.SHARED) - set(LOSSES["wind"].keywords) <= trainer
    keys = trainer | {each.name for each in dataclasses.fields(run.RunConfig)}
    assert {each.name for each in dataclasses.fields(demo.Changes)} <= keys
    helps: dict[str, set[str]] = {}
    for cls in (demo.Changes, demo.Options, evaluate.EvalSettings, BanditSettings):
        for each in dataclasses.fields(cls):
            if each.name in options.SHARED:
                helps.setdefault(each.name, set()).add(each.metadata["help"])
    assert {name for name, texts in helps.items() if len(texts) > 1} == {"num_iterations", "eta"}  # bandit has its own


def test_options_may_be_written_with_underscores():
    argv = ["train", "--output_dir", "a_b", "--report_to=my_tracker", "--override", "eval_steps=1"]
    found = options.filled(train.Options, build_parser().parse_args(argv))
    assert (found.output_dir, found.report_to, found.override) == (Path("a_b"), "my_tracker", ["eval_steps=1"])
