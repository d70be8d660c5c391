"""Write a policy's weights to a folder that a server can read: an adapter, or a whole model."""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from windkern.train.models import sync_files


def is_adapter(model: nn.Module) -> bool:
    """Return whether a model is a PEFT model, so that a server needs only its adapter."""
    return hasattr(model, "peft_config")


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that a server needs, on the CPU: those of the adapter, or all weights.

    Every process of a sharded model must call this.

    Raises:
        ValueError: DeepSpeed ZeRO-3 has partitioned the model, or several adapters are active.
    """
    if any(hasattr(value, "ds_id") for value in model.parameters()):
        raise ValueError(
            "a server cannot follow a policy that DeepSpeed ZeRO-3 has partitioned; use ZeRO-2 or FSDP2, or "
            "sampler: transformers"
        )
    if is_adapter(model):
        from peft import get_peft_model_state_dict

        found = get_peft_model_state_dict(model, adapter_name=_active(model), save_embedding_layers=False)
    else:
        found = model.state_dict()
    return {name: _whole(value) for name, value in found.items()}


def _active(model: Any) -> str:
    active = model.active_adapters
    if len(active) != 1:
        raise ValueError(f"a server takes one adapter, but the policy has {len(active)} active: {', '.join(active)}")
    return active[0]


def _whole(value: Tensor) -> Tensor:
    full = value.full_tensor() if hasattr(value, "full_tensor") else value
    return full.detach().cpu().contiguous()


def digest_of(state: Mapping[str, Tensor]) -> str:
    """Return a digest of names, dtypes, shapes and bytes of tensors.

    Example:
        >>> digest_of({"a": torch.zeros(2)}) == digest_of({"a": torch.zeros(2)}) != digest_of({"a": torch.ones(2)})
        True
    """
    found = hashlib.blake2b(digest_size=6)
    for name in sorted(state):
        value = state[name]
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def write(model: Any, state: dict[str, Tensor], folder: Path) -> None:
    """Write a model's weights to a folder, which gets its name once it is complete.

    Args:
        model: its configuration is written as well.
        state: from `state_of`.
        folder: replaced if it exists.

    Raises:
        OSError: it cannot be written.
    """
    scratch = folder.with_name(f".{folder.name}.part")
    for old in (scratch, folder):
        shutil.rmtree(old, ignore_errors=True)
    scratch.mkdir(parents=True)
    if is_adapter(model):
        config = copy.deepcopy(model.peft_config[_active(model)])
        config.inference_mode = True
        config.save_pretrained(scratch)
        save_file(state, scratch / "adapter_model.safetensors", metadata={"format": "pt"})
    else:
        model.save_pretrained(scratch, state_dict=state)
    sync_files(scratch)
    scratch.rename(folder)
