"""Merge the online-softmax statistics of a head whose vocabulary is sharded over ranks with the same rows."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor

from windkern.kernels import buffers
from windkern.kernels.contract import RowState
from windkern.sharding.ranks import Ranks

# Rows per gather, which bounds the memory of a merge.
_ROWS_AT_ONCE = 1 << 15


def merged(state: RowState, ranks: Ranks) -> RowState:
    """Merge the statistics (M,) of each rank's part into those of the whole vocabulary, the same bits on every rank.

        run_max = max_r m_r        run_sum = sum_r s_r exp(m_r - run_max)        target_logit = max_r t_r
        entropy_sum = sum_r exp(m_r - run_max) (e_r + s_r (m_r - run_max))

    This takes one gather of three numbers per row and rank, four with the entropy. Reason: an all-reduce adds in an
    order that depends on the position of a row, which batch_invariant forbids, and the maximum would have to be reduced
    before the sums. The gradient of the hidden states has hundreds of times these bytes.
    """
    total = _each(torch.empty_like, state)
    for first in range(0, state.run_max.shape[0], _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        own = torch.stack([part[rows] for part in state if part is not None])
        parts = buffers.track("rows", ranks.gathered(own, "merge log-sums of the vocabulary"))
        _merge(parts, _each(operator.itemgetter(rows), total))
    return total


def _each(change: Callable[[Tensor], Tensor], state: RowState) -> RowState:
    entropy_sum = None if state.entropy_sum is None else change(state.entropy_sum)
    return RowState(change(state.run_max), change(state.run_sum), change(state.target_logit), entropy_sum)


def _merge(parts: Tensor, total: RowState) -> None:
    """Write the merged statistics of parts (ranks, 3 or 4, m), in the order of RowState, to `total`."""
    maxima, sums, target_logits = parts[:, 0], parts[:, 1], parts[:, 2]
    torch.amax(maxima, 0, out=total.run_max)
    torch.amax(target_logits, 0, out=total.target_logit)
    total.run_sum.zero_()
    if total.entropy_sum is not None:
        total.entropy_sum.zero_()
    for rank, (maximum, summed) in enumerate(zip(maxima, sums, strict=True)):
        # Hazard: -inf - (-inf) is NaN where all entries of a rank are masked. Remedy: it adds exactly 0.
        gap = torch.where(maximum == -torch.inf, 0.0, maximum - total.run_max)
        factor = torch.where(maximum == -torch.inf, 0.0, torch.exp(gap))
        if total.entropy_sum is not None:
            total.entropy_sum.add_(factor * (parts[rank, 3] + summed * gap))
        total.run_sum.add_(factor * summed)
