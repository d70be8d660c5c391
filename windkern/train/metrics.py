"""Numbers a step reports about its groups, beside the loss."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from windkern.train.config import WindConfig
from windkern.train.evaluation.evaluate import Evaluation
from windkern.train.focus import exploitability
from windkern.train.groups import FitGroup
from windkern.train.report.progress import Record
from windkern.train.rollouts import Rollout


def step_metrics(logps: Tensor, constants: dict[str, Tensor], config: WindConfig) -> dict[str, Tensor]:
    """Return how far the policy has moved in the groups of a step, and how well the target is met.

    Scalars where the log-probs are: a number for the host would make it wait for the forward pass on a GPU.

    Args:
        logps: (B, K) of the policy, nats.
        constants: old_logps, ref_logps, where (B, K), prefs (B, K, K) or win_rates (B, K), as far as the loss has them;
            responses that `where` leaves out do not count, unless it leaves out all.
        config: with eta and beta of loss="wind".

    Returns:
        kl_old: mean of log pi_t - log pi_theta over the responses, an estimate of KL(pi_t || pi_theta), nats.
        kl_ref: mean of log pi_theta - log pi_ref over the responses, nats; samples are those of pi_t.
        residual: root mean square of (s_i - mean s) / c - (w_i - mean w), in units of win rate (wind).
        implied_win_rate_max, outside: largest p_i = mean w + (s_i - mean s) / c, and the share outside [0, 1] (wind).
    """
    found = {}
    old, ref = constants.get("old_logps"), constants.get("ref_logps")
    kept = constants.get("where", torch.ones_like(logps, dtype=torch.bool))
    kept = kept | ~kept.any()  # processes must report the same names
    if old is not None:
        found["kl_old"] = _mean_over(kept, old - logps)
    if ref is not None:
        found["kl_ref"] = _mean_over(kept, logps - ref)
    if config.loss == "wind":
        win_rates = win_rates_of(constants)
        c = config.step_scale
        s = (logps - old) + config.eta * config.beta / (1 + config.eta * config.beta) * (old - ref)
        count = kept.sum(-1, keepdim=True).clamp(min=1)
        error = (s / c - win_rates).masked_fill(~kept, 0.0)
        implied = win_rates + error - error.sum(-1, keepdim=True) / count
        found["residual"] = _mean_over(kept, (implied - win_rates).square()).sqrt()
        found["implied_win_rate_max"] = implied.masked_fill(~kept, -torch.inf).max()
        found["outside"] = _mean_over(kept, ((implied < 0) | (implied > 1)).to(implied.dtype))
    return found


def rollout_metrics(rollouts: list[Rollout]) -> dict[str, float]:
    """Return what an iteration's responses are like.

    Returns:
        length: mean tokens of a response.
        truncated: share of the responses that met the length limit.
        reward: mean, where the judge has rewards.
        ties: share of the pairs with preference 1/2, where responses were judged.
        decided: mean |2 P_ij - 1| over pairs.
    """
    responses = sum(len(rollout.texts) for rollout in rollouts)
    found = {
        "length": sum(rollout.tokens for rollout in rollouts) / responses,
        "truncated": sum(sum(rollout.truncated) for rollout in rollouts) / responses,
    }
    rewards = [reward for rollout in rollouts for reward in rollout.rewards or ()]
    if rewards:
        found["reward"] = sum(rewards) / len(rewards)
    if rollouts[0].prefs is not None:
        prefs = torch.tensor([rollout.prefs for rollout in rollouts])
        pairs = prefs[:, ~torch.eye(prefs.shape[-1], dtype=torch.bool)]
        found["ties"] = float((pairs == 0.5).float().mean())
        found["decided"] = float((2 * pairs - 1).abs().mean())
    return found


def make_record(
    iteration: int,
    rollouts: list[Rollout],
    result: Evaluation | None,
    lines: Sequence[dict[str, float]],
    seconds: float,
) -> Record:
    """The record of an iteration: of its responses, its evaluation, and the log lines of its steps."""
    norms = [line["grad_norm"] for line in lines if "grad_norm" in line]
    found = rollout_metrics(rollouts)
    win_rate, reward, kl = (getattr(result, name, None) for name in ("win_rate", "reward", "kl"))
    return Record(
        iteration=iteration,
        win_rate=None if win_rate is None else win_rate.mean,
        win_rate_se=None if win_rate is None else win_rate.standard_error,
        reward=None if reward is None else reward.mean,
        kl=None if kl is None else kl.mean,
        kl_se=None if kl is None else kl.standard_error,
        loss=mean(line["loss"] for line in lines) if lines else None,
        gradient_norm=max(norms, default=None),
        train_reward=found.get("reward"),
        truncated=found["truncated"],
        tokens=sum(rollout.tokens for rollout in rollouts),
        seconds=seconds,
    )


def _mean_over(kept: Tensor, values: Tensor) -> Tensor:
    """() mean of the values that `kept` has; what is left out may be anything."""
    return torch.where(kept, values, 0.0).sum() / kept.sum()


def group_metrics(groups: Sequence[FitGroup], config: WindConfig) -> dict[str, float]:
    """Return what an iteration's groups say about pi_t before its first step.

    Returns:
        exploitability: mean over groups of the estimate of `windkern.train.focus` (wind with beta above 0), in win
            rates.
    """
    if config.loss != "wind" or not config.beta:
        return {}
    old, ref = (torch.stack([group.constants[name] for group in groups]) for name in ("old_logps", "ref_logps"))
    win_rates = torch.stack([win_rates_of(group.constants) for group in groups])
    where = torch.stack([group.constants["where"] for group in groups]) if "where" in groups[0].constants else None
    return {"exploitability": float(exploitability(old, ref, win_rates, config.beta, where=where).mean())}


def win_rates_of(constants: dict[str, Tensor]) -> Tensor:
    """(..., K) win rates among the constants of groups, whether given or as means of preferences."""
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
    """Arithmetic mean.

    Example:
        >>> mean([1.0, 2.0])
        1.5
    """
    values = list(values)
    return sum(values) / len(values)
