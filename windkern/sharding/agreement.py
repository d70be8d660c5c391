"""Let the ranks of one head agree on the sizes they plan for, and check that their calls match."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from windkern.sharding.ranks import Ranks


def agreed(ranks: Ranks, device: torch.device, largest: list[int], equal: Mapping[str, int]) -> list[int]:
    """Return the largest of each number over the ranks, in one all-reduce.

    Args:
        largest: numbers to plan for, such as rows and groups.
        equal: numbers that must be equal on all ranks, by their names in the error.

    Raises:
        ValueError: on all ranks: a number that must be equal is not.
        RanksError: a rank does not take part.
    """
    numbers = [*largest, *equal.values(), *(-value for value in equal.values())]
    found = ranks.largest(numbers, device, "settle how to walk over the head")
    most, least = found[len(largest) : len(largest) + len(equal)], found[len(largest) + len(equal) :]
    pairs = zip(equal, most, least, strict=True)
    differ = [f"{name} ({-negative} and {high})" for name, high, negative in pairs if high != -negative]
    if differ:
        raise ValueError(
            "all ranks of a sharded head must make the same call, with the same options and the same wanted gradients "
            f"of the head; they differ in {', '.join(differ)}"
        )
    return found[: len(largest)]
