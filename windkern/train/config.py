"""What determines a run, what it reports, and who may watch it."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Protocol

from windkern._checks import check_choice, check_count, check_number
from windkern.losses import OBJECTIVES


@dataclass(frozen=True)
class WindSettings:
    """The numbers of a WIND run; with model, judge and prompts they determine it.

    Args:
        iterations: outer iterations: sample, judge, fit.
        prompts_per_iteration: training prompts answered in each; the training set is gone through in shuffled order.
        num_responses: N, responses to each of them.
        fit_responses: how many of the N are fitted: those with the highest and lowest win rates against all N; None
            fits all. A response costs less to sample than to fit, and the extremes say most about where to go.
        eta: step size of the update. Below, c = eta / (1 + eta * beta) nats separate a certain winner from a certain
            loser after a perfect fit.
        beta: weight of the KL to the reference.
        objective: of `windkern.losses.wind`.
        learning_rate: of AdamW at the first step; it falls linearly to `final_learning_rate` times this at the last.
        final_learning_rate: share of the learning rate left at the end of the run.
        momentum: beta_1 of AdamW, which starts anew in each iteration. With 0.9 and four steps, the first step's
            gradient moves the weights seven times as far as the last one's; with 0 all responses count alike.
        epochs: passes over the responses of an iteration.
        prompts_per_step: whose responses make up one optimizer step.
        prompts_per_pass: whose responses go through the model at once; gradients of passes add up to a step.
        max_grad_norm: gradients are scaled down to this norm.
        temperature: of the policy, in its samples and its log-probs alike.
        eval_responses: of the policy to each held-out prompt, after each iteration.
        final_responses: the same after the last iteration.
        reference_responses: of the reference to each held-out prompt, drawn once.
        seed: of all randomness.

    Raises:
        ValueError, TypeError: a field is out of range; the message names it.
    """

    iterations: int = 6
    prompts_per_iteration: int = 16
    num_responses: int = 4
    fit_responses: int | None = None
    eta: float = 5.0
    beta: float = 0.05
    objective: str = "square"
    learning_rate: float = 2e-5
    final_learning_rate: float = 1.0
    momentum: float = 0.9
    epochs: int = 1
    prompts_per_step: int = 4
    prompts_per_pass: int = 4
    max_grad_norm: float = 1.0
    temperature: float = 1.0
    eval_responses: int = 1
    final_responses: int = 4
    reference_responses: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("iterations", "prompts_per_iteration", "epochs", "prompts_per_step", "prompts_per_pass"):
            check_count(name, getattr(self, name), least=1)
        for name in ("eval_responses", "final_responses", "reference_responses"):
            check_count(name, getattr(self, name), least=1)
        check_count("num_responses", self.num_responses, least=2)
        check_count("seed", self.seed)
        for name in ("eta", "learning_rate", "max_grad_norm", "temperature"):
            check_number(name, getattr(self, name), above=0)
        for name in ("beta", "final_learning_rate", "momentum"):
            check_number(name, getattr(self, name), least=0)
        if self.momentum >= 1:
            raise ValueError(f"momentum must be below 1, got {self.momentum}")
        check_choice("objective", self.objective, OBJECTIVES)
        if self.fit_responses is not None:
            check_count("fit_responses", self.fit_responses, least=2)
            if self.fit_responses > self.num_responses:
                raise ValueError(
                    f"fit_responses must be at most num_responses = {self.num_responses}, got {self.fit_responses}"
                )
            if OBJECTIVES[self.objective].statistic != "V":
                raise ValueError(
                    f"fit_responses must be None for objective={self.objective!r}, whose target is not a win rate "
                    "against all N"
                )

    @property
    def fitted_responses(self) -> int:
        """Responses to a prompt that go through the model in a fit."""
        return self.num_responses if self.fit_responses is None else self.fit_responses

    @property
    def steps_per_iteration(self) -> int:
        return self.epochs * -(-self.prompts_per_iteration // self.prompts_per_step)

    @property
    def step_scale(self) -> float:
        """c = eta / (1 + eta * beta), what a win rate is multiplied by in the log-prob target."""
        return self.eta / (1 + self.eta * self.beta)

    def learning_rate_at(self, step: int) -> float:
        """At optimizer step `step`, counted from 0 over the whole run."""
        last = max(1, self.iterations * self.steps_per_iteration - 1)
        return self.learning_rate * (1 + (self.final_learning_rate - 1) * min(1.0, step / last))


@dataclass(frozen=True)
class Record:
    """What one iteration did; the same numbers go to the screen, the picture, the JSON file and the checkpoint."""

    iteration: int
    win_rate: float  # on held-out prompts against the reference
    win_rate_se: float
    reward: float | None  # of the held-out responses, where the judge has rewards
    kl: float  # KL(policy || reference) of a held-out response, nats
    kl_se: float
    loss: float  # mean over the iteration's steps, in units of win rate squared
    gradient_norm: float  # largest of the iteration, before clipping
    train_reward: float | None  # of the responses to training prompts
    truncated: float  # share of them that met the length limit
    tokens: int  # of the responses to training prompts
    seconds: float  # of the whole iteration

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)


class Observer(Protocol):
    """Who wants to know how far a run is."""

    def phase(self, iteration: int, name: str, steps: int) -> None:
        """A phase of an iteration begins and will `advance` this many times."""
        ...

    def advance(self) -> None: ...

    def finished(self, record: Record) -> None:
        """An iteration is over and, if the run keeps checkpoints, on the disk."""
        ...

    def note(self, text: str) -> None:
        """Something a reader of the log should know."""
        ...


class Unobserved:
    """Nobody watches."""

    def phase(self, iteration: int, name: str, steps: int) -> None:
        pass

    def advance(self) -> None:
        pass

    def finished(self, record: Record) -> None:
        pass

    def note(self, text: str) -> None:
        pass


def stream(seed: int, *labels: object) -> int:
    """Return a seed for one use of randomness.

    Every use (the responses of iteration 3, the order of its steps ...) has its own, so a resumed run draws what an
    uninterrupted one would have drawn, and no random-number state has to be saved.

    Example:
        >>> stream(0, "sample", 3) == stream(0, "sample", 3), stream(0, "sample", 3) == stream(0, "sample", 4)
        (True, False)
    """
    digest = hashlib.sha256("/".join(map(str, (seed, *labels))).encode()).digest()
    return int.from_bytes(digest[:7], "big")
