"""NCA: noise contrastive alignment, which determines each log-ratio and not only their gaps."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from windkern._checks import check_number
from windkern.losses._groups import (
    check_frozen_logps,
    check_logps,
    check_reduction,
    check_rewards,
    fill,
    first_of_pair,
    group_mean,
    kept_responses,
    masked_softmax,
    reduce_groups,
)


def nca(
    logps: Tensor,
    ref_logps: Tensor,
    rewards: Tensor | None = None,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
    where: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return the NCA loss of each group.

    Formula: -sum_i q_i log sigma(beta d_i) - (1/K) sum_i log sigma(-beta d_i) with d_i = l_i - r_i and
    q = softmax(R / alpha) over the group, or q = (1, 0) for pairs without rewards, which gives

        -log sigma(beta d_w) - 1/2 log sigma(-beta d_w) - 1/2 log sigma(-beta d_l)

    Unlike `dpo` and `infonca`, it is not invariant to a constant in d: the chosen response is pulled up until
    beta d_w = log 2 and no further, so its likelihood does not fall with that of the rejected one.

    Args:
        logps: (B, N) float32 or float64, log-probs of the responses under the policy, nats, summed over tokens.
        ref_logps: (B, N), dtype of `logps`, under the frozen reference.
        rewards: (B, N), any finite scores; None for pairs (N = 2) of a chosen and a rejected response.
        beta: weight of the KL to the reference, positive.
        alpha: temperature of the target, positive; for `rewards`.
        where: (B, N) bool, responses that count, None for all. The others can hold anything, even NaN. A group with
            fewer than two left contributes 0 with gradient 0.
        reduction: "mean" (sum over groups / B), "sum", or "none".

    Returns:
        () or, for "none", (B,), dtype of `logps`.

    Raises:
        TypeError: an argument is not a tensor or not float32 or float64, `where` is not bool, or log-probs mix dtypes.
        ValueError: a shape or device does not fit; a constant requires grad; `rewards` are missing for N != 2 or not
            finite (checked on a CPU only); `beta`, `alpha` or `reduction` is out of range.

    Source:
        Chen et al. 2024 (arXiv 2402.05369).

    Example:
        >>> import torch
        >>> from windkern.losses import nca
        >>> logps = torch.tensor([[-9.0, -11.0]], requires_grad=True)
        >>> loss = nca(logps, logps.detach(), beta=0.5)  # 2 log 2
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}", logps.grad.tolist())
        1.3863 [[-0.125, 0.125]]
    """
    check_logps(logps)
    ref_logps = check_frozen_logps("ref_logps", ref_logps, logps)
    check_number("beta", beta, above=0)
    check_number("alpha", alpha, above=0)
    check_reduction(reduction)
    where = kept_responses(where, logps)
    if rewards is not None:
        q = masked_softmax(check_rewards(rewards, logps, where) / alpha, where)
    elif logps.shape[1] == 2:
        q = (where & first_of_pair(logps)).to(logps.dtype)
    else:
        raise ValueError(f"rewards may be left out for pairs only, got {logps.shape[1]} responses per group")
    d = beta * (fill(logps, where) - fill(ref_logps, where))
    return reduce_groups(-(q * logsigmoid(d)).sum(-1) - group_mean(logsigmoid(-d), where), reduction)
