"""J-BOND: distil best-of-2 of a moving anchor, with forward and backward KL at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from windkern._checks import check_number
from windkern.losses._groups import (
    check_constant,
    check_frozen_logps,
    check_logps,
    check_reduction,
    check_rewards,
    fill,
    kept_responses,
    reduce_groups,
)

PENALTY = -math.log(16)  # makes the expected reward log p at p = 1/2: -(1/4) log 16 = -log 2


def bond(
    logps: Tensor,
    anchor_logps: Tensor,
    rewards: Tensor,
    *,
    baseline: Tensor | None = None,
    beta: float = 0.5,
    gamma: float = 0.1,
    where: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return the J-BOND loss of each prompt, over one response of the policy and two of the anchor.

    Formula: with y the policy's response, y* the better of the anchor's (a tie takes half of each), a the anchor's
    log-probs and r_J = -log 16 if y is worse than both of the anchor's, else 0,

        -(1 - beta) l(y*) - beta (r_J - baseline) l(y) + (beta + gamma)/2 (l(y) - a(y))^2

    Gradients: dL/dl(y*) = -(1 - beta), the forward KL: imitate the best of 2. dL/dl(y) = -beta (R - baseline) +
    gamma (l(y) - a(y)) with R = r_J - (l(y) - a(y)), the backward KL as a policy gradient and the pull to the anchor.
    A positive gamma attracts. The derivative of half the square is the published coefficient (which is held constant
    there), so value and gradient are consistent here.

    Args:
        logps: (B, 3) float32 or float64, log-probs under the policy, nats, summed over tokens: one response that the
            policy sampled, then two that the anchor sampled.
        anchor_logps: (B, 3), dtype of `logps`, under the anchor, a moving average of past policies. The loss reads
            column 0 only.
        rewards: (B, 3), any finite scores; only their order counts.
        baseline: (B,), subtracted from r_J - (l(y) - a(y)), e.g. its mean over the batch; None for 0. It lowers the
            variance of the gradient without changing its expectation.
        beta: weight of the backward KL, in [0, 1]; the forward one has 1 - beta.
        gamma: weight of the pull to the anchor, not negative.
        where: (B, 3) bool, responses that count, None for all. An incomplete triple contributes 0 with gradient 0,
            whatever it holds.
        reduction: "mean" (sum over groups / B), "sum", or "none".

    Returns:
        () or, for "none", (B,), dtype of `logps`.

    Raises:
        TypeError: an argument is not a tensor or not float32 or float64, `where` is not bool, or log-probs mix dtypes.
        ValueError: a shape or device does not fit; a constant requires grad; `rewards` are not finite (checked on a CPU
            only); `beta`, `gamma` or `reduction` is out of range.

    Source:
        Sessa et al. 2024 (arXiv 2407.14622), J-BOND. It has no pull to a fixed reference: the KL to the initial anchor
        grows without bound.

    Example:
        >>> import torch
        >>> from windkern.losses import bond
        >>> logps = torch.tensor([[-9.0, -11.0, -10.0]], requires_grad=True)
        >>> loss = bond(logps, logps.detach() - 1, torch.tensor([[0.0, 2.0, 1.0]]))  # r_J = -2.77, l - a = 1
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}", [round(g, 4) for g in logps.grad[0].tolist()])
        -6.6766 [1.9863, -0.5, 0.0]
    """
    check_logps(logps, responses=3)
    anchor_logps = check_frozen_logps("anchor_logps", anchor_logps, logps)
    check_number("beta", beta, least=0)
    if beta > 1:
        raise ValueError(f"beta must be at most 1, got {beta!r}")
    check_number("gamma", gamma, least=0)
    check_reduction(reduction)
    where = kept_responses(where, logps, least=3)
    rewards = check_rewards(rewards, logps, where)
    whole = where.all(-1)
    base = 0.0 if baseline is None else fill(check_constant("baseline", baseline, logps, (logps.shape[0],)), whole)
    logps = fill(logps, where)

    mine, first, second = rewards.unbind(-1)
    share = (
        (first > second).to(logps.dtype) + (first >= second).to(logps.dtype)
    ) / 2  # of the first: 1, 1/2 for a tie, 0
    forward = share * logps[:, 1] + (1 - share) * logps[:, 2]
    reward = PENALTY * ((mine < first) & (mine < second)).to(logps.dtype)
    gap = logps[:, 0] - fill(anchor_logps, where)[:, 0]
    value = -(1 - beta) * forward - beta * (reward - base) * logps[:, 0] + (beta + gamma) / 2 * gap.square()
    return reduce_groups(fill(value, whole), reduction)


def baseline(rewards: Tensor, old_logps: Tensor, anchor_logps: Tensor, where: Tensor | None = None) -> Tensor:
    """Return the mean of r_J - (l - a) over the policy's own samples of G groups, (G,), the same for each of them.

    The published baseline is the mean over the samples whose gradients it shifts, so triples that `bond` leaves out do
    not count; if it leaves out all of them, the mean is 0.

    Args:
        rewards: (G, 3), any finite scores.
        old_logps: (G, 3) under the policy that sampled column 0.
        anchor_logps: (G, 3) under the anchor.
        where: (G, 3) bool, responses that count, None for all.

    Example:
        >>> import torch
        >>> zero = torch.zeros(2, 3)
        >>> baseline(torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]]), zero, zero)  # one of two is worse than both
        tensor([-1.3863, -1.3863])
    """
    mine, first, second = rewards.unbind(-1)
    gap = old_logps[:, 0] - anchor_logps[:, 0]
    value = PENALTY * ((mine < first) & (mine < second)) - gap
    whole = torch.ones_like(value, dtype=torch.bool) if where is None else where.all(-1)
    return (torch.where(whole, value, 0.0).sum() / whole.sum().clamp(min=1)).expand(len(rewards))
