"""Call a causal LM once to find out how it computes logits from the product of its head.

The model's own forward runs on a few tokens. The output of its head is compared with the product of its input and the
weight. Then the head returns numbers that we chose, and the logits that the model computes from them reveal scale,
softcap and masked columns, for any weights.
"""

from __future__ import annotations

import functools
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from windkern._checks import shape_of
from windkern.hf import call as hf_call
from windkern.hf import transform as hf_transform
from windkern.hf.call import Target
from windkern.hf.head import UnsupportedModelError, adapter_state, blocks, check_adapters, head_shape, linear_of, whole
from windkern.hf.transform import numbers_of
from windkern.transform import LogitTransform

_TOKENS = 9
_PADDED = 3  # tokens replaced by padding in the check of padding
_KEPT = 8  # verdicts for each model
_COLUMNS = 8192  # of the vocabulary, multiplied at a time
_verdicts: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # base model -> {circumstances: Verdict}


@dataclass(frozen=True, eq=False)
class Verdict:
    """The findings of one check of a model."""

    transform: LogitTransform
    masked: Tensor | None  # (V',) bool: columns to which the model assigns no probability
    columns: int | None  # V', if the model returns fewer logits than its head has rows, else None
    positions: bool  # whether the model counts positions from the first token that is not padding
    left_padding: bool  # whether hidden states stay the same with padding on the left


def verdict_of(target: Target) -> Verdict:
    """Check a model, once for each combination of dtype, autocast, head, adapters and numbers of its configuration.

    Raises:
        UnsupportedModelError: its logits are not known to be a transform of one product.
    """
    seen = _verdicts.setdefault(target.base, {})
    now = circumstances(target)
    if now not in seen:
        verdict = _look(target)
        while len(seen) >= _KEPT:
            del seen[next(iter(seen))]
        seen[now] = verdict
    return seen[now]


def circumstances(target: Target) -> tuple:
    head = target.head
    linear = linear_of(head)
    device = target.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    prepared = any("_original_forward" in vars(each) for each in target.chain)  # by accelerate, whose forward autocasts
    hooks = (*head._forward_hooks, *head._forward_pre_hooks)
    weight = (weakref.ref(linear), linear.weight.dtype, head_shape(head), linear.bias is None)
    return weakref.ref(head), weight, autocast, prepared, hooks, adapter_state(head), numbers_of(target.base)


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Switch to eval mode, because dropout would make two passes differ."""
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for each, mode in modes:
            each.training = mode


@torch.no_grad()
def _look(target: Target) -> Verdict:
    ids = _token_ids(target)
    with in_eval_mode(target.chain[0]):
        seen = _Forward(target, ids)
        alone, columns = seen.hidden[0], seen.logits.shape[-1]  # (T, H), V'
        probe, exact = seen.probe[:, :columns], seen.exact[:, :columns]
        transform, masked = hf_transform.read(
            target, probe, seen.made_of_probe, exact, seen.logits, seen.dtype, seen.rounding
        )
        for name, value, claimed in hf_transform.unfollowed(target, transform):
            if not _is_used_before(target, ids, alone, name, value):
                raise hf_transform.refusal(target, name, value, claimed, exact, seen.logits)
        if not _alike(target, seen.hidden[1, :-1], alone[:-1]):
            warnings.warn(
                f"hidden states of {target.name} change with later tokens, so its log-probs are not those of an "
                "autoregressive model; windkern scores them as the model computes them",
                stacklevel=4,
            )
        positions, left_padding = _padding(target, ids, alone)
        columns = columns if columns < seen.probe.shape[-1] else None
    return Verdict(transform, masked, columns, positions, left_padding)


def _is_used_before(target: Target, ids: Tensor, alone: Tensor, name: str, value: float) -> bool:
    """Return whether a number of the configuration changes the input of the head."""
    config = target.base.config
    setattr(config, name, 2 * value)
    try:
        hidden = hf_call.hidden_states(target, ids, torch.ones_like(ids), positions=False, check=True)
    finally:
        setattr(config, name, value)
    return not _alike(target, hidden[0], alone)


def _token_ids(target: Target) -> Tensor:
    """Return ids (2, T) whose rows differ in the last token."""
    ids = plain_ids(target, _TOKENS + 1)
    return torch.tensor([ids[:-1], [*ids[:-2], ids[-1]]], device=target.device)


def plain_ids(target: Target, count: int) -> list[int]:
    """Return ids spread over the vocabulary, without special ones."""
    config = target.base.config
    # Reason: if FSDP has sharded the weights, these numbers are still those of the whole.
    vocab = min(
        linear_of(target.head).out_features, getattr(target.base.get_input_embeddings(), "num_embeddings", 1 << 62)
    )
    special = {0}
    for holder in (config, config.get_text_config() if hasattr(config, "get_text_config") else config):
        for name, value in vars(holder).items():
            if name.endswith(("token_id", "token_index")):
                special |= {
                    each for each in (value if isinstance(value, (list, tuple)) else [value]) if each is not None
                }
    plain = [each for each in range(1, vocab) if each not in special] or list(range(vocab))
    step = max(1, len(plain) // count)
    return [plain[k * step % len(plain)] for k in range(count)]


class _Forward:
    """One forward of the model whose head returns its product for the first row and a probe for the second.

    Attributes:
        hidden: (2, T, H), the input of the head.
        exact: (T, V) float64 on the CPU, its product for the first row.
        logits: (T, V') float64, what the model returned for the first row.
        probe, made_of_probe: (T, V) and (T, V') float64, what the head returned for the second row, and the model's
            logits for it.
        dtype: of the product that the head returns.
        rounding: relative error that rounding can cause in an element of the product.
    """

    def __init__(self, target: Target, ids: Tensor):
        self.target, self.ids = target, ids
        self.hidden: Tensor | None = None
        given = hf_call.inputs(target.base, ids, torch.ones_like(ids), positions=False)
        try:
            hf_call.call(target, given, self._inside, check=True)
        except (UnsupportedModelError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise UnsupportedModelError(
                f"the forward of {target.name} on {_TOKENS} tokens of text failed: {type(error).__name__}: {error}"
            ) from error

    def _inside(self, theirs: Callable, *args: object, **received: object) -> Tensor:
        with hf_call.replaced_forward(self.target.head, self._head):
            out = theirs(*args, **received)
        if self.hidden is None:
            raise hf_call.never_called(self.target.head)
        logits = out[0] if isinstance(out, tuple) else out.logits
        wanted = (*self.ids.shape, self.probe.shape[-1])
        if shape_of(logits)[:-1] != wanted[:-1] or logits.shape[-1] > wanted[-1]:
            raise UnsupportedModelError(
                f"{self.target.name} returned logits {shape_of(logits)} for {shape_of(self.ids)} tokens, expected "
                f"{wanted} from its head"
            )
        self.logits, self.made_of_probe = logits.detach().to("cpu", torch.float64).unbind(0)
        return logits.new_zeros(())

    def _head(self, theirs: Callable) -> Callable:
        def forward(hidden: Tensor, *args: object, **options: object) -> Tensor:
            if self.hidden is not None or shape_of(hidden)[:-1] != shape_of(self.ids):
                raise UnsupportedModelError(
                    f"the head of {self.target.name} must be called once, with hidden states for each token, "
                    f"{(*shape_of(self.ids), 'H')}; it is called "
                    + ("again" if self.hidden is not None else f"with {shape_of(hidden)}")
                )
            self.hidden = hidden
            check_adapters(self.target.head)
            product = theirs(as_operand(self.target.head, hidden), *args, **options)
            self.exact = self._compare(product)
            self.dtype = product.dtype
            self.probe = hf_transform.probe(_TOKENS, product.shape[-1], product.dtype)
            # Hazard: some models write into the output of their head. Remedy: keep no view of it.
            return torch.cat([product[:1], self.probe[None].to(product.device, product.dtype)])

        return forward

    def _compare(self, product: Tensor) -> Tensor:
        """Return the exact product of the first row, (T, V) float64; raise if the head returns something else.

        The error of the same product in torch measures rounding, which allows for TF32 and sums in bfloat16, whatever
        turned them on.
        """
        head, linear = self.target.head, linear_of(self.target.head)
        states, weights = blocks(head, self.hidden)
        states, weights = ((each,) if isinstance(each, Tensor) else each for each in (states, weights))
        device = self.hidden.device.type
        autocast = torch.is_autocast_enabled(device) and self.hidden.dtype != torch.float64
        operand = torch.get_autocast_dtype(device) if autocast else weights[0].dtype
        wide = torch.float32 if operand.itemsize < 4 else torch.float64
        states = [each.to(operand) for each in states]
        bias = None if linear.bias is None else whole(linear.bias).to(wide)
        exact, theirs, torchs = [], _Gap(), _Gap()
        for start in range(0, product.shape[-1], _COLUMNS):
            part = slice(start, start + _COLUMNS)
            pairs = [(state, whole(each)[part].to(operand)) for state, each in zip(states, weights, strict=True)]
            ours = _sum(nn.functional.linear(state.to(wide), weight.to(wide)) for state, weight in pairs)
            torchs.add(_sum(nn.functional.linear(state, weight) for state, weight in pairs), ours)
            ours = ours if bias is None else ours + bias[part]
            theirs.add(product[..., part], ours)
            exact.append(ours[0].to("cpu", torch.float64))
        if not math.isfinite(theirs.share) and not math.isfinite(torchs.share):
            raise UnsupportedModelError(f"{self.target.name} has NaN or infinity in its hidden states or its head")
        eps = torch.finfo(product.dtype).eps
        if product.dtype == torch.float64:  # no wider dtype measures it: a sum in another order is off by this much
            eps *= self.hidden.shape[-1] ** 0.5
        self.rounding = max(2 * eps, 4 * torchs.largest)
        if not (theirs.largest <= self.rounding and theirs.share <= max(eps / 2, 2 * torchs.share)):
            raise UnsupportedModelError(
                f"the output of the head of {self.target.name} differs from the product with its weight by "
                f"{theirs.largest:.3g} of the size of an element, and by {theirs.share:.3g} overall (rounding to "
                f"{product.dtype} explains {torchs.largest:.3g} and {torchs.share:.3g}), so something has replaced its "
                f"forward; undo that, or {hf_transform.REMEDY}"
            )
        return torch.cat(exact, -1)


class _Gap:
    """Error of rounded numbers against exact ones, accumulated over slices of the vocabulary."""

    largest = 0.0  # of one element, relative to its size and the row's

    def __init__(self):
        self._gap = self._all = 0.0

    def add(self, rounded: Tensor, exact: Tensor) -> None:
        gap = rounded.to(exact.dtype) - exact
        size = exact.abs() + exact.square().mean(-1, keepdim=True).sqrt()
        self.largest = max(self.largest, float((gap.abs() / size.clamp(min=1e-30)).max()))
        self._gap, self._all = self._gap + float(gap.square().sum()), self._all + float(exact.square().sum())

    @property
    def share(self) -> float:
        """Root mean square of the errors, relative to that of the exact numbers."""
        return (self._gap / max(self._all, 1e-60)) ** 0.5


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, terms)


def as_operand(head: nn.Module, hidden: Tensor) -> Tensor:
    """Cast hidden states to the dtype of the head's weight, as models with a float32 head do; not under autocast."""
    dtype = linear_of(head).weight.dtype
    return hidden if torch.is_autocast_enabled(hidden.device.type) else hidden.to(dtype)


def _alike(target: Target, ours: Tensor, theirs: Tensor) -> bool:
    """Return whether 3 in 4 hidden states (T, H) of two passes agree within rounding (experts may flip in the rest)."""
    gap = (ours.float() - theirs.float()).norm(dim=-1) / theirs.float().norm(dim=-1).clamp(min=1e-30)
    narrow = torch.is_autocast_enabled(ours.device.type) or any(
        each.dtype.itemsize < 4 for each in target.base.parameters() if each.is_floating_point()
    )
    return float(gap.cpu().sort().values[3 * len(gap) // 4 - 1]) <= (0.1 if narrow else 1e-4)


def _padding(target: Target, ids: Tensor, alone: Tensor) -> tuple[bool, bool]:
    """Return whether positions can be passed, and whether left padding leaves the hidden states of a row unchanged."""
    filler = getattr(target.base.config, "pad_token_id", None)
    padded = torch.full_like(ids[0], filler if isinstance(filler, int) and filler >= 0 else int(ids[0, 0]))
    padded[_PADDED:] = ids[0, :-_PADDED]
    batch = torch.stack([ids[0], padded])
    mask = torch.ones_like(batch)
    mask[1, :_PADDED] = 0
    positions = hf_call.takes(target.base, "position_ids")
    for passed in (True, False) if positions else (False,):
        try:
            hidden = hf_call.hidden_states(target, batch, mask, positions=passed, check=True)
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError):
            continue  # the model does not take padding, or positions of this form
        if _alike(target, hidden[0], alone):
            return passed, _alike(target, hidden[1, _PADDED:], alone[:-_PADDED])
    return False, False
