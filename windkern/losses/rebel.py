"""REBEL: regression of log-ratio gaps on reward gaps, without a pull to a reference."""

from __future__ import annotations

from torch import Tensor

from windkern._checks import check_number
from windkern.losses._groups import (
    check_frozen_logps,
    check_logps,
    check_reduction,
    check_rewards,
    count,
    fill,
    group_variance,
    kept_responses,
    reduce_groups,
    residual,
)


def rebel(
    logps: Tensor,
    old_logps: Tensor,
    rewards: Tensor,
    *,
    eta: float,
    where: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return the REBEL loss of each group.

    Formula: mean over ordered pairs i != j of ((l_i - o_i) - (l_j - o_j) - eta (R_i - R_j))^2. For two responses this
    is the published loss of a pair. It is computed in O(N), as 2K/(K-1) times the variance of l_i - o_i - eta R_i.

    Args:
        logps: (B, N) float32 or float64, log-probs of the responses under the policy, nats, summed over tokens.
        old_logps: (B, N), dtype of `logps`, under pi_t, the policy that sampled them.
        rewards: (B, N), any finite scores.
        eta: step size, positive: nats per unit of reward.
        where: (B, N) bool, responses that count, None for all. The others can hold anything, even NaN. A group with
            fewer than two left contributes 0 with gradient 0.
        reduction: "mean" (sum over groups / B), "sum", or "none".

    Returns:
        () or, for "none", (B,), dtype of `logps`.

    Raises:
        TypeError: an argument is not a tensor or not float32 or float64, `where` is not bool, or log-probs mix dtypes.
        ValueError: a shape or device does not fit; a constant requires grad; `rewards` are not finite (checked on a CPU
            only); `eta` or `reduction` is out of range.

    Source:
        Gao et al. 2024 (arXiv 2404.16767); docs/theory.md, section 10.

    Example:
        >>> import torch
        >>> from windkern.losses import rebel
        >>> logps = torch.tensor([[-9.0, -11.0]], requires_grad=True)
        >>> loss = rebel(logps, logps.detach(), torch.tensor([[3.0, 1.0]]), eta=0.5)  # (0 - 1)^2
        >>> loss.backward()
        >>> loss.item(), logps.grad.tolist()
        (1.0, [[-2.0, 2.0]])
    """
    check_logps(logps)
    old_logps = check_frozen_logps("old_logps", old_logps, logps)
    check_number("eta", eta, above=0)
    check_reduction(reduction)
    where = kept_responses(where, logps)
    rewards = check_rewards(rewards, logps, where)
    old_logps = fill(old_logps, where)
    s = residual(fill(logps, where), old_logps, old_logps, b=0.0)  # no pull to a reference
    K = count(where).to(logps.dtype)
    return reduce_groups(2 * K / (K - 1).clamp(min=1) * group_variance(s - eta * rewards, where), reduction)
