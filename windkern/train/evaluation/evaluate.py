"""Estimate a policy's win rate against the reference on held-out prompts, with standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from windkern.train.judges.judge import Judge, ask

NORMAL_95 = 1.96


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and its standard error."""

    mean: float
    standard_error: float

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the normal approximation, mean -+ 1.96 standard errors."""
        reach = NORMAL_95 * self.standard_error
        return self.mean - reach, self.mean + reach


def over_prompts(values: Tensor) -> Estimate:
    """Return the mean of (B, N) values and its standard error, with prompts as the independent units.

        v_b = mean_n values[b, n],  mean = mean_b v_b,  standard error = std(v) / sqrt(B), B - 1 degrees of freedom

    Responses to one prompt are not independent, so the standard error comes from the spread between prompts.

    Example:
        >>> import torch
        >>> estimate = over_prompts(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        >>> estimate.mean, round(estimate.standard_error, 4)
        (0.75, 0.25)
    """
    per_prompt = values.double().flatten(1).mean(1)
    count = per_prompt.shape[0]
    error = float(per_prompt.std()) / math.sqrt(count) if count > 1 else math.nan
    return Estimate(float(per_prompt.mean()), error)


@dataclass(frozen=True)
class Evaluation:
    """The results of a policy against the reference."""

    win_rate: Estimate  # chance that a response of the policy beats one of the reference
    reward: Estimate | None  # mean reward of the policy's responses; None without rewards
    kl: Estimate | None  # KL(policy || reference) of a whole response, nats
    win_rates: tuple[float, ...] = ()  # mean of each prompt over its pairs of responses

    def metrics(self) -> dict[str, float]:
        """Return win rate, reward and KL as far as they are known, and their standard errors as NAME_se."""
        found = {}
        for name in ("win_rate", "reward", "kl"):
            estimate = getattr(self, name)
            if estimate is not None:
                found[name] = estimate.mean
                if math.isfinite(estimate.standard_error):  # a single prompt has none
                    found[f"{name}_se"] = estimate.standard_error
        return found


def compare(
    judge: Judge,
    prompts: Sequence[str],
    policy: Sequence[Sequence[str]],
    reference: Sequence[Sequence[str]],
    log_ratios: Tensor | None = None,
) -> Evaluation:
    """Judge every response of the policy against every response of the reference to the same prompt.

        win rate = mean_b mean_{i, j} P(policy_bi beats reference_bj)        KL = mean_b mean_i (l_bi - r_bi)

    Args:
        judge: compares responses.
        prompts: B prompts.
        policy: B times N responses.
        reference: B times M responses.
        log_ratios: (B, N') log-probs of the policy's responses under it, minus those under the reference, nats.

    Raises:
        ValueError: the lists have different lengths.
    """
    if not len(prompts) == len(policy) == len(reference):
        raise ValueError(
            "prompts, policy and reference must have one entry for each prompt, "
            f"got {len(prompts)}, {len(policy)} and {len(reference)}"
        )
    verdict = ask(judge, prompts, [[*ours, *theirs] for ours, theirs in zip(policy, reference, strict=True)])
    count = len(policy[0])
    wins = verdict.prefs[:, :count, count:]
    return Evaluation(
        win_rate=over_prompts(wins),
        reward=None if verdict.rewards is None else over_prompts(verdict.rewards[:, :count]),
        kl=None if log_ratios is None else over_prompts(log_ratios),
        win_rates=tuple(wins.double().flatten(1).mean(1).tolist()),
    )
