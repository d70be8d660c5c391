"""Split a list of items over the processes of a run, and gather all results on each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from windkern.train.errors import AnotherProcessError

Item = TypeVar("Item")
Result = TypeVar("Result")


class World:
    """The processes of an Accelerator.

    Example:
        >>> World(Accelerator(cpu=True)).share([1, 2, 3], lambda item: item * item)
        [1, 4, 9]
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.rank, self.size = accelerator.process_index, accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def agree(self, value: Item) -> Item:
        """Return the first process's value on all of them."""
        if self.size == 1:
            return value
        held = [value]
        broadcast_object_list(held)
        return held[0]

    def first(self, work: Callable[[], Result]) -> Result:
        """Do `work` on the first process and return its result on all of them. If it fails, all raise.

        Raises:
            AnotherProcessError: on the other processes, if it failed on the first.
        """
        result, error = None, None
        if self.is_main:
            try:
                result = work()
            except Exception as caught:
                error = caught
        failed, result = self.agree((error is not None, result))
        if error is not None:
            raise error
        if failed:
            raise AnotherProcessError("the first process has failed")
        return result

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the mean of each value over the processes, which must all pass the same names."""
        if self.size == 1 or not values:
            return dict(values)
        given = torch.tensor(list(values.values()), device=self.accelerator.device)
        return dict(zip(values, self.accelerator.reduce(given, "mean").tolist(), strict=True))

    def share(
        self,
        items: Sequence[Item],
        work: Callable[[Item], Result],
        *,
        together: bool = False,
        done: Callable[[Sequence[Item]], None] = lambda items: None,
    ) -> list[Result]:
        """Do `work` for each item on one of the processes, and return all results, in order, on every process.

        Args:
            items: the same on every process.
            work: called with items k with k % size == rank; its results are pickled between processes.
            together: every process calls `work` equally often (with the last item again if there are too few),
                because the calls communicate, as the forwards of a sharded model do.
            done: called after each item of this process with the items that all processes take in that round.

        Raises:
            AnotherProcessError: `work` failed on another process, which raises its own error. (With `together` that
                process raises at once; the others wait inside their calls until its end breaks the connection.)
        """
        rounds = -(-len(items) // self.size)
        found: list[tuple[int, Result]] = []
        error: Exception | None = None
        for turn in range(rounds):
            place = turn * self.size + self.rank
            try:
                if place < len(items):
                    found.append((place, work(items[place])))
                    done(items[turn * self.size : (turn + 1) * self.size])
                elif together:
                    work(items[-1])
            except Exception as caught:
                if together or self.size == 1:
                    raise
                error = caught
                break
        if self.size > 1:
            parts = gather_object([(error is not None, found)])  # one from every process
            if error is not None:
                raise error
            if any(failed for failed, _ in parts):
                raise AnotherProcessError("another process has failed")
            found = [entry for _, part in parts for entry in part]
        return [result for _, result in sorted(found, key=lambda entry: entry[0])]
