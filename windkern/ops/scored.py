"""Find the scored rows."""

from __future__ import annotations

import functools

from torch import Tensor

from windkern import backends

# Reason: one block of threads goes down the targets, which takes longer than torch's kernels for more of them.
_MOST_FOR_ONE_BLOCK = 1 << 15


def scored_positions(targets: Tensor, ignore_index: int) -> Tensor | None:
    """Return the positions (M,) of targets (R,) other than `ignore_index`, or None if all are scored.

    A GPU is waited for once. Reason: its host waits with nothing queued, so each launch before that is paid for, and
    torch takes six.
    """
    if targets.is_cuda and 0 < targets.shape[0] <= _MOST_FOR_ONE_BLOCK and _cuda_runs_on(targets.get_device()):
        return backends.BACKENDS["cuda"].kernels().find_scored(targets, ignore_index)
    found = (targets != ignore_index).nonzero().squeeze(1)
    return found if found.numel() < targets.numel() else None


@functools.cache
def _cuda_runs_on(index: int) -> bool:
    return backends.why_not("cuda", f"cuda:{index}") is None
