"""Pair kernels in Triton: all ordered pairs of a group in tiles, with value and slope in one launch and O(N) memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from windkern.kernels.native.pointers import LINKS, PAIR_LOSSES
from windkern.kernels.triton.launcher import launch

TILE, WARPS = 32, 4  # rows and columns of pairs that a program handles at once; warps of a program
_SEGMENT_BLOCK = 1024


@triton.jit
def _sigmoid(x):
    tail = tl.exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, tail) / (1.0 + tail)


@triton.jit
def _chance(gap, LINK: tl.constexpr):
    """Return the chance that the first beats the second, from the gap of their rewards; 1/2 for a tie."""
    if LINK == 0:
        p = _sigmoid(gap)
    else:
        p = tl.where(gap > 0.0, 1.0, tl.where(gap < 0.0, 0.0, 0.5)).to(gap.dtype)
    return p


@triton.jit
def _log1p(x):
    """log(1 + x) for x in [0, 1], with a quotient that corrects the rounding of 1 + x."""
    u = 1.0 + x
    excess = u - 1.0
    return tl.where(excess == 0.0, x, tl.log(u) * (x / tl.where(excess == 0.0, 1.0, excess)))


@triton.jit
def _square(d, p):
    r = d - (p - 0.5)
    return r * r, 4.0 * r


@triton.jit
def _logistic(d, p, q):
    tail = tl.exp(-tl.abs(d))  # at most 1: no overflow either way
    value = p * (tl.maximum(-d, 0.0) + _log1p(tail))
    # Reason: the slope equals sigmoid(d) - p, which would cancel where both are near 1.
    forth = tl.where(d >= 0.0, tail, 1.0)
    back = tl.where(d >= 0.0, 1.0, tail)
    return value, (q * back - p * forth) / (1.0 + tail)


@triton.jit
def _hinge(d, p, q):
    room = 1.0 - d
    back = 1.0 + d
    return p * tl.maximum(room, 0.0), tl.where(back > 0.0, q, 0.0) - tl.where(room > 0.0, p, 0.0)


@triton.jit
def _value_slope(d, p, q, LOSS: tl.constexpr):
    """Return the value of pair (i, j) with gap d = s_i - s_j, and the slope in s_i of (i, j) and (j, i); q = 1 - p."""
    if LOSS == 0:
        value, slope = _square(d, p)
    elif LOSS == 1:
        value, slope = _logistic(d, p, q)
    else:
        value, slope = _hinge(d, p, q)
    return value, slope


@triton.jit
def _tile_chances(given_ptr, group, n, i, j, mask, LINK: tl.constexpr, FROM_REWARDS: tl.constexpr):
    """Return the chances that i beats j, and that it does not; from rewards, the second loses no digits to 1 - p."""
    if FROM_REWARDS:
        base = given_ptr + group * n
        mine = tl.load(base + i, mask=i < n, other=0.0)
        theirs = tl.load(base + j, mask=j < n, other=0.0)
        gap = mine[:, None] - theirs[None, :]
        chance = _chance(gap, LINK)
        opposite = _chance(-gap, LINK)
    else:
        chance = tl.load(given_ptr + (group * n + i[:, None]) * n + j[None, :], mask=mask, other=0.5)
        opposite = 1.0 - chance
    return chance, opposite


@triton.jit
def _place(n, TILE: tl.constexpr):
    """Return the group of this program and its responses i; the programs of a group are adjacent.

    Reason: all programs are in x, where a grid has room for 2^31 - 1 of them; y has room for 65535.
    """
    tiles = tl.cdiv(n, TILE)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    i = (tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)).to(tl.int64)
    return group, i


@triton.jit
def pair_kernel(
    scores_ptr,  # (B, N)
    given_ptr,  # (B, N) rewards or (B, N, N) preferences
    where_ptr,  # (B, N) bool
    value_ptr,
    slope_ptr,  # (B, N) out
    n,
    LINK: tl.constexpr,
    LOSS: tl.constexpr,
    FROM_REWARDS: tl.constexpr,
    MASKED: tl.constexpr,
    TILE: tl.constexpr,
):
    group, i = _place(n, TILE)
    counted_i = i < n
    if MASKED:
        counted_i = counted_i & (tl.load(where_ptr + group * n + i, mask=i < n, other=0) != 0)
    mine = tl.load(scores_ptr + group * n + i, mask=counted_i, other=0.0)
    value = tl.zeros([TILE], dtype=mine.dtype)
    slope = tl.zeros([TILE], dtype=mine.dtype)
    for first in range(0, n, TILE):
        j = first + tl.arange(0, TILE).to(tl.int64)
        counted_j = j < n
        if MASKED:
            counted_j = counted_j & (tl.load(where_ptr + group * n + j, mask=j < n, other=0) != 0)
        # Hazard: a masked score can be NaN. Remedy: it is never loaded.
        theirs = tl.load(scores_ptr + group * n + j, mask=counted_j, other=0.0)
        counted = counted_i[:, None] & counted_j[None, :] & (i[:, None] != j[None, :])
        chance, opposite = _tile_chances(given_ptr, group, n, i, j, counted, LINK, FROM_REWARDS)
        pair_value, pair_slope = _value_slope(mine[:, None] - theirs[None, :], chance, opposite, LOSS)
        value += tl.sum(tl.where(counted, pair_value, 0.0), 1)
        slope += tl.sum(tl.where(counted, pair_slope, 0.0), 1)
    tl.store(value_ptr + group * n + i, value, mask=i < n)
    tl.store(slope_ptr + group * n + i, slope, mask=i < n)


@triton.jit
def win_rate_kernel(
    given_ptr,
    where_ptr,
    rates_ptr,  # (B, N) out
    n,
    LINK: tl.constexpr,
    FROM_REWARDS: tl.constexpr,
    MASKED: tl.constexpr,
    TILE: tl.constexpr,
):
    group, i = _place(n, TILE)
    counted_i = i < n
    if MASKED:
        counted_i = counted_i & (tl.load(where_ptr + group * n + i, mask=i < n, other=0) != 0)
    total = tl.zeros([TILE], dtype=rates_ptr.dtype.element_ty)
    count = 0
    for first in range(0, n, TILE):
        j = first + tl.arange(0, TILE).to(tl.int64)
        counted_j = j < n
        if MASKED:
            counted_j = counted_j & (tl.load(where_ptr + group * n + j, mask=j < n, other=0) != 0)
        counted = counted_i[:, None] & counted_j[None, :]
        chance, _opposite = _tile_chances(given_ptr, group, n, i, j, counted, LINK, FROM_REWARDS)
        chance = tl.where(i[:, None] == j[None, :], 0.5, chance)
        total += tl.sum(tl.where(counted, chance, 0.0), 1)
        count += tl.sum(counted_j.to(tl.int32), 0)
    rates = total / tl.maximum(count, 1).to(total.dtype)
    tl.store(rates_ptr + group * n + i, tl.where(counted_i, rates, 0.0), mask=i < n)


@triton.jit
def segment_kernel(values_ptr, bounds_ptr, sums_ptr, BLOCK: tl.constexpr):
    segment = tl.program_id(0).to(tl.int64)
    first, last = tl.load(bounds_ptr + segment), tl.load(bounds_ptr + segment + 1)
    # Reason: with float64 partial sums, long sequences are exact to float32 rounding.
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for place in range(first, last, BLOCK):
        index = place + tl.arange(0, BLOCK)
        total += tl.load(values_ptr + index, mask=index < last, other=0.0).to(tl.float64)
    tl.store(sums_ptr + segment, tl.sum(total, 0).to(sums_ptr.dtype.element_ty))


def pair_terms(
    scores: Tensor, prefs: Tensor | None, rewards: Tensor | None, where: Tensor | None, link: str, loss: str
) -> tuple[Tensor, Tensor]:
    """Like `kernels.torch.pairs.pair_terms`."""
    scores, given = scores.contiguous(), (prefs if rewards is None else rewards).contiguous()
    groups, n = scores.shape
    values, slope = torch.zeros_like(scores), torch.zeros_like(scores)
    if scores.numel():
        launch(
            pair_kernel,
            triton.cdiv(n, TILE) * groups,
            scores,
            given,
            scores if where is None else where.contiguous().view(torch.uint8),
            values,
            slope,
            n,
            LINK=LINKS[link],
            LOSS=PAIR_LOSSES[loss],
            FROM_REWARDS=rewards is not None,
            MASKED=where is not None,
            TILE=TILE,
            num_warps=WARPS,
        )
    return values.sum(1), slope


def win_rates(prefs: Tensor | None, rewards: Tensor | None, where: Tensor | None, link: str) -> Tensor:
    """Like `kernels.torch.pairs.win_rates`."""
    given = (prefs if rewards is None else rewards).contiguous()
    groups, n = given.shape[:2]
    rates = given.new_zeros(groups, n)
    if rates.numel():
        launch(
            win_rate_kernel,
            triton.cdiv(n, TILE) * groups,
            given,
            given if where is None else where.contiguous().view(torch.uint8),
            rates,
            n,
            LINK=LINKS[link],
            FROM_REWARDS=rewards is not None,
            MASKED=where is not None,
            TILE=TILE,
            num_warps=WARPS,
        )
    return rates


def segment_sum(values: Tensor, bounds: Tensor) -> Tensor:
    """Like `kernels.torch.rows.segment_sum`."""
    sums = values.new_empty(bounds.shape[0] - 1)
    if sums.numel():
        launch(
            segment_kernel,
            sums.shape[0],
            values.contiguous(),
            bounds.contiguous(),
            sums,
            BLOCK=_SEGMENT_BLOCK,
            num_warps=4,
        )
    return sums
