"""Trajectory balance (TBA, VarGrad): regression of log-ratios to the reference on rewards, for any sampler."""

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
    """Return the trajectory-balance loss of each group.

    Formula: (1/K) sum_i (log Z + d_i)^2 with d_i = l_i - r_i - R_i / beta and, unless `log_z` is given, the group's own
    estimate log Z = -mean d (VarGrad), which makes it the variance of d. The optimum is pi_ref exp(R / beta) / Z.

    The responses can come from any policy: there is no importance ratio, so a replay buffer needs no correction. For
    samples of the policy itself, the gradient is, in expectation, that of 2 KL(policy || optimum), times (K-1)/K with
    the group's estimate of log Z.

    Args:
        logps: (B, N) float32 or float64, log-probs of the responses under the policy, nats, summed over tokens.
        ref_logps: (B, N), dtype of `logps`, under the frozen reference.
        rewards: (B, N), any finite scores.
        log_z: (B,) nats, log Z if it is known or learned elsewhere; None takes the group's estimate.
        beta: weight of the KL to the reference, positive.
        where: (B, N) bool, responses that count, None for all. The others can hold anything, even NaN. A group with
            fewer than two left contributes 0 with gradient 0.
        reduction: "mean" (sum over groups / B), "sum", or "none".

    Returns:
        () or, for "none", (B,), dtype of `logps`.

    Raises:
        TypeError: an argument is not a tensor or not float32 or float64, `where` is not bool, or log-probs mix dtypes.
        ValueError: a shape or device does not fit; a constant requires grad; `rewards` are not finite (checked on a CPU
            only); `beta` or `reduction` is out of range.

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
    d = residual(fill(logps, where), ref_logps, ref_logps, b=1.0) - rewards / beta  # independent of the sampler
    if log_z is None:
        return reduce_groups(group_variance(d, where), reduction)
    log_z = fill(check_constant("log_z", log_z, logps, (logps.shape[0],)), where.any(-1))
    return reduce_groups(group_mean((log_z[:, None] + d).square(), where), reduction)
