"""Decide which policy a server serves, from its log-probs and the trainer's for the new and the previous policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Ours. Two dtypes, or 8-bit weights, differ by some hundredths of a nat per token; two models by several tenths.
MOST_GAP = 0.25  # nats, mean over tokens
_GROWN = 5.0  # times the difference after the first update; beyond it, some of the weights are not the new ones
_LEAST_GAP = 0.01  # nats, always accepted as a difference
_CHOSEN = 32  # tokens where the two policies differ most that decide
_CLEAR = 4.0  # times the noise that two policies must differ there
_LEAST = 1e-5  # nats; what float32 makes of a log-prob, where a server repeats itself to the last bit


@dataclass(frozen=True)
class Comparison:
    """A verdict with its evidence. Numbers are means of absolute differences per token, in nats."""

    verdict: str  # new, stale, other (another model, or a part of the weights), or unknown: new or previous
    gap: float  # between server and new policy, all tokens
    apart: float = 0.0  # between new and previous policy, where they differ most
    to_new: float = 0.0  # between server and new policy, there
    to_previous: float = 0.0  # between server and previous policy, there
    noise: float = 0.0  # median difference between the server and the nearer of the two


def compare(
    new: Sequence[float],
    served: Sequence[float],
    previous: Sequence[float] | None = None,
    *,
    usual: float | None = None,
) -> Comparison:
    """Return which policy a server's log-probs of some tokens come from.

    On the quarter of the tokens (at most 32) where new and previous policy differ most, the server's log-probs must be
    closer to the new policy's. The verdict is "unknown" if the two differ there by less than four times the noise: the
    median, over all tokens, of the difference between the server and the nearer of the two.

    Args:
        new: T log-probs by the current policy, nats.
        served: log-probs that the server gives.
        previous: log-probs by the previous policy; None if there was none.
        usual: the server's difference after the first update. If it is much larger now, the server has taken only some
            of the weights. None: not known.

    Raises:
        ValueError: the arguments do not hold T numbers each, at least one.

    Example:
        >>> compare([-1.0, -2.0], [-1.5, -2.0], [-1.5, -2.0]).verdict
        'stale'
    """
    mine, theirs = (torch.tensor(row, dtype=torch.float64) for row in (new, served))
    if not len(mine) or mine.shape != theirs.shape or (previous is not None and len(previous) != len(mine)):
        counts = [len(new), len(served), None if previous is None else len(previous)]
        raise ValueError(f"new, served and previous must hold one log-prob for each token, got {counts}")
    gap = _mean(mine - theirs)
    most = MOST_GAP if usual is None else min(MOST_GAP, max(_LEAST_GAP, _GROWN * usual))
    if previous is None:
        return Comparison("unknown" if gap <= most else "other", gap)
    before = torch.tensor(previous, dtype=torch.float64)
    chosen = (mine - before).abs().topk(max(1, min(_CHOSEN, len(mine) // 4))).indices
    apart, to_new, to_previous = (_mean(each[chosen]) for each in (mine - before, theirs - mine, theirs - before))
    noise = max(_LEAST, min(float((theirs - each).abs().median()) for each in (mine, before)))
    if apart > _CLEAR * noise and to_previous <= to_new:
        verdict = "stale" if _mean(theirs - before) <= most else "other"
    elif gap > most or gap != gap:
        verdict = "other"
    else:
        verdict = "new" if apart > _CLEAR * noise else "unknown"
    return Comparison(verdict, gap, apart, to_new, to_previous, noise)


def _mean(values: Tensor) -> float:
    return float(values.abs().mean())
