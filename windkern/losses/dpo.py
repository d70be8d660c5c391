"""DPO and its relatives: a chosen and a rejected response against the reference, with several links."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from windkern._checks import check_choice, check_number
from windkern.losses._groups import (
    check_frozen_logps,
    check_logps,
    check_reduction,
    check_smoothing,
    fill,
    kept_responses,
    logistic,
    pair_gaps,
    reduce_groups,
)

DISCOPOP_TAU = 0.05  # as in the published loss


def _sigmoid(chosen: Tensor, rejected: Tensor, beta: float, smoothing: float) -> Tensor:
    return logistic(beta * (chosen - rejected), smoothing)


def _robust(chosen: Tensor, rejected: Tensor, beta: float, smoothing: float) -> Tensor:
    u = beta * (chosen - rejected)
    return ((1 - smoothing) * logistic(u) - smoothing * logistic(-u)) / (1 - 2 * smoothing)


def _ipo(chosen: Tensor, rejected: Tensor, beta: float, smoothing: float) -> Tensor:
    return (chosen - rejected - 1 / (2 * beta)).square()


def _hinge(chosen: Tensor, rejected: Tensor, beta: float, smoothing: float) -> Tensor:
    return (1 - beta * (chosen - rejected)).relu()


def _bco(chosen: Tensor, rejected: Tensor, beta: float, smoothing: float) -> Tensor:
    return logistic(beta * chosen) + logistic(-beta * rejected)


def _discopop(chosen: Tensor, rejected: Tensor, beta: float, smoothing: float) -> Tensor:
    # Hazard: sigma(u / tau) exp(-u) is 0 * inf for u far below 0. Remedy: compute the product as one exponential.
    u = beta * (chosen - rejected)
    gate = logsigmoid(u / DISCOPOP_TAU)
    return logistic(u) * torch.sigmoid(-u / DISCOPOP_TAU) + (gate - u).exp()


@dataclass(frozen=True)
class Link:
    """The loss of a pair, from the log-ratios of its two responses to the reference."""

    value: Callable[[Tensor, Tensor, float, float], Tensor]  # (chosen (B,), rejected (B,), beta, smoothing) -> (B,)
    takes_smoothing: bool
    formula: str
    source: str


LINKS = {
    "sigmoid": Link(
        _sigmoid,
        True,
        "-(1-eps) log sigma(beta h) - eps log sigma(-beta h)",
        "DPO (arXiv 2305.18290); cDPO for eps > 0",
    ),
    "robust": Link(
        _robust,
        True,
        "[-(1-eps) log sigma(beta h) + eps log sigma(-beta h)] / (1 - 2 eps)",
        "robust DPO (arXiv 2403.00409)",
    ),
    "ipo": Link(_ipo, False, "(h - 1/(2 beta))^2", "IPO (arXiv 2310.12036)"),
    "hinge": Link(_hinge, False, "max(0, 1 - beta h)", "SLiC (arXiv 2305.10425)"),
    "bco": Link(
        _bco, False, "-log sigma(beta (l_w - r_w)) - log sigma(-beta (l_l - r_l))", "BCO (arXiv 2404.04656), pairs"
    ),
    "discopop": Link(
        _discopop,
        False,
        "-(1-g) log sigma(beta h) + g exp(-beta h), g = sigma(beta h / 0.05)",
        "DiscoPOP (arXiv 2406.08414)",
    ),
}


def dpo(
    logps: Tensor,
    ref_logps: Tensor,
    *,
    beta: float = 0.1,
    link: str = "sigmoid",
    label_smoothing: float = 0.0,
    where: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return the DPO loss of each pair (chosen, rejected).

    Formula: with the margin h = (l_w - r_w) - (l_l - r_l),

    =========== =========================================================== ======================================
    link        value of a pair                                             known as
    =========== =========================================================== ======================================
    sigmoid     -(1-eps) log sigma(beta h) - eps log sigma(-beta h)         DPO; cDPO with eps = `label_smoothing`
    robust      [-(1-eps) log sigma(beta h) + eps log sigma(-beta h)]       robust DPO: unbiased if a share eps of the
                / (1 - 2 eps)                                               labels is flipped
    ipo         (h - 1/(2 beta))^2                                          IPO
    hinge       max(0, 1 - beta h)                                          SLiC
    bco         -log sigma(beta (l_w - r_w)) - log sigma(-beta (l_l - r_l)) BCO without its running shift
    discopop    -(1-g) log sigma(beta h) + g exp(-beta h),                  DiscoPOP, a loss found by search; not
                g = sigma(beta h / 0.05)                                    convex
    =========== =========================================================== ======================================

    Other variants that libraries offer under the name of DPO are `exo`, `nca`, `apo`, `aot` and, for verdicts instead
    of win rates, `sppo(win_rates=[1, 0], eta=1/beta)`.

    Args:
        logps: (B, 2) float32 or float64, log-probs of chosen and rejected under the policy, nats, summed over tokens.
        ref_logps: (B, 2), dtype of `logps`, under the frozen reference.
        beta: weight of the KL to the reference, positive.
        link: a name from the table above.
        label_smoothing: chance that a label is wrong, in [0, 1/2); for the links sigmoid and robust only.
        where: (B, 2) bool, responses that count, None for all. An incomplete pair contributes 0 with gradient 0,
            whatever it holds.
        reduction: "mean" (sum over pairs / B), "sum", or "none".

    Returns:
        () or, for "none", (B,), dtype of `logps`.

    Raises:
        TypeError: an argument is not a tensor or not float32 or float64, `where` is not bool, or log-probs mix dtypes.
        ValueError: a shape or device does not fit; `ref_logps` requires grad; `beta`, `link`, `label_smoothing` or
            `reduction` is out of range; `label_smoothing` is given for a link without it.

    Source:
        Rafailov et al. 2023 (arXiv 2305.18290) for sigmoid, Azar et al. 2023 (arXiv 2310.12036) for ipo (with log-probs
        summed as in the paper; TRL averages them over tokens), Zhao et al. 2023 (arXiv 2305.10425) for hinge, Ray
        Chowdhury et al. 2024 (arXiv 2403.00409) for robust, Jung et al. 2024 (arXiv 2404.04656) for bco (TRL's table of
        losses shows the formula of sigmoid for it, its code this one), Lu et al. 2024 (arXiv 2406.08414) for discopop.

    Example:
        >>> import torch
        >>> from windkern.losses import dpo
        >>> logps = torch.tensor([[-9.0, -11.0]], requires_grad=True)
        >>> loss = dpo(logps, torch.tensor([[-10.0, -10.0]]), beta=0.5)  # h = 2
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}", [round(g, 4) for g in logps.grad[0].tolist()])
        0.3133 [-0.1345, 0.1345]
    """
    check_logps(logps, responses=2)
    ref_logps = check_frozen_logps("ref_logps", ref_logps, logps)
    check_number("beta", beta, above=0)
    chosen_link = LINKS[check_choice("link", link, LINKS)]
    check_smoothing(label_smoothing)
    if label_smoothing and not chosen_link.takes_smoothing:
        raise ValueError(f"label_smoothing has no meaning for link={link!r}; use link='sigmoid' or 'robust'")
    check_reduction(reduction)
    where = kept_responses(where, logps)
    values = chosen_link.value(*pair_gaps(logps, ref_logps, where), beta, label_smoothing)
    return reduce_groups(fill(values, where.all(-1)), reduction)
