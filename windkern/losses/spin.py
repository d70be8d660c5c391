"""SPIN: prefer a person's answer to the model's own, relative to the previous model."""

from __future__ import annotations

from torch import Tensor

from windkern._checks import check_number
from windkern.losses._groups import (
    check_frozen_logps,
    check_logps,
    check_reduction,
    fill,
    kept_responses,
    logistic,
    pair_gaps,
    reduce_groups,
)


def spin(
    logps: Tensor,
    old_logps: Tensor,
    *,
    beta: float = 0.1,
    where: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return the SPIN loss of each pair (demonstration, own sample).

    Formula: -log sigma(beta [(l_w - o_w) - (l_l - o_l)]) with y_w a demonstration and y_l a sample of pi_t, the policy
    of the previous iteration, which is also the reference. The formula is that of `dpo` with this reference; the
    rejected responses are sampled again in every iteration, and no judge is needed.

    Args:
        logps: (B, 2) float32 or float64, log-probs of demonstration and own sample under the policy, nats, summed over
            tokens.
        old_logps: (B, 2), dtype of `logps`, under pi_t.
        beta: strength of the pull to pi_t, positive; lambda in the paper.
        where: (B, 2) bool, responses that count, None for all. An incomplete pair contributes 0 with gradient 0,
            whatever it holds.
        reduction: "mean" (sum over pairs / B), "sum", or "none".

    Returns:
        () or, for "none", (B,), dtype of `logps`.

    Raises:
        TypeError: an argument is not a tensor or not float32 or float64, `where` is not bool, or log-probs mix dtypes.
        ValueError: a shape or device does not fit; `old_logps` requires grad; `beta` or `reduction` is out of range.

    Source:
        Chen et al. 2024 (arXiv 2401.01335), with the logistic loss.

    Example:
        >>> import torch
        >>> from windkern.losses import spin
        >>> logps = torch.tensor([[-9.0, -11.0]], requires_grad=True)
        >>> loss = spin(logps, logps.detach(), beta=0.5)
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}", logps.grad.tolist())
        0.6931 [[-0.25, 0.25]]
    """
    check_logps(logps, responses=2)
    old_logps = check_frozen_logps("old_logps", old_logps, logps)
    check_number("beta", beta, above=0)
    check_reduction(reduction)
    where = kept_responses(where, logps)
    chosen, rejected = pair_gaps(logps, old_logps, where)
    return reduce_groups(fill(logistic(beta * (chosen - rejected)), where.all(-1)), reduction)
