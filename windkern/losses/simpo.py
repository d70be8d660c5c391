"""SimPO: mean log-probs and a margin, without a reference."""

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


def simpo(
    logps: Tensor,
    lengths: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    label_smoothing: float = 0.0,
    where: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return the SimPO loss of each pair (chosen, rejected).

    Formula: -(1-eps) log sigma(u) - eps log sigma(-u) with u = beta (l_w / T_w - l_l / T_l) - gamma, T the number of
    scored tokens.

    Args:
        logps: (B, 2) float32 or float64, log-probs of chosen and rejected under the policy, nats, summed over tokens.
        lengths: (B, 2) integers or floats, tokens summed in each of `logps`, at least 1. The division happens here.
        beta: scale of the mean log-probs, positive.
        gamma: margin to exceed, in units of u. The authors' settings give gamma / beta.
        label_smoothing: eps, chance that a label is wrong, in [0, 1/2).
        where: (B, 2) bool, responses that count, None for all. An incomplete pair contributes 0 with gradient 0,
            whatever it holds.
        reduction: "mean" (sum over pairs / B), "sum", or "none".

    Returns:
        () or, for "none", (B,), dtype of `logps`.

    Raises:
        TypeError: an argument is not a tensor, `logps` is not float32 or float64, `lengths` are not numbers, or `where`
            is not bool.
        ValueError: a shape or device does not fit; `lengths` are below 1 (checked on a CPU only); `beta`, `gamma`,
            `label_smoothing` or `reduction` is out of range.

    Source:
        Meng et al. 2024 (arXiv 2405.14734); label smoothing as in TRL.

    Example:
        >>> import torch
        >>> from windkern.losses import simpo
        >>> logps = torch.tensor([[-9.0, -16.0]], requires_grad=True)
        >>> loss = simpo(logps, torch.tensor([[10, 8]]), beta=2.0, gamma=1.0)  # u = 2 (-0.9 + 2) - 1
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}", [round(g, 4) for g in logps.grad[0].tolist()])
        0.2633 [-0.0463, 0.0579]
    """
    check_logps(logps, responses=2)
    check_number("beta", beta, above=0)
    check_number("gamma", gamma)
    check_smoothing(label_smoothing)
    check_reduction(reduction)
    where = kept_responses(where, logps)
    chosen, rejected = (fill(logps, where) / check_lengths(lengths, logps, where)).unbind(-1)
    return reduce_groups(fill(logistic(beta * (chosen - rejected) - gamma, label_smoothing), where.all(-1)), reduction)
