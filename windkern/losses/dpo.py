"""DPO and its relatives: one margin between a chosen and a rejected response, several links."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from windkern._checks import check_choice, check_number
from windkern.losses._groups import (
    check_frozen_logps,
    check_logps,
    check_reduction,
    fill,
    kept_responses,
    reduce_groups,
)


def _sigmoid(margin: Tensor, beta: float, smoothing: float) -> Tensor:
    return -(1 - smoothing) * logsigmoid(beta * margin) - smoothing * logsigmoid(-beta * margin)


def _ipo(margin: Tensor, beta: float, smoothing: float) -> Tensor:
    return (margin - 1 / (2 * beta)).square()


def _hinge(margin: Tensor, beta: float, smoothing: float) -> Tensor:
    return (1 - beta * margin).relu()


@dataclass(frozen=True)
class Link:
    """What a margin h costs."""

    value: Callable[[Tensor, float, float], Tensor]  # (margin (B,), beta, label smoothing) -> (B,)
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
    "ipo": Link(_ipo, False, "(h - 1/(2 beta))^2", "IPO (arXiv 2310.12036)"),
    "hinge": Link(_hinge, False, "max(0, 1 - beta h)", "SLiC (arXiv 2305.10425)"),
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
    """DPO loss of each pair (chosen, rejected).

    Formula: with the margin h = (l_w - r_w) - (l_l - r_l),

    =========== =========================================================== ======================================
    link        value of a pair                                             known as
    =========== =========================================================== ======================================
    sigmoid     -(1-eps) log sigma(beta h) - eps log sigma(-beta h)         DPO; cDPO with eps = `label_smoothing`
    ipo         (h - 1/(2 beta))^2                                          IPO
    hinge       max(0, 1 - beta h)                                          SLiC
    =========== =========================================================== ======================================

    Args:
        logps: (B, 2) float32 or float64, log-probs of chosen and rejected under the policy, nats, summed over tokens.
        ref_logps: (B, 2), dtype of `logps`, under the frozen reference.
        beta: weight of the KL to the reference, positive.
        link: a name from the table above.
        label_smoothing: chance that a label is wrong, in [0, 1/2); for the sigmoid link only.
        where: (B, 2) bool, responses that take part, None for all. A pair that is not whole contributes 0 and gradient
            0, whatever it holds.
        reduction: "mean" (sum over pairs / B), "sum", or "none".

    Returns:
        () or, for "none", (B,), dtype of `logps`.

    Raises:
        TypeError: a tensor is not one, is not float32 or float64, `where` is not bool, or the log-probs mix dtypes.
        ValueError: a shape or device does not fit; `ref_logps` requires grad; `beta`, `link`, `label_smoothing` or
            `reduction` is out of range; `label_smoothing` with a link that has none.

    Source:
        Rafailov et al. 2023 (arXiv 2305.18290) for sigmoid, Azar et al. 2023 (arXiv 2310.12036) for ipo (with log-probs
        summed, not averaged, over tokens), Zhao et al. 2023 (arXiv 2305.10425) for hinge.

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
    check_number("label_smoothing", label_smoothing, least=0)
    if label_smoothing >= 0.5:
        raise ValueError(f"label_smoothing must be below 0.5, got {label_smoothing!r}")
    if label_smoothing and not chosen_link.takes_smoothing:
        raise ValueError(f"label_smoothing has no meaning for link={link!r}; leave it out or use link='sigmoid'")
    check_reduction(reduction)
    where = kept_responses(where, logps)
    chosen, rejected = (fill(logps, where) - fill(ref_logps, where)).unbind(-1)
    values = chosen_link.value(chosen - rejected, beta, label_smoothing)
    return reduce_groups(fill(values, where.all(-1)), reduction)
