"""Turn off a model's dropout."""

from __future__ import annotations

from torch import nn

_DROPOUT = ("dropout", "pdrop", "layerdrop")


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of a model to 0, including those of its attention and its configuration."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # Reason: Starcoder2 and Bloom read the probability from the module, Falcon from the configuration.
        for owner in (module, getattr(module, "config", module)):
            for name, value in list(vars(owner).items()):
                if isinstance(value, float) and any(word in name for word in _DROPOUT):
                    setattr(owner, name, 0.0)
