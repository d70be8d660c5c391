"""float32 master weights for models that compute in bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MasterWeights:
    """float32 copies of a model's trainable parameters, for a torch optimizer to step.

    A bfloat16 weight cannot take steps smaller than 1/256 of itself, which is most steps of a fine-tune; its float32
    copy can. Gradients are added up in float32 over micro-batches. Parameters that are float32 already are their own
    copy.

    Args:
        model: its parameters with requires_grad are trained; a tied one counts once.
        max_grad_norm: gradients are scaled down to this norm, all parameters together.

    Raises:
        ValueError: nothing in the model is trainable.

    Memory:
        4 bytes a parameter for the copy and 4 for its gradient, beside the optimizer's own.
    """

    def __init__(self, model: nn.Module, *, max_grad_norm: float):
        self._working = {name: value for name, value in model.named_parameters() if value.requires_grad}
        if not self._working:
            raise ValueError("model has no parameter that requires grad; nothing would be trained")
        self.weights = {
            name: value if value.dtype == torch.float32 else nn.Parameter(value.detach().float())
            for name, value in self._working.items()
        }
        self.max_grad_norm = max_grad_norm

    def parameters(self) -> list[Tensor]:
        """The float32 tensors an optimizer is made for."""
        return list(self.weights.values())

    @torch.no_grad()
    def collect(self) -> None:
        """Add the model's gradients to the copies' and free them."""
        for name, value in self._working.items():
            master = self.weights[name]
            if value.grad is None or master is value:
                continue
            if master.grad is None:
                master.grad = value.grad.float()
            else:
                master.grad += value.grad
            value.grad = None

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> float:
        """One optimizer step with the gradients collected so far; returns their norm before scaling."""
        norm = nn.utils.clip_grad_norm_(self.parameters(), self.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.publish()
        return float(norm)

    @torch.no_grad()
    def publish(self) -> None:
        """Round the copies into the model."""
        for name, value in self._working.items():
            if self.weights[name] is not value:
                value.copy_(self.weights[name])

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Take the copies from a checkpoint and round them into the model.

        Raises:
            ValueError: names or shapes are not those of this model.
        """
        if set(weights) != set(self.weights):
            raise ValueError(f"checkpoint has other parameters: {sorted(set(weights) ^ set(self.weights))[:3]} ...")
        for name, master in self.weights.items():
            if weights[name].shape != master.shape:
                raise ValueError(
                    f"checkpoint has {name} of shape {tuple(weights[name].shape)}, the model {tuple(master.shape)}"
                )
            master.copy_(weights[name])
        self.publish()
