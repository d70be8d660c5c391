"""GRPO: the clipped policy gradient of a group, per token."""

from __future__ import annotations

import torch
from torch import Tensor

from windkern._checks import check_choice, check_flag, check_number, check_shape
from windkern.losses._groups import (
    centred,
    check_frozen_logps,
    check_precise,
    check_reduction,
    check_rewards,
    count,
    fill,
    group_mean,
    kept_responses,
    reduce_groups,
)

AVERAGES = ("sequence", "group", "none")
LARGEST = 20.0  # nats; a larger log-ratio of one token is meaningless
STD_FLOOR = 1e-4  # added to the standard deviation, as in TRL


def tamed_exp(x: Tensor) -> Tensor:
    """Return exp(x), continued beyond LARGEST by its tangent.

    Hazard: exp overflows beyond 88, and a clamp has gradient 0 exactly where x must be pushed back. Remedy: a tangent.
    """
    return x.clamp(max=LARGEST).exp() * (1 + (x - LARGEST).relu())


def group_advantages(rewards: Tensor, where: Tensor, scale: bool) -> Tensor:
    """Return R - mean R, divided by the sample std of R if `scale`; 0 for a single response. (B, N) -> (B, N)."""
    gaps = fill(centred(rewards, where), where)
    if not scale:
        return gaps
    std = (gaps.square().sum(-1) / (count(where) - 1).clamp(min=1)).sqrt()
    return gaps / (std + STD_FLOOR)[:, None]


def grpo(
    logps: Tensor,
    old_logps: Tensor,
    ref_logps: Tensor | None = None,
    rewards: Tensor | None = None,
    *,
    advantages: Tensor | None = None,
    clip: float = 0.2,
    clip_high: float | None = None,
    beta: float = 0.0,
    scale_rewards: bool = True,
    average: str = "sequence",
    where: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return the GRPO loss of each group, from the log-probs of single tokens that `token_logps` returns.

    Formula: with the ratio rho = exp(l_t - o_t) of a token and the advantage A_i of its response,

        token     -min(rho A_i, clip(rho, 1 - clip, 1 + clip_high) A_i) + beta (exp(x) - x - 1),  x = r_t - l_t
        A_i       (R_i - mean R) / (std R + 1e-4) over the group, or as given

    averaged over the T_i tokens of a response, then over the K responses of the group (`average="sequence"`).

    With one step per batch, `old_logps` can be `logps.detach()`: the ratio is 1, with the gradient of REINFORCE.

    The loss cannot be used in `fused_loss`, which passes sums over tokens; use it with `token_logps`.

    Args:
        logps: (B, N, T) float32 or float64, log-probs of the tokens under the policy, nats.
        old_logps: (B, N, T), dtype of `logps`, under the policy that sampled them.
        ref_logps: (B, N, T), dtype of `logps`, under the frozen reference; for beta > 0.
        rewards: (B, N), any finite scores. Either this or `advantages`.
        advantages: (B, N), used as they are.
        clip: ratios below 1 - clip are clipped, in (0, 1).
        clip_high: ratios above 1 + clip_high are clipped, positive; None for `clip`. 0.28 in DAPO.
        beta: weight of the KL to the reference, not negative.
        scale_rewards: whether to divide by the standard deviation of the group's rewards (Dr. GRPO does not).
        average: "sequence" (each response counts the same, GRPO), "group" (each token of the group counts the same, as
            DAPO does over the batch), or "none" (tokens add up, responses are averaged; Dr. GRPO up to a constant).
        where: (B, N, T) bool, tokens that count, None for all. The others can hold anything, even NaN. A response
            without such tokens does not count; a group without any contributes 0 with gradient 0.
        reduction: "mean" (sum over groups / B), "sum", or "none".

    Returns:
        () or, for "none", (B,), dtype of `logps`.

    Raises:
        TypeError: an argument is not a tensor or not float32 or float64, `where` is not bool, log-probs mix dtypes, or
            `scale_rewards` is not True or False (TRL's strings "group" and "none" are neither).
        ValueError: a shape or device does not fit; a constant requires grad; `rewards` and `advantages` are both given
            or both missing, or not finite (checked on a CPU only); `ref_logps` are missing for beta > 0, or given for
            beta = 0; a number, `average` or `reduction` is out of range.

    Numerics:
        Beyond e^20 the ratio and the exp of the KL term continue as their tangents: finite, and they still push back.

    Source:
        Shao et al. 2024 (arXiv 2402.03300); Yu et al. 2025, DAPO (arXiv 2503.14476); Liu et al. 2025, Dr. GRPO
        (arXiv 2503.20783).

    Example:
        >>> import torch
        >>> from windkern.losses import grpo
        >>> logps = torch.tensor([[[-1.0, -2.0], [-3.0, -1.0]]], requires_grad=True)
        >>> where = torch.tensor([[[True, True], [True, False]]])
        >>> advantages = torch.tensor([[1.0, -1.0]])
        >>> loss = grpo(logps, logps.detach(), advantages=advantages, where=where)
        >>> loss.backward()
        >>> loss.item(), logps.grad.tolist()
        (0.0, [[[-0.25, -0.25], [0.5, 0.0]]])
    """
    check_precise("logps", logps)
    check_shape("logps", logps, ("B", "N", "T"))
    old_logps = check_frozen_logps("old_logps", old_logps, logps)
    check_number("clip", clip, above=0)
    if clip >= 1:
        raise ValueError(f"clip must be below 1, got {clip!r}")
    clip_high = clip if clip_high is None else check_number("clip_high", clip_high, above=0)
    check_number("beta", beta, least=0)
    if (ref_logps is None) != (beta == 0):
        raise ValueError(f"ref_logps and beta > 0 go together, got beta = {beta!r}")
    check_flag("scale_rewards", scale_rewards)
    check_choice("average", average, AVERAGES)
    check_reduction(reduction)
    where = kept_responses(where, logps, least=0)
    responses = where.any(-1)
    A = _advantages(rewards, advantages, scale_rewards, logps, responses)

    logps = fill(logps, where)
    ratio = tamed_exp(logps - fill(old_logps, where))
    terms = -torch.minimum(ratio * A[:, :, None], ratio.clamp(1 - clip, 1 + clip_high) * A[:, :, None])
    if ref_logps is not None:
        gap = fill(check_frozen_logps("ref_logps", ref_logps, logps), where) - logps
        terms = terms + beta * (tamed_exp(gap) - gap - 1)
    sums = fill(terms, where).sum(-1)
    if average == "group":
        return reduce_groups(sums.sum(-1) / where.sum((-2, -1)).clamp(min=1), reduction)
    per_response = sums / where.sum(-1).clamp(min=1) if average == "sequence" else sums
    return reduce_groups(group_mean(per_response, responses), reduction)


def _advantages(
    rewards: Tensor | None, advantages: Tensor | None, scale: bool, logps: Tensor, responses: Tensor
) -> Tensor:
    if (rewards is None) == (advantages is None):
        raise ValueError(f"give exactly one of rewards and advantages, got {'neither' if rewards is None else 'both'}")
    name, value = ("rewards", rewards) if advantages is None else ("advantages", advantages)
    value = check_rewards(value, logps, responses, name)
    return value if rewards is None else group_advantages(value, responses, scale)
