"""The `windkern` command: one small pair of functions for each subcommand."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from windkern import __version__, recipes
from windkern.terminal import printable

if TYPE_CHECKING:
    from windkern.display import Display

FAILED, USAGE, INTERRUPTED = 1, 2, 130


@contextlib.contextmanager
def _loading(*, lines: bool = True) -> Iterator[Display | None]:
    """A display that says at once that packages are being loaded; None without rich, which the command will ask for."""
    if importlib.util.find_spec("rich") is None:
        yield None
        return
    from windkern.display import Display

    os.environ.setdefault("TQDM_DISABLE", "1")  # for bars of libraries that have no switch; read when tqdm is imported
    with Display(lines=lines) as display:
        display.phase(0, "loading packages")
        yield display


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--output-dir", type=Path, default=Path("demo"), help="picture, JSON and checkpoints go here (default: demo)")
    add("--resume", action="store_true", help="go on from the last finished iteration in --output-dir")
    add("--seed", type=int, help="of all randomness (default: 0)")
    add("--iterations", type=int, help="outer iterations: sample, judge, fit")
    add(
        "--prompts", type=Path, metavar="FILE", help="training prompts, .jsonl, .csv, .txt (default: the packaged ones)"
    )
    add("--heldout-prompts", type=Path, metavar="FILE", help="prompts for the evaluation (default: the packaged ones)")
    add("--model", metavar="NAME", help="folder or hub id of a causal LM (default: the packaged SmolLM2-135M-Instruct)")
    add("--judge", metavar="MODULE:FUNCTION", help="reward(prompts, responses) -> numbers (default: VADER sentiment)")
    add("--prompts-per-iteration", type=int, metavar="N", help="training prompts answered in an iteration")
    add("--responses", type=int, metavar="N", help="responses to each of them")
    add("--max-new-tokens", type=int, metavar="N", help="longest response")
    add("--learning-rate", type=float, metavar="X", help="of AdamW")
    add("--eta", type=float, metavar="X", help="step size of WIND")
    add("--beta", type=float, metavar="X", help="weight of the KL to the reference")


def _demo(arguments: argparse.Namespace) -> int:
    # Reason: everything is on this machine; transformers must not wait for a network that may not be there.
    if arguments.model is None or os.path.isdir(arguments.model):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with _loading() as display:
        from windkern.commands import demo

        return demo.run(arguments, display)


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", metavar="FILE", help=f"settings in YAML, or the name of a recipe: {', '.join(recipes.names())}")
    add(
        "--override",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="wins over the file; the value in YAML, dots lead into mappings (peft.r=8)",
    )
    add("--output-dir", type=Path, metavar="DIR", help="wins over output_dir of the file")
    add("--resume", action="store_true", help="go on from the newest whole checkpoint in the output directory")
    add("--method", choices=("wind", "value"), help="wins over method of the file (default: wind)")
    add("--report-to", "--report_to", metavar="NAME", help="tensorboard, wandb, trackio ...; wins over report_to")
    add("--fields", action="store_true", help="list the keys of a settings file, with types, defaults and meaning")
    add("--all", action="store_true", help="with --fields: those of transformers.TrainingArguments too")


def _train(arguments: argparse.Namespace) -> int:
    with _loading(lines=not arguments.fields) as display:
        from windkern.commands import train as run

        return run.run(arguments, display)


def _bandit_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--output-dir", type=Path, default=Path("bandit"), help="picture and JSON go here (default: bandit)")
    add("--seeds", type=int, help="games, each with its own rewards, reference and draws (default: 5)")
    add("--contexts", type=int, help="of a game (default: 10)")
    add("--responses", type=int, help="of a context (default: 100)")
    add("--link", help="what rewards mean for a pair: bradley_terry (default) or step, where the better always wins")
    add("--beta", type=float, metavar="X", help="weight of the KL to the reference (default: 0.1)")
    add("--eta", type=float, metavar="X", help="step size of WIND and SPPO (default: 0.4)")
    add("--exact-iterations", type=int, metavar="N", help="iterations of the exact methods (default: 1000)")
    add("--iterations", type=int, metavar="N", help="iterations of the sampled methods (default: 120)")
    add("--groups", type=int, metavar="N", help="groups drawn in an iteration and context (default: 32)")
    add("--group-size", type=int, metavar="N", help="responses of a group (default: 4)")


def _bandit(arguments: argparse.Namespace) -> int:
    with _loading() as display:
        from windkern.train.models import require

        require("rich", "matplotlib")
        from windkern.tabular import bandit

        return bandit.run(arguments, display)


def _losses_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("name", nargs="?", metavar="NAME", help="show this one, with a picture of its value and slope (default: all)")
    add("--output", type=Path, metavar="FILE", help="the picture goes here (default: losses/NAME.png)")
    add("--json", action="store_true", help="JSON on stdout instead of a table")


def _losses(arguments: argparse.Namespace) -> int:
    with _loading(lines=False):
        from windkern.commands import losses as losses_report

    return losses_report.run(arguments)


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help="folder or hub id of a causal LM, or recorded:FILE (JSON lines)")
    add("--base", required=True, metavar="NAME", help="what it is compared with, likewise")
    add("--prompts", required=True, metavar="SOURCE", help=".jsonl, .csv, .txt ... or hub:NAME[:SPLIT[:COLUMN]]")
    add(
        "--judge",
        required=True,
        metavar="JUDGE",
        help="vader, MODULE:FUNCTION, reward-model:NAME, pair-model:NAME or recorded:FILE",
    )
    add(
        "--judge-setting",
        action="append",
        dest="judge_settings",
        metavar="KEY=VALUE",
        help="of a judge that is a model: label, max_length, batch_size, template; may be given again",
    )
    add("--output-dir", type=Path, default=Path("eval"), help="picture and JSON go here (default: eval)")
    add("--strength", type=float, metavar="X", help="of the Bradley-Terry link, per unit of reward (default: 1)")
    add("--responses", type=int, metavar="N", help="of each of the two to each prompt (default: 2)")
    add("--max-new-tokens", type=int, metavar="N", help="longest response (default: 128)")
    add("--temperature", type=float, metavar="X", help="of both (default: 1)")
    add("--system", metavar="TEXT", help="system message for chat templates (default: the template's own)")
    add("--batch-size", type=int, metavar="N", help="sequences at a time (default: 64)")
    add("--device", metavar="NAME", help="cpu or cuda (default: cuda where there is one)")
    add(
        "--dtype", help="auto (default: bfloat16, or float32 on a CPU that is slow in it), float32, bfloat16 or float16"
    )
    add("--seed", type=int, help="of the draws (default: 0)")


def _eval(arguments: argparse.Namespace) -> int:
    with _loading() as display:
        from windkern.commands import evaluate as evaluation

        return evaluation.run(arguments, display)


def _plot_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path, metavar="RESULTS.json", help="what train, demo, eval or bandit wrote")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the picture goes here (default: beside RESULTS)")


def _plot(arguments: argparse.Namespace) -> int:
    with _loading(lines=False):
        from windkern.commands import plot as plotting

    return plotting.run(arguments)


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="JSON on stdout instead of tables")


def _doctor(arguments: argparse.Namespace) -> int:
    with _loading(lines=False) as display:
        from windkern.commands import doctor

        return doctor.run(arguments, display)


COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]] = {
    "demo": ("align a small real model on this machine, in minutes, and show what happens", _demo_arguments, _demo),
    "train": ("train a policy with WIND, or another loss, by a settings file or a recipe", _train_arguments, _train),
    "bandit": (
        "WIND, iterative BOND, J-BOND and SPPO on the same contextual bandits, exact and sampled",
        _bandit_arguments,
        _bandit,
    ),
    "losses": ("list the losses, or show one with a picture of its value and slope", _losses_arguments, _losses),
    "eval": ("win rate of a model against a base, by a judge, with error bars", _eval_arguments, _eval),
    "plot": ("draw the picture of a results file again", _plot_arguments, _plot),
    "doctor": ("which back ends run here, why others do not, and whether they are right", _doctor_arguments, _doctor),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        super().error(printable(message))


def build_parser() -> argparse.ArgumentParser:
    """The parser with every command of COMMANDS."""
    parser = _Parser(prog="windkern", description="Preference losses without the logits.")
    parser.add_argument("--version", action="version", version=f"windkern {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, (summary, add_arguments, run) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        add_arguments(command)
        command.set_defaults(run=run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 it did not achieve its aim, 2 a mistake the user can put right.

    Errors are one line on stderr; with WINDKERN_DEBUG=1 they are tracebacks.
    """
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        hint = "; --resume goes on from what is on the disk" if hasattr(arguments, "resume") else ""
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
