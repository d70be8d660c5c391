"""Thin modules around the functions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from windkern.losses import WindLoss
from windkern.ops.inputs import Blocks
from windkern.ops.logprobs import TokenLogps, token_logps

__all__ = ["FusedLogProbs", "WindLoss"]


class FusedLogProbs(nn.Module):
    """A language-model head that returns log-probs of targets instead of logits.

        forward(hidden, targets).logps == log_softmax(transform(hidden @ weight.T + bias))[targets]

    Args:
        weight: (V, H) tensor or parameter; a parameter is shared, not copied (tied embeddings stay tied).
        bias: (V,) tensor, parameter, or None.
        scale, softcap, temperature, ignore_index, entropy, memory_budget, batch_invariant, backend: see
            `windkern.token_logps`.

    Returns:
        `forward(hidden (..., T, H), targets (..., T), max_scored=None)` returns `TokenLogps`.

    Raises:
        TypeError, ValueError, BackendUnavailableError: as `windkern.token_logps`, when called.

    Memory:
        As `windkern.token_logps`.

    Source:
        `windkern.token_logps`.

    Example:
        >>> import torch
        >>> lm_head = nn.Linear(8, 11, bias=False)
        >>> head = FusedLogProbs(lm_head.weight)
        >>> head(torch.randn(2, 3, 8), torch.randint(0, 11, (2, 3))).logps.shape
        torch.Size([2, 3])
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        ignore_index: int = -100,
        entropy: bool = False,
        memory_budget: int | None = None,
        batch_invariant: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        for name, value in (("weight", weight), ("bias", bias)):
            if value is None or isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value)
        self.options: dict[str, Any] = {
            "scale": scale,
            "softcap": softcap,
            "temperature": temperature,
            "ignore_index": ignore_index,
            "entropy": entropy,
            "memory_budget": memory_budget,
            "batch_invariant": batch_invariant,
            "backend": backend,
        }

    def forward(self, hidden: Blocks, targets: Tensor, max_scored: int | None = None) -> TokenLogps:
        return token_logps(hidden, self.weight, targets, bias=self.bias, max_scored=max_scored, **self.options)

    def extra_repr(self) -> str:
        return f"vocab={self.weight.shape[0]}, hidden={self.weight.shape[1]}, " + ", ".join(
            f"{name}={value}" for name, value in self.options.items()
        )
