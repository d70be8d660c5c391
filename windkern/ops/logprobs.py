"""The registered op, its autograd, and `token_logps`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from windkern import backends
from windkern._checks import check_flag
from windkern.kernels.contract import RowStats, Upstream
from windkern.kernels.gemm import accumulator
from windkern.kernels.pages import in_huge_pages
from windkern.ops.inputs import Blocks, Inputs, Weight, prepare, settled
from windkern.ops.once import differentiable_once
from windkern.ops.rows import RowBlock
from windkern.ops.sizes import bounded_rows, fixed_size
from windkern.ops.walk import Saved, kept_layout
from windkern.plan import planned_spec
from windkern.spec import WalkSpec, gear_in

_ROWS = "Tensor[] hidden, Tensor[] weight, Tensor? bias, Tensor targets, Tensor? rows"
_library = torch.library.Library("windkern", "FRAGMENT")
_library.define(
    f"logprobs_fwd({_ROWS}, {WalkSpec.schema()}) -> "
    "(Tensor logps, Tensor lse, Tensor entropy, Tensor stats, Tensor kept, Tensor offsets, Tensor[] units)"
)
_library.define(
    "logprobs_bwd(Tensor? c_logp, Tensor? c_lse, Tensor? c_ent, "
    f"{_ROWS}, Tensor stats, Tensor entropy_out, Tensor kept, Tensor offsets, Tensor[] units, {WalkSpec.schema()}) -> "
    "(Tensor[] dhidden, Tensor[] dweight, Tensor dbias)"
)


class TokenLogps(NamedTuple):
    """Results of `token_logps`, each shaped like targets, 0 where ignored."""

    logps: Tensor  # log-prob of the target, nats, float32 (float64 for a float64 head)
    lse: Tensor  # log-sum-exp of the transformed logits
    entropy: Tensor | None  # of the token distribution, nats, when asked for


@torch.no_grad()
def _fwd(hidden, weight, bias, targets, rows, *values):
    spec = WalkSpec(*values)
    block = RowBlock.of(spec, hidden, weight, bias, targets, rows)
    found, saved = block.forward()
    entropy = found.logps.new_empty(0) if found.entropy is None else found.entropy
    return found.logps, found.lse, entropy, found.stats, saved.kept, saved.offsets, saved.units


def _fwd_fake(hidden, weight, bias, targets, rows, *values):
    spec = WalkSpec(*values)
    num_rows, vocab_size = targets.shape[0], spec.head_rows(weight[0].shape[0])
    total = spec.padded_rows(num_rows)
    vector = targets.new_empty(num_rows, dtype=accumulator(spec.operand))
    layout = kept_layout(spec, total, vocab_size)
    units = []
    if spec.gear == "frozen_head":
        wanted = [block for block, flag in zip(hidden, spec.hidden_grad, strict=True) if flag]
        for _ in range(1 + spec.entropy):
            units += [block.new_empty((total, block.shape[1]), dtype=vector.dtype) for block in wanted]
        if spec.streams:
            units += [block.new_empty((total, block.shape[1]), dtype=spec.operand) for block in wanted]
    return (
        vector,
        torch.empty_like(vector),
        torch.empty_like(vector) if spec.entropy else vector.new_empty(0),
        vector.new_empty((3, total)),
        targets.new_empty(layout.shape, dtype=layout.dtype),
        vector.new_empty(layout.offsets),
        units,
    )


@torch.no_grad()
def _bwd(c_logp, c_lse, c_ent, hidden, weight, bias, targets, rows, three, entropy, kept, offsets, units, *values):
    spec = WalkSpec(*values)
    block = RowBlock.of(spec, hidden, weight, bias, targets, rows)
    run_max, log_sum, target_logit = three.unbind(0)
    stats = RowStats(run_max, log_sum, target_logit, block.padded(entropy) if spec.entropy else None)
    dweight = [
        in_huge_pages(torch.empty_like(head, memory_format=torch.contiguous_format)) if flag else None
        for head, flag in zip(weight, spec.weight_grad, strict=True)
    ]
    dbias = torch.empty_like(bias) if spec.bias_grad else None
    saved = Saved(stats, kept, offsets, list(units))
    grads = block.backward(Upstream(c_logp, c_lse, c_ent), saved, dweight, dbias, accumulate=False)
    dhidden = []
    for k, like in enumerate(hidden):
        if grads[k] is not None:
            dhidden.append(block.finished(grads[k], like, rows))
            grads[k] = None
    return (
        dhidden,
        [grad for grad in dweight if grad is not None],
        stats.run_max.new_empty(0) if dbias is None else dbias,
    )


def _bwd_fake(c_logp, c_lse, c_ent, hidden, weight, bias, targets, rows, stats, entropy, kept, offsets, units, *values):
    spec = WalkSpec(*values)
    dhidden = [block.new_empty(block.shape) for block, flag in zip(hidden, spec.hidden_grad, strict=True) if flag]
    dweight = [head.new_empty(head.shape) for head, flag in zip(weight, spec.weight_grad, strict=True) if flag]
    return dhidden, dweight, torch.empty_like(bias) if spec.bias_grad else stats.new_empty(0)


_library.impl("logprobs_fwd", _fwd, "CompositeExplicitAutograd")
_library.impl("logprobs_bwd", _bwd, "CompositeExplicitAutograd")
torch.library.register_fake("windkern::logprobs_fwd", _fwd_fake, lib=_library)
torch.library.register_fake("windkern::logprobs_bwd", _bwd_fake, lib=_library)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spec, num_blocks, targets, rows, bias, *blocks):
        hidden, weight = list(blocks[:num_blocks]), list(blocks[num_blocks:])
        logps, lse, entropy, *saved, units = torch.ops.windkern.logprobs_fwd(hidden, weight, bias, targets, rows, *spec)
        ctx.save_for_backward(targets, rows, bias, entropy, *saved, *blocks, *units)
        ctx.spec, ctx.num_blocks = spec, num_blocks
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(saved[0])
        return logps, lse, entropy, saved[0]

    @staticmethod
    @differentiable_once("token_logps", lambda ctx: ctx.saved_tensors)
    def backward(ctx, c_logp, c_lse, c_ent, _):
        spec, n = WalkSpec(*ctx.spec), ctx.num_blocks
        targets, rows, bias, entropy, stats, kept, offsets, *rest = ctx.saved_tensors
        hidden, weight, units = rest[:n], rest[n : 2 * n], rest[2 * n :]
        if not spec.entropy:
            c_ent = None
        dhidden, dweight, dbias = torch.ops.windkern.logprobs_bwd(
            c_logp, c_lse, c_ent, hidden, weight, bias, targets, rows, stats, entropy, kept, offsets, units, *ctx.spec
        )
        dhidden, dweight = iter(dhidden), iter(dweight)
        grads = [next(dhidden) if flag else None for flag in spec.hidden_grad]
        grads += [next(dweight) if flag else None for flag in spec.weight_grad]
        return None, None, None, None, dbias if spec.bias_grad else None, *grads


def row_logps(
    inputs: Inputs, *, entropy: bool, memory_budget: int | None, batch_invariant: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return differentiable logps, lse and entropy of the compacted rows, each (M,), and a constant (3, M or more).

    The entropy is empty unless asked for. The constant has the largest transformed logit, the log of the sum relative
    to it, and the target's logit.
    """
    rows, planned = bounded_rows(inputs.num_rows), inputs.planned()
    if inputs.streams:
        given = {"entropy": entropy, "batch_invariant": batch_invariant, "memory_budget": memory_budget}
        (rows, _), planned["hidden_grad"] = settled(inputs, planned, (rows, 0), {**given, "fused_loss": False})
    if inputs.cut is None and not torch.compiler.is_compiling():  # the numbers may be symbols
        planned["transform"] = inputs.transform.factors
    with backends.on_device_of(inputs.targets):  # what runs there, and not on another GPU
        spec = planned_spec(
            rows,
            tuple(fixed_size(size) for size in inputs.hidden_sizes),
            fixed_size(inputs.vocab_size),
            entropy=entropy,
            memory_budget=memory_budget,
            batch_invariant=batch_invariant,
            total_rows=rows + inputs.copies_rows,
            masks=inputs.masks,
            **planned,
        )
    if "transform" not in planned:
        spec = WalkSpec(*spec).of(inputs.transform, inputs.cut, rows, masks=inputs.masks).values()
    if gear_in(spec) == "scoring":
        return torch.ops.windkern.logprobs_fwd(
            inputs.hidden, inputs.weight, inputs.bias, inputs.targets, inputs.rows, *spec
        )[:4]
    return _LogProbs.apply(
        spec, len(inputs.hidden), inputs.targets, inputs.rows, inputs.bias, *inputs.hidden, *inputs.weight
    )


def token_logps(
    hidden: Blocks,
    weight: Weight,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
    max_scored: int | None = None,
    memory_budget: int | None = None,
    batch_invariant: bool = False,
    backend: str = "auto",
) -> TokenLogps:
    """Return the log-prob of each target, the log-sum-exp and, if asked for, the entropy, without the logits.

        z = transform(sum_k hidden_k @ weight_k.T + bias), transform(z) = scale * z / temperature
            or softcap * tanh(scale * z / softcap) / temperature
        logps = z[target] - logsumexp(z)        entropy = -sum_v softmax(z)_v * log softmax(z)_v

    All three are differentiable with respect to hidden, weight and bias, with any upstream gradient per token.

    Args:
        hidden: (..., T, H), or a tuple of blocks (..., T, H_k) whose logits add up (LoRA on the head, a value head).
            float64, float32, bfloat16 or float16.
        weight: (V, H) as in nn.Linear; a tuple of (V, H_k); a `windkern.Head`, which has its own bias, scale, softcap
            and temperature; or, for a head that is sharded over processes, the result of `windkern.sharding`. Outside
            autocast, hidden is cast to the dtype of weight (the widest if blocks differ), as in
            lm_head(hidden.to(lm_head.weight.dtype)); gradients have the dtype of their tensors.
        targets: (..., T) int64 or int32, already aligned with hidden (nothing is shifted).
        bias: (V,) added to the logits; an entry of -inf masks that vocabulary entry after any transform. Any floating
            dtype that is not wider than the sums.
        scale: multiplies the logits first (Cohere's `logit_scale`, `1 / logits_scaling` of Granite). Positive.
        softcap: bound of the logits before the temperature (Gemma's `final_logit_softcapping`), or None. Positive.
        temperature: divides last. Positive.
        ignore_index: targets with this value are not scored: results and gradients are 0 there, even for a NaN.
        entropy: also return the entropy of each token's distribution.
        max_scored: upper bound of the number of scored targets. On a GPU it saves the only synchronisation and keeps
            all sizes static (CUDA graphs, torch.compile). Rows beyond it give NaN on a GPU, an error on a CPU.
        memory_budget: bytes for everything besides outputs and gradients; None is 2.5 GiB on a GPU, 384 MiB on a CPU.
        batch_invariant: whether a row's results must not depend on the other rows, the budget or the gradients wanted.
        backend: "auto" or a name of `windkern.backends.available(device)`.

    Returns:
        TokenLogps(logps, lse, entropy), each (..., T) in nats, float32 (float64 for a float64 weight); entropy is None
        unless asked for.

    Raises:
        TypeError: a tensor argument is not a plain tensor, or its dtype does not fit.
        ValueError: shapes, devices or values do not fit; a target lies outside the vocabulary (checked on a CPU, on
            a GPU with WINDKERN_DEBUG=1); on a CPU, a scored row whose logits are all -inf.
        BackendUnavailableError: the named back end cannot run here.

    Memory:
        At most the `peak_bytes` of `windkern.plan`; rows x V are held only if the budget allows it.

    Source:
        Online softmax over vocabulary slabs (Milakov and Gimelshein 2018, arXiv 1805.02867);
        docs/concepts/walk.md.

    Example:
        >>> hidden, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
        >>> targets = torch.tensor([[1, 2, -100], [3, 0, 10]])
        >>> out = token_logps(hidden, weight, targets)
        >>> out.logps.shape, out.logps[0, 2].item()
        (torch.Size([2, 3]), 0.0)
        >>> out.logps.sum().backward()
    """
    entropy, batch_invariant = check_flag("entropy", entropy), check_flag("batch_invariant", batch_invariant)
    inputs = prepare(
        hidden,
        weight,
        targets,
        bias=bias,
        scale=scale,
        softcap=softcap,
        temperature=temperature,
        ignore_index=ignore_index,
        max_scored=max_scored,
        backend=backend,
        entropy=entropy,
        batch_invariant=batch_invariant,
    )
    logps, lse, ent, _ = row_logps(
        inputs, entropy=entropy, memory_budget=memory_budget, batch_invariant=batch_invariant
    )
    return TokenLogps(inputs.scatter(logps), inputs.scatter(lse), inputs.scatter(ent) if entropy else None)
