"""What a back end's row kernels take and fill. Shapes: M rows, W columns of one vocabulary slab."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Reason: float16 has 15 binades above 1 and 24 below; kept exp(z - max) starts at the top of them, so that what is
# flushed to zero is 2e-12 of the largest entry instead of 6e-8.
KEPT_BINADES = {torch.float16: 15}
# Reason: the same for dz, whose largest entry is about 1 after row normalisation; 3 binades stay free for entropy.
DZ_BINADES = {torch.float16: 12}


def kept_gain(dtype: torch.dtype) -> float:
    """exp(z - slab maximum) is multiplied by this before it is stored in `dtype`."""
    return 2.0 ** KEPT_BINADES.get(dtype, 0)


def kept_log_gain(dtype: torch.dtype) -> float:
    return math.log(2.0) * KEPT_BINADES.get(dtype, 0)


class RowState(NamedTuple):
    """Running statistics of each row, float32 (float64 for float64), updated in place slab by slab."""

    run_max: Tensor  # (M,) of the transformed logits, -inf before the first slab
    run_sum: Tensor  # (M,) sum of exp(y - run_max)
    target_logit: Tensor  # (M,) transformed logit of the target, -inf until its slab has passed
    entropy_sum: Tensor | None  # (M,) sum of exp(y - run_max) * (y - run_max), when entropy is wanted


class RowStats(NamedTuple):
    """What backward needs of a finished forward."""

    run_max: Tensor  # (M,)
    log_sum: Tensor  # (M,) log(run_sum), apart from run_max so that large logits cost no digits
    target_logit: Tensor  # (M,)
    entropy: Tensor | None  # (M,) nats

    @property
    def logps(self) -> Tensor:
        return (self.target_logit - self.run_max) - self.log_sum


class Upstream(NamedTuple):
    """Upstream gradients of each row, already divided by the row scale of float16; None where nothing came."""

    logp: Tensor | None  # (M,)
    lse: Tensor | None  # (M,)
    entropy: Tensor | None  # (M,)
