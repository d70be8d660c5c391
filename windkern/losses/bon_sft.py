"""Best-of-N fine-tuning: imitate the best response of each group."""

from __future__ import annotations

from torch import Tensor

from windkern.losses._groups import (
    check_logps,
    check_reduction,
    check_rewards,
    fill,
    kept_responses,
    reduce_groups,
)


def bon_sft(
    logps: Tensor,
    rewards: Tensor,
    *,
    where: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return the negative log-likelihood of the best response of each group.

    Formula: -l_best, averaged over the best ones if several tie. For responses drawn from pi, its gradient is, in
    expectation, that of KL(best-of-K of pi || policy): the forward half of BOND.

    Args:
        logps: (B, N) float32 or float64, log-probs of the responses under the policy, nats, summed over tokens.
        rewards: (B, N), any finite scores, win rates included; only the largest counts.
        where: (B, N) bool, responses that count, None for all. The others can hold anything, even NaN. A group with
            fewer than two left contributes 0 with gradient 0.
        reduction: "mean" (sum over groups / B), "sum", or "none".

    Returns:
        () or, for "none", (B,), dtype of `logps`.

    Raises:
        TypeError: an argument is not a tensor or not float32 or float64, `where` is not bool, or log-probs mix dtypes.
        ValueError: a shape or device does not fit; `rewards` require grad or are not finite (checked on a CPU only);
            `reduction` is unknown.

    Source:
        Rejection sampling as in Touvron et al. 2023 (arXiv 2307.09288); Sessa et al. 2024 (arXiv 2407.14622) for the
        forward KL to best-of-N.

    Example:
        >>> import torch
        >>> from windkern.losses import bon_sft
        >>> logps = torch.tensor([[-9.0, -11.0, -10.0]], requires_grad=True)
        >>> loss = bon_sft(logps, torch.tensor([[0.0, 2.0, 1.0]]))
        >>> loss.backward()
        >>> loss.item(), logps.grad.int().tolist()
        (11.0, [[0, -1, 0]])
    """
    check_logps(logps)
    check_reduction(reduction)
    where = kept_responses(where, logps)
    rewards = check_rewards(rewards, logps, where)
    top = fill(rewards, where, float("-inf")).amax(-1, keepdim=True)
    best = (where & (rewards == top)).to(logps.dtype)
    share = best / best.sum(-1, keepdim=True).clamp(min=1)
    return reduce_groups(-(share * fill(logps, where)).sum(-1), reduction)
