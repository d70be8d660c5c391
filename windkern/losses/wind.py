"""WIND: regression of log-prob ratios on win rates, with six objectives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from windkern._checks import check_choice
from windkern.losses._groups import (
    centred,
    check_constant,
    check_frozen_logps,
    check_logps,
    check_reduction,
    choose_target,
    extended_log,
    fill,
    group_mean,
    group_variance,
    kept_responses,
    masked_log_softmax,
    masked_softmax,
    pair_mean,
    pair_square,
    reduce_groups,
    residual,
    step_coefficients,
)


class Fit(NamedTuple):
    """A batch of groups, ready for an objective; masked entries hold harmless numbers."""

    s: Tensor  # (B, N) l - a o - b r, which is c w - log Z at the exact update
    gap: Tensor  # (B, N) l - o
    pull: Tensor  # (B, N) b (r - o), constant
    target: Tensor  # (B, N) win rates, or (B, N, N) preferences if the objective uses pairs
    log_z: Tensor  # (B, 1)
    c: float
    where: Tensor  # (B, N) bool


def _square(fit: Fit) -> Tensor:
    return group_variance(fit.s - fit.c * fit.target, fit.where)


def _square_pair(fit: Fit) -> Tensor:
    return pair_square(fit.s, fit.c * (fit.target - 0.5), fit.where)


def _square_point(fit: Fit) -> Tensor:
    return group_mean((fit.s + fit.log_z - fit.c * fit.target).square(), fit.where)


def _kl(fit: Fit) -> Tensor:
    w = fit.target
    p = group_mean(w, fit.where)[:, None] + centred(fit.s, fit.where) / fit.c
    negative_entropy = torch.xlogy(w, w) + torch.xlogy(1 - w, 1 - w)
    return group_mean(negative_entropy - w * extended_log(p) - (1 - w) * extended_log(1 - p), fit.where)


def _nce(fit: Fit) -> Tensor:
    p = (fit.s + fit.log_z) / fit.c
    surprise = -extended_log(p)[:, :, None] - extended_log(1 - p)[:, None, :]  # i called winner, j called loser
    return pair_mean(fit.target * surprise, fit.where)


def _nce_ratio(fit: Fit) -> Tensor:
    target = masked_softmax(fit.pull + fit.c * fit.target, fit.where)
    return -(target * masked_log_softmax(fit.gap, fit.where)).sum(-1)


@dataclass(frozen=True)
class Objective:
    """One way to fit the update from a group of samples."""

    value: Callable[[Fit], Tensor]  # Fit -> (B,)
    statistic: str  # computed from `prefs`: "V" win rates, "U" win rates, or "pairs" (the preferences themselves)
    uses_log_z: bool
    formula: str
    source: str


# In the formulas: d_i = s_i - c w_i; "mean" runs over the K responses or the K (K-1) ordered pairs i != j of a group.
OBJECTIVES = {
    "square": Objective(
        _square, "V", False, "mean_i (d_i - mean d)^2", "squared risk of WIND, centred as in VarGrad (arXiv 2503.18929)"
    ),
    "square_pair": Objective(
        _square_pair,
        "pairs",
        False,
        "mean_ij (s_i - s_j - c (P_ij - 1/2))^2",
        "squared risk of WIND in the pair form of INPO (arXiv 2407.00617)",
    ),
    "square_point": Objective(
        _square_point,
        "U",
        True,
        "mean_i (s_i + log_z - c w_i)^2",
        "squared risk of WIND in the point form of SPPO (arXiv 2405.00675)",
    ),
    "kl": Objective(
        _kl,
        "V",
        False,
        "mean_i KL(Bern(w_i) || Bern(p_i)), p_i = mean w + (s_i - mean s)/c",
        "KL risk of WIND; empirical form ours",
    ),
    "nce": Objective(
        _nce,
        "pairs",
        True,
        "mean_ij P_ij (-log p_i - log(1 - p_j)), p_i = (s_i + log_z)/c",
        "NCE risk of WIND; empirical form ours",
    ),
    "nce_ratio": Objective(
        _nce_ratio,
        "V",
        False,
        "-sum_i softmax(t)_i log softmax(l - o)_i, t_i = b (r_i - o_i) + c w_i",
        "InfoNCA (arXiv 2402.05369) with the WIND target; empirical form ours",
    ),
}


def wind(
    logps: Tensor,
    old_logps: Tensor,
    ref_logps: Tensor,
    prefs: Tensor | None = None,
    *,
    win_rates: Tensor | None = None,
    log_z: Tensor | None = None,
    eta: float,
    beta: float,
    objective: str = "square",
    where: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return the WIND loss of each group: how far the policy is from the next exact iterate of the win-rate game.

    Formula: the exact update is log pi_{t+1} = a log pi_t + b log pi_ref + c w - log Z with a = 1/(1 + eta*beta),
    b = eta*beta*a, c = eta*a and w_i = P(response i beats pi_t). With l, o, r the log-probs under the policy, pi_t and
    pi_ref, the residual s_i = l_i - a o_i - b r_i equals c w_i - log Z there. Every objective has that update as its
    population minimiser, up to the bias noted (K responses left by `where`, P = `prefs`):

    ============ ==================================================================== ========= =======================
    objective    value of a group                                                     from      bias
                                                                                      `prefs`
    ============ ==================================================================== ========= =======================
    square       (1/K) sum_i (d_i - mean d)^2,  d_i = s_i - c w_i                     V         none
    square_pair  mean over i != j of (s_i - s_j - c (P_ij - 1/2))^2                   P_ij      none
    square_point (1/K) sum_i (s_i + log_z - c w_i)^2                                  U         that of `log_z`
    kl           (1/K) sum_i KL(Bern(w_i) || Bern(p_i)),                              V         small, gone at large K
                 p_i = mean w + (s_i - mean s)/c
    nce          mean over i != j of P_ij (-log p_i - log(1 - p_j)),                  P_ij      that of `log_z`
                 p_i = (s_i + log_z)/c
    nce_ratio    -sum_i softmax(t)_i log softmax(l - o)_i,                            V         small, gone at large K,
                 t_i = b (r_i - o_i) + c w_i                                                    more with 0/1 prefs
    ============ ==================================================================== ========= =======================

    V: w_i = (1/K) sum_j P_ij, where the comparison with itself counts 1/2, as centring requires. U: w_i = (1/(K-1))
    sum_{j != i} P_ij. `mean w` is 1/2 whenever win rates come from `prefs`. With exact win rates in `win_rates`, every
    objective that takes them is unbiased (`square_point`: with an exact `log_z`). `nce` is the cross-entropy of `kl`
    point by point, with U. In `kl` and `nce`, a log outside [0.02, 0.98] continues as its second-order Taylor
    polynomial.

    Args:
        logps: (B, N) float32 or float64, log-probs of the responses under the policy, nats, summed over tokens.
        old_logps: (B, N), dtype of `logps`, under pi_t, the policy that sampled them.
        ref_logps: (B, N), dtype of `logps`, under the frozen reference.
        prefs: (B, N, N), chance that response i beats response j, `prefs + prefs.mT = 1`. Either this or `win_rates`.
        win_rates: (B, N) in [0, 1], chance that response i beats pi_t; used as they are. Not for the pair objectives.
        log_z: (B,) nats, exact or estimated log Z, for `square_point` and `nce`. None takes c/2, the value at small
            eta while pi_t = pi_ref; it is biased later, because it leaves out log sum pi_t^a pi_ref^b <= 0.
        eta: step size, positive. Up to 4 * beta, convergence is guaranteed for any preferences.
        beta: weight of the KL to the reference, not negative.
        objective: a name from the table above.
        where: (B, N) bool, responses that count, None for all. The others can hold anything, even NaN. A group with
            fewer than two left contributes 0 with gradient 0.
        reduction: "mean" (sum over groups / B), "sum", or "none".

    Returns:
        () or, for "none", (B,), dtype of `logps`.

    Raises:
        TypeError: an argument is not a tensor or not float32 or float64, `where` is not bool, or log-probs mix dtypes.
        ValueError: a shape or device does not fit; a constant requires grad; `prefs` and `win_rates` are both given or
            both missing; the objective cannot use `win_rates` or `log_z`; `eta`, `beta`, `objective` or `reduction` is
            out of range; `prefs` or `win_rates` are outside [0, 1], or `prefs` are not symmetric (values are checked on
            a CPU only, because on a GPU Python would wait: see `check_prefs`).

    Numerics:
        s is computed as (l - o) + b (o - r), because the log-probs are hundreds of nats and the differences are small.

    Source:
        WIND (arXiv 2410.20727) defines the game and names the squared, KL and NCE risks; derivations and the empirical
        forms are ours: docs/theory.md, eq. (1.24), (1.31) to (1.44).

    Example:
        >>> import torch
        >>> from windkern.losses import wind
        >>> logps = torch.tensor([[-9.0, -11.0, -10.0]], requires_grad=True)
        >>> old = ref = logps.detach()
        >>> prefs = torch.tensor([[[0.5, 0.9, 1.0], [0.1, 0.5, 0.6], [0.0, 0.4, 0.5]]])
        >>> loss = wind(logps, old, ref, prefs, eta=1.0, beta=0.25)  # c = 0.8, w = 0.8, 0.4, 0.3
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}", [round(g, 4) for g in logps.grad[0].tolist()])
        0.0299 [-0.16, 0.0533, 0.1067]
    """
    check_logps(logps)
    old_logps = check_frozen_logps("old_logps", old_logps, logps)
    ref_logps = check_frozen_logps("ref_logps", ref_logps, logps)
    chosen = OBJECTIVES[check_choice("objective", objective, OBJECTIVES)]
    check_reduction(reduction)
    _, b, c = step_coefficients(eta, beta)
    where = kept_responses(where, logps)
    target = choose_target(logps, prefs, win_rates, chosen.statistic, where, f"objective={objective!r}")
    if log_z is None:
        log_z = logps.new_full(logps.shape[:1], c / 2)
    elif chosen.uses_log_z:
        log_z = fill(check_constant("log_z", log_z, logps, (logps.shape[0],)), where.any(-1))
    else:
        raise ValueError(f"log_z cannot be used for objective={objective!r}, in which it cancels; leave it out")

    logps, old_logps, ref_logps = (fill(value, where) for value in (logps, old_logps, ref_logps))
    fit = Fit(
        s=residual(logps, old_logps, ref_logps, b),
        gap=logps - old_logps,
        pull=b * (ref_logps - old_logps),
        target=target,
        log_z=log_z[:, None],
        c=c,
        where=where,
    )
    return reduce_groups(chosen.value(fit), reduction)


def against_all(arguments: Mapping[str, Any]) -> bool:
    """Return whether the target of an objective is the win rate against all samples, the response itself included."""
    return OBJECTIVES[arguments["objective"]].statistic == "V"


def inverse_square_step(arguments: Mapping[str, Any]) -> float:
    """Return 1 / c^2 for the squared objectives, which turns their value into an error of win rates; 1 for others."""
    *_, c = step_coefficients(arguments["eta"], arguments["beta"])
    return 1 / c**2 if arguments["objective"].startswith("square") else 1.0


def fit_metrics(
    logps: Tensor,
    win_rates: Tensor,
    where: Tensor,
    *,
    arguments: Mapping[str, Any],
    old_logps: Tensor,
    ref_logps: Tensor,
) -> dict[str, Tensor]:
    """Return how well groups meet the target of the update, as scalars in units of win rate.

    Args:
        logps, old_logps, ref_logps: (B, N) nats.
        win_rates: (B, N) of each response, means of its preferences.
        where: (B, N) bool, responses that count; at least one does.
        arguments: eta and beta.

    Returns:
        residual: root mean square of (s_i - mean s) / c - (w_i - mean w).
        implied_win_rate_max, outside: largest p_i = mean w + (s_i - mean s) / c, and the share outside [0, 1].
    """
    _, b, c = step_coefficients(arguments["eta"], arguments["beta"])
    count = where.sum(-1, keepdim=True).clamp(min=1)
    error = fill(residual(logps, old_logps, ref_logps, b) / c - win_rates, where)
    implied = win_rates + error - error.sum(-1, keepdim=True) / count
    counted = where.sum()
    return {
        "residual": (fill((implied - win_rates).square(), where).sum() / counted).sqrt(),
        "implied_win_rate_max": implied.masked_fill(~where, -torch.inf).max(),
        "outside": (where & ((implied < 0) | (implied > 1))).sum() / counted,
    }
