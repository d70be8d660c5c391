"""Huge pages for large blocks on a CPU.

A new block of memory has no pages yet: the first write to each page costs a page fault, and with pages of 4 KiB the
faults take three times as long as the writing. Linux gives pages of 2 MiB to a program that asks for them if it is set
to "madvise", which is the default of most distributions.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

from torch import Tensor

_PAGE = 2 << 20
_LEAST = 4 * _PAGE  # smaller blocks contain few whole pages
_MADV_HUGEPAGE = 14


@functools.cache
def _advise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):  # a libc without madvise
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def in_huge_pages(tensor: Tensor) -> Tensor:
    """Ask for huge pages inside `tensor` (contiguous, not yet written), and return it.

    Only whole pages of 2 MiB inside the tensor are huge, so no more memory becomes resident. If the operating system
    refuses, nothing changes.
    """
    if not tensor.is_cpu or (size := tensor.nbytes) < _LEAST:
        return tensor
    advise = _advise()
    if advise is not None:
        first = -(-tensor.data_ptr() // _PAGE) * _PAGE
        stop = (tensor.data_ptr() + size) // _PAGE * _PAGE
        advise(first, stop - first, _MADV_HUGEPAGE)
    return tensor
