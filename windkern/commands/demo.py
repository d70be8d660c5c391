"""`windkern demo`: the recipe `demo`, trained and compared with where it started."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from windkern.commands.train import load_settings, needed_packages
from windkern.kernels import cpu_libraries
from windkern.train.models import require

if TYPE_CHECKING:
    from windkern.display import Display

RECIPE = "demo"
# Options of the command line and the keys of the recipe they stand for.
_KEYS = {
    "seed": "seed",
    "iterations": "num_iterations",
    "prompts": "train_prompts",
    "heldout_prompts": "eval_prompts",
    "model": "model",
    "judge": "judge",
    "responses": "num_responses",
    "max_new_tokens": "max_new_tokens",
    "learning_rate": "learning_rate",
    "eta": "eta",
    "beta": "beta",
}

# Changes to the recipe where the CPU trains in float32: fewer and longer steps fit the same minutes. Chosen on the
# held-out curves of seeds 1 and 2.
FLOAT32 = {"num_iterations": 3, "attention": "sdpa", "learning_rate": 1.3e-4}


def overrides_of(arguments: argparse.Namespace) -> dict[str, object]:
    """What the command line changes in the recipe, by its keys."""
    given = {key: getattr(arguments, name) for name, key in _KEYS.items()}
    changes = {} if cpu_libraries.has_bfloat16_products() else dict(FLOAT32)
    changes |= {
        key: str(value) if isinstance(value, Path) else value for key, value in given.items() if value is not None
    }
    if "learning_rate" in changes:
        changes["lr_scheduler_kwargs"] = {"lr_end": changes["learning_rate"] / 2, "power": 1.0}
    if arguments.prompts_per_iteration is not None:
        changes |= batches(arguments.prompts_per_iteration)
    if arguments.responses is not None:
        changes["fit_responses"] = min(4, arguments.responses)  # fewer than are fitted: fit them all
    return changes


def batches(prompts: int) -> dict[str, object]:
    """Steps and batch size for so many prompts in an iteration, four of them at a time where that goes.

    Example:
        >>> batches(6)
        {'per_device_train_batch_size': 3, 'steps_per_iteration': 2, 'save_steps': 4}
    """
    size = next(size for size in (4, 3, 2, 1) if prompts % size == 0)
    steps = prompts // size
    return {"per_device_train_batch_size": size, "steps_per_iteration": steps, "save_steps": 2 * steps}


def run(arguments: argparse.Namespace, display: Display | None = None) -> int:
    """Run the demo; returns 0 if the held-out win rate rose for certain (95 %), else 1."""
    require("transformers", "accelerate", "yaml", "rich")
    from windkern.display import Display

    display = display or Display()
    settings, config = load_settings(
        RECIPE,
        changes=overrides_of(arguments) | {"overwrite": not arguments.resume},
        output_dir=arguments.output_dir,
    )
    require(*needed_packages(settings, config))
    from windkern.train import launch

    outcome = launch.start(settings, config, resume=arguments.resume, display=display, kind="demo")
    low, _ = outcome.final.win_rate.interval
    if low > 0.5:
        return 0
    text = "the win rate did not rise above 0.5 for certain; more iterations (--iterations) or another seed may do it"
    display.print((text, "red"))
    return 1
