"""CPO: a margin of log-probs and the likelihood of the chosen response, without a reference."""

from __future__ import annotations

from torch import Tensor

from windkern._checks import check_number
from windkern.losses._groups import (
    check_lengths,
    check_logps,
    check_reduction,
    check_smoothing,
    fill,
    kept_responses,
    logistic,
    reduce_groups,
)


def cpo(
    logps: Tensor,
    lengths: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
    where: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return the CPO loss of each pair (chosen, rejected).

    Formula: -(1-eps) log sigma(u) - eps log sigma(-u) - alpha l_w / T_w with u = beta (l_w - l_l), T the number of
    scored tokens. The margin uses sums over tokens; the likelihood term is a mean over the response's tokens, pair by
    pair (the authors' code and TRL take one mean over all tokens of the batch).

    Args:
        logps: (B, 2) float32 or float64, log-probs of chosen and rejected under the policy, nats, summed over tokens.
        lengths: (B, 2) integers or floats, tokens summed in each of `logps`, at least 1. The division happens here.
        beta: scale of the margin, positive.
        alpha: weight of the likelihood of the chosen response, not negative.
        label_smoothing: eps, chance that a label is wrong, in [0, 1/2).
        where: (B, 2) bool, responses that count, None for all. An incomplete pair contributes 0 with gradient 0,
            whatever it holds.
        reduction: "mean" (sum over pairs / B), "sum", or "none".

    Returns:
        () or, for "none", (B,), dtype of `logps`.

    Raises:
        TypeError: an argument is not a tensor, `logps` is not float32 or float64, `lengths` are not numbers, or `where`
            is not bool.
        ValueError: a shape or device does not fit; `lengths` are below 1 (checked on a CPU only); `beta`, `alpha`,
            `label_smoothing` or `reduction` is out of range.

    Source:
        Xu et al. 2024 (arXiv 2401.08417); label smoothing as in TRL.

    Example:
        >>> import torch
        >>> from windkern.losses import cpo
        >>> logps = torch.tensor([[-9.0, -11.0]], requires_grad=True)
        >>> loss = cpo(logps, torch.tensor([[10, 8]]), beta=0.5)  # u = 1
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}", [round(g, 4) for g in logps.grad[0].tolist()])
        1.2133 [-0.2345, 0.1345]
    """
    check_logps(logps, responses=2)
    check_number("beta", beta, above=0)
    check_number("alpha", alpha, least=0)
    check_smoothing(label_smoothing)
    check_reduction(reduction)
    where = kept_responses(where, logps)
    logps = fill(logps, where)
    likelihood = (logps / check_lengths(lengths, logps, where))[:, 0]
    margin = beta * (logps[:, 0] - logps[:, 1])
    return reduce_groups(fill(logistic(margin, label_smoothing) - alpha * likelihood, where.all(-1)), reduction)
