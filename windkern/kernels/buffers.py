"""Allocate the buffers of a walk over the vocabulary, so that their sizes can be recorded."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from windkern.kernels.pages import in_huge_pages


@dataclass
class Recording:
    """Live and peak bytes, the largest single buffer, and products with their FLOPs, of one recorded region."""

    live_bytes: int = 0
    peak_bytes: int = 0
    largest: int = 0
    flops: int = 0
    products: int = 0
    by_name: dict[str, int] = field(default_factory=dict)

    def grow(self, name: str, num_bytes: int) -> None:
        self.live_bytes += num_bytes
        self.largest = max(self.largest, num_bytes)
        self.by_name[name] = max(self.by_name.get(name, 0), num_bytes)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def shrink(self, num_bytes: int) -> None:
        self.live_bytes -= num_bytes


_recordings: list[Recording] = []


@contextmanager
def recording() -> Iterator[Recording]:
    """Record the buffers and FLOPs of everything that runs inside, on any device.

    Example:
        >>> with recording() as record:
        ...     scratch = empty("slab", (4, 8), torch.float32, "cpu")
        >>> record.peak_bytes
        128
    """
    record = Recording()
    _recordings.append(record)
    try:
        yield record
    finally:
        _recordings.remove(record)


def track(name: str, tensor: Tensor) -> Tensor:
    """Count a tensor that another library allocated for us until it is freed."""
    if _recordings:
        num_bytes = tensor.numel() * tensor.element_size()
        for record in _recordings:
            record.grow(name, num_bytes)
            weakref.finalize(tensor, record.shrink, num_bytes)
    return tensor


def add_flops(flops: int) -> None:
    for record in _recordings:
        record.flops += flops
        record.products += 1


def empty(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    return track(name, in_huge_pages(torch.empty(shape, dtype=dtype, device=device)))


def zeros(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    return empty(name, shape, dtype, device).zero_()


def lowest(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Return a small buffer of -inf."""
    return track(name, torch.full(shape, -torch.inf, dtype=dtype, device=device))
