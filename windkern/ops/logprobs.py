"""The registered op, its autograd, and `token_logps`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from windkern import backends
from windkern._checks import check_flag
from windkern.kernels import buffers
from windkern.kernels.contract import RowStats, Upstream
from windkern.kernels.gemm import Gemm, accumulator
from windkern.ops import walk as walks
from windkern.ops.inputs import Blocks, Inputs, check_targets, prepare
from windkern.ops.once import differentiable_once
from windkern.ops.sizes import bounded_rows, fixed_size
from windkern.plan import deterministic_tile, walk_sizes
from windkern.transform import LogitTransform

# Arguments that say what a walk does; the same tail for forward and backward.
_CONFIG = (
    "float scale, float? softcap, float temperature, bool[] hidden_grad, bool[] weight_grad, bool bias_grad, "
    "bool entropy, SymInt slab_width, SymInt slabs_kept, SymInt row_block, int offset_tiles, ScalarType operand, "
    "str backend"
)
_ROWS = "Tensor[] hidden, Tensor[] weight, Tensor? bias, Tensor targets, Tensor? rows"
_library = torch.library.Library("windkern", "FRAGMENT")
_library.define(
    f"logprobs_fwd({_ROWS}, {_CONFIG}) -> "
    "(Tensor logps, Tensor lse, Tensor entropy, Tensor stats, Tensor kept, Tensor offsets, Tensor[] units)"
)
_library.define(
    "logprobs_bwd(Tensor? c_logp, Tensor? c_lse, Tensor? c_ent, "
    f"{_ROWS}, Tensor stats, Tensor entropy_out, Tensor kept, Tensor offsets, Tensor[] units, {_CONFIG}) -> "
    "(Tensor[] dhidden, Tensor[] dweight, Tensor dbias)"
)


class TokenLogps(NamedTuple):
    """Results of `token_logps`, each shaped like targets, 0 where ignored."""

    logps: Tensor  # log-prob of the target, nats, float32 (float64 for a float64 head)
    lse: Tensor  # log-sum-exp of the transformed logits
    entropy: Tensor | None  # of the token distribution, nats, when asked for


class Config(NamedTuple):
    """The op's static arguments, in the order of its schema."""

    scale: float
    softcap: float | None
    temperature: float
    hidden_grad: tuple[bool, ...]
    weight_grad: tuple[bool, ...]
    bias_grad: bool
    entropy: bool
    slab_width: int
    slabs_kept: int
    row_block: int
    offset_tiles: int
    operand: torch.dtype
    backend: str

    def walk(self, device_type: str) -> walks.Walk:
        return walks.Walk(
            kernels=backends.BACKENDS[self.backend].kernels(),
            gemm=Gemm(device_type, self.operand),
            transform=LogitTransform(self.scale, self.softcap, self.temperature),
            hidden_grad=tuple(self.hidden_grad),
            weight_grad=tuple(self.weight_grad),
            bias_grad=self.bias_grad,
            entropy=self.entropy,
            slab_width=self.slab_width,
            slabs_kept=self.slabs_kept,
            row_block=self.row_block,
            offset_tiles=self.offset_tiles,
            frozen_head=self.frozen_head,
        )

    @property
    def frozen_head(self) -> bool:
        return any(self.hidden_grad) and not (any(self.weight_grad) or self.bias_grad) and self.offset_tiles == 1


def config_of(
    inputs: Inputs, slab_width: int, slabs_kept: int, row_block: int, offset_tiles: int, grads: dict, entropy: bool
) -> Config:
    transform = inputs.transform
    return Config(
        scale=transform.scale,
        softcap=transform.softcap,
        temperature=transform.temperature,
        hidden_grad=grads["hidden_grad"],
        weight_grad=grads["weight_grad"],
        bias_grad=grads["bias_grad"],
        entropy=entropy,
        slab_width=slab_width,
        slabs_kept=slabs_kept,
        row_block=row_block,
        offset_tiles=offset_tiles,
        operand=inputs.operand,
        backend=inputs.backend,
    )


def padded_rows(num_rows: int, row_block: int) -> int:
    """Rows of the walk: `row_block` divides them (it is the row count itself unless products have fixed tiles)."""
    return -(-num_rows // row_block) * row_block if num_rows else 0


def gather_rows(
    blocks: list[Tensor], rows: Tensor | None, targets: Tensor, total: int, operand: torch.dtype
) -> list[Tensor]:
    """The walk's rows: copies of the blocks in the operand dtype, with `total` rows; themselves if nothing changes.

    Hazard: a row with an ignored target may hold NaN, and 0 * NaN is NaN in a product. Remedy: such rows are 0, as
    those at the end.
    """
    if rows is None and all(block.shape[0] == total and block.dtype == operand for block in blocks):
        return blocks
    count, ignored = targets.shape[0], (targets < 0).unsqueeze(1)
    gathered = []
    for block in blocks:
        copy = buffers.empty("compact", (total, block.shape[1]), operand, block.device)
        if rows is None:
            copy[:count].copy_(block)
        elif block.dtype == operand:
            torch.index_select(block, 0, rows, out=copy[:count])
        else:
            step = max(1, (1 << 20) // max(1, block.shape[1] * block.element_size()))
            for first in range(0, count, step):
                part = slice(first, min(first + step, count))
                copy[part].copy_(buffers.track("scratch", block.index_select(0, rows[part])))
        copy[:count].masked_fill_(ignored, 0.0)
        copy[count:].zero_()
        gathered.append(copy)
    return gathered


def pad_rows(values: Tensor, total: int, fill: float) -> Tensor:
    if values.shape[0] == total:
        return values
    return torch.cat([values, values.new_full((total - values.shape[0],), fill)])


def check_some_entry_is_open(saved: walks.Saved, bias: Tensor | None, targets: Tensor) -> None:
    """A row whose logits are all -inf has no distribution; seen on a CPU and in debug mode."""
    if targets.device.type != "cpu" and not backends.debug_mode():
        return
    closed = (saved.stats.run_max == -torch.inf) & (targets >= 0)
    if not bool(closed.any()):
        return
    row = f"every vocabulary entry of scored row {int(closed.nonzero()[0])}"
    if bias is not None and bool((bias == -torch.inf).all()):
        raise ValueError(f"bias masks {row} with -inf")
    raise ValueError(
        f"the logits of {row} are -inf: hidden @ weight.T overflows {saved.stats.run_max.dtype}, so hidden or weight "
        "holds -inf or numbers that are too large"
    )


def run_forward(
    walk: walks.Walk, hidden: list[Tensor], weight: list[Tensor], bias: Tensor | None, targets: Tensor
) -> walks.Saved:
    check_targets(targets, weight[0].shape[0])
    saved = walks.forward(walk, hidden, weight, bias, targets)
    check_some_entry_is_open(saved, bias, targets)
    return saved


def finish_hidden(total: Tensor, like: Tensor, rows: Tensor | None, num_rows: int) -> Tensor:
    """float32 dhidden of compacted rows to the caller's rows and dtype; ignored rows get exact zeros."""
    total = total[:num_rows]
    narrowed = total if total.dtype == like.dtype else buffers.track("cast", total.to(like.dtype))
    if rows is None:
        return narrowed
    # Reason: spare rows of num_scored all point at one row and carry zeros; adding them keeps that row right.
    return torch.zeros_like(like, memory_format=torch.contiguous_format).index_add_(0, rows, narrowed)


@torch.no_grad()
def _fwd(hidden, weight, bias, targets, rows, *config):
    config = Config(*config)
    walk = config.walk(targets.device.type)
    num_rows = targets.shape[0]
    total = padded_rows(num_rows, config.row_block)
    compact = gather_rows(hidden, rows, targets, total, config.operand)
    saved = run_forward(walk, compact, weight, bias, pad_rows(targets, total, -1))
    scored = targets >= 0
    stats = RowStats(*(None if part is None else part[:num_rows] for part in saved.stats))
    zero = stats.run_max.new_zeros(())
    entropy = torch.where(scored, stats.entropy, zero) if config.entropy else zero.new_empty(0)
    return (
        torch.where(scored, stats.logps, zero),
        torch.where(scored, stats.run_max + stats.log_sum, zero),
        entropy,
        torch.stack(saved.stats[:3]),
        saved.kept,
        saved.offsets,
        saved.units,
    )


def _fwd_fake(hidden, weight, bias, targets, rows, *config):
    config = Config(*config)
    num_rows, vocab_size = targets.shape[0], weight[0].shape[0]
    total = padded_rows(num_rows, config.row_block)
    acc = accumulator(config.operand)
    vector = targets.new_empty(num_rows, dtype=acc)
    layout = walks.kept_layout(config, config.operand, total, vocab_size)
    units = []
    if config.frozen_head:
        wanted = [block for block, flag in zip(hidden, config.hidden_grad, strict=True) if flag]
        units = [
            block.new_empty((total, block.shape[1]), dtype=acc) for _ in range(1 + config.entropy) for block in wanted
        ]
    return (
        vector,
        torch.empty_like(vector),
        torch.empty_like(vector) if config.entropy else vector.new_empty(0),
        vector.new_empty((3, total)),
        targets.new_empty(layout.shape, dtype=layout.dtype),
        vector.new_empty(layout.offsets),
        units,
    )


@torch.no_grad()
def _bwd(c_logp, c_lse, c_ent, hidden, weight, bias, targets, rows, stats, entropy, kept, offsets, units, *config):
    config = Config(*config)
    walk = config.walk(targets.device.type)
    num_rows, total = targets.shape[0], stats.shape[1]
    scored = targets >= 0
    upstream = Upstream(
        *(
            None if part is None else pad_rows(torch.where(scored, part, 0.0), total, 0.0)
            for part in (c_logp, c_lse, c_ent)
        )
    )
    saved = walks.Saved(
        RowStats(*stats.unbind(0), pad_rows(entropy, total, 0.0) if config.entropy else None),
        kept,
        offsets,
        list(units),
    )
    compact = gather_rows(hidden, rows, targets, total, config.operand)
    labels = pad_rows(targets, total, -1)
    if config.frozen_head:
        grads = walks.backward_unit(walk, upstream, compact, weight, labels, saved)
    else:
        dweight = [
            torch.empty_like(head, memory_format=torch.contiguous_format) if flag else None
            for head, flag in zip(weight, config.weight_grad, strict=True)
        ]
        dbias = torch.empty_like(bias) if config.bias_grad else None
        grads = walks.backward(walk, upstream, compact, weight, bias, labels, saved, dweight, dbias, accumulate=False)
    dhidden = []
    for k, block in enumerate(hidden):
        if grads.hidden[k] is not None:
            dhidden.append(finish_hidden(grads.hidden[k], block, rows, num_rows))
            grads.hidden[k] = None
    return (
        dhidden,
        [grad for grad in grads.weight if grad is not None],
        stats.new_empty(0) if grads.bias is None else grads.bias,
    )


def _bwd_fake(c_logp, c_lse, c_ent, hidden, weight, bias, targets, rows, stats, entropy, kept, offsets, units, *config):
    config = Config(*config)
    dhidden = [block.new_empty(block.shape) for block, flag in zip(hidden, config.hidden_grad, strict=True) if flag]
    dweight = [head.new_empty(head.shape) for head, flag in zip(weight, config.weight_grad, strict=True) if flag]
    return dhidden, dweight, torch.empty_like(bias) if config.bias_grad else stats.new_empty(0)


_library.impl("logprobs_fwd", _fwd, "CompositeExplicitAutograd")
_library.impl("logprobs_bwd", _bwd, "CompositeExplicitAutograd")
torch.library.register_fake("windkern::logprobs_fwd", _fwd_fake, lib=_library)
torch.library.register_fake("windkern::logprobs_bwd", _bwd_fake, lib=_library)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, config, num_blocks, targets, rows, bias, *blocks):
        hidden, weight = list(blocks[:num_blocks]), list(blocks[num_blocks:])
        logps, lse, entropy, *saved, units = torch.ops.windkern.logprobs_fwd(
            hidden, weight, bias, targets, rows, *config
        )
        ctx.save_for_backward(targets, rows, bias, entropy, *saved, *blocks, *units)
        ctx.config, ctx.num_blocks = config, num_blocks
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(saved[0])
        return logps, lse, entropy, saved[0]

    @staticmethod
    @differentiable_once("token_logps", lambda ctx: ctx.saved_tensors)
    def backward(ctx, c_logp, c_lse, c_ent, _):
        config, n = Config(*ctx.config), ctx.num_blocks
        targets, rows, bias, entropy, stats, kept, offsets, *rest = ctx.saved_tensors
        hidden, weight, units = rest[:n], rest[n : 2 * n], rest[2 * n :]
        if not config.entropy:
            c_ent = None
        dhidden, dweight, dbias = torch.ops.windkern.logprobs_bwd(
            c_logp, c_lse, c_ent, hidden, weight, bias, targets, rows, stats, entropy, kept, offsets, units, *config
        )
        dhidden, dweight = iter(dhidden), iter(dweight)
        grads = [next(dhidden) if flag else None for flag in config.hidden_grad]
        grads += [next(dweight) if flag else None for flag in config.weight_grad]
        return None, None, None, None, dbias if config.bias_grad else None, *grads


def row_logps(
    inputs: Inputs, *, entropy: bool, memory_budget: int | None, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Differentiable logps, lse, entropy of the compacted rows, each (M,); entropy is empty unless asked for.

    Last a constant (3, M or more): largest transformed logit, log of the sum relative to it, target's logit.
    """
    grads = inputs.grads()
    rows = bounded_rows(inputs.num_rows)
    hidden_sizes = tuple(fixed_size(size) for size in inputs.hidden_sizes)
    tile_columns = backends.tile_columns(inputs.backend, hidden_sizes, inputs.operand, deterministic)
    gear, slab_width, slabs_kept, offset_tiles = walk_sizes(
        rows,
        hidden_sizes,
        fixed_size(inputs.weight[0].shape[0]),
        dtype=inputs.operand,
        entropy=entropy,
        memory_budget=memory_budget,
        device=inputs.device.type,
        deterministic=deterministic,
        total_rows=rows + (inputs.rows is not None),
        hidden_dtype=tuple(block.dtype for block in inputs.hidden),
        weight_dtype=tuple(head.dtype for head in inputs.weight),
        tile_columns=tile_columns,
        **grads,
    )
    pads = deterministic and tile_columns is None
    row_block = deterministic_tile(inputs.device.type)[0] if pads else inputs.num_rows
    config = config_of(inputs, slab_width, slabs_kept, row_block, offset_tiles, grads, entropy)
    if gear == "scoring":
        return torch.ops.windkern.logprobs_fwd(
            inputs.hidden, inputs.weight, inputs.bias, inputs.targets, inputs.rows, *config
        )[:4]
    return _LogProbs.apply(
        tuple(config), len(inputs.hidden), inputs.targets, inputs.rows, inputs.bias, *inputs.hidden, *inputs.weight
    )


def token_logps(
    hidden: Blocks,
    weight: Blocks,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform | None = None,
    ignore_index: int = -100,
    entropy: bool = False,
    num_scored: int | None = None,
    memory_budget: int | None = None,
    deterministic: bool = False,
    backend: str = "auto",
) -> TokenLogps:
    """Return the log-prob of each target, the log-sum-exp and, if asked for, the entropy, without the logits.

        z = transform(sum_k hidden_k @ weight_k.T + bias)
        logps = z[target] - logsumexp(z)        entropy = -sum_v softmax(z)_v * log softmax(z)_v

    All three are differentiable with respect to hidden, weight and bias, with any upstream gradient per token.

    Args:
        hidden: (..., T, H), or a tuple of blocks (..., T, H_k) whose logits add up (LoRA on the head, a value head).
            float64, float32, bfloat16 or float16.
        weight: (V, H) as in nn.Linear, or a tuple of (V, H_k). Outside autocast hidden is cast to the dtype of weight,
            as in lm_head(hidden.to(lm_head.weight.dtype)), to the widest where blocks differ; gradients have the
            dtype of their tensors.
        targets: (..., T) int64 or int32, already aligned with hidden (nothing is shifted).
        bias: (V,) added to the logits; an entry of -inf masks that vocabulary entry after any transform. Any floating
            dtype that is no wider than the sums.
        transform: scale, softcap and temperature of the logits; None is the identity.
        ignore_index: targets with this value are not scored: results and gradients are 0 there, whatever hidden holds.
        entropy: also return the entropy of each token's distribution.
        num_scored: upper bound of the number of scored targets. On a GPU it saves the one synchronisation and keeps
            all sizes static (CUDA graphs, torch.compile). Rows beyond it give NaN on a GPU, an error on a CPU.
        memory_budget: bytes for everything beside outputs and gradients; None is 2 GiB on a GPU, 256 MiB on a CPU.
        deterministic: a row's results do not depend on the other rows, the budget or which gradients are wanted.
        backend: "auto" or a name of `windkern.backends.available(device)`.

    Returns:
        TokenLogps(logps, lse, entropy), each (..., T) in nats, float32 (float64 for a float64 weight); entropy is None
        unless asked for.

    Raises:
        TypeError: a tensor argument is no plain tensor or has a dtype that does not fit.
        ValueError: shapes, devices or values do not fit; a target lies outside the vocabulary (checked on a CPU, on
            a GPU with WINDKERN_DEBUG=1); on a CPU, a scored row whose logits are all -inf.
        BackendUnavailableError: the named back end cannot run here.

    Memory:
        What `windkern.plan` returns as `peak_bytes`; never rows x V unless the budget allows to keep it.

    Source:
        Online softmax over vocabulary slabs (Milakov and Gimelshein 2018, arXiv 1805.02867); README, section
        "How it works".

    Example:
        >>> hidden, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
        >>> targets = torch.tensor([[1, 2, -100], [3, 0, 10]])
        >>> out = token_logps(hidden, weight, targets)
        >>> out.logps.shape, out.logps[0, 2].item()
        (torch.Size([2, 3]), 0.0)
        >>> out.logps.sum().backward()
    """
    entropy, deterministic = check_flag("entropy", entropy), check_flag("deterministic", deterministic)
    inputs = prepare(
        hidden,
        weight,
        targets,
        bias=bias,
        transform=transform,
        ignore_index=ignore_index,
        num_scored=num_scored,
        backend=backend,
    )
    logps, lse, ent, _ = row_logps(inputs, entropy=entropy, memory_budget=memory_budget, deterministic=deterministic)
    return TokenLogps(inputs.scatter(logps), inputs.scatter(lse), inputs.scatter(ent) if entropy else None)
