"""Listwise DPO: the Plackett-Luce likelihood of a whole ranking."""

from __future__ import annotations

import torch
from torch import Tensor

from windkern._checks import check_number
from windkern.losses._groups import (
    check_frozen_logps,
    check_logps,
    check_reduction,
    check_rewards,
    fill,
    kept_responses,
    pairs_of,
    reduce_groups,
)


def listwise_dpo(
    logps: Tensor,
    ref_logps: Tensor,
    rewards: Tensor,
    *,
    beta: float = 0.1,
    where: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return the Plackett-Luce loss of each group.

    Formula: with z = beta (l - r), -sum_i [z_i - log sum_{j: R_j <= R_i} exp z_j]: minus the log-likelihood of picking
    the responses best first, each among those not yet picked. Two responses give `dpo`.

    Tied responses are each compared with all of their tie (Breslow's form), so no order among them is invented.

    Args:
        logps: (B, N) float32 or float64, log-probs of the responses under the policy, nats, summed over tokens.
        ref_logps: (B, N), dtype of `logps`, under the frozen reference.
        rewards: (B, N), any finite scores, such as negative ranks; only their order counts.
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

    Memory:
        O(N^2) per group. For thousands of items use `windkern.pair_loss`.

    Source:
        Rafailov et al. 2023 (arXiv 2305.18290), appendix on the Plackett-Luce model.

    Example:
        >>> import torch
        >>> from windkern.losses import listwise_dpo
        >>> logps = torch.tensor([[-9.0, -11.0, -10.0]], requires_grad=True)
        >>> loss = listwise_dpo(logps, logps.detach(), torch.tensor([[3.0, 1.0, 2.0]]), beta=0.6)  # log 3 + log 2
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}", [round(g, 4) for g in logps.grad[0].tolist()])
        1.7918 [-0.4, 0.5, -0.1]
    """
    check_logps(logps)
    ref_logps = check_frozen_logps("ref_logps", ref_logps, logps)
    check_number("beta", beta, above=0)
    check_reduction(reduction)
    where = kept_responses(where, logps)
    rewards = check_rewards(rewards, logps, where)
    z = beta * (fill(logps, where) - fill(ref_logps, where))
    left = pairs_of(where) & (rewards[:, None, :] <= rewards[:, :, None])  # (B, N, N): j is not better than i
    # Hazard: a row that is all -inf gives NaN. Remedy: every response, masked or not, counts in its own row.
    left = left | torch.eye(left.shape[-1], dtype=torch.bool, device=left.device)
    totals = fill(z[:, None, :].expand(left.shape), left, float("-inf")).logsumexp(-1)
    return reduce_groups(fill(totals - z, where).sum(-1), reduction)
