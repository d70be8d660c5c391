"""Prepare models and plugins for FSDP2 by accelerate and for DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch import nn
from transformers import TrainingArguments

from windkern.hf.tensor_parallel import is_cut


class HeadUnit(nn.Linear):
    """An untied head whose class name makes accelerate wrap it as a separate FSDP2 unit.

    Reason: accelerate wraps classes by their names, and would put a head into one unit with the last norm, whose call
    gathers the head, too.
    """


def _name_units(plugin: FullyShardedDataParallelPlugin, model: Any) -> None:
    """Make accelerate wrap a model's head separately, if it is plain and untied, and layers are wrapped by name."""
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    given = plugin.transformer_cls_names_to_wrap
    names = [name for name in given or getattr(model, "_no_split_modules", None) or () if name != HeadUnit.__name__]
    plain = type(head) in (nn.Linear, HeadUnit) and getattr(embedding, "weight", None) is not head.weight
    if plain and _wrapped_by(plugin) is transformer_auto_wrap_policy:
        head.__class__ = HeadUnit
        plugin.transformer_cls_names_to_wrap = [*names, HeadUnit.__name__]
    elif given:
        plugin.transformer_cls_names_to_wrap = names


def _wrapped_by(plugin: FullyShardedDataParallelPlugin) -> object:
    return getattr(plugin.auto_wrap_policy, "func", plugin.auto_wrap_policy)


def prepare_plugin(accelerator: Accelerator, model: nn.Module) -> None:
    """Make an FSDP2 plugin wrap the head separately, leave results in float32 and save whole weights.

    Reason: with bf16, accelerate would round the returned loss and log-probs, and the sums of gradients between
    processes, to bfloat16.

    Raises:
        ValueError: the plugin is FSDP1, or saves sharded weights, from which no model could be loaded.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(f"fsdp_config.version must be 2 for this trainer, got {plugin.fsdp_version}")
    if "FULL" not in str(plugin.state_dict_type):
        raise ValueError(
            f"fsdp_config.state_dict_type must be FULL_STATE_DICT, got {plugin.state_dict_type}: no model "
            "can be loaded from sharded weights"
        )
    if accelerator.mixed_precision != "no":
        from torch.distributed.fsdp import MixedPrecisionPolicy

        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[accelerator.mixed_precision]
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    _name_units(plugin, model)


def shard_frozen(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """Return a frozen model sharded as the policy is, so that every process holds only its share."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = accelerator.state.fsdp_plugin
    names = plugin.transformer_cls_names_to_wrap
    _name_units(plugin, model)
    try:
        return fsdp2_prepare_model(accelerator, model)
    finally:
        plugin.transformer_cls_names_to_wrap = names


@contextmanager
def whole_models(config: TrainingArguments) -> Iterator[None]:
    """Make transformers load whole models inside, where with ZeRO-3 it would partition them while it loads.

    Reason: only a DeepSpeed engine gathers the partitions for a forward. The policy gets its engine when training
    begins, after its head was checked; the reference and a reward model get none.

    Args:
        config: settings of the run; without DeepSpeed nothing changes.
    """
    plugin = config.deepspeed_plugin
    if plugin is None:
        yield
        return
    from transformers.integrations import deepspeed

    held = getattr(config, "hf_deepspeed_config", None) or plugin.dschf
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed.set_hf_deepspeed_config(held)


def check_whole(model: nn.Module) -> None:
    """Raise if ZeRO-3 has partitioned a model that no engine gathers, or tensor parallelism has split it.

    Raises:
        ValueError: the model is not whole.
    """
    for name, value in model.named_parameters():
        if is_cut(value):
            raise ValueError(
                f"model must be whole, but tensor parallelism has split its parameter {name} over processes, each "
                "of which gets its own prompts here; load it without tp_plan and train under FSDP2, or score it in "
                "your own loop with windkern.hf.sequence_logps"
            )
        if hasattr(value, "ds_id") and value.shape != getattr(value, "ds_shape", None):
            raise ValueError(
                f"model must be whole, but DeepSpeed ZeRO-3 has partitioned its parameter {name}; load policy and "
                "reference inside windkern.train.sharded.whole_models(args)"
            )
