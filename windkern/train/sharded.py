"""What FSDP2 by accelerate needs beside its settings."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn


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
