"""`windkern losses`: list the losses, or show one of them with a picture."""

from __future__ import annotations

import argparse
from pathlib import Path

from windkern.commands.loading import loading

SUMMARY = "list the losses, or show one with a picture of its value and slope"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command to its parser."""
    add = parser.add_argument
    add("name", nargs="?", metavar="NAME", help="show this loss, with a picture of its value and slope (default: all)")
    add("--output", type=Path, metavar="FILE", help="file for the picture (default: losses/NAME.png)")
    add("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Print the table, or one loss and draw it; with --json a picture is drawn only if --output asks for it."""
    with loading(lines=False):
        from windkern.commands import losses_report

    return losses_report.show(arguments.name, output=arguments.output, as_json=arguments.json)
