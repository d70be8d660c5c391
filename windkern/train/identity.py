"""What must be equal for a resumed run to be the run it goes on with."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from torch import nn

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
    "dataloader_pin_memory",
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


def outline_of(model: nn.Module) -> dict:
    """What tells models at their start apart without reading weights: name, counts of parameters, adapter."""
    counts = {True: 0, False: 0}
    for value in model.parameters():
        counts[value.requires_grad] += getattr(value, "ds_numel", value.numel())  # ZeRO-3 leaves none here
    found = {"model": os.path.basename(str(getattr(model.config, "_name_or_path", "")).rstrip("/"))}
    found |= {"trained_parameters": counts[True], "frozen_parameters": counts[False]}
    for name, adapter in getattr(model, "peft_config", {}).items():
        found |= {f"peft.{name}.{key}": getattr(adapter, key, None) for key in ("r", "lora_alpha", "lora_dropout")}
    return found


def identity_of(
    config: WindConfig, model: nn.Module, prompts: Sequence, heldout: Sequence[str], judge: str, processes: int
) -> dict:
    """What determines the weights a run ends with, as JSON holds it.

    Args:
        config: of the run.
        model: the policy at its start.
        prompts: strings or `Demonstration`s, whose answers count, too.
        heldout: held-out prompts.
        judge: name of the judge, and its strength where it has one.
        processes: that train.
    """
    settings = {name: value for name, value in config.own_settings().items() if name not in _FREE}
    settings |= {name: getattr(config, name) for name in _INHERITED}
    settings["prompts_per_step"] = config.per_device_train_batch_size * config.gradient_accumulation_steps * processes
    settings |= outline_of(model)
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
            f"{where} is of another run ({differing}); resume with its settings, or start another run in "
            "another output_dir"
        )
