"""Settle between the ranks of one head what they must do alike, and check what they must agree on."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from windkern.sharding.ranks import Ranks


def agreed(ranks: Ranks, device: torch.device, largest: list[int], equal: Mapping[str, int]) -> list[int]:
    """The largest of each number over the ranks, in one all-reduce.

    Args:
        largest: what ranks plan with: rows, groups.
        equal: what must be one number on all ranks, by the name that the error gives it.

    Raises:
        ValueError: on all ranks alike: a number that must be equal is not.
        RanksError: a rank does not come.
    """
    numbers = [*largest, *equal.values(), *(-value for value in equal.values())]
    found = ranks.largest(numbers, device, "settle how to walk over the head")
    most, least = found[len(largest) : len(largest) + len(equal)], found[len(largest) + len(equal) :]
    pairs = zip(equal, most, least, strict=True)
    differ = [f"{name} ({-negative} and {high})" for name, high, negative in pairs if high != -negative]
    if differ:
        raise ValueError(
            "all ranks that a head is cut over must make the same call, with the same options and the same gradients "
            f"wanted of the head; they differ in {', '.join(differ)}"
        )
    return found[: len(largest)]
