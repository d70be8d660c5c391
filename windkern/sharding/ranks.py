"""The processes that share a head, and their collectives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group


class RanksError(RuntimeError):
    """Raised if a collective of a sharded head fails: a rank died, raised, or called another op or other sizes."""


class Ranks:
    """One process group; every method with a collective raises `RanksError` if that fails or takes too long.

    The timeout of the group bounds each wait.

    Args:
        group: name of the group, as in `windkern.shard.Cut`.
    """

    def __init__(self, group: str):
        try:
            self.group = _resolve_process_group(GroupName(group))
        except (RuntimeError, LookupError) as error:
            raise RanksError(
                f"weight is sharded over the process group {group!r}, which does not exist (any more); call "
                "windkern.sharding.vocab_parallel or streamed again after init_process_group"
            ) from error
        self.rank, self.size = self.group.rank(), self.group.size()

    @contextmanager
    def meeting(self, what: str) -> Iterator[None]:
        """Raise `RanksError` with the name of the collective if it fails inside."""
        try:
            yield
        except RuntimeError as error:
            raise RanksError(
                f"rank {self.rank} of the {self.size} ranks of the head could not {what}: another rank has died, has "
                "raised an error, or made a call with other rows, gradients or arguments; all ranks of the group must "
                "make the same calls (its timeout, an argument of init_process_group or new_group, bounds the wait): "
                f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
            ) from error

    def gathered(self, local: Tensor, what: str) -> Tensor:
        """Return the tensors of all ranks, (size, ...), in the order of ranks."""
        shape = self.size, *local.shape
        if local.numel() == 0:
            return local.new_empty(shape)
        parts = local.new_empty(shape)
        with self.meeting(what):
            dist.all_gather(list(parts.unbind(0)), local.contiguous(), group=self.group)
        return parts

    def begin_sum(self, values: Tensor, what: str) -> Callable[[], None]:
        """Begin to replace `values` by their sum over the ranks; the returned function waits for the end."""
        if values.numel() == 0:
            return _nothing
        with self.meeting(what):
            work = dist.all_reduce(values, group=self.group, async_op=True)
        return self._waiting(work, what)

    def begin_send(self, values: Tensor, owner: int, what: str) -> Callable[[], None]:
        """Begin to fill `values` with those of rank `owner` of the group; the returned function waits for the end."""
        with self.meeting(what):
            work = dist.broadcast(values, group=self.group, group_src=owner, async_op=True)
        return self._waiting(work, what)

    def begin_collect(self, values: Tensor, owner: int, what: str) -> Callable[[], None]:
        """Begin to replace `values` on rank `owner` by their sum over the ranks; the returned function waits."""
        with self.meeting(what):
            work = dist.reduce(values, group=self.group, group_dst=owner, async_op=True)
        return self._waiting(work, what)

    def _waiting(self, work: dist.Work, what: str) -> Callable[[], None]:
        def wait() -> None:
            with self.meeting(what):
                work.wait()

        return wait

    def largest(self, numbers: list[int], device: torch.device, what: str) -> list[int]:
        """Return the largest of each of `numbers` over the ranks."""
        values = torch.tensor(numbers, device=device)
        with self.meeting(what):
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return values.tolist()


def _nothing() -> None:
    pass
