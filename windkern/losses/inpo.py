"""INPO: the pair form of the square loss, with the pull to the reference given as tau."""

from __future__ import annotations

from torch import Tensor

from windkern._checks import check_number
from windkern.losses._groups import (
    check_frozen_logps,
    check_logps,
    check_reduction,
    choose_target,
    fill,
    first_of_pair,
    kept_responses,
    pair_square,
    reduce_groups,
    residual,
)


def inpo(
    logps: Tensor,
    old_logps: Tensor,
    ref_logps: Tensor,
    prefs: Tensor | None = None,
    *,
    eta: float,
    tau: float,
    where: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return the INPO loss of each group.

    Formula: mean over ordered pairs i != j of (s_i - s_j - (P_ij - 1/2) / eta)^2 with the residual
    s_i = l_i - (1 - tau/eta) o_i - (tau/eta) r_i. For a pair whose first response won, this is the published
    (s_w - s_l - 1/(2 eta))^2.

    It equals `wind(objective="square_pair")` with beta = tau and step size 1/(eta - tau): here eta is a weight that
    slows the step, as in the paper. tau = 0 gives IPO with the reference pi_t, tau = eta gives IPO with the reference
    pi_ref.

    Args:
        logps: (B, N) float32 or float64, log-probs of the responses under the policy, nats, summed over tokens.
        old_logps: (B, N), dtype of `logps`, under pi_t, the policy that sampled them.
        ref_logps: (B, N), dtype of `logps`, under the frozen reference.
        prefs: (B, N, N), chance that response i beats response j, `prefs + prefs.mT = 1`. None for pairs (N = 2) whose
            first response won.
        eta: weight of the KL to pi_t and pi_ref together, positive; 0.002 in the authors' settings.
        tau: weight of the KL to pi_ref, in [0, eta]; eta / 3 in the authors' settings.
        where: (B, N) bool, responses that count, None for all. The others can hold anything, even NaN. A group with
            fewer than two left contributes 0 with gradient 0.
        reduction: "mean" (sum over groups / B), "sum", or "none".

    Returns:
        () or, for "none", (B,), dtype of `logps`.

    Raises:
        TypeError: an argument is not a tensor or not float32 or float64, `where` is not bool, or log-probs mix dtypes.
        ValueError: a shape or device does not fit; a constant requires grad; `prefs` are missing for N != 2, outside
            [0, 1] or not symmetric (values are checked on a CPU only, see `check_prefs`); `eta`, `tau` or `reduction`
            is out of range.

    Source:
        Zhang et al. 2024 (arXiv 2407.00617); docs/theory.md, section 10.

    Example:
        >>> import torch
        >>> from windkern.losses import inpo
        >>> logps = torch.tensor([[-9.0, -11.0]], requires_grad=True)
        >>> loss = inpo(logps, logps.detach(), logps.detach(), eta=0.5, tau=0.1)  # (0 - 1)^2
        >>> loss.backward()
        >>> loss.item(), logps.grad.tolist()
        (1.0, [[-2.0, 2.0]])
    """
    check_logps(logps)
    old_logps = check_frozen_logps("old_logps", old_logps, logps)
    ref_logps = check_frozen_logps("ref_logps", ref_logps, logps)
    check_number("eta", eta, above=0)
    check_number("tau", tau, least=0)
    if tau > eta:
        raise ValueError(f"tau must be at most eta = {eta!r}, got {tau!r}")
    check_reduction(reduction)
    where = kept_responses(where, logps)
    if prefs is None:
        if logps.shape[1] != 2:
            raise ValueError(f"prefs may be left out for pairs only, got {logps.shape[1]} responses per group")
        won = first_of_pair(logps).to(logps.dtype)
        prefs = (0.5 + (won[:, None] - won) / 2).expand(logps.shape[0], 2, 2)
    prefs = choose_target(logps, prefs, None, "pairs", where, "inpo")
    logps, old_logps, ref_logps = (fill(value, where) for value in (logps, old_logps, ref_logps))
    s = residual(logps, old_logps, ref_logps, b=tau / eta)
    return reduce_groups(pair_square(s, (prefs - 0.5) / eta, where), reduction)
