"""Pair kernels in plain PyTorch: all ordered pairs of a group, in blocks of rows, so that memory stays O(N)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of one block of pairs; a block is never smaller than one row of N.
BLOCK_ELEMENTS = 1 << 18


def _chance(gap: Tensor, link: str) -> Tensor:
    """Return the chance that the first beats the second, from the gap of their rewards; 1/2 for a tie."""
    return torch.sigmoid(gap) if link == "bradley_terry" else 0.5 * (1 + torch.sign(gap))


def _square(d: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    r = d - (p - 0.5)
    return r * r, 2 * r


def _logistic(d: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    # Reason: softplus becomes a straight line at 20, a relative error of 1e-10 in float64.
    return -p * F.logsigmoid(d), -p * torch.sigmoid(-d)


def _hinge(d: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    room = 1 - d
    return p * room.clamp(min=0), -p * (room > 0)


# Value and slope by the score gap d of an ordered pair, whose first response beats its second with chance p.
PAIR_LOSSES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "square": _square,
    "logistic": _logistic,
    "hinge": _hinge,
}


def _blocks(groups: int, n: int) -> Iterator[tuple[int, slice]]:
    step = max(1, BLOCK_ELEMENTS // max(1, n))
    for group in range(groups):
        for start in range(0, n, step):
            yield group, slice(start, min(start + step, n))


def _block_chances(
    prefs: Tensor | None, rewards: Tensor | None, link: str, group: int, rows: slice
) -> tuple[Tensor, Tensor]:
    """Return the chances that i in `rows` beats each j, and that it does not.

    Hazard: 1 - sigmoid(gap) loses all digits of a clear win. Remedy: from rewards, compute sigmoid(-gap).
    """
    if rewards is None:
        return prefs[group, rows], 1 - prefs[group, rows]
    gap = rewards[group, rows].unsqueeze(1) - rewards[group]
    return _chance(gap, link), _chance(-gap, link)


def pair_terms(
    scores: Tensor,  # (B, N) float32 or float64
    prefs: Tensor | None,  # (B, N, N), or None
    rewards: Tensor | None,  # (B, N), or None
    where: Tensor | None,  # (B, N) bool
    link: str,
    loss: str,
) -> tuple[Tensor, Tensor]:
    """Sum the loss over ordered pairs i != j, (B,), with its slope in the scores, (B, N)."""
    groups, n = scores.shape
    value, slope = scores.new_zeros(groups), scores.new_zeros(groups, n)
    function = PAIR_LOSSES[loss]
    columns = torch.arange(n, device=scores.device)
    for group, rows in _blocks(groups, n):
        chance, opposite = _block_chances(prefs, rewards, link, group, rows)
        gap = scores[group, rows].unsqueeze(1) - scores[group]
        counted = columns[rows].unsqueeze(1) != columns
        if where is not None:
            counted = counted & where[group, rows].unsqueeze(1) & where[group]
        forth, slope_forth = function(gap, chance)
        _, slope_back = function(-gap, opposite)
        # Hazard: a masked score can be NaN or inf. Remedy: select, never multiply by 0.
        value[group] += torch.where(counted, forth, 0.0).sum()
        slope[group, rows] = torch.where(counted, slope_forth - slope_back, 0.0).sum(1)
    return value, slope


def win_rates(prefs: Tensor | None, rewards: Tensor | None, where: Tensor | None, link: str) -> Tensor:
    """Average over the K counted j the chance that i beats j, 1/2 against itself, (B, N); 0 where masked."""
    given = prefs if rewards is None else rewards
    groups, n = given.shape[:2]
    rates = given.new_zeros(groups, n)
    columns = torch.arange(n, device=given.device)
    for group, rows in _blocks(groups, n):
        chance, _ = _block_chances(prefs, rewards, link, group, rows)
        chance = torch.where(columns[rows].unsqueeze(1) == columns, 0.5, chance)
        if where is None:
            rates[group, rows] = chance.mean(1)
            continue
        counted = where[group, rows].unsqueeze(1) & where[group]
        total = torch.where(counted, chance, 0.0).sum(1)
        rates[group, rows] = total / where[group].sum().clamp(min=1)
    return rates
