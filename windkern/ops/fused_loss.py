"""`fused_loss`: loss and gradients of groups of responses, computed chunk by chunk in forward."""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from windkern import backends
from windkern._checks import check_choice, check_flag, check_tensor, shape_of
from windkern.kernels.contract import Upstream
from windkern.ops.held_grads import HeldGradients
from windkern.ops.inputs import (
    Blocks,
    Inputs,
    Weight,
    acc_dtype,
    check_max_scored,
    first_scored,
    must_keep_rows,
    prepare,
    settled,
)
from windkern.ops.once import differentiable_once, graph_links
from windkern.ops.rows import RowBlock
from windkern.plan import Plan, planned


@dataclass
class _Chunk:
    """Whole groups that go through the walk together."""

    groups: slice
    rows: Tensor | None  # (m,) positions of the rows in the chunk; None if none is dropped
    targets: Tensor  # (m,)
    overflow: Tensor | None  # rows of the chunk beyond max_scored
    masks: bool  # whether targets may be ignored


@dataclass
class _Job:
    """One call of `fused_loss`: checked inputs, the loss, and its split into chunks of whole groups."""

    inputs: Inputs
    loss_fn: Callable[..., Tensor]
    per_group: dict[str, Tensor]
    groups: int  # B
    responses: int  # N
    tokens: int  # T
    max_scored: int | None
    memory_budget: int | None
    batch_invariant: bool
    grads: dict[str, Any]
    grad_enabled: bool  # in the caller
    chunk_rows: int | None = None  # rows to plan for if all chunks share one plan; None: each chunk's scored rows

    @property
    def group_tokens(self) -> int:
        return self.responses * self.tokens

    def make_plan(self, rows: int, *, group_rows: int, total_rows: int) -> Plan:
        with backends.on_device_of(self.inputs.targets):
            return planned(
                rows,
                self.inputs.hidden_sizes,
                self.inputs.vocab_size,
                group_rows=group_rows,
                memory_budget=self.memory_budget,
                batch_invariant=self.batch_invariant,
                total_rows=total_rows,
                **{**self.inputs.planned(), **self.grads},
            )

    def chunks(self) -> tuple[Plan, Iterator[_Chunk]]:
        """Return the plan, sized by the largest group's scored rows where the host can know them, and the chunks."""
        targets = self.inputs.targets
        scored = targets >= 0
        total_rows, positions, counts = self.inputs.total_rows, None, None
        if self.max_scored is not None or must_keep_rows(targets):
            per_group, copies = self.group_tokens, True
        else:  # on a GPU: one synchronisation for any number of chunks
            counts = scored.view(self.groups, self.group_tokens).sum(1).tolist()
            per_group, copies = max(counts, default=0), sum(counts) < max(1, targets.shape[0])
            # Hazard: nonzero_static of torch 2.8 on a GPU crashes for no elements.
            found = scored.nonzero_static(size=sum(counts)) if scored.numel() else scored.nonzero()
            positions = found.squeeze(1)
        per_group, groups = max(1, per_group), self.groups
        if self.inputs.streams:
            given = {"batch_invariant": self.batch_invariant, "memory_budget": self.memory_budget}
            given |= {"entropy": False, "fused_loss": True}
            (per_group, groups), flags = settled(self.inputs, self.grads, (per_group, groups), given)
            self.grads["hidden_grad"], total_rows = flags, per_group * groups + 1
        copies = copies or self.inputs.copies_rows
        total_rows = max(total_rows, per_group * groups) + copies  # groups without tokens have fewer
        made = self.make_plan(per_group * groups, group_rows=per_group, total_rows=total_rows)
        chunks = self._cut(made.chunk_groups, targets, positions, counts)
        if not self.inputs.streams:
            return made, chunks
        self.chunk_rows = per_group * made.chunk_groups
        # Other ranks of a streamed head may have more chunks.
        empty = _Chunk(slice(self.groups, self.groups), None, targets[:0], None, masks=False)
        missing = made.num_chunks - -(-self.groups // made.chunk_groups)
        return made, itertools.chain(chunks, itertools.repeat(empty, missing))

    def _cut(self, step: int, targets: Tensor, positions: Tensor | None, counts: list[int] | None) -> Iterator[_Chunk]:
        """Yield chunks of `step` groups, from `positions` of scored rows and `counts` by group if the host has them."""
        passed = 0
        for start in range(0, self.groups, step):
            groups = slice(start, min(start + step, self.groups))
            first = groups.start * self.group_tokens
            labels = targets[first : groups.stop * self.group_tokens]
            rows, overflow = None, None
            if self.max_scored is not None and labels.numel() > 0:
                bound = min(self.max_scored, labels.shape[0])
                rows, labels, overflow = first_scored(labels >= 0, labels, bound)
            elif counts is not None:
                found = sum(counts[groups])
                if found < labels.shape[0]:
                    rows = positions[passed : passed + found] - first
                    labels = labels.index_select(0, rows)
                passed += found
            yield _Chunk(groups, rows, labels, overflow, masks=counts is None)


def _chunk_loss(job: _Job, logps: Tensor, groups: slice, wants_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Return the summed loss of one chunk and its gradient with respect to logps (b, N)."""
    constants = {name: value[groups] for name, value in job.per_group.items()}
    with torch.set_grad_enabled(wants_grad or job.grad_enabled):
        leaf = logps.detach().requires_grad_(wants_grad)
        values = job.loss_fn(leaf, **constants)
        if not isinstance(values, Tensor) or shape_of(values) != (logps.shape[0],):
            got = shape_of(values) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"loss_fn must return one loss per group, shape ({logps.shape[0]},), for logps {shape_of(logps)}, "
                f'got {got}; losses of windkern.losses take reduction="none" for this'
            )
        if not values.is_floating_point():
            raise TypeError(f"loss_fn must return losses of a floating dtype, got {values.dtype}")
        # Reason: loss_fn may compute in another precision, and the sum over groups keeps that of the log-probs.
        total = values.sum(dtype=torch.promote_types(values.dtype, logps.dtype)).to(logps.dtype)
        _refuse_other_leaves(total, leaf)
        if not wants_grad:
            return total.detach(), None
        coefficients = None
        if total.requires_grad:
            (coefficients,) = torch.autograd.grad(total, leaf, allow_unused=True)
        if coefficients is None:
            raise ValueError(
                "loss_fn must return losses that depend on logps, got some without a gradient (detached, or made under "
                "no_grad); if that is intended, add 0 * logps.sum(-1)"
            )
    return total.detach(), coefficients


def _refuse_other_leaves(total: Tensor, leaf: Tensor) -> None:
    """Raise if the loss depends on a tensor that requires grad other than `leaf`.

    Hazard: a parameter used inside loss_fn would silently get no gradient. Remedy: raise.
    """
    seen, stack = set(), [total.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        other = getattr(node, "variable", None)
        if other is not None and other is not leaf:
            raise ValueError(
                f"loss_fn must not depend on any tensor that requires grad except logps, found one of shape "
                f"{shape_of(other)}; use sequence_logps and your loss instead"
            )
        stack.extend(parent for parent, _ in node.next_functions)


def _run(job: _Job, scale: float, wants_grad: bool) -> tuple[Tensor, HeldGradients | None]:
    """Return the summed loss times `scale`, and its gradients."""
    made, chunks = job.chunks()
    held = HeldGradients(job.inputs, job.grads, made.num_chunks, filled=job.groups > 0) if wants_grad else None
    total = job.inputs.hidden[0].new_zeros((), dtype=acc_dtype(job.inputs))
    for chunk in chunks:
        total = total + _run_chunk(job, made, chunk, scale, held)
    if held is not None:
        held.finish()
    return total * scale, held


def _run_chunk(job: _Job, made: Plan, chunk: _Chunk, scale: float, held: HeldGradients | None) -> Tensor:
    inputs, groups, rows, targets = job.inputs, chunk.groups, chunk.rows, chunk.targets
    places = slice(groups.start * job.group_tokens, groups.stop * job.group_tokens)
    hidden = [block[places] for block in inputs.hidden]
    planned = targets.shape[0] if job.chunk_rows is None else job.chunk_rows
    spec = made.chunk(planned).of(inputs.transform, inputs.cut, planned, masks=chunk.masks)
    block = RowBlock.of(spec, hidden, inputs.weight, inputs.bias, targets, rows)
    found, saved = block.forward()
    token_logps = found.logps
    if rows is not None:
        token_logps = token_logps.new_zeros(places.stop - places.start).index_add_(0, rows, token_logps)
    if chunk.overflow is not None:
        token_logps = torch.where(chunk.overflow, torch.nan, token_logps)
    logps = token_logps.view(groups.stop - groups.start, job.responses, job.tokens).sum(-1)
    if groups.start == groups.stop:
        loss, coefficients = logps.new_zeros(()), torch.zeros_like(logps)
    else:
        loss, coefficients = _chunk_loss(job, logps, groups, held is not None)
    if held is None:
        return loss
    # Reason: the scale is applied here, in float32, and not to gradients that are already rounded.
    c_logp = (coefficients.to(logps.dtype) * scale).unsqueeze(-1).expand(-1, -1, job.tokens).reshape(-1)
    c_logp = c_logp if rows is None else c_logp.index_select(0, rows)
    upstream = Upstream(c_logp, None, None)
    grads = block.backward(upstream, saved, held.weight, held.bias, accumulate=held.accumulates)
    for k in range(len(hidden)):
        if grads[k] is not None:
            held.write_hidden(k, places, grads[k], rows, block)
            grads[k] = None
    return loss


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, job, scale, links, bias, *blocks):
        ctx.links = links
        n = len(blocks) // 2
        inputs = replace(job.inputs, hidden=list(blocks[:n]), weight=list(blocks[n:]), bias=bias)
        total, ctx.held = _run(replace(job, inputs=inputs), scale, wants_grad=True)
        return total

    @staticmethod
    @differentiable_once("fused_loss", lambda ctx: ctx.links)
    def backward(ctx, upstream):
        if ctx.held is None:
            raise RuntimeError(
                "fused_loss was backpropagated a second time after its gradients were freed; "
                "pass retain_graph=True to the first backward"
            )
        keep = _keeps_graph()
        grads = ctx.held.times(upstream, keep=keep)
        if not keep:
            ctx.held = None
        return None, None, None, *grads


def _keeps_graph() -> bool:
    """Return whether this backward runs with retain_graph=True; True if torch cannot tell, to be safe."""
    query = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if query is None else query()


def _check_per_group(
    loss_fn: Callable[..., Tensor], per_group: Mapping[str, Tensor] | None, groups: int
) -> dict[str, Tensor]:
    if not isinstance(per_group, (Mapping, type(None))):
        raise TypeError(f"per_group must be a mapping from names to tensors, got {type(per_group).__name__}")
    checked = {}
    for name, value in (per_group or {}).items():
        if not isinstance(name, str):
            raise TypeError(f"the keys of per_group must be names of arguments of loss_fn, got {name!r}")
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
    _check_accepts(loss_fn, tuple(checked))
    return checked


_accepted: set[tuple] = set()  # kinds of functions that take the names of their constants


def _check_accepts(loss_fn: Callable[..., Tensor], names: tuple[str, ...]) -> None:
    """Raise unless loss_fn can be called with log-probs and these names.

    Reason: inspect takes 0.2 ms on the host of a GPU, so that functions of the same code are looked at once.
    """
    kind = _kind_of(loss_fn, names)
    if kind in _accepted:
        return
    try:
        signature = inspect.signature(loss_fn)
    except (ValueError, TypeError):  # a callable without a signature
        return
    try:
        signature.bind(None, **dict.fromkeys(names))
    except TypeError as error:
        listed = ", ".join(["logps", *names])
        raise TypeError(f"loss_fn cannot be called with per_group's entries, as loss_fn({listed}): {error}") from None
    if kind is not None and len(_accepted) < 1000:
        _accepted.add(kind)


def _kind_of(loss_fn: Callable[..., Tensor], names: tuple[str, ...]) -> tuple | None:
    """Return what decides whether a function takes the names; None for callables of other kinds."""
    function: Any = loss_fn
    given = 0
    named: tuple[str, ...] = ()
    if type(function) is functools.partial:
        given, named, function = len(function.args), tuple(sorted(function.keywords)), function.func
    if type(function) is not FunctionType or hasattr(function, "__wrapped__") or hasattr(function, "__signature__"):
        return None
    optional = len(function.__defaults__ or ()), tuple(function.__kwdefaults__ or ())
    return function.__code__, optional, given, named, names


def _outside_graphs(function: Callable) -> Callable:
    """Apply torch.compiler.disable, but only once torch._dynamo has been imported (which takes a second)."""
    disabled: list[Callable] = []

    @functools.wraps(function)
    def call(*args, **kwargs):
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    return call


@_outside_graphs
def fused_loss(
    loss_fn: Callable[..., Tensor],
    hidden: Blocks,
    weight: Weight,
    targets: Tensor,
    *,
    per_group: Mapping[str, Tensor] | None = None,
    reduction: str = "mean",
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
    """Return a loss over groups of responses, with gradients, without holding or recomputing logits.

        logps[b, n] = sum_t log softmax(transform(hidden[b, n, t] @ weight.T + bias))[targets[b, n, t]]
        loss = sum_b loss_fn(logps, **per_group)[b]      divided by B for reduction="mean"

    Groups are processed in chunks whose probabilities fit the memory budget. Forward finishes each chunk's loss and
    gradients, so no logit is computed twice. Value and gradients equal those of the loss applied to `sequence_logps`.

    Args:
        loss_fn: called as loss_fn(logps (b, N), **per_group) -> (b,) on chunks of b whole groups: any differentiable
            torch code that treats groups independently. It must not use other tensors that require grad.
        hidden: (B, N, T, H), or a tuple of blocks.
        weight: (V, H), or a tuple of blocks.
        targets: (B, N, T), aligned with hidden.
        per_group: constants with leading dimension B, passed to loss_fn by name, chunk by chunk.
        reduction: "mean" (the sum over groups divided by B, always) or "sum".
        bias, scale, softcap, temperature, ignore_index, max_scored, memory_budget, batch_invariant, backend: see
            `token_logps`.

    Returns:
        A scalar, float32 (float64 for a float64 weight).

    Raises:
        ValueError: shapes do not fit; a constant in `per_group` requires grad or has another leading dimension;
            loss_fn does not return (b,), does not depend on logps where a gradient is wanted, or depends on another
            tensor that requires grad.
        TypeError: loss_fn cannot be called with the entries of `per_group`, or its losses are not floats; and as
            `token_logps`.
        BackendUnavailableError: as `token_logps`.

    Memory:
        The budget, and 4 * V * H bytes if there is more than one chunk and the head is trained in low precision.
        Gradients exist from forward on; backward scales and returns them, or copies of them with retain_graph.

    Notes:
        Under torch.compile this function is a graph break: loss_fn is Python.

    Source:
        docs/concepts/walk.md.

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
        scale=scale,
        softcap=softcap,
        temperature=temperature,
        ignore_index=ignore_index,
        max_scored=None,
        backend=backend,
        entropy=False,
        batch_invariant=check_flag("batch_invariant", batch_invariant),
        drop=False,
    )
    if max_scored is not None:
        max_scored = check_max_scored(inputs.targets >= 0, max_scored)
    groups, responses, tokens = targets.shape
    grads = inputs.grads()
    job = _Job(
        inputs=inputs,
        loss_fn=loss_fn,
        per_group=_check_per_group(loss_fn, per_group, groups),
        groups=groups,
        responses=responses,
        tokens=tokens,
        max_scored=max_scored,
        memory_budget=memory_budget,
        batch_invariant=check_flag("batch_invariant", batch_invariant),
        grads=grads,
        grad_enabled=torch.is_grad_enabled(),
    )
    scale = 1.0 / max(1, groups) if reduction == "mean" else 1.0
    if not (any(grads["hidden_grad"]) or any(grads["weight_grad"]) or grads["bias_grad"]):
        return _run(job, scale, wants_grad=False)[0]
    links = graph_links(inputs.bias, *inputs.hidden, *inputs.weight)
    return _FusedLoss.apply(job, scale, links, inputs.bias, *inputs.hidden, *inputs.weight)
