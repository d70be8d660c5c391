"""What FSDP2 by accelerate, and DeepSpeed, need beside their settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import nn
from transformers import TrainingArguments


def prepare_plugin(accelerator: Accelerator) -> None:
    """Let an FSDP2 plugin leave results in float32 and save whole weights.

    Reason: with bf16, accelerate would round the returned loss and log-probs, and the sums of gradients between
    processes, to bfloat16.

    Raises:
        ValueError: it is FSDP1, or saves sharded weights, of which no model could be loaded.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(f"fsdp_config.version must be 2 for this trainer, got {plugin.fsdp_version}")
    if "FULL" not in str(plugin.state_dict_type):
        raise ValueError(
            f"fsdp_config.state_dict_type must be FULL_STATE_DICT, got {plugin.state_dict_type}: sharded weights are "
            "no model that could be loaded"
        )
    if accelerator.mixed_precision != "no":
        from torch.distributed.fsdp import MixedPrecisionPolicy

        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[accelerator.mixed_precision]
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)


def shard_frozen(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """A frozen model cut in pieces as the policy is, so that every process holds its share only."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    return fsdp2_prepare_model(accelerator, model)


@contextmanager
def whole_models(config: TrainingArguments) -> Iterator[None]:
    """Inside, transformers loads models whole, where with ZeRO-3 it would cut them in pieces while it loads.

    Reason: only a DeepSpeed engine puts the pieces together for a forward. The policy gets its engine when training
    begins, after its head was checked; the reference and a reward model get none.

    Args:
        config: of the run; without DeepSpeed nothing happens.
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
    """Raise if ZeRO-3 has cut a model in pieces that no engine puts together.

    Raises:
        ValueError: it has.
    """
    for name, value in model.named_parameters():
        if hasattr(value, "ds_id") and value.shape != value.ds_shape:
            raise ValueError(
                f"model must be whole, but DeepSpeed ZeRO-3 has cut its parameter {name} in pieces; load policy and "
                "reference inside windkern.train.sharded.whole_models(args)"
            )
