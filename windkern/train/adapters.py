"""Put a new LoRA adapter on a model."""

from __future__ import annotations

from typing import Any

from torch import nn

_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def with_adapter(model: nn.Module, peft_config: Any, seed: int) -> nn.Module:
    """Return the model with a new adapter on top, initialised from the seed.

    Raises:
        ValueError: the model already has an adapter, which PEFT would replace.
    """
    from peft import get_peft_model
    from transformers import set_seed

    if held := getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False):
        names = ", ".join(held) if isinstance(held, dict) else "default"
        raise ValueError(
            f"peft_config makes a new adapter, but model already has one ({names}), which it would replace. To train "
            "that one further, leave peft_config out and load it by PeftModel.from_pretrained(base, folder, "
            "is_trainable=True); to start a new one on top, merge it first: PeftModel.from_pretrained(base, "
            "folder).merge_and_unload()"
        )
    set_seed(seed)  # the adapter starts at random; transformers seeds only later
    return get_peft_model(model, peft_config)


def starts_as_base(peft_config: Any) -> bool:
    """Return whether a model whose new adapter is switched off equals the model it was put on.

    PiSSA and similar methods subtract from the base what they put into the adapter.
    """
    start = getattr(peft_config, "init_lora_weights", True)
    return not (isinstance(start, str) and start.lower().startswith(_MOVES_BASE))
