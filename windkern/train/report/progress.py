"""Define the record of an iteration, and the observer of a run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Protocol

# Units of phases that appear beside others of the same name.
OF_REFERENCE, HELD_OUT, OF_HELD_OUT = "responses of the reference", "held-out responses", "held-out log-probs"
RECORDED = "recorded responses"


@dataclass(frozen=True)
class Record:
    """The numbers of one iteration, for the screen, the picture, the JSON file and the checkpoint."""

    iteration: int
    win_rate: float | None  # on held-out prompts against the reference, if there are any
    win_rate_se: float | None
    reward: float | None  # mean of the held-out responses, if the judge has rewards
    kl: float | None  # KL(policy || reference) of a held-out response, nats
    kl_se: float | None
    loss: float | None  # mean of the iteration's log lines; for squared losses in units of win rate squared
    gradient_norm: float | None  # largest of those lines, before clipping
    train_reward: float | None  # mean of the responses to training prompts
    truncated: float  # share of these responses that reached the length limit
    tokens: int  # in the responses to training prompts
    seconds: float  # duration of the iteration

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)


class Progress(Protocol):
    """Watches the progress of a piece of work."""

    def phase(self, iteration: int, name: str, steps: int = 1, unit: str = "", done: int = 0) -> None:
        """Begin a phase, or continue it after an interruption by another.

        Args:
            iteration: number of its iteration; 0 before the first, and one more than the last after it.
            name: name of the phase, such as "sampling".
            steps: number of steps.
            unit: unit of a step, such as "responses".
            done: steps that are done already, for example by an earlier process.
        """
        ...

    def advance(self, steps: float = 1) -> None:
        """Count more steps as done."""
        ...

    def under_way(self, steps: float) -> None:
        """Report what unfinished steps amount to so far; `advance` counts them when they are done."""
        ...

    def note(self, text: str) -> None:
        """Show a reader of the log one line."""
        ...


class Observer(Progress, Protocol):
    """Watches the progress of a run."""

    def finished(self, record: Record) -> None:
        """Report an iteration that is over and, if the run keeps checkpoints, on disk."""
        ...


class Unobserved:
    """An observer that ignores everything."""

    def phase(self, iteration: int, name: str, steps: int = 1, unit: str = "", done: int = 0) -> None:
        pass

    def advance(self, steps: float = 1) -> None:
        pass

    def under_way(self, steps: float) -> None:
        pass

    def finished(self, record: Record) -> None:
        pass

    def note(self, text: str) -> None:
        pass
