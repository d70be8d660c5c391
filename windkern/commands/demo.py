"""`windkern demo`: train by the recipe `demo`, and compare the policy with the initial one."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from windkern.commands.loading import loading
from windkern.settings.options import add_options, filled, given, option, shared

if TYPE_CHECKING:
    from windkern.display import Display

SUMMARY = "align a small real model on this machine, in minutes, and show what happens"
RECIPE = "demo"
# Changes to the recipe where the CPU trains in float32: fewer and longer steps fit the same minutes. Chosen on the
# held-out curves of seeds 1 and 2.
FLOAT32 = {"num_iterations": 3, "attention": "sdpa", "learning_rate": 1.3e-4}


@dataclass(frozen=True)
class Changes:
    """Keys of the recipe that the command line can change; the others stay as the recipe has them."""

    model: str | None = option(
        None, "folder or hub id of a causal LM (default: the packaged SmolLM2-135M-Instruct)", metavar="NAME"
    )
    train_dataset: Path | None = option(
        None, "training prompts, .jsonl, .csv, .txt (default: the packaged ones)", metavar="FILE"
    )
    eval_dataset: Path | None = option(
        None, "held-out prompts for the evaluation (default: the packaged ones)", metavar="FILE"
    )
    judge: str | None = option(
        None, "reward(prompts, responses) -> numbers (default: VADER sentiment)", metavar="MODULE:FUNCTION"
    )
    num_iterations: int | None = shared("num_iterations")
    num_generations: int | None = shared("num_generations")
    max_completion_length: int | None = shared("max_completion_length")
    learning_rate: float | None = option(None, "initial learning rate of AdamW; it falls to half", metavar="X")
    seed: int | None = shared("seed")


@dataclass(frozen=True)
class Options:
    """Options of the command that are not keys of the recipe."""

    output_dir: Path = option(Path("demo"), "folder for picture, JSON and checkpoints", metavar="DIR")
    resume: bool = option(False, "continue from the last finished iteration in --output-dir")
    prompts_per_iteration: int | None = option(None, "training prompts answered in an iteration", metavar="N")
    eta: float | None = shared("eta")
    beta: float | None = shared("beta")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command to its parser."""
    parser.epilog = "Options without a default are as in the recipe demo, see `python -m windkern.recipes demo`."
    add_options(parser, Options)
    add_options(parser, Changes)


def overrides_of(arguments: argparse.Namespace) -> dict[str, object]:
    """Return what the command line changes in the recipe, by its keys."""
    from windkern.kernels import cpu_libraries

    options = filled(Options, arguments)
    changes: dict[str, Any] = {} if cpu_libraries.has_bfloat16_products() else dict(FLOAT32)
    changes |= given(Changes, arguments)
    if "learning_rate" in changes:
        changes["lr_scheduler_kwargs"] = {"lr_end": changes["learning_rate"] / 2, "power": 1.0}
    if options.prompts_per_iteration is not None:
        changes |= batches(options.prompts_per_iteration)
    if "num_generations" in changes:
        changes["fit_responses"] = min(4, changes["num_generations"])  # fewer than are fitted: fit them all
    return changes


def batches(prompts: int) -> dict[str, object]:
    """Return steps and batch size for a number of prompts per iteration: the largest batch up to 4 that divides it.

    Example:
        >>> batches(6)
        {'per_device_train_batch_size': 3, 'steps_per_iteration': 2, 'save_steps': 4}
    """
    size = next(size for size in (4, 3, 2, 1) if prompts % size == 0)
    steps = prompts // size
    return {"per_device_train_batch_size": size, "steps_per_iteration": steps, "save_steps": 2 * steps}


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; return 0 if the 95 % interval of the held-out win rate lies above 0.5, else 1."""
    model = getattr(arguments, "model", None)
    # Reason: everything is on this machine; transformers must not wait for a network that may not be there.
    if model is None or os.path.isdir(model):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with loading() as display:
        from windkern.train.models import require

        require("transformers", "accelerate", "yaml", "rich")
        assert display is not None  # rich is there
        return _run(arguments, filled(Options, arguments), display)


def _run(arguments: argparse.Namespace, options: Options, display: Display) -> int:
    from windkern.settings.run import load_settings
    from windkern.train.models import require

    numbers = {name: getattr(options, name) for name in ("eta", "beta")}
    settings, config = load_settings(
        RECIPE,
        [f"loss_kwargs.{name}={value!r}" for name, value in numbers.items() if value is not None],
        changes=overrides_of(arguments) | {"overwrite": not options.resume},
        output_dir=options.output_dir,
    )
    require(*settings.packages(config))
    from windkern.settings.run import RunConfig
    from windkern.train import launch

    assert isinstance(settings, RunConfig)  # the recipe's method
    outcome = launch.start(settings, config, resume=options.resume, display=display, kind="demo")
    assert outcome.final is not None  # the recipe has held-out prompts
    low, _ = outcome.final.win_rate.interval
    if low > 0.5:
        return 0
    text = "the 95 % interval of the win rate includes 0.5; try more iterations (--num-iterations) or another seed"
    display.print((text, "red"))
    return 1
