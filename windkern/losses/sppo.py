"""SPPO: self-play preference optimization, the point-wise square loss without a pull to the reference."""

from __future__ import annotations

from torch import Tensor

from windkern._checks import check_number
from windkern.losses._groups import (
    check_frozen_logps,
    check_logps,
    check_reduction,
    choose_target,
    fill,
    group_mean,
    kept_responses,
    reduce_groups,
    residual,
)


def sppo(
    logps: Tensor,
    old_logps: Tensor,
    prefs: Tensor | None = None,
    *,
    win_rates: Tensor | None = None,
    eta: float,
    where: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return the SPPO loss of each group.

    Formula: (1/K) sum_i (l_i - o_i - eta (w_i - 1/2))^2 over the K responses left by `where`, with l and o the
    log-probs under the policy and under pi_t, and w_i = (1/K) sum_j P_ij, where the comparison with itself counts 1/2.

    The authors' code uses this statistic (K = 5). In a point-wise loss it shrinks the step: the fit converges to
    eta (K-1)/K instead of eta. For the full step, pass `win_rates` that leave out the comparison with itself, or use
    `wind` with beta = 0, whose centred losses do not need this.

    Args:
        logps: (B, N) float32 or float64, log-probs of the responses under the policy, nats, summed over tokens.
        old_logps: (B, N), dtype of `logps`, under pi_t, the policy that sampled them.
        prefs: (B, N, N), chance that response i beats response j, `prefs + prefs.mT = 1`. Either this or `win_rates`.
        win_rates: (B, N) in [0, 1], chance that response i beats pi_t; used as they are.
        eta: step size, positive; 1 / beta in the authors' code, where beta = 0.001.
        where: (B, N) bool, responses that count, None for all. The others can hold anything, even NaN. A group with
            fewer than two left contributes 0 with gradient 0.
        reduction: "mean" (sum over groups / B), "sum", or "none".

    Returns:
        () or, for "none", (B,), dtype of `logps`.

    Raises:
        TypeError: an argument is not a tensor or not float32 or float64, `where` is not bool, or log-probs mix dtypes.
        ValueError: a shape or device does not fit; a constant requires grad; `prefs` and `win_rates` are both given or
            both missing; `eta` or `reduction` is out of range; `prefs` or `win_rates` are outside [0, 1], or `prefs`
            are not symmetric (values are checked on a CPU only, see `check_prefs`).

    Source:
        Wu et al. 2024 (arXiv 2405.00675) and its code; docs/theory.md, eq. (1.31) with a = 1, b = 0, c = eta.

    Example:
        >>> import torch
        >>> from windkern.losses import sppo
        >>> logps = torch.tensor([[-9.0, -11.0]], requires_grad=True)
        >>> prefs = torch.tensor([[[0.5, 1.0], [0.0, 0.5]]])  # w = 0.75, 0.25
        >>> loss = sppo(logps, logps.detach(), prefs, eta=4.0)
        >>> loss.backward()
        >>> loss.item(), logps.grad.tolist()
        (1.0, [[-1.0, 1.0]])
    """
    check_logps(logps)
    old_logps = check_frozen_logps("old_logps", old_logps, logps)
    check_number("eta", eta, above=0)
    check_reduction(reduction)
    where = kept_responses(where, logps)
    w = choose_target(logps, prefs, win_rates, "V", where, "sppo")
    old_logps = fill(old_logps, where)
    s = residual(fill(logps, where), old_logps, old_logps, b=0.0)  # no pull to a reference
    return reduce_groups(group_mean((s - eta * (w - 0.5)).square(), where), reduction)
