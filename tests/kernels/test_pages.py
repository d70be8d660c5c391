"""Huge pages are requested inside large blocks on a CPU, and nowhere else."""

import sys

import pytest
import torch

from windkern.kernels import buffers, pages

MIB = 1 << 20


@pytest.fixture
def asked(monkeypatch):
    """The arguments of calls of madvise."""
    calls = []
    monkeypatch.setattr(pages, "_advise", lambda: lambda *arguments: calls.append(arguments))
    return calls


@pytest.mark.parametrize("make", [buffers.empty, buffers.zeros])
@pytest.mark.parametrize("extra", [0, 1000])
def test_whole_pages_inside_are_asked_for(asked, make, extra):
    tensor = make("kept", (9 * MIB + extra,), torch.uint8, "cpu")
    ((first, size, advice),) = asked
    assert advice == 14  # MADV_HUGEPAGE of Linux's mman.h
    assert first % (2 * MIB) == size % (2 * MIB) == 0 and size >= 6 * MIB
    assert tensor.data_ptr() <= first and first + size <= tensor.data_ptr() + tensor.nbytes
    if make is buffers.zeros:
        assert not tensor.any()


def test_small_and_foreign_blocks_are_left_alone(asked):
    buffers.empty("kept", (MIB,), torch.uint8, "cpu")
    pages.in_huge_pages(torch.empty(100 * MIB, dtype=torch.uint8, device="meta"))
    assert asked == []


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_the_kernel_takes_the_advice():
    advise = pages._advise()
    tensor = torch.empty(16 * MIB, dtype=torch.uint8)
    inside = -(-tensor.data_ptr() // (2 * MIB)) * 2 * MIB
    assert advise is not None and advise(inside, 2 * MIB, 14) in (0, -1)  # -1: a kernel without huge pages
    assert advise(inside + 1, 2 * MIB, 14) == -1  # no page starts there
