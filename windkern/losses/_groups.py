"""Helpers shared by the group losses: checks, masks, reductions, the residual, win-rate statistics, the extended log.

There are `B` groups (prompts) of `N` responses; `where (B, N)` says which responses count. A group with fewer than two
of them is switched off: it contributes 0 with gradient 0, and still counts in the mean's `B`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from windkern._checks import (
    check_choice,
    check_number,
    check_prefs_values,
    check_rewards_values,
    check_same_device,
    check_shape,
    check_tensor,
    readable,
    shape_of,
)

REDUCTIONS = ("mean", "sum", "none")
DELTA = 0.02  # implied win rates outside [DELTA, 1 - DELTA] use the polynomial of `extended_log`


def check_precise(name: str, value: object) -> Tensor:
    """Return a float32 or float64 tensor; lower precision raises, because its rounding far exceeds the targets."""
    tensor = check_tensor(name, value)
    if tensor.dtype in (torch.bfloat16, torch.float16):
        raise TypeError(
            f"{name} must be float32 or float64, got {tensor.dtype}, which rounds log-probs near -300 nats to "
            f"multiples of {256 * torch.finfo(tensor.dtype).eps:g}; the loss fits differences smaller than that"
        )
    if tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {tensor.dtype}")
    return tensor


def check_logps(logps: object, responses: int | str = "N") -> Tensor:
    tensor = check_precise("logps", logps)
    check_shape("logps", tensor, ("B", responses))
    return tensor


def check_constant(name: str, value: object, logps: Tensor, shape: tuple[int | str, ...]) -> Tensor:
    """Return a constant in the dtype of `logps`, checked; one that requires grad is a mistake, so it raises."""
    tensor = check_precise(name, value)
    check_shape(name, tensor, shape)
    check_same_device(name, tensor, "logps", logps)
    if tensor.requires_grad:
        raise ValueError(f"{name} is a constant of the loss but requires grad; pass {name}.detach()")
    return tensor.to(logps.dtype)


def check_frozen_logps(name: str, value: object, logps: Tensor) -> Tensor:
    """Return log-probs of a frozen policy: like any constant, but a dtype other than that of `logps` raises."""
    tensor = check_constant(name, value, logps, shape_of(logps))
    if isinstance(value, Tensor) and value.dtype != logps.dtype:
        raise TypeError(f"{name} is {value.dtype} but logps is {logps.dtype}; score both policies in one precision")
    return tensor


def check_rewards(rewards: object, logps: Tensor, where: Tensor, name: str = "rewards") -> Tensor:
    """Return finite scores (B, N), 0 where masked."""
    rewards = fill(check_constant(name, rewards, logps, shape_of(where)), where)
    if readable(rewards):
        check_rewards_values(rewards, where, name)
    return rewards


def check_lengths(lengths: object, logps: Tensor, where: Tensor) -> Tensor:
    """Return token counts (B, N) in the dtype of `logps`, at least 1 so that means exist, and 1 where masked."""
    tensor = check_tensor("lengths", lengths)
    if tensor.dtype == torch.bool or tensor.is_complex():
        raise TypeError(f"lengths must be integers or floats, got {tensor.dtype}")
    check_shape("lengths", tensor, shape_of(logps))
    check_same_device("lengths", tensor, "logps", logps)
    if tensor.requires_grad:
        raise ValueError("lengths is a constant of the loss but requires grad; pass lengths.detach()")
    tensor = fill(tensor.to(logps.dtype), where, 1.0)
    if readable(tensor) and not (tensor >= 1).all():
        raise ValueError("lengths must be at least 1 for every response that is not masked; mask empty ones with where")
    return tensor.clamp(min=1)


def check_smoothing(label_smoothing: float) -> float:
    check_number("label_smoothing", label_smoothing, least=0)
    if label_smoothing >= 0.5:
        raise ValueError(f"label_smoothing must be below 0.5, got {label_smoothing!r}")
    return label_smoothing


def check_prefs(prefs: Tensor, where: Tensor | None = None) -> None:
    """Raise unless `prefs` is a valid preference matrix. Losses call this on a CPU only; on a GPU, call it yourself.

    Formula: 0 <= prefs[b, i, j] <= 1 and prefs[b, i, j] + prefs[b, j, i] = 1, hence 1/2 on the diagonal.

    Args:
        prefs: (B, N, N) float32 or float64, chance that response i beats response j.
        where: (B, N) bool, responses that count; None for all. Entries of the others can hold anything.

    Raises:
        TypeError: `prefs` is not a float32 or float64 tensor, or `where` is not a bool tensor.
        ValueError: `prefs` is not (B, N, N) or `where` is not (B, N); `prefs` are outside [0, 1], hold NaN, or are
            asymmetric by more than 1e-4.

    Example:
        >>> import torch
        >>> from windkern.losses import check_prefs
        >>> scores = torch.tensor([[1.0, 0.0, 3.0]])
        >>> check_prefs(torch.sigmoid(scores[:, :, None] - scores[:, None, :]))
    """
    check_precise("prefs", prefs)
    check_shape("prefs", prefs, ("B", "N", "N"))
    if prefs.shape[1] != prefs.shape[2]:
        raise ValueError(f"prefs must have shape (B, N, N), got {shape_of(prefs)}")
    check_prefs_values(prefs, kept_responses(where, prefs.diagonal(dim1=1, dim2=2)))


def pairs_of(where: Tensor) -> Tensor:
    """Return the mask of pairs whose members both count: (B, N) -> (B, N, N)."""
    return where[:, :, None] & where[:, None, :]


def kept_responses(where: Tensor | None, logps: Tensor, least: int = 2) -> Tensor:
    """Return the mask for all later steps: (B, N) bool, cleared for groups with fewer than `least` responses."""
    if where is None:
        where = torch.ones_like(logps, dtype=torch.bool)
    else:
        check_tensor("where", where)
        if where.dtype != torch.bool:
            raise TypeError(f"where must be torch.bool, got {where.dtype}")
        check_shape("where", where, shape_of(logps))
        check_same_device("where", where, "logps", logps)
    return where & (where.sum(-1, keepdim=True) >= least)


def fill(value: Tensor, where: Tensor, filler: float = 0.0) -> Tensor:
    """Return `value`, with `filler` where it is masked.

    Hazard: 0 * NaN is NaN, in backward as well. Remedy: select before any arithmetic, never multiply by a mask.
    """
    return torch.where(where, value, filler)


def count(where: Tensor) -> Tensor:
    return where.sum(-1).clamp(min=1)  # (B,); 1 for a group without responses, whose sums are 0


def group_mean(terms: Tensor, where: Tensor) -> Tensor:
    """Return the mean over the responses that count: (B, N) -> (B,)."""
    return fill(terms, where).sum(-1) / count(where)


def centred(terms: Tensor, where: Tensor) -> Tensor:
    return terms - group_mean(terms, where)[:, None]


def group_variance(terms: Tensor, where: Tensor) -> Tensor:
    """Return (1/K) sum_i (d_i - mean d)^2 over the responses that count: (B, N) -> (B,)."""
    return group_mean(centred(terms, where).square(), where)


def masked_log_softmax(terms: Tensor, where: Tensor) -> Tensor:
    """Return the log-softmax over the responses that count; masked entries are finite and must be dropped.

    Hazard: with -inf for masked entries, a group that is all masked becomes NaN. Remedy: a finite floor whose exp is 0.
    """
    return fill(terms, where, torch.finfo(terms.dtype).min / 4).log_softmax(-1)


def masked_softmax(terms: Tensor, where: Tensor) -> Tensor:
    """Return the softmax over the responses that count, 0 elsewhere."""
    return fill(masked_log_softmax(terms, where).exp(), where)


def rivals(where: Tensor) -> Tensor:
    """Return the mask of ordered pairs i != j that count: (B, N, N) bool."""
    return pairs_of(where) & ~torch.eye(where.shape[-1], dtype=torch.bool, device=where.device)


def pair_mean(terms: Tensor, where: Tensor) -> Tensor:
    """Return the mean over ordered pairs i != j that count: (B, N, N) -> (B,)."""
    pairs = count(where) * (count(where) - 1).clamp(min=1)
    return fill(terms, rivals(where)).sum((-2, -1)) / pairs


def pair_square(s: Tensor, target: Tensor, where: Tensor) -> Tensor:
    """Return the mean over ordered pairs i != j of (s_i - s_j - t_ij)^2: (B, N), (B, N, N) -> (B,)."""
    gaps = s[:, :, None] - s[:, None, :]  # (B, N, N)
    return pair_mean((gaps - target).square(), where)


def first_of_pair(logps: Tensor) -> Tensor:
    """Return (2,) bool, True for the chosen response. Copying a list to the device instead would make Python wait."""
    return torch.arange(2, device=logps.device) == 0


def pair_gaps(logps: Tensor, base_logps: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-ratios (B,) of the chosen and of the rejected response, 0 where masked, from (B, 2)."""
    chosen, rejected = (fill(logps, where) - fill(base_logps, where)).unbind(-1)
    return chosen, rejected


def logistic(margin: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return -(1-eps) log sigma(u) - eps log sigma(-u), finite for any u."""
    return -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)


def v_win_rates(prefs: Tensor, where: Tensor) -> Tensor:
    """Return (1/K) sum_j P_ij over all K responses, where the comparison with itself counts 1/2: (B, N)."""
    return (fill(prefs, rivals(where)).sum(-1) + 0.5) / count(where)[:, None]


def u_win_rates(prefs: Tensor, where: Tensor) -> Tensor:
    """Return (1/(K-1)) sum_{j != i} P_ij, without the comparison with itself: (B, N)."""
    return fill(prefs, rivals(where)).sum(-1) / (count(where) - 1).clamp(min=1)[:, None]


def choose_target(
    logps: Tensor, prefs: Tensor | None, win_rates: Tensor | None, statistic: str, where: Tensor, user: str
) -> Tensor:
    """Return the target of a loss from `prefs` or `win_rates`: checked, 1/2 where masked, as `statistic` says."""
    if (prefs is None) == (win_rates is None):
        raise ValueError(f"give exactly one of prefs and win_rates, got {'neither' if prefs is None else 'both'}")
    B, N = logps.shape
    if win_rates is not None:
        if statistic == "pairs":
            raise ValueError(f"win_rates cannot be used for {user}, which compares pairs; give prefs")
        win_rates = fill(check_constant("win_rates", win_rates, logps, (B, N)), where, 0.5)
        if readable(win_rates) and not ((win_rates >= 0) & (win_rates <= 1)).all():
            raise ValueError("win_rates must lie in [0, 1] and hold no NaN")
        return win_rates
    prefs = fill(check_constant("prefs", prefs, logps, (B, N, N)), pairs_of(where), 0.5)
    if readable(prefs):
        check_prefs(prefs)
    if statistic == "pairs":
        return prefs
    return (v_win_rates if statistic == "V" else u_win_rates)(prefs, where)


def reduce_groups(values: Tensor, reduction: str) -> Tensor:
    """Reduce (B,) to a scalar; "mean" divides by B whatever is masked (0 for B = 0), "none" returns (B,)."""
    if reduction == "none":
        return values
    return values.sum() / max(values.shape[0], 1) if reduction == "mean" else values.sum()


def check_reduction(reduction: str) -> str:
    return check_choice("reduction", reduction, REDUCTIONS)


def step_coefficients(eta: float, beta: float) -> tuple[float, float, float]:
    """Return a = 1/(1+eta*beta), b = 1-a and c = eta*a of log pi_{t+1} = a log pi_t + b log pi_ref + c w - log Z."""
    check_number("eta", eta, above=0)
    check_number("beta", beta, least=0)
    a = 1 / (1 + eta * beta)
    return a, eta * beta * a, eta * a


def residual(logps: Tensor, old_logps: Tensor, ref_logps: Tensor, b: float) -> Tensor:
    """Return s_i = l_i - a o_i - b r_i with a = 1 - b, (B, N).

    Hazard: a o and b r are hundreds of nats, s is below one. Remedy: compute the two small differences first.
    """
    return (logps - old_logps) + b * (old_logps - ref_logps)


def extended_log(p: Tensor) -> Tensor:
    """Return log p inside [DELTA, 1 - DELTA], and outside its second-order Taylor polynomial at the nearer end.

    Hazard: an implied win rate can be outside (0, 1), and a clamp has gradient 0 exactly where it must be pushed back.
    Remedy: expand around the nearest point inside. Inside, x is 0 but has the slope 1/p, so one formula covers both.
    """
    nearest = p.detach().clamp(DELTA, 1 - DELTA)
    x = (p - nearest) / nearest
    return nearest.log() + x * (1 - x / 2)
