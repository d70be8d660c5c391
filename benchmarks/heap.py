"""Keep freed memory in the process while calls are timed, and give it back at once while memory is measured.

Hazard: some virtual machines hand free pages back to their host within seconds. A first touch then takes many times as
long, and how much of that a call meets depends on what ran before it. Remedy: `kept`.

Hazard: glibc does not reuse a freed block for an aligned one of the same size, which torch asks for, so a loop over
blocks of 16 MiB holds two or three. Remedy: `give_back`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from windkern.kernels.pages import in_huge_pages

# Options of glibc's mallopt, and the values that it starts with.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_DEFAULTS = {_TRIM_THRESHOLD: 128 << 10, _MMAP_MAX: 65536}
_KEEPING = {_TRIM_THRESHOLD: -1, _MMAP_MAX: 0}  # -1: never


def can_keep() -> bool:
    """Return whether the C library is one that can be told to keep freed memory."""
    return hasattr(ctypes.CDLL(None), "mallopt")


def trim() -> None:
    """Return freed memory to the system."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def give_back() -> None:
    """Let freed blocks of 1 MiB and more go back to the system from now on, so that what is resident is in use."""
    if can_keep():
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 20)


@contextmanager
def kept(peak_bytes: int) -> Iterator[None]:
    """Keep what is freed inside, after a first touch of memory for calls with the given peak.

    A quarter more than the peak is touched, for gaps between blocks. Where the C library cannot do it, nothing changes.
    The memory is in huge pages if the system gives them, for all calls alike. (windkern asks for them by itself.)
    """
    if not can_keep():
        yield
        return
    libc = ctypes.CDLL(None)
    for option, value in _KEEPING.items():
        libc.mallopt(option, value)
    try:
        in_huge_pages(torch.empty(peak_bytes * 5 // 4, dtype=torch.uint8)).fill_(0)
        yield
    finally:
        for option, value in _DEFAULTS.items():
            libc.mallopt(option, value)
        trim()
