"""Accept or refuse each setting of `transformers.TrainingArguments` for a `WindTrainer`.

No setting is accepted and then ignored. A test compares the tables with the installed transformers.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import transformers

# These change what is trained, so a run can only be resumed with the same values.
TRAINED = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "optim_target_modules",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "seed",
    "bf16",
    "fp16",
    "tf32",
)

# These decide where and how fast a run goes, what it shows and what it keeps; they change rounding at most.
FREE = (
    "output_dir",
    "num_train_epochs",  # follows from num_iterations
    "max_steps",  # likewise
    "per_device_train_batch_size",  # the product of these two and of the processes counts, and is compared
    "gradient_accumulation_steps",
    "per_device_eval_batch_size",
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
    "gradient_checkpointing",  # their names before transformers 5.24
    "gradient_checkpointing_kwargs",
    "torch_compile",
    "torch_compile_backend",
    "torch_compile_mode",
    "torch_empty_cache_steps",
    "full_determinism",
    "use_cpu",
    "accelerator_config",
    "ddp_find_unused_parameters",
    "ddp_bucket_cap_mb",
    "ddp_broadcast_buffers",
    "ddp_static_graph",
    "ddp_backend",
    "ddp_timeout",
    "fsdp",
    "fsdp_config",
    "deepspeed",
    "dataloader_pin_memory",
    "logging_strategy",
    "logging_steps",
    "logging_first_step",
    "log_on_each_node",
    "include_num_input_tokens_seen",
    "log_level",
    "log_level_replica",
    "disable_tqdm",
    "report_to",
    "run_name",  # this and the next four: used by the integration that report_to names
    "project",
    "trackio_space_id",
    "trackio_bucket_id",
    "trackio_static_space_id",
    "eval_strategy",
    "eval_steps",
    "eval_on_start",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "save_only_model",
    "enable_jit_checkpoint",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
    "restore_callback_states_from_checkpoint",
    "push_to_hub",
    "hub_token",
    "hub_private_repo",
    "hub_model_id",
    "hub_strategy",
    "hub_always_push",
    "hub_revision",
    "debug",
    "skip_memory_metrics",
    "do_eval",  # this and the next two: see CONDITIONAL
    "eval_delay",
    "local_rank",
)

_WORKERS = "batches are made of responses that are sampled during the run, by this process"
_PREDICTIONS = "an evaluation compares responses; there are no predictions"
_SCRIPTS = "it is meant for training scripts; here the command decides what is done"
# These would be wrong here, or do nothing, for the reason given. Only their defaults are accepted.
REFUSED = {
    "dataloader_num_workers": _WORKERS,
    "dataloader_persistent_workers": _WORKERS,
    "dataloader_prefetch_factor": _WORKERS,
    "dataloader_multiprocessing_context": _WORKERS,
    "dataloader_in_order": _WORKERS,
    "dataloader_drop_last": "the prompts of an iteration fill its batches",
    "auto_find_batch_size": "another batch size would change the number of steps; set per_device_train_batch_size",
    "ignore_data_skip": "a resumed iteration would fit its first groups twice",
    "neftune_noise_alpha": "with noise the trained policy would differ from the one that sampled and was scored",
    "label_smoothing_factor": "there are no labels to smooth",
    "label_names": "there are no labels",
    "average_tokens_across_devices": "the loss is a mean over groups of responses, not over tokens",
    "use_liger_kernel": "it replaces the forward that the loss is computed in",
    "liger_kernel_config": "it belongs to use_liger_kernel, which replaces the forward that the loss is computed in",
    "use_cache": "training needs no cache, and sampling always has one",
    "train_sampling_strategy": "the order of steps follows from the seed",
    "length_column_name": "the order of steps follows from the seed",
    "data_seed": "the order of steps follows from seed",
    "remove_unused_columns": "the trainer makes its own batches, which have no columns",
    "logging_nan_inf_filter": "an infinite or NaN loss ends the run, so none is ever logged",
    "bf16_full_eval": "evaluations sample and score with the policy as it is trained; set dtype",
    "fp16_full_eval": "evaluations sample and score with the policy as it is trained; set dtype",
    "prediction_loss_only": _PREDICTIONS,
    "eval_accumulation_steps": _PREDICTIONS,
    "eval_do_concat_batches": _PREDICTIONS,
    "eval_use_gather_object": _PREDICTIONS,
    "include_for_metrics": _PREDICTIONS,
    "batch_eval_metrics": _PREDICTIONS,
    "save_on_each_node": "output_dir must be on a file system that all nodes see: responses are shared through it",
    "parallelism_config": "the loss needs whole sequences and heads; FSDP2 and DDP are chosen by fsdp and the launcher",
    "do_train": _SCRIPTS,
    "do_predict": _SCRIPTS,
    "resume_from_checkpoint": "use --resume on a command line, train(resume_from_checkpoint=...) in Python",
}


def _of_launcher(args: transformers.TrainingArguments) -> bool:
    return args.local_rank in (-1, int(os.environ.get("LOCAL_RANK", 0)))


def _low_rank_optimizer(args: transformers.TrainingArguments) -> bool:
    name = str(getattr(args.optim, "value", args.optim))
    return args.optim_target_modules is None or "galore" in name or "apollo" in name


# Settings of the first two tables that need others: the condition, and the reason to give if it does not hold.
CONDITIONAL: dict[str, tuple[Callable[[transformers.TrainingArguments], bool], str]] = {
    "do_eval": (lambda args: not args.do_eval or args.eval_strategy != "no", _SCRIPTS + "; set eval_strategy"),
    "eval_delay": (
        lambda args: not args.eval_delay or args.eval_strategy != "epoch",
        "with eval_strategy=epoch every iteration is evaluated, for its record; use eval_strategy=steps",
    ),
    "local_rank": (_of_launcher, "the launcher sets it, by the environment variable LOCAL_RANK"),
    "optim_target_modules": (_low_rank_optimizer, "only the galore and apollo optimizers use it"),
}


def check_inherited(args: transformers.TrainingArguments) -> None:
    """Raise if a setting that would be wrong here, or do nothing, has been changed.

    Raises:
        ValueError: there is one; the message names it, its value and the reason.
    """
    fields = {each.name: each for each in dataclasses.fields(transformers.TrainingArguments)}
    for name, why in REFUSED.items():
        if (field := fields.get(name)) is None:  # a field of another release
            continue
        factory: Any = field.default_factory
        default = factory() if field.default is dataclasses.MISSING else field.default
        default = {"remove_unused_columns": False}.get(name, default)
        if (value := getattr(args, name)) != default:
            raise ValueError(f"{name} must be {default!r}, got {value!r}: {why}")
    for name, (holds, why) in CONDITIONAL.items():
        if name in fields and not holds(args):
            raise ValueError(f"{name} must be {fields[name].default!r}, got {getattr(args, name)!r}: {why}")


def check_optimizer_arguments(args: Any, model: Any) -> None:
    """Raise if `optim_args` are given to an optimizer that ignores them.

    Raises:
        ValueError: the optimizer ignores `optim_args`, as torch's AdamW does.
    """
    if not args.optim_args or "layerwise" in args.optim.value:  # asking about a layerwise one would change the model
        return
    given = transformers.Trainer.get_optimizer_cls_and_kwargs(args, model)
    held, args.optim_args = args.optim_args, None
    try:
        plain = transformers.Trainer.get_optimizer_cls_and_kwargs(args, model)
    finally:
        args.optim_args = held
    if given == plain:
        raise ValueError(f"optim_args must be None for optim={args.optim.value!r}, which takes none, got {held!r}")
