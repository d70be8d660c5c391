"""Sequence log-probs: token log-probs summed over padded or packed sequences."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from windkern import backends
from windkern._checks import check_choice, check_integer, check_same_device, shape_of
from windkern.ops.inputs import Blocks, Weight
from windkern.ops.logprobs import token_logps

_library = torch.library.Library("windkern", "FRAGMENT")
_library.define("segment_sum(Tensor values, Tensor cu_seqlens, str backend) -> Tensor")


def _segment_sum(values: Tensor, cu_seqlens: Tensor, backend: str) -> Tensor:
    if backends.checks_values(values.device):
        bounds = cu_seqlens.tolist()
        rising = all(low <= high for low, high in itertools.pairwise(bounds))
        if bounds[0] != 0 or bounds[-1] != values.shape[0] or not rising:
            raise ValueError(
                f"cu_seqlens must rise from 0 to the number of rows, {values.shape[0]}, got {bounds[:4]}...{bounds[-1]}"
            )
    with backends.on_device_of(values):
        return backends.BACKENDS[backend].kernels().segment_sum(values, cu_seqlens)


_library.impl("segment_sum", _segment_sum, "CompositeExplicitAutograd")
torch.library.register_fake(
    "windkern::segment_sum", lambda values, cu_seqlens, backend: values.new_empty(cu_seqlens.shape[0] - 1), lib=_library
)


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, cu_seqlens, backend):
        ctx.save_for_backward(cu_seqlens)
        ctx.rows = values.shape[0]
        return torch.ops.windkern.segment_sum(values, cu_seqlens, backend)

    @staticmethod
    def backward(ctx, upstream):
        (cu_seqlens,) = ctx.saved_tensors
        rows = torch.arange(ctx.rows, device=upstream.device)
        segment = torch.searchsorted(cu_seqlens, rows, right=True) - 1
        return upstream.index_select(0, segment), None, None


def sequence_logps(
    hidden: Blocks,
    weight: Weight,
    targets: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    normalize: str = "sum",
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    max_scored: int | None = None,
    memory_budget: int | None = None,
    batch_invariant: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Return the log-prob of each sequence (the sum over its scored tokens), without the logits.

        logps[s] = sum_t log softmax(transform(hidden[s, t] @ weight.T + bias))[targets[s, t]]

    Args:
        hidden: (..., T, H), or packed (M, H) with `cu_seqlens`; or a tuple of blocks, see `token_logps`.
        weight: (V, H), or a tuple of blocks.
        targets: (..., T), or packed (M,); aligned with hidden.
        cu_seqlens: (S + 1,) int64 or int32, rising from 0 to M: sequence s is rows cu_seqlens[s] to cu_seqlens[s + 1].
        normalize: "sum" (as the theory of preference losses requires) or "mean" over the scored tokens (0 if none).
        bias, scale, softcap, temperature, ignore_index, max_scored, memory_budget, batch_invariant, backend: see
            `token_logps`.

    Returns:
        (...) for padded and (S,) for packed input, nats, float32 (float64 for a float64 weight). Padded rows are summed
        in float32, packed ones in float64.

    Raises:
        ValueError: `normalize` is unknown, or `cu_seqlens` does not fit; and as `token_logps`.
        TypeError, BackendUnavailableError: as `token_logps`.

    Memory:
        As `token_logps`, plus one float32 per token.

    Source:
        docs/concepts/walk.md.

    Example:
        >>> hidden, weight = torch.randn(6, 8), torch.randn(11, 8)
        >>> targets = torch.tensor([1, 2, 3, 4, 5, 6])
        >>> packed = sequence_logps(hidden, weight, targets, cu_seqlens=torch.tensor([0, 3, 6]))
        >>> padded = sequence_logps(hidden.view(2, 3, 8), weight, targets.view(2, 3))
        >>> torch.allclose(packed, padded)
        True
    """
    check_choice("normalize", normalize, ("sum", "mean"))
    if cu_seqlens is not None:
        check_integer("cu_seqlens", cu_seqlens)
        check_integer("targets", targets)
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or targets.dim() != 1:
            raise ValueError(
                "cu_seqlens must have shape (S + 1,) with packed targets (M,), got "
                f"{shape_of(cu_seqlens)} and targets {shape_of(targets)}"
            )
        check_same_device("cu_seqlens", cu_seqlens, "targets", targets)
        cu_seqlens = cu_seqlens.long()
    elif check_integer("targets", targets).dim() == 0:
        raise ValueError("targets must have shape (..., T), got a scalar")
    logps = token_logps(
        hidden,
        weight,
        targets,
        bias=bias,
        scale=scale,
        softcap=softcap,
        temperature=temperature,
        ignore_index=ignore_index,
        max_scored=max_scored,
        memory_budget=memory_budget,
        batch_invariant=batch_invariant,
        backend=backend,
    ).logps
    if cu_seqlens is None:
        total = logps.sum(-1)
    else:
        name = backends.resolve(backend, logps.device, logps.dtype)
        total = _SegmentSum.apply(logps, cu_seqlens, name)
    if normalize == "sum":
        return total
    scored = (targets != ignore_index).to(logps.dtype)
    count = scored.sum(-1) if cu_seqlens is None else torch.ops.windkern.segment_sum(scored, cu_seqlens, name)
    return total / count.clamp(min=1)
