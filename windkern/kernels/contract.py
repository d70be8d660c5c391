"""The contract of the row kernels: the inputs and outputs of a back end, for M rows and W columns of a vocabulary slab.

Matrices have contiguous rows; the row stride can be larger than the number of columns.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from windkern.transform import LogitTransform

# Columns of the widest slab.
WIDEST_SLAB = 1 << 17
# Of the widest that is kept for dz: a Triton program holds one of its rows in registers.
WIDEST_ROW = 16384
# Of the frozen head's with an entropy or a softcap, whose kernel holds twice as much of a row in registers.
WIDEST_UNIT_SLAB = 8192
# Reason: float16 has 15 binades above 1 and 24 below. The largest kept exp(z - max) is at the top of them, so that
# entries flushed to zero are 2e-12 of the largest one instead of 6e-8.
KEPT_BINADES = {torch.float16: 15}
# Reason: the same for dz, whose largest entry is about 1 after row normalisation; 3 binades stay free for entropy.
DZ_BINADES = {torch.float16: 12}
# Vocabulary entries of a tile whose logits stay in registers, as csrc/cuda/tiles.h has them.
TILE_COLUMNS = 256
# The pivot of a row moves to a slab's maximum that exceeds it by more than this: exp(40) leaves bfloat16 and float32
# room for sums of products, and entries 87 below a maximum are 0 relative to it.
PIVOT_ROOM = 40.0
# The same at the end of forward. Reason: backward divides upstream gradients by the sum of the exponentials, and small
# ones would become denormal, which bfloat16 products treat as 0.
SETTLED_ROOM = 20.0


def kept_gain(dtype: torch.dtype) -> float:
    """Return the factor by which exp(z - slab maximum) is multiplied before it is stored in `dtype`."""
    return 2.0 ** KEPT_BINADES.get(dtype, 0)


def kept_log_gain(dtype: torch.dtype) -> float:
    return math.log(2.0) * KEPT_BINADES.get(dtype, 0)


class Slab(NamedTuple):
    """Logits of adjacent vocabulary entries, with their bias, targets and transform."""

    logits: Tensor | None  # (M, W) float32 (float64 for float64), overwritten; None where a kernel reads kept values
    bias: Tensor | None  # (W,) of the same dtype
    targets: Tensor  # (M,) int64, negative if the row is ignored; beyond the vocabulary if another rank has the target
    start: int  # vocabulary entry of column 0
    transform: LogitTransform


class RowState(NamedTuple):
    """Running statistics of each row, float32 (float64 for float64), updated in place slab by slab."""

    run_max: Tensor  # (M,) of the transformed logits, -inf before the first slab
    run_sum: Tensor  # (M,) sum of exp(y - run_max)
    target_logit: Tensor  # (M,) transformed logit of the target, -inf until its slab is reached
    entropy_sum: Tensor | None  # (M,) sum of exp(y - run_max) * (y - run_max), when entropy is wanted


class Kept(NamedTuple):
    """The part of a slab that forward keeps for dz. (The entropy's backward needs the logits instead.)"""

    values: Tensor  # (M, W) operand dtype: exp(y - offset) * relative slope of the transform
    offset: Tensor  # (M, tiles), the same for all columns of a tile


class Unit(NamedTuple):
    """Operands of the frozen head's products from one slab, all relative to the running maximum."""

    values: Tensor  # (M, W): gain * exp(y - run_max) * relative slope, 0 at the target
    logged: Tensor | None  # (M, W): the same times (y - run_max), when entropy is wanted
    rescale: Tensor  # (M,): factor for sums accumulated under the old maximum
    max_step: Tensor | None  # (M,): old minus new maximum, when entropy is wanted


class Exps(NamedTuple):
    """exp(y - pivot) of one slab, with a pivot that all slabs of a row share and that rarely moves.

    If the upstream gradient is on the log-prob alone, dz = g * E with one number g per row, once the target's entry is
    replaced. Then g multiplies the other operands of the products, and dz is never written.
    """

    values: Tensor  # (M, W), out: exp(y - pivot); 0 at the target and in ignored rows. May be the logits' memory.
    pivot: Tensor  # (M,): -inf until a slab has a finite maximum; moves to a maximum that exceeds it by 40
    earlier: int  # columns left of `values` in the same rows, which are rescaled when the pivot moves
    moved: Tensor | None  # (M,), out: factor for sums under the old pivot, exactly 1 where it did not move


class Settled(NamedTuple):
    """Exponentials of a walk whose forward ends, with the pivots that backward will see."""

    kept: Tensor  # (M, columns): exp(y - pivot) of what is kept, rescaled where a pivot moves; may have no columns
    pivot: Tensor  # (M,), in and out
    total: Tensor  # (M,), out: the sum of exp(y - pivot) over the vocabulary
    entry: Tensor  # (M,), out: -(1 - p) * total, which makes g * E equal dz at the target
    moves: bool  # whether a pivot moves to a maximum that exceeds it by SETTLED_ROOM


class RowStats(NamedTuple):
    """Row statistics of a finished forward, which backward needs."""

    run_max: Tensor  # (M,)
    log_sum: Tensor  # (M,) log(run_sum), separate from run_max so that large logits cost no digits
    target_logit: Tensor  # (M,)
    entropy: Tensor | None  # (M,) nats

    @property
    def logps(self) -> Tensor:
        return (self.target_logit - self.run_max) - self.log_sum


class Upstream(NamedTuple):
    """Upstream gradients of each row, already divided by the row scale of float16; None where there is none."""

    logp: Tensor | None  # (M,)
    lse: Tensor | None  # (M,)
    entropy: Tensor | None  # (M,)


class HiddenGrad(NamedTuple):
    """The gradient of a block of hidden states, with what is still to be done row by row.

    dhidden (M, H) = factor * total + at_target * head[targets], 0 in ignored rows
    """

    total: Tensor  # (M, H) float32 (float64 for float64)
    factor: Tensor | None = None  # (M,); None: 1
    at_target: Tensor | None = None  # (M,), given with `head`
    head: Tensor | None = None  # (V, H), any strides
    rounded: torch.dtype | None = None  # of the products, to which a row of `head` is rounded first
    owned: bool = True  # whether `total` may be overwritten


class RowKernels(Protocol):
    """The functions that the module of a back end must provide."""

    def slab_forward(self, slab: Slab, state: RowState, kept: Kept | None) -> None:
        """Run the online softmax over one slab, and fill `kept` unless it is None."""

    def slab_forward_unit(self, slab: Slab, state: RowState, unit: Unit) -> None:
        """Run the online softmax over one slab, and write the operands of the frozen head's products."""

    def slab_backward(
        self,
        slab: Slab,
        kept: Kept | None,  # only without an upstream on the entropy; None: read the logits, which are overwritten
        stats: RowStats,
        upstream: Upstream,
        row_scale: Tensor | None,  # (M,) divisor of upstream, for dbias
        dz: Tensor,  # (M, W) out: operand dtype, or the logits' if the back end supports it; may be the logits' memory
        dbias: Tensor | None,  # (W,) out: the sum of row_scale * dz over rows
    ) -> None:
        """dz = slope * (c_logp * onehot + P * (c_lse - c_logp - c_ent * (log P + entropy))), 0 in ignored rows."""

    def exps_forward(self, slab: Slab, state: RowState, exps: Exps) -> None:
        """Run the online softmax over one slab, and write its exponentials."""

    def exps_backward(self, slab: Slab, pivot: Tensor, entry: Tensor, values: Tensor) -> None:
        """values (M, W) = exp(y - pivot), `entry` (M,) at the target, 0 in ignored rows; may be the logits' memory."""

    def finish_rows(
        self, state: RowState, targets: Tensor, log_sum: Tensor, logps: Tensor, lse: Tensor, settled: Settled | None
    ) -> None:
        """End forward: write log(run_sum), log-probs and log-sum-exps (M,), the last two 0 in ignored rows.

        If given, `settled` gets its pivots, sums and entries, and the kept entry of each target is set.
        """

    def row_factors(
        self,
        upstream: Tensor,  # (M,) contiguous, as all vectors
        total: Tensor,  # (M,) sums of the exponentials
        targets: Tensor,  # (M,)
        slope: float,  # of the transform at zero
        factor: Tensor,  # (M,) out
        hidden: Tensor | None,  # (M, H) in the dtype of the operands, any strides; None: only `factor` is wanted
        scaled: Tensor | None,  # (M, H) out, in the dtype that is multiplied
    ) -> None:
        """factor = -slope * upstream / total, 0 in ignored rows; scaled = factor * hidden, rounded once."""

    def write_hidden_grad(self, grad: HiddenGrad, targets: Tensor, rows: Tensor | None, out: Tensor) -> None:
        """Write dhidden, rounded once to the dtype of `out`: row m to out[rows[m]], or to out[m] without `rows`.

        With `rows` (count,), `out` (R, H) holds zeros, and ignored rows are not written. Without, `out` (count, H) can
        be `grad.total` itself. Rows from `count` on are padding.
        """

    def column_sums(self, values: Tensor, weights: Tensor, sums: Tensor) -> None:
        """sums (W,) = sum over rows of weights (M,) * values (M, W), in one fixed order."""

    def rescale_rows(self, sums: Tensor, factor: Tensor) -> None:
        """sums (M, H) *= factor (M,); rows whose factor is 1 need not be touched."""

    def segment_sum(self, values: Tensor, bounds: Tensor) -> Tensor:
        """Sum values[bounds[s] : bounds[s + 1]] for each s, in one fixed order: (M,), (S + 1,) -> (S,)."""

    def pair_terms(
        self, scores: Tensor, prefs: Tensor | None, rewards: Tensor | None, where: Tensor | None, link: str, loss: str
    ) -> tuple[Tensor, Tensor]:
        """Sum the loss over the pairs of each group (B,), with its slope in the scores (B, N)."""

    def win_rates(self, prefs: Tensor | None, rewards: Tensor | None, where: Tensor | None, link: str) -> Tensor:
        """Average the preference of each response over its group, itself included with 1/2: (B, N)."""


class TileKernels(Protocol):
    """What a back end provides besides where it multiplies itself: a slab has no logits, and no softcap.

    hidden (M, H) and weight (W, H) have the dtype of the operands. With `fresh`, a walk begins: the state and the
    pivots hold anything, and are written.
    """

    def tile_forward(
        self, hidden: Tensor, weight: Tensor, slab: Slab, state: RowState, kept: Kept | None, *, fresh: bool = False
    ) -> None:
        """Do what a product and `slab_forward` do; `kept` has an offset for each tile."""

    def tile_exps_forward(
        self, hidden: Tensor, weight: Tensor, slab: Slab, state: RowState, exps: Exps, *, fresh: bool = False
    ) -> None:
        """Do what a product and `exps_forward` do, for a bfloat16 `exps.values`.

        A pivot of -inf moves to a logit of the row before the products: its target's, or column 0's where the slab
        does not have the target.
        """

    def tile_exps_backward(
        self, hidden: Tensor, weight: Tensor, slab: Slab, pivot: Tensor, entry: Tensor, values: Tensor
    ) -> None:
        """Do what a product and `exps_backward` do, for bfloat16 `values`."""

    def reads_in_place(self, matrix: Tensor) -> bool:
        """Return whether the kernels read `matrix` where it lies; they copy others."""


CONTRACT = tuple(name for name in vars(RowKernels) if not name.startswith("_"))


def relative_slope(y: Tensor, transform: LogitTransform, out: Tensor) -> Tensor:
    """1 - tanh^2 of the transformed logits `y`: the transform's slope over its slope at zero."""
    bound = transform.softcap / transform.temperature
    # Reason: near saturation 1 - (y / bound)^2 is all rounding. With d = 1 - |y| / bound, whose difference is exact
    # there, it is d (2 - d), and exactly 0 at the bound: as accurate as 1 - tanh^2, without keeping tanh.
    torch.abs(y, out=out).sub_(bound).mul_(-1 / bound)
    # Hazard: a masked entry has y = -inf. Remedy: its slope is exactly 0, as that of tanh at -inf.
    out.clamp_(min=0.0)
    return out.addcmul_(out, out, value=-0.5).mul_(2.0)


def target_slope(stats: RowStats, upstream: Upstream, transform: LogitTransform) -> Tensor:
    """d(loss) / d(logit before the transform) at each row's target, (M,), with 1 - p as -expm1(logp)."""
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
    """Factor of P at every entry but the target's, (M,), before the transform's slope and without the log P term."""
    factor = torch.zeros_like(stats.run_max)
    if upstream.logp is not None:
        factor -= upstream.logp
    if upstream.lse is not None:
        factor += upstream.lse
    if upstream.entropy is not None:
        factor -= upstream.entropy * stats.entropy
    return factor
