"""Helpers shared by the group losses: checks, masks, reductions, the residual, win-rate statistics, the extended log.

`B` groups (prompts) of `N` responses; `where (B, N)` says which responses take part. A group with fewer than two of
them is switched off: it contributes 0 with gradient 0, and still counts in the mean's `B`.
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
DELTA = 0.02  # implied win rates outside [DELTA, 1 - DELTA] meet the polynomial of `extended_log`


def check_precise(name: str, value: object) -> Tensor:
    """Refuse low precision: the targets are of the size of eta, far below its rounding."""
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
    """A float constant on the device of `logps`, in its dtype; one that wants a gradient is a mistake, so it raises."""
    tensor = check_precise(name, value)
    check_shape(name, tensor, shape)
    check_same_device(name, tensor, "logps", logps)
    if tensor.requires_grad:
        raise ValueError(f"{name} is a constant of the loss but requires grad; pass {name}.detach() if that is meant")
    return tensor.to(logps.dtype)


def check_frozen_logps(name: str, value: object, logps: Tensor) -> Tensor:
    """Log-probs of a frozen policy: like any constant, but a dtype other than that of `logps` is a mix-up."""
    tensor = check_constant(name, value, logps, shape_of(logps))
    if isinstance(value, Tensor) and value.dtype != logps.dtype:
        raise TypeError(f"{name} is {value.dtype} but logps is {logps.dtype}; score both policies in one precision")
    return tensor


def check_rewards(rewards: object, logps: Tensor, where: Tensor, name: str = "rewards") -> Tensor:
    """(B, N) scores, 0 where masked: any finite numbers."""
    rewards = fill(check_constant(name, rewards, logps, shape_of(where)), where)
    if readable(rewards):
        check_rewards_values(rewards, where, name)
    return rewards


def check_lengths(lengths: object, logps: Tensor, where: Tensor) -> Tensor:
    """(B, N) token counts in the dtype of `logps`, 1 where masked; at least 1, so that a mean can be taken."""
    tensor = check_tensor("lengths", lengths)
    if tensor.dtype == torch.bool or tensor.is_complex():
        raise TypeError(f"lengths must be integers or floats, got {tensor.dtype}")
    check_shape("lengths", tensor, shape_of(logps))
    check_same_device("lengths", tensor, "logps", logps)
    if tensor.requires_grad:
        raise ValueError("lengths is a constant of the loss but requires grad; pass lengths.detach() if that is meant")
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
        where: (B, N) bool, responses that take part; None for all. Entries of the others may hold anything.

    Raises:
        TypeError: `prefs` is not a float32 or float64 tensor, or `where` is not a bool tensor.
        ValueError: `prefs` is not (B, N, N) or `where` not (B, N); `prefs` leave [0, 1], hold NaN, or miss the symmetry
            by more than 1e-4.

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
    """(B, N) -> (B, N, N): both members take part."""
    return where[:, :, None] & where[:, None, :]


def kept_responses(where: Tensor | None, logps: Tensor, least: int = 2) -> Tensor:
    """The mask every later step uses: (B, N) bool, cleared for groups with fewer than `least` responses."""
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
    """`value` with `filler` where it is masked.

    Hazard: 0 * NaN is NaN, in the backward as well. Remedy: select before any arithmetic, never multiply by a mask.
    """
    return torch.where(where, value, filler)


def count(where: Tensor) -> Tensor:
    return where.sum(-1).clamp(min=1)  # (B,); 1 for a group that is off, whose sums are 0


def group_mean(terms: Tensor, where: Tensor) -> Tensor:
    """Mean over the responses that take part: (B, N) -> (B,)."""
    return fill(terms, where).sum(-1) / count(where)


def centred(terms: Tensor, where: Tensor) -> Tensor:
    return terms - group_mean(terms, where)[:, None]


def group_variance(terms: Tensor, where: Tensor) -> Tensor:
    """(1/K) sum_i (d_i - mean d)^2 over the responses that take part: (B, N) -> (B,)."""
    return group_mean(centred(terms, where).square(), where)


def masked_log_softmax(terms: Tensor, where: Tensor) -> Tensor:
    """Log-softmax over the responses that take part; masked entries hold a finite number to be dropped.

    Hazard: -inf for masked entries turns a group that is all masked into NaN. Remedy: a finite floor, exp of it is 0.
    """
    return fill(terms, where, torch.finfo(terms.dtype).min / 4).log_softmax(-1)


def masked_softmax(terms: Tensor, where: Tensor) -> Tensor:
    """Softmax over the responses that take part, 0 elsewhere."""
    return fill(masked_log_softmax(terms, where).exp(), where)


def rivals(where: Tensor) -> Tensor:
    """Ordered pairs i != j that take part: (B, N, N) bool."""
    return pairs_of(where) & ~torch.eye(where.shape[-1], dtype=torch.bool, device=where.device)


def pair_mean(terms: Tensor, where: Tensor) -> Tensor:
    """Mean over ordered pairs i != j that take part: (B, N, N) -> (B,)."""
    pairs = count(where) * (count(where) - 1).clamp(min=1)
    return fill(terms, rivals(where)).sum((-2, -1)) / pairs


def pair_square(s: Tensor, target: Tensor, where: Tensor) -> Tensor:
    """Mean over ordered pairs i != j of (s_i - s_j - t_ij)^2: (B, N), (B, N, N) -> (B,)."""
    gaps = s[:, :, None] - s[:, None, :]  # (B, N, N)
    return pair_mean((gaps - target).square(), where)


def first_of_pair(logps: Tensor) -> Tensor:
    """(2,) bool, True for the chosen response. Made on the device: a list copied there would make Python wait."""
    return torch.arange(2, device=logps.device) == 0


def pair_gaps(logps: Tensor, base_logps: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 2) -> log-ratios (B,) of the chosen and of the rejected response, 0 where masked."""
    chosen, rejected = (fill(logps, where) - fill(base_logps, where)).unbind(-1)
    return chosen, rejected


def logistic(margin: Tensor, smoothing: float = 0.0) -> Tensor:
    """-(1-eps) log sigma(u) - eps log sigma(-u), finite for any u."""
    return -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)


def v_win_rates(prefs: Tensor, where: Tensor) -> Tensor:
    """(1/K) sum_j P_ij over all K responses, the own comparison counting 1/2: (B, N)."""
    return (fill(prefs, rivals(where)).sum(-1) + 0.5) / count(where)[:, None]


def u_win_rates(prefs: Tensor, where: Tensor) -> Tensor:
    """(1/(K-1)) sum_{j != i} P_ij, without the own comparison: (B, N)."""
    return fill(prefs, rivals(where)).sum(-1) / (count(where) - 1).clamp(min=1)[:, None]


def choose_target(
    logps: Tensor, prefs: Tensor | None, win_rates: Tensor | None, statistic: str, where: Tensor, user: str
) -> Tensor:
    """Exactly one of `prefs` and `win_rates`, checked, filled with 1/2 where masked, as the statistic asks."""
    if (prefs is None) == (win_rates is None):
        raise ValueError(f"give exactly one of prefs and win_rates, got {'neither' if prefs is None else 'both'}")
    B, N = logps.shape
    if win_rates is not None:
        if statistic == "pairs":
            raise ValueError(f"win_rates cannot serve {user}, which compares pairs; give prefs")
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
    """(B,) -> scalar; "mean" divides by B whatever is masked (0 for B = 0), "none" leaves (B,)."""
    if reduction == "none":
        return values
    return values.sum() / max(values.shape[0], 1) if reduction == "mean" else values.sum()


def check_reduction(reduction: str) -> str:
    return check_choice("reduction", reduction, REDUCTIONS)


def step_coefficients(eta: float, beta: float) -> tuple[float, float, float]:
    """(a, b, c) of log pi_{t+1} = a log pi_t + b log pi_ref + c w - log Z: a = 1/(1+eta*beta), b = 1-a, c = eta*a."""
    check_number("eta", eta, above=0)
    check_number("beta", beta, least=0)
    a = 1 / (1 + eta * beta)
    return a, eta * beta * a, eta * a


def residual(logps: Tensor, old_logps: Tensor, ref_logps: Tensor, b: float) -> Tensor:
    """s_i = l_i - a o_i - b r_i with a = 1 - b, (B, N).

    Hazard: a o and b r are hundreds of nats, s is below one. Remedy: form the two small differences first.
    """
    return (logps - old_logps) + b * (old_logps - ref_logps)


def extended_log(p: Tensor) -> Tensor:
    """log p inside [DELTA, 1 - DELTA]; outside, its second-order Taylor polynomial at the nearer end.

    Hazard: an implied win rate is not confined to (0, 1), and a clamp has gradient 0 just where a push back is needed.
    Remedy: expand around the nearest point inside. Inside, x is 0 but carries the slope 1/p, so one line serves both.
    """
    nearest = p.detach().clamp(DELTA, 1 - DELTA)
    x = (p - nearest) / nearest
    return nearest.log() + x * (1 - x / 2)
