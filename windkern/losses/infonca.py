"""InfoNCA: cross-entropy from the target distribution of the rewards to the policy's, over a group."""

from __future__ import annotations

from torch import Tensor

from windkern._checks import check_number
from windkern.losses._groups import (
    check_frozen_logps,
    check_logps,
    check_reduction,
    check_rewards,
    fill,
    kept_responses,
    masked_log_softmax,
    masked_softmax,
    reduce_groups,
)


def infonca(
    logps: Tensor,
    ref_logps: Tensor,
    rewards: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
    where: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return the InfoNCA loss of each group.

    Formula: -sum_i q_i log softmax(beta (l - r))_i with q = softmax(R / alpha) over the group. For two responses and
    alpha -> 0 it is `dpo`. Also known as DPO-rw and as the soft form of listwise preference losses.

    Args:
        logps: (B, N) float32 or float64, log-probs of the responses under the policy, nats, summed over tokens.
        ref_logps: (B, N), dtype of `logps`, under the frozen reference.
        rewards: (B, N), any finite scores.
        beta: weight of the KL to the reference, positive.
        alpha: temperature of the target, positive.
        where: (B, N) bool, responses that count, None for all. The others can hold anything, even NaN. A group with
            fewer than two left contributes 0 with gradient 0.
        reduction: "mean" (sum over groups / B), "sum", or "none".

    Returns:
        () or, for "none", (B,), dtype of `logps`.

    Raises:
        TypeError: an argument is not a tensor or not float32 or float64, `where` is not bool, or log-probs mix dtypes.
        ValueError: a shape or device does not fit; a constant requires grad; `rewards` are not finite (checked on a CPU
            only); `beta`, `alpha` or `reduction` is out of range.

    Source:
        Chen et al. 2024 (arXiv 2402.05369).

    Example:
        >>> import torch
        >>> from windkern.losses import infonca
        >>> logps = torch.tensor([[-9.0, -11.0]], requires_grad=True)
        >>> loss = infonca(logps, logps.detach(), torch.tensor([[1.0, 0.0]]), beta=0.5)  # q = 0.73, 0.27
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}", [round(g, 4) for g in logps.grad[0].tolist()])
        0.6931 [-0.1155, 0.1155]
    """
    check_logps(logps)
    ref_logps = check_frozen_logps("ref_logps", ref_logps, logps)
    check_number("beta", beta, above=0)
    check_number("alpha", alpha, above=0)
    check_reduction(reduction)
    where = kept_responses(where, logps)
    q = masked_softmax(check_rewards(rewards, logps, where) / alpha, where)
    log_p = masked_log_softmax(beta * (fill(logps, where) - fill(ref_logps, where)), where)
    return reduce_groups(-(q * log_p).sum(-1), reduction)
