"""AOT: prefer one distribution over another, by margins sorted over the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from windkern._checks import check_flag, check_number
from windkern.losses._groups import (
    check_frozen_logps,
    check_logps,
    check_reduction,
    check_smoothing,
    fill,
    kept_responses,
    logistic,
    reduce_groups,
)


def aot(
    logps: Tensor,
    ref_logps: Tensor,
    *,
    beta: float = 0.1,
    paired: bool = True,
    label_smoothing: float = 0.0,
    where: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return the AOT loss of a batch of pairs (chosen, rejected).

    Formula: mean over ranks k of -(1-eps) log sigma(u_k) - eps log sigma(-u_k), with u_k = beta (upper_(k) - lower_(k))
    and

        paired      upper = l_w - l_l,  lower = r_w - r_l     each sorted over the batch
        unpaired    upper = l_w - r_w,  lower = l_l - r_l     likewise; the two columns need not belong together

    The loss asks that one sorted list lies above the other (first-order stochastic dominance), not that each pair is
    ordered. The value of rank k is assigned to the pair whose `upper` has that rank.

    The loss is not separable, because it sorts over the whole batch, so it cannot be used inside `fused_loss`.

    Args:
        logps: (B, 2) float32 or float64, log-probs of chosen and rejected under the policy, nats, summed over tokens.
        ref_logps: (B, 2), dtype of `logps`, under the frozen reference.
        beta: weight of the KL to the reference, positive.
        paired: whether the two columns of a row answer one prompt.
        label_smoothing: eps, chance that a label is wrong, in [0, 1/2).
        where: (B, 2) bool, responses that count, None for all. An incomplete pair contributes 0 with gradient 0,
            whatever it holds.
        reduction: "mean" (sum over pairs / B), "sum", or "none".

    Returns:
        () or, for "none", (B,), dtype of `logps`.

    Raises:
        TypeError: an argument is not a tensor or not float32 or float64, `where` is not bool, log-probs mix dtypes, or
            `paired` is not True or False.
        ValueError: a shape or device does not fit; `ref_logps` requires grad; `beta`, `label_smoothing` or `reduction`
            is out of range.

    Source:
        Melnyk et al. 2024 (arXiv 2406.05882), with the logistic loss.

    Example:
        >>> import torch
        >>> from windkern.losses import aot
        >>> logps = torch.tensor([[-9.0, -11.0], [-10.0, -9.0]], requires_grad=True)
        >>> loss = aot(logps, torch.full((2, 2), -10.0), beta=0.5)  # margins 2, -1 against 0, 0
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}", [round(g, 4) for g in logps.grad[:, 0].tolist()])
        0.6437 [-0.0672, -0.1556]
    """
    check_logps(logps, responses=2)
    ref_logps = check_frozen_logps("ref_logps", ref_logps, logps)
    check_number("beta", beta, above=0)
    check_flag("paired", paired)
    check_smoothing(label_smoothing)
    check_reduction(reduction)
    where = kept_responses(where, logps)
    logps, ref_logps = fill(logps, where), fill(ref_logps, where)
    if paired:
        upper, lower = logps[:, 0] - logps[:, 1], ref_logps[:, 0] - ref_logps[:, 1]
    else:
        upper, lower = (logps - ref_logps).unbind(-1)
    whole = where.all(-1)
    infinity = float("inf")  # masked pairs go to the end of both lists
    order = fill(upper.detach(), whole, infinity).argsort(stable=True)
    partner = fill(lower.detach(), whole, infinity).argsort(stable=True)
    values = logistic(beta * (upper[order] - lower[partner]), label_smoothing)
    return reduce_groups(fill(torch.zeros_like(values).index_copy(0, order, values), whole), reduction)
