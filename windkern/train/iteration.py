"""An outer iteration as a value."""

from __future__ import annotations

from dataclasses import dataclass

from windkern.train.groups import Group


@dataclass(frozen=True)
class Iteration:
    """An outer iteration: what was sampled and judged, and what its steps fit."""

    number: int  # counted from 1
    groups: list[Group]  # sampled and judged
    fitted: list[Group]  # with all constants of the loss; empty if a past iteration was read from disk
    measured: list[Group]  # the groups whose prompts were drawn uniformly
