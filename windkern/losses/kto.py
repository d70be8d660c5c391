"""KTO: single responses marked good or bad, against a reference point shared by the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from windkern._checks import check_number, check_same_device, check_shape, check_tensor, shape_of
from windkern.losses._groups import (
    check_constant,
    check_frozen_logps,
    check_logps,
    check_reduction,
    fill,
    group_mean,
    kept_responses,
    reduce_groups,
)


def kto(
    logps: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    *,
    kl_gaps: Tensor | None = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    where: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return the KTO loss of each group; responses are independent, so N = 1 is the usual case.

    Formula: (1/K) sum_i v_i with d_i = l_i - r_i and

        v_i = w_D (1 - sigma(beta (d_i - z0)))   if i is desirable
              w_U (1 - sigma(beta (z0 - d_i)))   if not
        z0  = max(0, mean of kl_gaps), a constant: no gradient flows through it

    z0 estimates KL(policy || reference). The authors take `kl_gaps` from mismatched pairs of prompts and responses.
    Without `kl_gaps`, the mean of d over all responses of the batch is used, which needs no second forward but is
    biased. Across processes, pass the gathered gaps. `kl_gaps` of zeros give the unpaired form of
    `apo(variant="zero")`.

    Without `kl_gaps` the loss is not separable, because a part of the batch has another z0. Inside `fused_loss`, close
    over `kl_gaps`.

    Args:
        logps: (B, N) float32 or float64, log-probs of the responses under the policy, nats, summed over tokens.
        ref_logps: (B, N), dtype of `logps`, under the frozen reference.
        desirable: (B, N) bool, True where a response is marked good.
        kl_gaps: (M,) nats, log-ratios of policy to reference on mismatched pairs, any number of them; None for the
            batch's own mean.
        beta: weight of the KL to the reference, positive.
        desirable_weight, undesirable_weight: w_D and w_U, not negative; to balance unequal numbers of the two.
        where: (B, N) bool, responses that count, None for all. The others can hold anything, even NaN. A group with
            none left contributes 0 with gradient 0.
        reduction: "mean" (sum over groups / B), "sum", or "none".

    Returns:
        () or, for "none", (B,), dtype of `logps`.

    Raises:
        TypeError: an argument is not a tensor or not float32 or float64, `desirable` or `where` is not bool, or
            log-probs mix dtypes.
        ValueError: a shape or device does not fit; a constant requires grad; `kl_gaps` are empty; a number or
            `reduction` is out of range.

    Source:
        Ethayarajh et al. 2024 (arXiv 2402.01306).

    Example:
        >>> import torch
        >>> from windkern.losses import kto
        >>> logps = torch.tensor([[-9.0], [-11.0]], requires_grad=True)
        >>> loss = kto(logps, logps.detach(), torch.tensor([[True], [False]]), beta=0.5)  # z0 = 0
        >>> loss.backward()
        >>> loss.item(), logps.grad.tolist()
        (0.5, [[-0.0625], [0.0625]])
    """
    check_logps(logps)
    ref_logps = check_frozen_logps("ref_logps", ref_logps, logps)
    if check_tensor("desirable", desirable).dtype != torch.bool:
        raise TypeError(f"desirable must be torch.bool, got {desirable.dtype}")
    check_shape("desirable", desirable, shape_of(logps))
    check_same_device("desirable", desirable, "logps", logps)
    check_number("beta", beta, above=0)
    check_number("desirable_weight", desirable_weight, least=0)
    check_number("undesirable_weight", undesirable_weight, least=0)
    check_reduction(reduction)
    where = kept_responses(where, logps, least=1)
    gaps = fill(logps, where) - fill(ref_logps, where)
    if kl_gaps is None:
        z0 = (gaps.detach().sum() / where.sum().clamp(min=1)).clamp(min=0)
    else:
        kl_gaps = check_constant("kl_gaps", kl_gaps, logps, ("M",))
        if kl_gaps.numel() == 0:
            raise ValueError("kl_gaps must hold at least one log-ratio, got none")
        z0 = kl_gaps.mean().clamp(min=0)
    u = beta * (gaps - z0)
    values = torch.where(desirable, desirable_weight * torch.sigmoid(-u), undesirable_weight * torch.sigmoid(u))
    return reduce_groups(group_mean(values, where), reduction)
