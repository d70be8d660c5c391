"""Estimate how much of a command is done and how long the rest takes, from the phases measured so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Kind = tuple[str, str]  # name and unit of a phase: sampling, responses
ENOUGH = 0.05  # share of a phase after which its pace counts as measured


@dataclass
class _Visit:
    """A phase that has begun in the current iteration."""

    began: float  # when it was last entered
    first: float  # share that was done before it was first entered
    share: float
    moved: float  # when the share last grew
    spent: float = 0.0  # seconds in it before it was last entered


class Forecast:
    """Estimates the share of a command that is done, and the seconds left.

        cost of a phase: a guess in any unit
        pace of a kind = seconds / cost of its phases so far, or while there are none, of all phases so far
        left = sum of cost * pace over the phases left

    Args:
        before: phases before the first iteration: their costs by kind, in order.
        each: phases of an iteration; a phase that does not occur in an iteration counts as taking no time.
        iterations: number of iterations.
        after: phases after the last iteration.
        clock: returns seconds.

    Example:
        >>> now = 0.0
        >>> forecast = Forecast(each={("sampling", ""): 3.0, ("fitting", ""): 1.0}, iterations=2, clock=lambda: now)
        >>> forecast.begin(1, ("sampling", ""))
        >>> forecast.share, forecast.left is None
        (0.0, True)
        >>> now = 15.0
        >>> forecast.move(0.5)  # 15 s for half of the sampling, so 30 s for all of it and 10 s for the fitting
        >>> forecast.share, forecast.left
        (0.1875, 65.0)
    """

    def __init__(
        self,
        before: Mapping[Kind, float] | None = None,
        each: Mapping[Kind, float] | None = None,
        iterations: int = 0,
        after: Mapping[Kind, float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._before, self._each, self._after = dict(before or {}), dict(each or {}), dict(after or {})
        self._iterations, self._clock = iterations, clock
        self._at = 0  # the current iteration
        self._kind: Kind | None = None  # the current phase; None for one that was not planned
        self._last: Kind | None = None  # the planned phase that was entered last in this iteration
        self._visits: dict[Kind, _Visit] = {}
        self._measured: dict[Kind, tuple[float, float]] = {}  # seconds and cost of iterations that are over
        self._shown = 0.0

    def begin(self, iteration: int, kind: Kind, share: float = 0.0) -> None:
        """Record that a phase begins, or is entered again; `share` of it was done before."""
        self._leave()
        if iteration != self._at:
            self._close()
            self._at = iteration
        if kind not in self._phases(iteration):
            return
        now, spent = self._clock(), 0.0
        if kind in self._visits:
            spent, first = self._visits[kind].spent, self._visits[kind].first
        else:
            first = share
        self._visits[kind], self._kind, self._last = _Visit(now, first, share, now, spent), kind, kind

    def move(self, share: float) -> None:
        """Record that `share` of the current phase is done."""
        if self._kind is not None:
            visit = self._visits[self._kind]
            if share > visit.share:
                visit.share, visit.moved = min(1.0, share), self._clock()

    @property
    def share(self) -> float:
        """Share of the predicted time that has passed; it never falls."""
        paces = self._paces()
        total = sum(
            count * sum(cost * self._pace(kind, paces) for kind, cost in phases.items())
            for count, phases in ((1, self._before), (self._iterations, self._each), (1, self._after))
        )
        if total > 0:
            self._shown = max(self._shown, min(1.0, 1 - self._remaining(paces) / total))
        return self._shown

    @property
    def left(self) -> float | None:
        """Seconds left; None while no pace is known."""
        paces = self._paces()
        return self._remaining(paces) if paces else None

    def _phases(self, iteration: int) -> dict[Kind, float]:
        return self._before if iteration < 1 else self._after if iteration > self._iterations else self._each

    def _leave(self) -> None:
        if self._kind is not None:
            visit = self._visits[self._kind]
            visit.spent += self._clock() - visit.began
            visit.share, self._kind = 1.0, None

    def _close(self) -> None:
        """Add the seconds and costs of the iteration to the measured ones."""
        resumed = any(visit.first for visit in self._visits.values())
        for kind, cost in self._phases(self._at).items():
            visit = self._visits.get(kind)
            if (visit is None and (resumed or not self._visits)) or (visit is not None and visit.first >= 1):
                continue
            seconds, done = (0.0, cost) if visit is None else (visit.spent, cost * (1 - visit.first))
            before = self._measured.get(kind, (0.0, 0.0))
            self._measured[kind] = before[0] + seconds, before[1] + done
        self._visits, self._last = {}, None

    def _paces(self) -> dict[Kind | None, float]:
        """Return the seconds per unit of cost of each measured kind, and of all together under None."""
        found = dict(self._measured)
        phases = self._phases(self._at)
        for kind, visit in self._visits.items():
            if visit.share - visit.first >= ENOUGH:
                seconds = visit.spent + (visit.moved - visit.began if kind == self._kind else 0.0)
                before = found.get(kind, (0.0, 0.0))
                found[kind] = before[0] + seconds, before[1] + phases[kind] * (visit.share - visit.first)
        measured = {kind: seconds / cost for kind, (seconds, cost) in found.items() if cost > 0}
        paces: dict[Kind | None, float] = dict(measured.items())
        if measured:
            whole = [sum(column) for column in zip(*(found[kind] for kind in measured), strict=True)]
            paces[None] = whole[0] / whole[1]
        return paces

    @staticmethod
    def _pace(kind: Kind, paces: Mapping[Kind | None, float]) -> float:
        return paces.get(kind, paces.get(None, 1.0))

    def _remaining(self, paces: Mapping[Kind | None, float]) -> float:
        """Return the seconds that the remaining costs take at their paces."""
        phases = self._phases(self._at)
        places = list(phases)
        behind = places.index(self._last) + 1 if self._last else 0
        left = sum(phases[kind] * self._pace(kind, paces) for kind in places[behind:])
        if self._kind is not None:
            visit = self._visits[self._kind]
            passed = self._clock() - visit.moved if paces else 0.0
            whole = phases[self._kind] * self._pace(self._kind, paces)
            left += max(0.0, whole * (1 - visit.share) - passed)
        if self._at <= self._iterations:
            rest = self._iterations - max(0, self._at)
            left += rest * sum(cost * self._pace(kind, paces) for kind, cost in self._each.items())
            left += sum(cost * self._pace(kind, paces) for kind, cost in self._after.items())
        return left
