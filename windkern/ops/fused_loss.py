"""`fused_loss`: loss and gradients of groups of responses, finished chunk by chunk in forward."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from windkern._checks import check_choice, check_tensor, shape_of
from windkern.kernels import buffers
from windkern.kernels.contract import RowStats, Upstream
from windkern.ops import walk as walks
from windkern.ops.inputs import IGNORED, Blocks, Inputs, acc_dtype, first_scored, must_keep_rows, prepare
from windkern.ops.logprobs import config_of, finish_hidden, gather_rows, pad_rows, padded_rows, run_forward
from windkern.ops.once import differentiable_once
from windkern.plan import Plan, plan
from windkern.transform import LogitTransform


@dataclass
class _Job:
    """One call: checked inputs, the loss, and how it is cut into chunks of whole groups."""

    inputs: Inputs
    loss_fn: Callable[..., Tensor]
    per_group: dict[str, Tensor]
    groups: int  # B
    responses: int  # N
    tokens: int  # T
    num_scored: int | None
    memory_budget: int | None
    deterministic: bool
    grads: dict[str, object]

    @property
    def group_tokens(self) -> int:
        return self.responses * self.tokens

    def make_plan(self, rows: int, *, group_rows: int | None = None, total_rows: int | None = None) -> Plan:
        return plan(
            rows,
            self.inputs.hidden_sizes,
            self.inputs.weight[0].shape[0],
            self.inputs.operand,
            group_rows=group_rows,
            memory_budget=self.memory_budget,
            device=self.inputs.device,
            deterministic=self.deterministic,
            total_rows=total_rows,
            weight_dtype=self.inputs.weight[0].dtype,
            **self.grads,
        )

    def chunks(self) -> tuple[Plan, Iterator[slice]]:
        """The plan, and slices of groups; sized by the largest group's scored rows where the host may know them."""
        scored = self.inputs.targets >= 0
        if self.num_scored is not None or must_keep_rows(self.inputs.targets):
            per_group, rows = self.group_tokens, self.inputs.total_rows
            if self.num_scored is not None:
                rows = min(rows, self.num_scored)
        else:
            counts = scored.view(self.groups, self.group_tokens).sum(1)
            per_group, rows = int(counts.max()) if self.groups else 0, int(scored.sum())
        per_group = max(1, per_group)
        made = self.make_plan(
            per_group * self.groups, group_rows=per_group, total_rows=self.inputs.total_rows + (rows == 0)
        )
        step = made.chunk_groups
        return made, (slice(first, min(first + step, self.groups)) for first in range(0, self.groups, step))


def _chunk_loss(job: _Job, logps: Tensor, groups: slice, wants_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Summed loss of one chunk and its gradient with respect to logps (b, N)."""
    constants = {name: value[groups] for name, value in job.per_group.items()}
    with torch.enable_grad() if wants_grad else torch.no_grad():
        leaf = logps.detach().requires_grad_(wants_grad)
        values = job.loss_fn(leaf, **constants)
        if not isinstance(values, Tensor) or shape_of(values) != (logps.shape[0],):
            got = shape_of(values) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"loss_fn must return one loss per group, shape ({logps.shape[0]},), for logps {shape_of(logps)}, "
                f'got {got}; losses of windkern.losses take reduction="none" for this'
            )
        total = values.sum()
        if not wants_grad:
            return total, None
        if total.grad_fn is None:
            return total.detach(), torch.zeros_like(logps)
        _refuse_other_leaves(total, leaf)
        (coefficients,) = torch.autograd.grad(total, leaf, allow_unused=True)
    return total.detach(), torch.zeros_like(logps) if coefficients is None else coefficients


def _refuse_other_leaves(total: Tensor, leaf: Tensor) -> None:
    """Hazard: a parameter used inside loss_fn would get no gradient, silently. Remedy: raise."""
    seen, stack = set(), [total.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        other = getattr(node, "variable", None)
        if other is not None and other is not leaf:
            raise ValueError(
                f"loss_fn must depend on no tensor that requires grad except logps, found one of shape "
                f"{shape_of(other)}; use sequence_logps and your loss instead"
            )
        stack.extend(parent for parent, _ in node.next_functions)


class _Gradients:
    """Gradients of all chunks: dhidden rows are written, dweight and dbias add up in float32."""

    def __init__(self, job: _Job, num_chunks: int):
        inputs, grads = job.inputs, job.grads
        self.several = num_chunks > 1
        acc = acc_dtype(inputs)
        self.hidden = [
            torch.zeros_like(block) if flag else None
            for block, flag in zip(inputs.hidden, grads["hidden_grad"], strict=True)
        ]
        self.weight: list[Tensor | None] = [None] * len(inputs.weight)
        for k, (head, flag) in enumerate(zip(inputs.weight, grads["weight_grad"], strict=True)):
            if flag and self.several and head.dtype != acc:
                self.weight[k] = buffers.zeros("accumulator", tuple(head.shape), acc, head.device)
            elif flag:
                self.weight[k] = torch.zeros(head.shape, dtype=head.dtype, device=head.device)
        self.bias = torch.zeros_like(inputs.bias, dtype=acc) if grads["bias_grad"] else None

    def finish(self, job: _Job) -> list[Tensor | None]:
        for k, head in enumerate(job.inputs.weight):
            if self.weight[k] is not None:
                self.weight[k] = self.weight[k].to(head.dtype)
        bias = None if self.bias is None else self.bias.to(job.inputs.bias.dtype)
        return [bias, *self.hidden, *self.weight]


def _run(job: _Job, wants_grad: bool) -> tuple[Tensor, list[Tensor | None]]:
    made, chunks = job.chunks()
    gradients = _Gradients(job, made.num_chunks) if wants_grad else None
    total = job.inputs.hidden[0].new_zeros((), dtype=acc_dtype(job.inputs))
    for groups in chunks:
        total = total + _run_chunk(job, groups, gradients)
    return total, [] if gradients is None else gradients.finish(job)


def _run_chunk(job: _Job, groups: slice, gradients: _Gradients | None) -> Tensor:
    inputs = job.inputs
    places = slice(groups.start * job.group_tokens, groups.stop * job.group_tokens)
    hidden = [block[places] for block in inputs.hidden]
    targets, rows, overflow = inputs.targets[places], None, None
    if job.num_scored is not None and targets.numel() > 0:
        bound = min(job.num_scored, targets.shape[0])
        rows, targets, overflow = first_scored(targets >= 0, targets, bound)
    elif not must_keep_rows(targets):
        positions = (targets >= 0).nonzero().squeeze(1)
        if positions.numel() < targets.numel():
            rows, targets = positions, targets.index_select(0, positions)
    num_rows = targets.shape[0]
    chunk_plan = job.make_plan(num_rows, total_rows=num_rows + (rows is not None))
    walk = config_of(inputs, chunk_plan, job.grads, False).walk(inputs.device.type)
    total_rows = padded_rows(num_rows, max(1, chunk_plan.row_block))
    compact, labels = gather_rows(hidden, rows, total_rows), pad_rows(targets, total_rows, IGNORED)
    saved = run_forward(walk, compact, inputs.weight, inputs.bias, labels)
    token_logps = torch.where(targets >= 0, RowStats(*saved.stats).logps[:num_rows], 0.0)
    if rows is not None:
        token_logps = token_logps.new_zeros(places.stop - places.start).index_add_(0, rows, token_logps)
    if overflow is not None:
        token_logps = torch.where(overflow, torch.nan, token_logps)
    num_groups = groups.stop - groups.start
    logps = token_logps.view(num_groups, job.responses, job.tokens).sum(-1)
    loss, coefficients = _chunk_loss(job, logps, groups, gradients is not None)
    if gradients is None:
        return loss
    c_logp = coefficients.to(logps.dtype).unsqueeze(-1).expand(-1, -1, job.tokens).reshape(-1)
    c_logp = c_logp if rows is None else c_logp.index_select(0, rows)
    upstream = Upstream(pad_rows(torch.where(targets >= 0, c_logp, 0.0), total_rows, 0.0), None, None)
    if walk.frozen_head:
        grads = walks.backward_unit(walk, upstream, compact, inputs.weight, labels, saved)
    else:
        grads = walks.backward(
            walk,
            upstream,
            compact,
            inputs.weight,
            inputs.bias,
            labels,
            saved,
            gradients.weight,
            gradients.bias,
            accumulate=gradients.several,
        )
    for k, block in enumerate(hidden):
        if grads.hidden[k] is not None:
            gradients.hidden[k][places].copy_(finish_hidden(grads.hidden[k], block, rows, num_rows))
            grads.hidden[k] = None
    return loss


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, job, scale, bias, *blocks):
        n = len(blocks) // 2
        inputs = replace(job.inputs, hidden=list(blocks[:n]), weight=list(blocks[n:]), bias=bias)
        total, grads = _run(replace(job, inputs=inputs), wants_grad=True)
        ctx.grads = [None if grad is None else grad.mul_(scale) for grad in grads]
        return total * scale

    @staticmethod
    @differentiable_once("fused_loss")
    def backward(ctx, upstream):
        if ctx.grads is None:
            raise RuntimeError(
                "fused_loss was backpropagated a second time after its gradients were freed; "
                "pass retain_graph=True to the first backward"
            )
        if _keeps_graph():
            return None, None, *[None if grad is None else grad * upstream for grad in ctx.grads]
        grads, ctx.grads = ctx.grads, None
        return None, None, *[None if grad is None else grad.mul_(upstream) for grad in grads]


def _keeps_graph() -> bool:
    """Whether this backward runs with retain_graph=True; if torch cannot tell, gradients are copied to be safe."""
    query = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if query is None else query()


def _check_per_group(per_group: Mapping[str, Tensor] | None, groups: int) -> dict[str, Tensor]:
    checked = {}
    for name, value in (per_group or {}).items():
        check_tensor(f"per_group[{name!r}]", value)
        if value.dim() == 0 or value.shape[0] != groups:
            raise ValueError(
                f"per_group[{name!r}] must have leading dimension {groups} (one entry per group), got {shape_of(value)}"
            )
        if value.requires_grad:
            raise ValueError(
                f"per_group[{name!r}] requires grad, but fused_loss differentiates only through logps; "
                "detach it, or use sequence_logps and your loss"
            )
        checked[name] = value
    return checked


def _outside_graphs(function: Callable) -> Callable:
    """torch.compiler.disable, applied at the first call after torch._dynamo was imported (which takes a second)."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not hasattr(function, "eager"):
            function.eager = torch.compiler.disable(function)
        return function.eager(*args, **kwargs)

    return call


@_outside_graphs
def fused_loss(
    loss_fn: Callable[..., Tensor],
    hidden: Blocks,
    weight: Blocks,
    targets: Tensor,
    *,
    per_group: Mapping[str, Tensor] | None = None,
    reduction: str = "mean",
    bias: Tensor | None = None,
    transform: LogitTransform | None = None,
    ignore_index: int = -100,
    num_scored: int | None = None,
    memory_budget: int | None = None,
    deterministic: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Return a loss over groups of responses, with gradients, without logits and without recomputing them.

        logps[b, n] = sum_t log softmax(transform(hidden[b, n, t] @ weight.T + bias))[targets[b, n, t]]
        loss = sum_b loss_fn(logps, **per_group)[b]      divided by B for reduction="mean"

    Groups are processed in chunks whose probabilities fit the memory budget; each chunk's loss and gradients are
    finished in forward, so no logit is computed twice. Same value and gradients as `sequence_logps` and the loss by
    hand.

    Args:
        loss_fn: called as loss_fn(logps (b, N), **per_group) -> (b,) on chunks of b whole groups; any differentiable
            torch code that treats groups apart. It may hold no parameter that requires grad.
        hidden: (B, N, T, H), or a tuple of blocks.
        weight: (V, H), or a tuple of blocks.
        targets: (B, N, T), aligned with hidden.
        per_group: constants with leading dimension B, handed to loss_fn chunk by chunk by name.
        reduction: "mean" (the sum over groups divided by B, always) or "sum".
        bias, transform, ignore_index, num_scored, memory_budget, deterministic, backend: see `token_logps`.

    Returns:
        A scalar, float32 (float64 for float64 input).

    Raises:
        ValueError: shapes do not fit; a constant in `per_group` requires grad or has another leading dimension;
            loss_fn returns anything but (b,), or depends on another tensor that requires grad.
        TypeError, BackendUnavailableError: as `token_logps`.

    Memory:
        The budget, and 4 * V * H bytes when there is more than one chunk and the head is trained in low precision.
        Gradients exist from forward on; backward hands them over (and scales them), or copies with retain_graph.

    Notes:
        Under torch.compile this function is a graph break: loss_fn is Python.

    Source:
        README, section "How it works".

    Example:
        >>> hidden, weight = torch.randn(2, 3, 4, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
        >>> targets = torch.randint(0, 11, (2, 3, 4))
        >>> best = torch.tensor([0, 2])
        >>> def nll_of_best(logps, best):
        ...     return -logps.gather(1, best.unsqueeze(1)).squeeze(1)
        >>> loss = fused_loss(nll_of_best, hidden, weight, targets, per_group={"best": best})
        >>> loss.backward()
        >>> hidden.grad.shape
        torch.Size([2, 3, 4, 8])
    """
    check_choice("reduction", reduction, ("mean", "sum"))
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable, got {type(loss_fn).__name__}")
    if check_tensor("targets", targets).dim() != 3:
        raise ValueError(f"targets must have shape (B, N, T), got {shape_of(targets)}")
    inputs = prepare(
        hidden,
        weight,
        targets,
        bias=bias,
        transform=transform,
        ignore_index=ignore_index,
        num_scored=None,
        backend=backend,
        drop=False,
    )
    groups, responses, tokens = targets.shape
    grads = inputs.grads()
    job = _Job(
        inputs=inputs,
        loss_fn=loss_fn,
        per_group=_check_per_group(per_group, groups),
        groups=groups,
        responses=responses,
        tokens=tokens,
        num_scored=num_scored,
        memory_budget=memory_budget,
        deterministic=deterministic,
        grads=grads,
    )
    scale = 1.0 / max(1, groups) if reduction == "mean" else 1.0
    if not (any(grads["hidden_grad"]) or any(grads["weight_grad"]) or grads["bias_grad"]):
        return _run(job, wants_grad=False)[0] * scale
    return _FusedLoss.apply(job, scale, inputs.bias, *inputs.hidden, *inputs.weight)
