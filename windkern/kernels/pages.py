"""Huge pages for large blocks on a CPU.

A new block of memory comes without pages: the first write to each costs a page fault, and for pages of 4 KiB those
faults take three times as long as the writing. Linux gives pages of 2 MiB to who asks for them, where it is set to
"madvise" as most distributions set it.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

from torch import Tensor

_PAGE = 2 << 20
_LEAST = 4 * _PAGE  # below, few whole pages lie inside
_MADV_HUGEPAGE = 14


@functools.cache
def _advise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):  # a libc without it
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def in_huge_pages(tensor: Tensor) -> Tensor:
    """`tensor` (contiguous), of which the whole pages of 2 MiB inside, if not touched yet, will be huge ones.

    Nothing else lies in those pages, so that no more memory is resident. A refusal of the kernel changes nothing.
    """
    size = tensor.nbytes
    if size < _LEAST or tensor.device.type != "cpu":
        return tensor
    advise = _advise()
    if advise is not None:
        first = -(-tensor.data_ptr() // _PAGE) * _PAGE
        stop = (tensor.data_ptr() + size) // _PAGE * _PAGE
        advise(first, stop - first, _MADV_HUGEPAGE)
    return tensor
