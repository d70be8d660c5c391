"""A moving average of a model's trained weights: the anchor of J-BOND."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from windkern._checks import check_number


def anchor_file(rank: int, size: int) -> str:
    """Return the name of a process's part of the anchor in a checkpoint."""
    return f"anchor-{rank}-of-{size}.pt"


class Anchor:
    """Exponential moving average of a model's trainable parameters, swapped into the model on demand.

    Formula: a <- (1 - rate) a + rate theta at each `update`, from a = theta when the object is made.

    The average is kept in float32 (float64 for float64 parameters): with a rate of 0.02 most of its steps are too
    small for bfloat16. Frozen parameters and buffers are shared with the model, so with LoRA only adapters are
    copied. Sharded parameters (DTensor) are averaged shard by shard, without communication.

    Args:
        model: its parameters with requires_grad are averaged; a tied one counts once. Pass the model after sharding it
            (FSDP2) and without a wrapper that renames parameters (DDP).
        rate: share of the new weights in an update, in (0, 1].

    Raises:
        ValueError: nothing in the model is trainable, a parameter has no elements here (DeepSpeed ZeRO-3 partitions
            it), or `rate` is out of range.

    Memory:
        4 bytes per trainable parameter, and inside `in_place` a copy of these parameters in their own dtype.

    Source:
        Sessa et al. 2024 (arXiv 2407.14622), J-BOND.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = model.weight.data.fill_(0.0)
        >>> anchor = Anchor(model, rate=0.25)
        >>> _ = model.weight.data.fill_(1.0)  # an optimizer step
        >>> anchor.update()
        >>> with anchor.in_place():
        ...     print(model.weight.item())
        0.25
        >>> model.weight.item()
        1.0
    """

    def __init__(self, model: nn.Module, rate: float):
        self.rate = check_number("rate", rate, above=0)
        if rate > 1:
            raise ValueError(f"rate must be at most 1, got {rate!r}")
        self._model = model
        _reshard(model)
        self._parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        if not self._parameters:
            raise ValueError("model has no parameter that requires grad; its average would never move")
        for name, value in self._parameters.items():
            if value.numel() == 0:
                raise ValueError(
                    f"parameter {name} has no elements, as DeepSpeed ZeRO-3 leaves it on a rank; the average "
                    "needs weights that can be read: use ZeRO-1, ZeRO-2 or FSDP2"
                )
        self._average = {
            name: value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True)
            for name, value in self._parameters.items()
        }
        self._swapped = False

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights the model has now.

        Raises:
            RuntimeError: inside `in_place`, where the model's weights are the average's own.
        """
        self._refuse_if_swapped("update")
        for name, average in self._average.items():
            # Reason: in this form an average that equals the weights stays exactly as it is.
            average.add_(self._parameters[name].detach().to(average.dtype) - average, alpha=self.rate)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the model the average's weights, rounded to its dtype, and restore its own afterwards, bit for bit.

        They are restored after an exception, too. Do not enter or leave between a forward pass and its backward pass:
        autograd raises, because the weights have changed.

        Raises:
            RuntimeError: already inside `in_place`.
        """
        self._refuse_if_swapped("in_place")
        own = {name: value.detach().clone() for name, value in self._parameters.items()}
        self._swapped = True
        try:
            self._put(self._average)
            yield
        finally:
            self._put(own)
            self._swapped = False

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average by parameter name. The tensors are the average's own, not copies."""
        return dict(self._average)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load the average from a checkpoint. The model's own weights do not change.

        Raises:
            ValueError: names or shapes are not those of the model's trainable parameters. Nothing is loaded then.
            RuntimeError: inside `in_place`.
        """
        self._refuse_if_swapped("load_state_dict")
        missing, unknown = sorted(self._average.keys() - state.keys()), sorted(state.keys() - self._average.keys())
        if missing or unknown:
            raise ValueError(
                f"state must hold the model's {len(self._average)} trainable parameters: {len(missing)} missing "
                f"{missing[:3]}, {len(unknown)} unknown {unknown[:3]}"
            )
        for name, average in self._average.items():
            if state[name].shape != average.shape:
                raise ValueError(
                    f"state[{name!r}] must have shape {tuple(average.shape)}, got {tuple(state[name].shape)}"
                )
        for name, average in self._average.items():
            average.copy_(state[name])

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, value in self._parameters.items():
            value.detach().copy_(weights[name])
        _reshard(self._model)

    def _refuse_if_swapped(self, what: str) -> None:
        if self._swapped:
            raise RuntimeError(f"{what} inside in_place: the model holds the average's weights there, not its own")


def _reshard(model: nn.Module) -> None:
    """Free the weights that FSDP2 has gathered.

    Hazard: FSDP2 keeps the outermost weights of a forward pass until a backward pass, which evaluation never runs; the
    next forward would use the old values. Remedy: free them wherever the shards are read or written.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
