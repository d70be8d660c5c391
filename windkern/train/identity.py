"""What must be equal for a resumed run to be the run it goes on with."""

from __future__ import annotations

import json
from collections.abc import Sequence

from windkern.train.config import WindConfig
from windkern.train.seeds import stream

# Of the settings declared by WindConfig: these may differ. More iterations than before are welcome; a schedule that
# depends on their number then goes on at another rate.
_FREE = {
    "num_iterations",
    "overwrite",
    "memory_budget",
    "backend",
    "save_strategy",
    "save_total_limit",
    "logging_steps",
    "remove_unused_columns",
    "ddp_find_unused_parameters",
    "per_device_train_batch_size",  # its product with the next ones counts
    "per_device_eval_batch_size",
}
_INHERITED = (
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "seed",
    "bf16",
    "fp16",
)


class ResumeError(ValueError):
    """A checkpoint or sampled responses belong to another run; the message says what differs."""


def identity_of(config: WindConfig, prompts: Sequence, heldout: Sequence[str], judge: str, processes: int) -> dict:
    """What determines the weights a run ends with, as JSON holds it.

    Args:
        config: of the run.
        prompts: strings or `Demonstration`s, whose answers count, too.
        heldout: held-out prompts.
        judge: name of the judge, and its strength where it has one.
        processes: that train.
    """
    settings = {name: value for name, value in config.own_settings().items() if name not in _FREE}
    settings |= {name: getattr(config, name) for name in _INHERITED}
    settings["prompts_per_step"] = config.per_device_train_batch_size * config.gradient_accumulation_steps * processes
    settings["judge"] = judge
    settings["prompts"] = stream(0, *prompts, "held-out", *heldout)
    return json.loads(json.dumps(settings, default=str))


def check_same(theirs: dict, ours: dict, where: str) -> None:
    """Raise unless two identities are equal.

    Raises:
        ResumeError: names what differs, with both values.
    """
    names = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
    if names:
        differing = ", ".join(f"{name} {theirs.get(name)!r} there, {ours.get(name)!r} here" for name in names)
        raise ResumeError(
            f"{where} is of another run ({differing}); start without resuming, or with another output_dir"
        )
