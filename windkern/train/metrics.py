"""Compute the metrics of steps, iterations and their responses."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from windkern.train.focus import exploitability
from windkern.train.groups import Group
from windkern.train.iteration import Iteration
from windkern.train.loss_plan import LossPlan
from windkern.train.report.progress import Record


def step_metrics(logps: Tensor, constants: Mapping[str, Tensor], plan: LossPlan) -> dict[str, Tensor]:
    """Return how far the policy has moved on the groups of a step, and how well it meets the target.

    The values are scalar tensors on the device of the log-probs; reading one makes the host wait for the forward pass.

    Args:
        logps: (B, K) log-probs of the policy, nats.
        constants: old_logps, ref_logps, where (B, K), prefs (B, K, K) or win_rates (B, K), as far as the loss has them;
            responses that `where` leaves out do not count, unless it leaves out all.
        plan: plan of the loss.

    Returns:
        kl_old: mean of log pi_t - log pi_theta over the responses, an estimate of KL(pi_t || pi_theta), nats.
        kl_ref: mean of log pi_theta - log pi_ref over the responses, nats; samples are those of pi_t.
        And the loss's own `metrics`, such as those of `windkern.losses.wind.fit_metrics`.
    """
    found = {}
    frozen = {name: constants[name] for name in ("old_logps", "ref_logps") if name in constants}
    kept = constants.get("where", torch.ones_like(logps, dtype=torch.bool))
    kept = kept | ~kept.any()  # processes must report the same names
    if "old_logps" in frozen:
        found["kl_old"] = _mean_over(kept, frozen["old_logps"] - logps)
    if "ref_logps" in frozen:
        found["kl_ref"] = _mean_over(kept, logps - frozen["ref_logps"])
    if plan.loss.metrics is not None:
        found |= plan.loss.metrics(logps, win_rates_of(constants), kept, arguments=plan.arguments, **frozen)
    return found


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Return metrics of an iteration's responses.

    Returns:
        length: mean tokens of a response.
        truncated: share of the responses that reached the length limit.
        reward: mean reward, if the judge has rewards.
        ties: share of the pairs with preference 1/2, if responses were judged.
        decided: mean |2 P_ij - 1| over pairs.
    """
    responses = sum(len(group.texts) for group in groups)
    found = {
        "length": sum(group.tokens for group in groups) / responses,
        "truncated": sum(sum(group.truncated) for group in groups) / responses,
    }
    rewards = [reward for group in groups for reward in group.rewards or ()]
    if rewards:
        found["reward"] = sum(rewards) / len(rewards)
    if groups[0].prefs is not None:
        prefs = torch.tensor([group.prefs for group in groups])
        pairs = prefs[:, ~torch.eye(prefs.shape[-1], dtype=torch.bool)]
        found["ties"] = float((pairs == 0.5).float().mean())
        found["decided"] = float((2 * pairs - 1).abs().mean())
    return found


def make_record(
    iteration: Iteration,
    evaluated: Mapping[str, float] | None,
    lines: Sequence[dict[str, float]],
    seconds: float,
) -> Record:
    """Make the record of an iteration.

    Args:
        iteration: the iteration, with its responses.
        evaluated: metrics of its evaluation, named as in `Evaluation.metrics`; None if there was none.
        lines: log lines of its steps.
        seconds: duration of the iteration.
    """
    norms = [line["grad_norm"] for line in lines if "grad_norm" in line]
    found, evaluated = rollout_metrics(iteration.groups), evaluated or {}

    def error_of(name: str) -> float | None:
        return evaluated.get(f"{name}_se", math.nan) if name in evaluated else None

    return Record(
        iteration=iteration.number,
        win_rate=evaluated.get("win_rate"),
        win_rate_se=error_of("win_rate"),
        reward=evaluated.get("reward"),
        kl=evaluated.get("kl"),
        kl_se=error_of("kl"),
        loss=mean(line["loss"] for line in lines) if lines else None,
        gradient_norm=max(norms, default=None),
        train_reward=found.get("reward"),
        truncated=found["truncated"],
        tokens=sum(group.tokens for group in iteration.groups),
        seconds=seconds,
    )


def _mean_over(kept: Tensor, values: Tensor) -> Tensor:
    """Return the () mean of the values that `kept` marks; the others have no effect."""
    return torch.where(kept, values, 0.0).sum() / kept.sum()


def group_metrics(groups: Sequence[Group], plan: LossPlan) -> dict[str, float]:
    """Return metrics of pi_t that an iteration's groups give before the first step.

    Returns:
        exploitability: mean over groups of the estimate of `windkern.train.focus`, in win rates, for losses that seek
            the equilibrium of a game with a pull to the reference.
    """
    if not plan.pull:
        return {}
    old, ref = (torch.stack([group.constants[name] for group in groups]) for name in ("old_logps", "ref_logps"))
    win_rates = torch.stack([win_rates_of(group.constants) for group in groups])
    where = torch.stack([group.constants["where"] for group in groups]) if "where" in groups[0].constants else None
    return {"exploitability": float(exploitability(old, ref, win_rates, plan.pull, where=where).mean())}


def win_rates_of(constants: Mapping[str, Tensor]) -> Tensor:
    """Return (..., K) win rates from the constants of groups, as they are given or as means of preferences."""
    return constants["win_rates"] if "win_rates" in constants else constants["prefs"].mean(-1)


class Averages:
    """Means of numbers since they were last taken; scalar tensors stay on their device until then."""

    def __init__(self) -> None:
        self._values: dict[str, list[float | Tensor]] = defaultdict(list)

    def add(self, values: Mapping[str, float | Tensor]) -> None:
        for name, value in values.items():
            self._values[name].append(value)

    def take(self) -> dict[str, float]:
        tensors = [value for values in self._values.values() for value in values if isinstance(value, Tensor)]
        numbers = iter(torch.stack(tensors).tolist() if tensors else ())  # one transfer, however many there are
        means = {
            name: mean(next(numbers) if isinstance(value, Tensor) else value for value in values)
            for name, values in self._values.items()
        }
        self._values.clear()
        return means


def mean(values: Iterable[float]) -> float:
    """Return the arithmetic mean.

    Example:
        >>> mean([1.0, 2.0])
        1.5
    """
    values = list(values)
    return sum(values) / len(values)
