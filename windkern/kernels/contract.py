"""The contract of the row kernels: what a back end takes and fills. Shapes: M rows, W columns of one vocabulary slab.

Matrices have contiguous rows, which may lie farther apart than they are long.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from windkern.transform import LogitTransform

# Columns of the widest slab: a Triton program holds a row of one in registers.
WIDEST_SLAB = 16384
# Reason: float16 has 15 binades above 1 and 24 below; kept exp(z - max) starts at the top of them, so that what is
# flushed to zero is 2e-12 of the largest entry instead of 6e-8.
KEPT_BINADES = {torch.float16: 15}
# Reason: the same for dz, whose largest entry is about 1 after row normalisation; 3 binades stay free for entropy.
DZ_BINADES = {torch.float16: 12}
# How far a slab's maximum may exceed the pivot of its row before the pivot moves there: exp(40) leaves bfloat16 and
# float32 room for sums of products, and what lies 87 below a maximum is 0 beside it.
PIVOT_ROOM = 40.0
# The same at the end of forward. Reason: backward divides upstream gradients by the sum of the exponentials, and small
# ones would go denormal, which bfloat16 products take for 0.
SETTLED_ROOM = 20.0


def kept_gain(dtype: torch.dtype) -> float:
    """exp(z - slab maximum) is multiplied by this before it is stored in `dtype`."""
    return 2.0 ** KEPT_BINADES.get(dtype, 0)


def kept_log_gain(dtype: torch.dtype) -> float:
    return math.log(2.0) * KEPT_BINADES.get(dtype, 0)


class Slab(NamedTuple):
    """Logits of neighbouring vocabulary entries, and what makes a distribution of them."""

    logits: Tensor | None  # (M, W) float32 (float64 for float64), overwritten; None where a kernel reads what was kept
    bias: Tensor | None  # (W,) of the same dtype
    targets: Tensor  # (M,) int64, negative where the row is ignored; beyond the vocabulary where another rank has it
    start: int  # vocabulary entry of column 0
    transform: LogitTransform


class RowState(NamedTuple):
    """Running statistics of each row, float32 (float64 for float64), updated in place slab by slab."""

    run_max: Tensor  # (M,) of the transformed logits, -inf before the first slab
    run_sum: Tensor  # (M,) sum of exp(y - run_max)
    target_logit: Tensor  # (M,) transformed logit of the target, -inf until its slab has passed
    entropy_sum: Tensor | None  # (M,) sum of exp(y - run_max) * (y - run_max), when entropy is wanted


class Kept(NamedTuple):
    """The part of a slab that forward keeps for dz; the entropy's backward needs the logits instead."""

    values: Tensor  # (M, W) operand dtype: exp(y - offset) * relative slope of the transform
    offset: Tensor  # (M, tiles), the same for all columns of a tile


class Unit(NamedTuple):
    """Operands of the frozen head's products from one slab, all relative to the running maximum."""

    values: Tensor  # (M, W): gain * exp(y - run_max) * relative slope, 0 at the target
    logged: Tensor | None  # (M, W): the same times (y - run_max), when entropy is wanted
    rescale: Tensor  # (M,): factor for what was accumulated under the old maximum
    max_step: Tensor | None  # (M,): old minus new maximum, when entropy is wanted


class Exps(NamedTuple):
    """exp(y - pivot) of one slab, with a pivot that a row's slabs share and that hardly ever moves.

    Where an upstream gradient c comes on the log-prob alone, dz = g * E with one number g a row, once the target's
    entry is replaced; g goes to the other operands of the products and dz is never written.
    """

    values: Tensor  # (M, W), out: exp(y - pivot); 0 at the target and in ignored rows. May be the logits.
    pivot: Tensor  # (M,): -inf until a slab with a finite maximum has passed; moved where a maximum exceeds it by 40
    earlier: int  # columns left of `values` in the same rows, which are brought to a pivot that moves
    moved: Tensor | None  # (M,), out: factor for what was summed under the old pivot, exactly 1 where it stayed


class RowStats(NamedTuple):
    """Row statistics of a finished forward, which backward needs."""

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


class RowKernels(Protocol):
    """Functions that the module of a back end must have."""

    def slab_forward(self, slab: Slab, state: RowState, kept: Kept | None) -> None:
        """Online softmax over one slab; fills `kept` where the plan has room for it."""

    def slab_forward_unit(self, slab: Slab, state: RowState, unit: Unit) -> None:
        """Online softmax over one slab that also writes the operands of the frozen head's products."""

    def slab_backward(
        self,
        slab: Slab,
        kept: Kept | None,  # without c_entropy; None: the logits are there, and overwritten
        stats: RowStats,
        upstream: Upstream,
        row_scale: Tensor | None,  # (M,) what upstream was divided by, for dbias
        dz: Tensor,  # (M, W) operand dtype, or that of the logits where the back end can; out; may be the logits
        dbias: Tensor | None,  # (W,) out: the sum of row_scale * dz over rows
    ) -> None:
        """dz = slope * (c_logp * onehot + P * (c_lse - c_logp - c_ent * (log P + entropy))), 0 in ignored rows."""

    def exps_forward(self, slab: Slab, state: RowState, exps: Exps) -> None:
        """Online softmax over one slab that also writes its exponentials."""

    def exps_backward(self, slab: Slab, pivot: Tensor, entry: Tensor, values: Tensor) -> None:
        """values (M, W) = exp(y - pivot), `entry` (M,) at the target, 0 in ignored rows; may be the logits."""

    def column_sums(self, values: Tensor, weights: Tensor, sums: Tensor) -> None:
        """sums (W,) = sum over rows of weights (M,) * values (M, W), in one fixed order."""

    def rescale_rows(self, sums: Tensor, factor: Tensor) -> None:
        """sums (M, H) *= factor (M,), with no access to a row whose factor is 1."""

    def segment_sum(self, values: Tensor, bounds: Tensor) -> Tensor:
        """Sums of values[bounds[s] : bounds[s + 1]] for each s, in one fixed order: (M,), (S + 1,) -> (S,)."""

    def pair_terms(
        self, scores: Tensor, prefs: Tensor | None, rewards: Tensor | None, where: Tensor | None, link: str, loss: str
    ) -> tuple[Tensor, Tensor]:
        """Loss of all pairs of each group (B,), and its slope by score (B, N)."""

    def win_rates(self, prefs: Tensor | None, rewards: Tensor | None, where: Tensor | None, link: str) -> Tensor:
        """Mean preference of each response over the others of its group: (B, N)."""


CONTRACT = tuple(name for name in vars(RowKernels) if not name.startswith("_"))


def relative_slope(y: Tensor, transform: LogitTransform, out: Tensor) -> Tensor:
    """1 - tanh^2 of the transformed logits `y`: the transform's slope over its slope at zero."""
    bound = transform.softcap / transform.temperature
    # Reason: near saturation 1 - (y / bound)^2 is all rounding. With d = 1 - |y| / bound, whose difference is exact
    # there, it is d (2 - d), and exactly 0 at the bound: as accurate as 1 - tanh^2 with nothing else to keep.
    torch.abs(y, out=out).sub_(bound).mul_(-1 / bound)
    # Hazard: a masked entry has y = -inf. Remedy: its slope is exactly 0, what tanh gives at -inf.
    out.clamp_(min=0.0)
    return out.addcmul_(out, out, value=-0.5).mul_(2.0)


def target_slope(stats: RowStats, upstream: Upstream, transform: LogitTransform) -> Tensor:
    """d(loss) / d(logit before the transform) at each row's target, (M,): 1 - p comes from -expm1(logp)."""
    logps = stats.logps
    p = logps.exp()
    slope = torch.zeros_like(logps)
    if upstream.logp is not None:
        slope += upstream.logp * -torch.expm1(logps)
    if upstream.lse is not None:
        slope += upstream.lse * p
    if upstream.entropy is not None:
        # Hazard: a masked target has logp = -inf and p = 0. Remedy: p log p is 0 there.
        slope -= upstream.entropy * torch.where(p > 0, p * (logps + stats.entropy), 0.0)
    if transform.softcap is not None:
        slope *= relative_slope(stats.target_logit, transform, torch.empty_like(slope))
    return slope * transform.slope_at_zero


def other_slope(stats: RowStats, upstream: Upstream) -> Tensor:
    """Factor of P at every entry but the target's, (M,), before the transform's slope; the log P term is apart."""
    factor = torch.zeros_like(stats.run_max)
    if upstream.logp is not None:
        factor -= upstream.logp
    if upstream.lse is not None:
        factor += upstream.lse
    if upstream.entropy is not None:
        factor -= upstream.entropy * stats.entropy
    return factor
