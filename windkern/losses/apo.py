"""APO: anchored preference optimization, for pairs that are better or worse than the model's own responses."""

from __future__ import annotations

from torch import Tensor

from windkern._checks import check_choice, check_number
from windkern.losses._groups import (
    check_frozen_logps,
    check_logps,
    check_reduction,
    fill,
    kept_responses,
    pair_gaps,
    reduce_groups,
)


def _zero(chosen: Tensor, rejected: Tensor) -> Tensor:
    return (-chosen).sigmoid() + rejected.sigmoid()


def _down(chosen: Tensor, rejected: Tensor) -> Tensor:
    return chosen.sigmoid() + (rejected - chosen).sigmoid()


VARIANTS = {"zero": _zero, "down": _down}


def apo(
    logps: Tensor,
    ref_logps: Tensor,
    *,
    beta: float = 0.1,
    variant: str = "zero",
    where: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return the APO loss of each pair (chosen, rejected).

    Formula: with d_w = l_w - r_w, d_l = l_l - r_l,

    ======= ============================================== ==========================================================
    variant value of a pair                                when
    ======= ============================================== ==========================================================
    zero    1 - sigma(beta d_w) + sigma(beta d_l)          chosen responses beat the model's own: raise them
    down    sigma(beta d_w) + 1 - sigma(beta (d_w - d_l))  they do not: lower both, and the rejected one further
    ======= ============================================== ==========================================================

    Args:
        logps: (B, 2) float32 or float64, log-probs of chosen and rejected under the policy, nats, summed over tokens.
        ref_logps: (B, 2), dtype of `logps`, under the frozen reference.
        beta: weight of the KL to the reference, positive.
        variant: a name from the table above.
        where: (B, 2) bool, responses that count, None for all. An incomplete pair contributes 0 with gradient 0,
            whatever it holds.
        reduction: "mean" (sum over pairs / B), "sum", or "none".

    Returns:
        () or, for "none", (B,), dtype of `logps`.

    Raises:
        TypeError: an argument is not a tensor or not float32 or float64, `where` is not bool, or log-probs mix dtypes.
        ValueError: a shape or device does not fit; `ref_logps` requires grad; `beta`, `variant` or `reduction` is out
            of range.

    Source:
        D'Oosterlinck et al. 2024 (arXiv 2408.06266).

    Example:
        >>> import torch
        >>> from windkern.losses import apo
        >>> logps = torch.tensor([[-9.0, -11.0]], requires_grad=True)
        >>> loss = apo(logps, logps.detach(), beta=0.5)
        >>> loss.backward()
        >>> loss.item(), logps.grad.tolist()
        (1.0, [[-0.125, 0.125]])
    """
    check_logps(logps, responses=2)
    ref_logps = check_frozen_logps("ref_logps", ref_logps, logps)
    check_number("beta", beta, above=0)
    value = VARIANTS[check_choice("variant", variant, VARIANTS)]
    check_reduction(reduction)
    where = kept_responses(where, logps)
    chosen, rejected = pair_gaps(logps, ref_logps, where)
    return reduce_groups(fill(value(beta * chosen, beta * rejected), where.all(-1)), reduction)
