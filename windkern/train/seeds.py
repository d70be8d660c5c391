"""One seed for each use of randomness."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def stream(seed: int, *labels: object) -> int:
    """Return a seed for one use of randomness.

    Every use (the responses of iteration 3, the order of its steps ...) has its own, so a resumed run draws what an
    uninterrupted one would have drawn, and no random-number state has to be saved.

    Example:
        >>> stream(0, "sample", 3) == stream(0, "sample", 3), stream(0, "sample", 3) == stream(0, "sample", 4)
        (True, False)
    """
    digest = hashlib.sha256("/".join(map(str, (seed, *labels))).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def generator(seed: int, *labels: object) -> torch.Generator:
    """Return a torch generator on the CPU for one use of randomness."""
    return torch.Generator().manual_seed(stream(seed, *labels))


def shuffled(count: int, seed: int, *labels: object) -> Tensor:
    """Return a (count,) permutation for one use of randomness."""
    return torch.randperm(count, generator=generator(seed, *labels))
