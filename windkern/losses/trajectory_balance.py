"""Trajectory balance (TBA, VarGrad): regression of log-ratios to the reference on rewards, from any sampler."""

from __future__ import annotations

from torch import Tensor

from windkern._checks import check_number
from windkern.losses._groups import (
    check_constant,
    check_frozen_logps,
    check_logps,
    check_reduction,
    check_rewards,
    fill,
    group_mean,
    group_variance,
    kept_responses,
    reduce_groups,
    residual,
)


def trajectory_balance(
    logps: Tensor,
    ref_logps: Tensor,
    rewards: Tensor,
    *,
    log_z: Tensor | None = None,
    beta: float,
    where: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Trajectory-balance loss of each group.

    Formula: (1/K) sum_i (log Z + d_i)^2 with d_i = l_i - r_i - R_i / beta and, unless `log_z` is given, the group's own
    estimate log Z = -mean d (VarGrad), which makes it the variance of d. The optimum is pi_ref exp(R / beta) / Z.

    The responses may come from any policy: no importance ratio occurs, so a replay buffer needs no correction. Samples
    of the policy itself make the gradient, in expectation, that of 2 KL(policy || optimum), times (K-1)/K with the
    group's estimate of log Z.

    Args:
        logps: (B, N) float32 or float64, log-probs of the responses under the policy, nats, summed over tokens.
        ref_logps: (B, N), dtype of `logps`, under the frozen reference.
        rewards: (B, N), any finite scores.
        log_z: (B,) nats, log Z where it is known or learned elsewhere; None takes the group's estimate.
        beta: weight of the KL to the reference, positive.
        where: (B, N) bool, responses that take part, None for all. The others may hold anything, NaN included. A group
            with fewer than two left contributes 0 and gradient 0.
        reduction: "mean" (sum over groups / B), "sum", or "none".

    Returns:
        () or, for "none", (B,), dtype of `logps`.

    Raises:
        TypeError: a tensor is not one, is not float32 or float64, `where` is not bool, or the log-probs mix dtypes.
        ValueError: a shape or device does not fit; a constant requires grad; `rewards` are not finite (looked at on a
            CPU only); `beta` or `reduction` is out of range.

    Source:
        Bartoldson et al. 2025, TBA (arXiv 2503.18929); docs/theory.md, section 10.

    Example:
        >>> import torch
        >>> from windkern.losses import trajectory_balance
        >>> logps = torch.tensor([[-9.0, -11.0]], requires_grad=True)
        >>> loss = trajectory_balance(logps, logps.detach(), torch.tensor([[1.0, 0.0]]), beta=0.5)  # d = -2, 0
        >>> loss.backward()
        >>> loss.item(), logps.grad.tolist()
        (1.0, [[-1.0, 1.0]])
    """
    check_logps(logps)
    ref_logps = check_frozen_logps("ref_logps", ref_logps, logps)
    check_number("beta", beta, above=0)
    check_reduction(reduction)
    where = kept_responses(where, logps)
    rewards = check_rewards(rewards, logps, where)
    ref_logps = fill(ref_logps, where)
    d = residual(fill(logps, where), ref_logps, ref_logps, b=1.0) - rewards / beta  # the sampler does not occur
    if log_z is None:
        return reduce_groups(group_variance(d, where), reduction)
    log_z = fill(check_constant("log_z", log_z, logps, (logps.shape[0],)), where.any(-1))
    return reduce_groups(group_mean((log_z[:, None] + d).square(), where), reduction)
