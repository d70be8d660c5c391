"""Pass slabs of a streamed head from their owners to all ranks, and their gradients back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from windkern.kernels import buffers
from windkern.sharding.ranks import Ranks

Slabs = list[tuple[int, int]]


def _pieces(ranks: Ranks, vocab_size: int, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield owner, first row and end of each part of rows `start` to `stop`, split like FSDP2 (torch.chunk)."""
    share = -(-vocab_size // ranks.size)
    while start < stop:
        end = min(stop, (start // share + 1) * share)
        yield start // share, start, end
        start = end


class PassedRows:
    """The rows of a head (V, H), read by ops slab by slab as `rows[start:stop]`, while the next slab is sent.

    All ranks must read the same slabs in the same order; a slab may be read several times before the next one. Each
    slab lies in one of two buffers, which the next slab but one overwrites.

    Args:
        local: (rows, H) of this rank.
        slabs: the slabs in the order in which they are read, in one pass or several.
        dtype: in which slabs are sent.
    """

    def __init__(self, local: Tensor, ranks: Ranks, vocab_size: int, slabs: Slabs, dtype: torch.dtype):
        self.local, self.ranks, self.slabs, self.dtype = local, ranks, slabs, dtype
        self.shape = torch.Size((vocab_size, local.shape[1]))
        self._buffers: list[Tensor | None] = [None, None]
        self._coming: tuple[int, list[Callable[[], None]]] = (-1, [])
        self._here = -1

    def __getitem__(self, rows: slice) -> Tensor:
        index = self._here
        if index < 0 or self.slabs[index] != (rows.start, rows.stop):
            index = index + 1 if index + 1 < len(self.slabs) else 0
            if self.slabs[index] != (rows.start, rows.stop):
                raise AssertionError(f"slab {index} is {self.slabs[index]}, but {rows.start} to {rows.stop} was read")
            if self._coming[0] != index:
                self._send(index)
            for wait in self._coming[1]:
                wait()
            self._here = index
            if index + 1 < len(self.slabs):
                self._send(index + 1)
        return self._buffer(index)[: rows.stop - rows.start]

    def _buffer(self, index: int) -> Tensor:
        buffer = self._buffers[index % 2]
        if buffer is None:
            shape = max(stop - start for start, stop in self.slabs), self.shape[1]
            buffer = self._buffers[index % 2] = buffers.empty("passed", shape, self.dtype, self.local.device)
        return buffer

    def _send(self, index: int) -> None:
        start, stop = self.slabs[index]
        share, waits = -(-self.shape[0] // self.ranks.size), []
        for owner, first, last in _pieces(self.ranks, self.shape[0], start, stop):
            place = self._buffer(index)[first - start : last - start]
            if owner == self.ranks.rank:
                place.copy_(self.local[first - owner * share : last - owner * share])
            waits.append(self.ranks.begin_send(place, owner, f"pass on rows {first} to {last} of the head"))
        self._coming = index, waits


class CollectedRows:
    """The gradient of a head (V, H), written by ops slab by slab; the owners receive the mean over the ranks.

    Args:
        local: (rows, H) the gradient of this rank's rows, filled or added to.
        width: most rows of a slab.
        dtype: in which the gradient is summed.
        accumulate: whether the gradient is added to `local`.
    """

    def __init__(
        self, local: Tensor, ranks: Ranks, vocab_size: int, width: int, dtype: torch.dtype, *, accumulate: bool
    ):
        self.local, self.ranks, self.vocab_size, self.accumulate = local, ranks, vocab_size, accumulate
        shape = min(width, vocab_size), local.shape[1]
        self._buffers = [buffers.empty("collected", shape, dtype, local.device) for _ in range(2)]
        self._going: list[list[Callable[[], None]]] = [[], []]
        self._turn = 0

    @contextmanager
    def rows(self, start: int, stop: int) -> Iterator[Tensor]:
        """Yield a buffer (stop - start, H) for this rank's gradient of these rows; it is sent when the context ends."""
        turn = self._turn = 1 - self._turn
        self._wait(turn)
        buffer = self._buffers[turn][: stop - start]
        yield buffer
        share, world = -(-self.vocab_size // self.ranks.size), self.ranks.size
        # Reason: a sum in float16 can overflow where the mean does not. FSDP2 divides first, too.
        before = buffer.dtype == torch.float16
        if before:
            buffer.div_(world)
        for owner, first, last in _pieces(self.ranks, self.vocab_size, start, stop):
            place = buffer[first - start : last - start]
            what = f"sum the gradient of rows {first} to {last} of the head"
            self._going[turn].append(self.ranks.begin_collect(place, owner, what))
            if owner == self.ranks.rank:
                mine = self.local[first - owner * share : last - owner * share]
                self._going[turn].append(self._taking(place, mine, 1 if before else world))

    def _taking(self, place: Tensor, mine: Tensor, divisor: int) -> Callable[[], None]:
        def take() -> None:
            if divisor > 1:
                place.div_(divisor)
            if self.accumulate:
                mine.add_(place)
            else:
                mine.copy_(place)

        return take

    def _wait(self, turn: int) -> None:
        for wait in self._going[turn]:
            wait()
        self._going[turn] = []

    def finish(self) -> None:
        """Wait until the gradient of this rank's rows is complete."""
        self._wait(1 - self._turn)
        self._wait(self._turn)
