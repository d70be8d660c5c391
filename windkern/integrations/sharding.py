"""A head that a distributed engine has cut in pieces, whole again for one op."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from windkern._checks import check_tensor


@contextmanager
def gathered(weight: Tensor) -> Iterator[Tensor]:
    """Yield the whole head of a sharded parameter: FSDP2 and tensor-parallel DTensors, ZeRO-3, or a plain tensor.

    A DTensor is gathered differentiably: its gradient comes back in pieces, each the mean over the ranks, as FSDP2
    reduces those of the other parameters. Every rank must therefore run its backward. A ZeRO-3 parameter is whole only
    inside the block, so forward and backward must both run there; one that hooks of DeepSpeed have gathered already, as
    in the head's own forward, is left to them.

    Args:
        weight: (V, H) parameter or tensor, sharded or not.

    Returns:
        A context manager that yields a plain (V, H) tensor.

    Raises:
        TypeError: weight is no tensor.
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
    if hasattr(weight, "full_tensor"):
        from torch.distributed.tensor import Partial

        # Hazard: by default the gradient counts as equal on all ranks, and each would keep its piece of its own only.
        yield weight.full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim)
    elif hasattr(weight, "ds_id") and weight.shape != weight.ds_shape:
        try:
            from deepspeed.zero import GatheredParameters
        except ImportError as error:
            raise ImportError("weight is partitioned by ZeRO-3; install deepspeed: pip install deepspeed") from error
        with GatheredParameters([weight]):
            yield weight
    else:
        yield check_tensor("weight", weight)
