"""Gather a head that a distributed engine has sharded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar, cast

from torch import Tensor

from windkern._checks import check_tensor
from windkern.head import Head

Whole = TypeVar("Whole", Tensor, Head)


def gathered_mean(dtensor: Any) -> Tensor:
    """Return the whole of a DTensor; its gradient comes back sharded, as the mean over the ranks."""
    from torch.distributed.tensor import Partial

    # Hazard: by default the gradient counts as equal on all ranks, so each would only keep a part of its own gradient.
    return dtensor.full_tensor(grad_placements=[Partial("avg")] * dtensor.device_mesh.ndim)


@contextmanager
def gathered(weight: Whole) -> Iterator[Whole]:
    """Yield the whole head of a sharded parameter: FSDP2 and tensor-parallel DTensors, ZeRO-3, or a plain tensor.

    A DTensor is gathered differentiably: its gradient comes back sharded, as the mean over the ranks, as FSDP2 reduces
    those of the other parameters. Every rank must therefore run its backward. A ZeRO-3 parameter is whole only inside
    the block, so forward and backward must both run there; if hooks of DeepSpeed have gathered it already, as in the
    head's own forward, it is left to them.

    Args:
        weight: (V, H) parameter or tensor, sharded or not; or a `windkern.Head` of such tensors.

    Returns:
        A context manager that yields a plain (V, H) tensor, or the head with plain tensors.

    Raises:
        TypeError: weight is neither a tensor nor a head.
        ImportError: the parameter is partitioned by ZeRO-3 and deepspeed cannot be imported.

    Memory:
        The whole head, V * H elements, on every rank.

    Source:
        torch.distributed.tensor.DTensor.full_tensor; deepspeed.zero.GatheredParameters.

    Example:
        >>> import torch
        >>> with gathered(torch.ones(5, 2)) as weight:
        ...     weight.shape
        torch.Size([5, 2])
    """
    if isinstance(weight, Head):
        with ExitStack() as stack:
            blocks = weight.weight if isinstance(weight.weight, tuple) else (weight.weight,)
            whole: list[Any] = [stack.enter_context(gathered(cast(Tensor, block))) for block in blocks]
            bias = None if weight.bias is None else stack.enter_context(gathered(weight.bias))
            single = isinstance(weight.weight, Tensor)
            yield dataclasses.replace(weight, weight=whole[0] if single else tuple(whole), bias=bias)
    elif hasattr(weight, "full_tensor"):
        yield gathered_mean(weight)
    elif hasattr(weight, "ds_id") and weight.shape != getattr(weight, "ds_shape", None):
        try:
            from deepspeed.zero import GatheredParameters
        except ImportError as error:
            raise ImportError("weight is partitioned by ZeRO-3; install deepspeed: pip install deepspeed") from error
        with GatheredParameters([weight]):
            yield weight
    else:
        yield check_tensor("weight", weight)
