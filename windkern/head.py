"""A language-model head as one object: it turns hidden states into a distribution over the vocabulary."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from windkern.shard import Shard
from windkern.transform import LogitTransform


@dataclass(frozen=True, eq=False)
class Head:
    """Weight, bias and transform of the logits, accepted wherever an op takes `weight`.

        log p = log softmax(softcap * tanh(scale * z / softcap) / temperature),  z = sum_k hidden_k @ weight_k.T + bias
        without a softcap: log softmax(scale * z / temperature)

    Args:
        weight: (V, H) as in nn.Linear, or a tuple of blocks (V, H_k) whose logits add up; for a head that is sharded
            over processes, the result of `windkern.sharding.vocab_parallel` or `streamed`.
        bias: (V,) or None; an entry of -inf masks that vocabulary entry after any transform. Sharded like the weight.
        scale: multiplies the logits first (Cohere's `logit_scale`, `1 / logits_scaling` of Granite). Positive.
        softcap: bound of the logits before the temperature (Gemma's `final_logit_softcapping`), or None. Positive.
        temperature: divides last. Positive.

    Raises:
        TypeError, ValueError: `scale`, `softcap` or `temperature` is not a finite number greater than 0. Tensors are
            checked by the op that takes the head.

    Example:
        >>> import torch, windkern as wk
        >>> head = Head(torch.randn(11, 8), softcap=30.0).at_temperature(0.7)
        >>> wk.token_logps(torch.randn(4, 8), head, torch.tensor([1, 2, 3, 10])).logps.shape
        torch.Size([4])
    """

    weight: Tensor | Shard | tuple[Tensor, ...] | tuple[Shard, ...]
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        transform = self.transform
        for name in ("scale", "softcap", "temperature"):
            object.__setattr__(self, name, getattr(transform, name))

    @property
    def transform(self) -> LogitTransform:
        return LogitTransform(self.scale, self.softcap, self.temperature)

    def at_temperature(self, temperature: float) -> Head:
        """Return the same head with this temperature, whose log-probs are those of a sampler at the temperature."""
        return dataclasses.replace(self, temperature=temperature)
