"""What a new LoRA adapter does to a model."""

from __future__ import annotations

from torch import nn

_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def with_adapter(model: nn.Module, peft_config, seed: int) -> nn.Module:
    """A model with a new adapter on top, which starts as the seed says.

    Raises:
        ValueError: the model has an adapter already; PEFT would put the new one in its place.
    """
    from peft import get_peft_model
    from transformers import set_seed

    if held := getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False):
        names = ", ".join(held) if isinstance(held, dict) else "default"
        raise ValueError(
            f"peft_config makes a new adapter, but model has one ({names}), which it would take the place of. To train "
            "that one further, leave peft_config out and load it by PeftModel.from_pretrained(base, folder, "
            "is_trainable=True); to start a new one on top, merge it first: PeftModel.from_pretrained(base, "
            "folder).merge_and_unload()"
        )
    set_seed(seed)  # the adapter starts at random; transformers seeds only later
    return get_peft_model(model, peft_config)


def starts_as_base(peft_config) -> bool:
    """Whether a model with a new adapter, switched off, is the model it was put on.

    PiSSA and its like take from the base what they put into the adapter.
    """
    start = getattr(peft_config, "init_lora_weights", True)
    return not (isinstance(start, str) and start.lower().startswith(_MOVES_BASE))
