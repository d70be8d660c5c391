"""The `windkern` command, made of the commands of this folder, one module each."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from windkern import __version__
from windkern.commands import bandit, demo, doctor, evaluate, losses, plot, train
from windkern.terminal import printable

FAILED, USAGE, INTERRUPTED = 1, 2, 130

# A command is a module with SUMMARY, `add_arguments(parser)` and `run(arguments) -> exit code`. Until it runs, it does
# not import torch, directly or indirectly, so that --help and the first output appear at once.
COMMANDS: dict[str, ModuleType] = {
    "demo": demo,
    "train": train,
    "bandit": bandit,
    "losses": losses,
    "eval": evaluate,
    "plot": plot,
    "doctor": doctor,
}


class _Parser(argparse.ArgumentParser):
    def parse_known_args(self, args=None, namespace=None):
        """Parse as argparse does, with --output_dir for --output-dir, as trainers of other libraries write it."""
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args(list(map(_with_dashes, given)), namespace)

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def _with_dashes(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with every command of COMMANDS."""
    more = "Documentation: https://windkern.github.io/windkern"
    parser = _Parser(prog="windkern", description="Preference losses without the logits.", epilog=more)
    parser.add_argument("--version", action="version", version=f"windkern {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.SUMMARY, description=module.SUMMARY)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 aim missed, 2 a mistake that the user can correct.

    Errors are one line on stderr; with WINDKERN_DEBUG=1 they are tracebacks.
    """
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        hint = "; --resume continues from what is on disk" if hasattr(arguments, "resume") else ""
        print(f"windkern: interrupted{hint}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        from windkern.backends import debug_mode
        from windkern.train.errors import ended_by_another, message_of

        told = message_of(error)
        if told is None or debug_mode():
            raise
        if ended_by_another(error):
            print(f"windkern: {told}", file=sys.stderr)
            return FAILED
        print(f"windkern: error: {told} (WINDKERN_DEBUG=1 shows where)", file=sys.stderr)
        return USAGE
