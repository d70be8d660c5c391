"""EXO: reverse KL from the policy's distribution over a group to the target distribution of its rewards."""

from __future__ import annotations

import math

from torch import Tensor

from windkern._checks import check_number
from windkern.losses._groups import (
    check_frozen_logps,
    check_logps,
    check_reduction,
    check_rewards,
    fill,
    first_of_pair,
    kept_responses,
    masked_log_softmax,
    reduce_groups,
)


def exo(
    logps: Tensor,
    ref_logps: Tensor,
    rewards: Tensor | None = None,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
    label_smoothing: float | None = None,
    where: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return the EXO loss of each group.

    Formula: KL(p || q) = sum_i p_i (log p_i - log q_i) with p = softmax(beta (l - r)) over the group and
    q = softmax(R / alpha), or, for pairs without rewards, q = (1 - eps, eps). `infonca` is the other direction for the
    same two distributions; this reverse direction seeks modes, and KL-regularised RL minimises it.

    Args:
        logps: (B, N) float32 or float64, log-probs of the responses under the policy, nats, summed over tokens.
        ref_logps: (B, N), dtype of `logps`, under the frozen reference.
        rewards: (B, N), any finite scores. Either this, or `label_smoothing` for pairs (N = 2, the first chosen).
        beta: weight of the KL to the reference, positive.
        alpha: temperature of the target, positive; for `rewards`.
        label_smoothing: eps, chance that a label is wrong, in (0, 1/2); 0.001 in the paper. 0 would be an infinite
            penalty, because the loss is -log eps where the policy is sure of the wrong response.
        where: (B, N) bool, responses that count, None for all. The others can hold anything, even NaN. A group with
            fewer than two left contributes 0 with gradient 0.
        reduction: "mean" (sum over groups / B), "sum", or "none".

    Returns:
        () or, for "none", (B,), dtype of `logps`.

    Raises:
        TypeError: an argument is not a tensor or not float32 or float64, `where` is not bool, or log-probs mix dtypes.
        ValueError: a shape or device does not fit; a constant requires grad; `rewards` and `label_smoothing` are both
            given or both missing; `label_smoothing` is given for N != 2; `rewards` are not finite (checked on a CPU
            only); a number or `reduction` is out of range.

    Source:
        Ji et al. 2024 (arXiv 2402.00856), EXO-pref for pairs and EXO-rw for rewards.

    Example:
        >>> import torch
        >>> from windkern.losses import exo
        >>> logps = torch.tensor([[-9.0, -11.0]], requires_grad=True)
        >>> loss = exo(logps, logps.detach(), beta=0.5, label_smoothing=0.01)  # p = 1/2, 1/2
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}", [round(g, 4) for g in logps.grad[0].tolist()])
        1.6145 [-0.5744, 0.5744]
    """
    check_logps(logps)
    ref_logps = check_frozen_logps("ref_logps", ref_logps, logps)
    check_number("beta", beta, above=0)
    check_number("alpha", alpha, above=0)
    check_reduction(reduction)
    if (rewards is None) == (label_smoothing is None):
        raise ValueError(
            f"give exactly one of rewards and label_smoothing, got {'neither' if rewards is None else 'both'}"
        )
    where = kept_responses(where, logps)
    if label_smoothing is not None:
        check_number("label_smoothing", label_smoothing, above=0)
        if label_smoothing >= 0.5:
            raise ValueError(f"label_smoothing must be below 0.5, got {label_smoothing!r}")
        if logps.shape[1] != 2:
            raise ValueError(f"label_smoothing is for pairs, got {logps.shape[1]} responses per group; give rewards")
        chosen = first_of_pair(logps).to(logps.dtype)
        log_q = chosen * math.log1p(-label_smoothing) + (1 - chosen) * math.log(label_smoothing)
    else:
        log_q = masked_log_softmax(check_rewards(rewards, logps, where) / alpha, where)
    log_p = masked_log_softmax(beta * (fill(logps, where) - fill(ref_logps, where)), where)
    return reduce_groups(fill(log_p.exp() * (log_p - log_q), where).sum(-1), reduction)
