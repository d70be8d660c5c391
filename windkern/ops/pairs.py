"""Win rates and pair losses over all pairs of a group, in O(N) memory."""

from __future__ import annotations

import torch
from torch import Tensor

from windkern import backends
from windkern._checks import (
    check_choice,
    check_floating,
    check_prefs_values,
    check_rewards_values,
    check_same_device,
    check_shape,
    check_tensor,
    readable,
    shape_of,
)
from windkern.ops.once import differentiable_once, graph_links

LINKS = ("bradley_terry", "step")
LOSSES = ("square", "logistic", "hinge")

_library = torch.library.Library("windkern", "FRAGMENT")
_library.define(
    "pair_terms(Tensor scores, Tensor? prefs, Tensor? rewards, Tensor? where, str link, str loss, str backend) -> "
    "(Tensor value, Tensor slope)"
)
_library.define("win_rates(Tensor? prefs, Tensor? rewards, Tensor? where, str link, str backend) -> Tensor")


def _pair_terms(scores, prefs, rewards, where, link, loss, backend):
    with backends.on_device_of(scores):
        return backends.BACKENDS[backend].kernels().pair_terms(scores, prefs, rewards, where, link, loss)


def _win_rates(prefs, rewards, where, link, backend):
    with backends.on_device_of(prefs if rewards is None else rewards):
        return backends.BACKENDS[backend].kernels().win_rates(prefs, rewards, where, link)


_library.impl("pair_terms", _pair_terms, "CompositeExplicitAutograd")
_library.impl("win_rates", _win_rates, "CompositeExplicitAutograd")
torch.library.register_fake(
    "windkern::pair_terms",
    lambda scores, prefs, rewards, where, link, loss, backend: (
        scores.new_empty(scores.shape[0]),
        torch.empty_like(scores, memory_format=torch.contiguous_format),
    ),
    lib=_library,
)
torch.library.register_fake(
    "windkern::win_rates",
    lambda prefs, rewards, where, link, backend: (prefs if rewards is None else rewards).new_empty(
        (prefs if rewards is None else rewards).shape[:2]
    ),
    lib=_library,
)


class _PairTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, links, prefs, rewards, where, link, loss, backend):
        value, slope = torch.ops.windkern.pair_terms(scores, prefs, rewards, where, link, loss, backend)
        ctx.save_for_backward(slope)
        ctx.links = links
        return value

    @staticmethod
    @differentiable_once("pair_loss", lambda ctx: ctx.links)
    def backward(ctx, upstream):
        (slope,) = ctx.saved_tensors
        return upstream.unsqueeze(1) * slope, None, None, None, None, None, None, None


def _check_wide(name: str, value: Tensor) -> Tensor:
    if check_floating(name, value).dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64 (differences of pairs cancel), got {value.dtype}")
    return value


def _check_constant(name: str, value: Tensor) -> None:
    if value.requires_grad:
        raise ValueError(f"{name} requires grad, but it is a constant here; detach it")


def _given(prefs: Tensor | None, rewards: Tensor | None, where: Tensor | None) -> tuple[str, Tensor]:
    """Check prefs (B, N, N) or rewards (B, N), values included as in the losses; return the name and the tensor."""
    if (prefs is None) == (rewards is None):
        raise ValueError(f"give exactly one of prefs and rewards, got {'neither' if prefs is None else 'both'}")
    name, value = ("prefs", prefs) if rewards is None else ("rewards", rewards)
    _check_constant(name, _check_wide(name, value))
    if value.dim() != (3 if rewards is None else 2):
        raise ValueError(
            f"{name} must have shape {'(B, N, N)' if rewards is None else '(B, N)'}, got {shape_of(value)}"
        )
    if rewards is None:
        check_shape(name, value, ("B", value.shape[1], value.shape[1]))
    if where is not None:
        if check_tensor("where", where).dtype != torch.bool:
            raise TypeError(f"where must be torch.bool, got {where.dtype}")
        check_shape("where", where, tuple(value.shape[:2]))
        check_same_device("where", where, "prefs or rewards", value)
    if readable(value):
        # As in the losses, a group with fewer than two responses does not count, so its values are not checked.
        counted = None if where is None else where & (where.sum(1, keepdim=True) >= 2)
        if rewards is None:
            check_prefs_values(value, counted)
        else:
            check_rewards_values(value, counted)
    return name, value


def win_rates(
    prefs: Tensor | None = None,
    *,
    rewards: Tensor | None = None,
    link: str = "bradley_terry",
    where: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return the win rate of each response against its group, itself included (the V-statistic).

        w_i = (1/K) * sum_{j counted} P_ij,  P_ii = 1/2      P_ij = prefs[i, j], or link(r_i - r_j)

    Args:
        prefs: (B, N, N), the chance that i beats j, prefs + prefs^T = 1, so 1/2 on the diagonal; float32 or float64. Or
        rewards: (B, N), finite; no N x N tensor is created.
        link: for rewards: "bradley_terry" (sigmoid of the gap) or "step" (1, 1/2 for a tie, 0).
        where: (B, N) bool, responses that count; the others get 0.
        backend: "auto" or a name of `windkern.backends.available(device)`.

    Returns:
        (B, N), in the dtype of prefs or rewards. No gradient flows.

    Raises:
        ValueError: both or neither of prefs and rewards are given; a shape or `link` is wrong; an input requires grad;
            prefs are outside [0, 1], NaN, or without prefs + prefs^T = 1; or rewards are not finite. Values are checked
            on a CPU, as in the losses; on a GPU, call `windkern.losses.check_prefs` (there the diagonal counts as 1/2,
            whatever it holds).
        TypeError: a dtype does not fit.
        BackendUnavailableError: the named back end cannot run here.

    Memory:
        O(N) per group besides the inputs.

    Source:
        docs/theory.md, eq. (1.32).

    Example:
        >>> win_rates(rewards=torch.tensor([[2.0, 1.0, 1.0]]), link="step")
        tensor([[0.8333, 0.3333, 0.3333]])
    """
    check_choice("link", link, LINKS)
    _, value = _given(prefs, rewards, where)
    return torch.ops.windkern.win_rates(
        prefs, rewards, where, link, backends.resolve(backend, value.device, value.dtype)
    )


def pair_loss(
    scores: Tensor,
    prefs: Tensor | None = None,
    *,
    rewards: Tensor | None = None,
    link: str = "bradley_terry",
    loss: str = "square",
    where: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Return a loss over all ordered pairs of each group, in O(N) memory, with the gradient in the scores.

        L_b = mean_{i != j} f(s_i - s_j, P_ij)
        square: (d - (P - 1/2))^2      logistic: P * log(1 + exp(-d))      hinge: P * max(0, 1 - d)

    Both orders of a pair are in the mean, so logistic and hinge see the winner's order with P_ij and the loser's with
    1 - P_ij; a tie (P = 1/2) counts half each way.

    Args:
        scores: (B, N) float32 or float64, differentiable.
        prefs: (B, N, N), the chance that i beats j, prefs + prefs^T = 1. Or
        rewards: (B, N), finite; no N x N tensor is created.
        link: for rewards: "bradley_terry" or "step".
        loss: "square", "logistic" or "hinge".
        where: (B, N) bool, responses that count; a group with fewer than two contributes 0 and gradient 0.
        reduction: "mean" (sum over groups divided by B), "sum" or "none".
        backend: "auto" or a name of `windkern.backends.available(device)`.

    Returns:
        A scalar, or (B,) for "none"; the dtype of scores.

    Raises:
        ValueError: both or neither of prefs and rewards are given, a shape or a name is wrong, or prefs or rewards
            require grad or have values that `win_rates` refuses.
        TypeError: a dtype does not fit.
        BackendUnavailableError: the named back end cannot run here.

    Memory:
        O(N) per group besides the inputs; time O(N^2).

    Source:
        square: docs/theory.md; logistic: Bradley-Terry likelihood (RankNet); hinge: ranking SVM.

    Example:
        >>> scores = torch.tensor([[1.0, 0.0]], requires_grad=True)
        >>> loss = pair_loss(scores, rewards=torch.tensor([[5.0, 1.0]]), link="step", loss="hinge")
        >>> loss.backward()
        >>> loss.item(), scores.grad.tolist()
        (0.0, [[0.0, 0.0]])
    """
    name, value = _given(prefs, rewards, where)
    for argument, choice, choices in (
        ("link", link, LINKS),
        ("loss", loss, LOSSES),
        ("reduction", reduction, ("mean", "sum", "none")),
    ):
        check_choice(argument, choice, choices)
    _check_wide("scores", scores)
    check_shape("scores", scores, tuple(value.shape[:2]))
    check_same_device(name, value, "scores", scores)
    if value.dtype != scores.dtype:
        raise TypeError(f"{name} must have the dtype of scores, {scores.dtype}, got {value.dtype}")
    groups, n = scores.shape
    chosen = backends.resolve(backend, scores.device, scores.dtype)
    total = _PairTerms.apply(scores, graph_links(scores), prefs, rewards, where, link, loss, chosen)
    if where is None:
        per_group = total / max(1, n * (n - 1))
    else:
        counted = where.sum(1)
        per_group = total / (counted * (counted - 1)).clamp(min=1)
    if reduction == "none":
        return per_group
    return per_group.sum() / max(1, groups) if reduction == "mean" else per_group.sum()
