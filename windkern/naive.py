"""The specification: every op in plain PyTorch with the full logits. Slow, obvious, float64-ready."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor


def _blocks(value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def logits(
    hidden: Tensor | Sequence[Tensor],
    weight: Tensor | Sequence[Tensor],
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Return transformed logits (..., V) of z = sum_k hidden_k @ weight_k.T + bias; a bias of -inf masks at the end.

        scale * z / temperature, with a softcap: softcap * tanh(scale * z / softcap) / temperature

    Products are computed in the dtype of the head (the widest if its blocks differ), as in lm_head(hidden.to(dtype)).

    Example:
        >>> logits(torch.ones(2, 3), torch.ones(5, 3)).shape
        torch.Size([2, 5])
    """
    heads = _blocks(weight)
    dtype = functools.reduce(torch.promote_types, (head.dtype for head in heads))
    products = (block.to(dtype) @ head.to(dtype).T for block, head in zip(_blocks(hidden), heads, strict=True))
    z = functools.reduce(torch.add, products)
    if bias is not None:
        z = z + bias
    z = scale * z if softcap is None else softcap * torch.tanh(z * (scale / softcap))
    z = z / temperature
    if bias is not None:
        z = z + torch.where(bias == -torch.inf, -torch.inf, 0.0).to(z.dtype)
    return z


def token_logps(
    hidden: Tensor | Sequence[Tensor],
    weight: Tensor | Sequence[Tensor],
    targets: Tensor,
    *,
    ignore_index: int = -100,
    entropy: bool = False,
    **logits_of: Any,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (logps, lse, entropy), each shaped like targets, 0 where ignored; entropy is None unless asked for.

    `logits_of` are the arguments of `logits` after the weight. Hidden states of ignored targets have no effect, not
    even as 0 * NaN.

    Example:
        >>> logps, lse, _ = token_logps(torch.zeros(1, 3), torch.ones(4, 3), torch.tensor([2]))
        >>> round(float(lse), 4), round(float(logps), 4)
        (1.3863, -1.3863)
    """
    scored = targets != ignore_index
    hidden = [torch.where(scored.unsqueeze(-1), block, 0.0) for block in _blocks(hidden)]
    z = logits(hidden, weight, **logits_of)
    log_p = torch.log_softmax(z, dim=-1)
    logps = log_p.gather(-1, torch.where(scored, targets, 0).unsqueeze(-1).long()).squeeze(-1)
    lse = torch.logsumexp(z, dim=-1)
    entropies = None
    if entropy:
        # Hazard: 0 * -inf where a bias masks. Remedy: replace those entries before the product.
        masked = log_p == -torch.inf
        terms = log_p.exp() * log_p.masked_fill(masked, 0.0)
        entropies = torch.where(scored, -terms.sum(-1), 0.0)
    return torch.where(scored, logps, 0.0), torch.where(scored, lse, 0.0), entropies


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the sums of values[cu_seqlens[s] : cu_seqlens[s + 1]], (M,), (S + 1,) -> (S,).

    Example:
        >>> segment_sum(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 3]))
        tensor([3., 4.])
    """
    sums = [values[start:stop].sum() for start, stop in itertools.pairwise(cu_seqlens.tolist())]
    return torch.stack(sums) if sums else values.new_zeros(0)


def sequence_logps(
    hidden: Tensor | Sequence[Tensor],
    weight: Tensor | Sequence[Tensor],
    targets: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    normalize: str = "sum",
    ignore_index: int = -100,
    **kwargs: Any,
) -> Tensor:
    """Sum (or average) the log-probs of each sequence's scored tokens; padded (..., T) -> (...), packed -> (S,).

    Example:
        >>> sequence_logps(torch.zeros(2, 3, 4), torch.ones(5, 4), torch.zeros(2, 3, dtype=torch.long)).shape
        torch.Size([2])
    """
    logps, _, _ = token_logps(hidden, weight, targets, ignore_index=ignore_index, **kwargs)
    scored = (targets != ignore_index).to(logps.dtype)
    if cu_seqlens is None:
        total, count = logps.sum(-1), scored.sum(-1)
    else:
        total, count = segment_sum(logps, cu_seqlens), segment_sum(scored, cu_seqlens)
    return total if normalize == "sum" else total / count.clamp(min=1)


def fused_loss(
    loss_fn: Callable[..., Tensor],
    hidden: Tensor | Sequence[Tensor],
    weight: Tensor | Sequence[Tensor],
    targets: Tensor,
    *,
    per_group: Any = None,
    reduction: str = "mean",
    **kwargs: Any,
) -> Tensor:
    """Apply loss_fn to sequence log-probs (B, N) and reduce over the B groups.

    Example:
        >>> hidden, targets = torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 4, dtype=torch.long)
        >>> fused_loss(lambda logps: logps.sum(-1), hidden, torch.ones(5, 8), targets).shape
        torch.Size([])
    """
    logps = sequence_logps(hidden, weight, targets, **kwargs)
    per_loss = loss_fn(logps, **(per_group or {}))
    return per_loss.sum() / logps.shape[0] if reduction == "mean" else per_loss.sum()


def preferences(rewards: Tensor, link: str = "bradley_terry") -> Tensor:
    """Return the chances (B, N, N) that i beats j from rewards (B, N): sigmoid of the gap, or 1, 1/2, 0 by its sign.

    Example:
        >>> preferences(torch.tensor([[1.0, 1.0, 0.0]]), link="step")[0, 0]
        tensor([0.5000, 0.5000, 1.0000])
    """
    gap = rewards.unsqueeze(-1) - rewards.unsqueeze(-2)
    return torch.sigmoid(gap) if link == "bradley_terry" else 0.5 * (1 + torch.sign(gap))


def win_rates(
    prefs: Tensor | None = None,
    *,
    rewards: Tensor | None = None,
    link: str = "bradley_terry",
    where: Tensor | None = None,
) -> Tensor:
    """Return (B, N): the mean chance that i beats j over the counted j, i itself with 1/2; 0 where masked.

    Example:
        >>> win_rates(rewards=torch.tensor([[1.0, 0.0]]), link="step")
        tensor([[0.7500, 0.2500]])
    """
    prefs = preferences(cast(Tensor, rewards), link) if prefs is None else prefs
    prefs = torch.where(torch.eye(prefs.shape[-1], dtype=torch.bool, device=prefs.device), 0.5, prefs)
    if where is None:
        return prefs.mean(-1)
    counted = where.unsqueeze(-1) & where.unsqueeze(-2)
    return torch.where(counted, prefs, 0.0).sum(-1) / where.sum(-1, keepdim=True).clamp(min=1)


def pair_loss(
    scores: Tensor,
    prefs: Tensor | None = None,
    *,
    rewards: Tensor | None = None,
    link: str = "bradley_terry",
    loss: str = "square",
    where: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Average over the ordered pairs i != j of a group, then reduce over groups, with the full N x N matrix.

    Example:
        >>> float(pair_loss(torch.zeros(1, 2), rewards=torch.tensor([[1.0, 0.0]]), link="step"))
        0.25
    """
    prefs = preferences(cast(Tensor, rewards), link) if prefs is None else prefs
    gap = scores.unsqueeze(-1) - scores.unsqueeze(-2)
    terms = {
        "square": lambda: (gap - (prefs - 0.5)).square(),
        "logistic": lambda: -prefs * torch.nn.functional.logsigmoid(gap),
        "hinge": lambda: prefs * (1 - gap).clamp(min=0),
    }[loss]()
    counted = ~torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device).expand_as(terms)
    if where is not None:
        counted = counted & where.unsqueeze(-1) & where.unsqueeze(-2)
    pairs = counted.sum((-1, -2)).clamp(min=1)
    per_group = torch.where(counted, terms, 0.0).sum((-1, -2)) / pairs
    return {"mean": per_group.sum() / max(1, scores.shape[0]), "sum": per_group.sum(), "none": per_group}[reduction]
