"""ORPO: likelihood of the chosen response and an odds ratio, without a reference."""

from __future__ import annotations

import torch
from torch import Tensor

from windkern._checks import check_number
from windkern.losses._groups import (
    check_lengths,
    check_logps,
    check_reduction,
    fill,
    kept_responses,
    logistic,
    reduce_groups,
)


def log_odds(mean_logps: Tensor) -> Tensor:
    """Return log(p / (1 - p)) for p = exp(mean_logps).

    Hazard: 1 - exp(x) rounds to 0 near x = 0. Remedy: use -expm1(x), and keep x below 0 so that p = 1 stays finite.
    """
    x = mean_logps.clamp(max=-torch.finfo(mean_logps.dtype).tiny)
    return x - (-torch.expm1(x)).log()


def orpo(
    logps: Tensor,
    lengths: Tensor,
    *,
    beta: float = 0.1,
    where: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return the ORPO loss of each pair (chosen, rejected).

    Formula: -l_w / T_w - beta log sigma(odds_w - odds_l) with odds = log(p / (1 - p)), p = exp(l / T) the geometric
    mean of the token probabilities, T the number of scored tokens.

    The first term is the mean over the response's tokens, pair by pair. TRL takes one mean over all tokens of the
    batch, prompts included; the second term is the same.

    Args:
        logps: (B, 2) float32 or float64, log-probs of chosen and rejected under the policy, nats, summed over tokens.
        lengths: (B, 2) integers or floats, tokens summed in each of `logps`, at least 1. The division happens here.
        beta: weight of the odds ratio, positive; lambda in the paper.
        where: (B, 2) bool, responses that count, None for all. An incomplete pair contributes 0 with gradient 0,
            whatever it holds.
        reduction: "mean" (sum over pairs / B), "sum", or "none".

    Returns:
        () or, for "none", (B,), dtype of `logps`.

    Raises:
        TypeError: an argument is not a tensor, `logps` is not float32 or float64, `lengths` are not numbers, or `where`
            is not bool.
        ValueError: a shape or device does not fit; `lengths` are below 1 (checked on a CPU only); `beta` or
            `reduction` is out of range.

    Numerics:
        log(1 - exp(x)) is computed from -expm1(x). Log-probs that rounding makes 0 or positive count as the largest
        number below 0.

    Source:
        Hong et al. 2024 (arXiv 2403.07691).

    Example:
        >>> import torch
        >>> from windkern.losses import orpo
        >>> logps = torch.tensor([[-9.0, -16.0]], requires_grad=True)
        >>> loss = orpo(logps, torch.tensor([[10, 8]]))
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}", [round(g, 4) for g in logps.grad[0].tolist()])
        0.9206 [-0.1031, 0.0027]
    """
    check_logps(logps, responses=2)
    check_number("beta", beta, above=0)
    check_reduction(reduction)
    where = kept_responses(where, logps)
    means = fill(logps, where, -1.0) / check_lengths(lengths, logps, where)
    chosen, rejected = log_odds(means).unbind(-1)
    return reduce_groups(fill(-means[:, 0] + beta * logistic(chosen - rejected), where.all(-1)), reduction)
