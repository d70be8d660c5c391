"""Call a model once to check whether responses that share a row get the same hidden states as alone.

A prompt and three responses of a few tokens run as one row and as three, in the model's own dtype. Windows and chunks
of attention are narrowed to a few tokens, so that the run reveals masks or positions that the model ignores. Hidden
states, and their gradient with respect to the embedded tokens, must agree within rounding. The model itself shows the
effect of rounding: the three rows run again with their embeddings changed by one rounding. In a 16-bit model that is
coarse, so a row whose responses see each other must come out wrong; otherwise the check proves nothing.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from windkern.hf import call as hf_call
from windkern.hf import masks as hf_masks
from windkern.hf.call import Target
from windkern.hf.check import circumstances, in_eval_mode, plain_ids, verdict_of
from windkern.hf.layout import GroupRows, LayoutRules, make_layout, make_rows
from windkern.hf.masks import MaskForm

_PROMPT, _RESPONSES = 5, (8, 4, 6)
_NARROW = 3  # tokens that a window sees in the check
# How much sums in another order may change hidden states, as a multiple of the effect of rounding the embeddings once.
# At most 0.9 of that was observed. A wide dtype leaves room for more; in a narrow one, more would hide a fault.
_ROUNDINGS = {"wide": 16, "narrow": 4}
_KEPT = 8
_log = logging.getLogger(__name__)
_seen: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # base model -> {circumstances: Sharing}
_said: set[tuple[str, str]] = set()  # (class, cause) already logged; a policy and its reference share both


@dataclass(frozen=True)
class Sharing:
    """Result of the check: the form of the model's masks, or the reason why its responses cannot share a row."""

    form: MaskForm | None
    cause: str | None
    evidence: str | None = None  # from this model: numbers, or the error it raised
    relative: bool = False  # whether only differences of positions matter

    @property
    def holds(self) -> bool:
        return self.form is not None

    @property
    def reason(self) -> str | None:
        """The cause and its evidence; None if responses share rows."""
        return self.cause if self.evidence is None else f"{self.cause} ({self.evidence})"


def sharing_of(target: Target) -> Sharing:
    """Check a model, once for each dtype, autocast, head, adapters, numbers of its configuration and attention.

    If responses cannot share a row, the log says why, once for each class of models and cause.

    Raises:
        UnsupportedModelError: see `windkern.hf.hidden_and_head`.
    """
    seen = _seen.setdefault(target.base, {})
    now = (*circumstances(target), hf_masks.implementation(target.base))
    if now not in seen:
        sharing = _look(target)
        if not sharing.holds and (target.name, sharing.cause) not in _said:
            _said.add((target.name, sharing.cause))
            _log.warning("%s: responses do not share their prompt, since %s", target.name, sharing.reason)
        while len(seen) >= _KEPT:
            del seen[next(iter(seen))]
        seen[now] = sharing
    return seen[now]


def inputs_of(target: Target, rows: GroupRows, form: MaskForm | None, positions: bool) -> tuple[dict, Callable]:
    """Return arguments for the wrapped model, and a function that turns them into those of the model itself.

    Wrappers get the ordinary padding mask. Hazard: some of them cast their arguments, or take only two-dimensional
    masks. Remedy: make the masks of rows inside the wrappers.
    """
    given = hf_call.inputs(target.base, rows.input_ids, rows.attention_mask, positions=False)
    if positions:
        given["position_ids"] = rows.position_ids
    if form is None or not rows.is_shared:
        return given, dict

    def amend(received: dict[str, Any]) -> dict[str, Any]:
        own = rows.to(received["input_ids"].device)
        return {**received, "attention_mask": hf_masks.make_masks(target.base, form, own)}

    return given, amend


def _look(target: Target) -> Sharing:
    positions = verdict_of(target).positions
    known = _known_reason(target, positions)
    if known is not None:
        return Sharing(None, known)
    target = replace(target, compiled=())  # Reason: code that runs once is not worth compiling
    apart, together = _example(target)
    with in_eval_mode(target.chain[0]), hf_masks.narrowed(target.base, _NARROW):
        try:
            trial = _Trial(target, apart, together)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a model can raise anything
            return Sharing(None, f"rows of one response failed: {type(error).__name__}: {error}")
        reasons = []
        for form in hf_masks.forms(target.base):
            reason = trial.refusal(form)
            if reason is None:
                return Sharing(form, None, relative=trial.is_relative(apart))
            reasons.append(reason)
    return _explained(target, reasons[0])


def _known_reason(target: Target, positions: bool) -> str | None:
    attention, dense = hf_masks.implementation(target.base), "attn_implementation='sdpa' or 'eager'"
    if attention == hf_masks.FLEX and target.device.type not in hf_masks.FLEX_DEVICES:
        return f"FlexAttention has no backward on the device {target.device.type!r} (load it with {dense})"
    if attention not in (*hf_masks.DENSE, hf_masks.FLEX):
        return f"its attention {attention!r} takes no mask of rows (load it with {dense})"
    if not positions and hf_call.takes(target.base, "position_ids"):
        return "it does not take positions that count from the first token"
    return None


def _explained(target: Target, reason: str) -> Sharing:
    others = [kind for kind in hf_masks.kinds_of(target.base) if "attention" not in kind or "linear" in kind]
    if others:
        return Sharing(
            None, f"it has layers of the kind {', '.join(others)}, which carry a state from token to token", reason
        )
    if not hf_call.takes(target.base, "position_ids"):
        return Sharing(None, "it takes no position ids", reason)
    return Sharing(None, reason)


def _example(target: Target) -> tuple[GroupRows, GroupRows]:
    """Return the same ids as three rows and as one. No id occurs twice, so that ids identify gradients."""
    ids = plain_ids(target, _PROMPT + sum(_RESPONSES))
    prompt, rest, responses = ids[:_PROMPT], ids[_PROMPT:], []
    for size in _RESPONSES:
        responses.append(rest[:size])
        rest = rest[size:]
    lengths = [(_PROMPT, _RESPONSES)]
    made = []
    for rules in (LayoutRules(shared=False), LayoutRules(balance=1 << 40)):
        made.append(make_rows(make_layout(lengths, rules), [prompt], [responses], fill=prompt[0]).to(target.device))
    return made[0], made[1]


class _Trial:
    """Runs plain rows, with and without one rounding, and compares rows with any form of masks to them.

    Raises:
        Exception: whatever the model raises on plain rows.
    """

    def __init__(self, target: Target, apart: GroupRows, together: GroupRows):
        self.target, self.together = target, together
        # Reason: a backward through a part of a wrapped model would confuse wrappers that count calls, and no gradient
        # passes through weights that are offloaded.
        self.gradients = not (
            target.reducers or target.is_sharded or target.is_offloaded or torch.is_inference_mode_enabled()
        )
        self.positions = hf_call.takes(target.base, "position_ids")
        self.plain = self._run(apart, None)
        moved = self._run(apart, None, moved=True)
        roundings = _ROUNDINGS["wide" if _eps_of(target.base) < 1e-4 else "narrow"]
        self.allowed = [roundings * gap for gap in self._gaps(moved)]

    def refusal(self, form: MaskForm) -> str | None:
        """Return why responses cannot share a row with masks of this form, or None if they can."""
        rows = self.together
        try:
            gaps = self._gaps(self._run(rows, form))
            for name, gap, allowed in zip(("hidden states", "gradients"), gaps, self.allowed, strict=False):
                if not gap <= allowed:
                    return f"{name} in one row differ by {gap:.2g} of their size, and rounding explains {allowed:.2g}"
            end = torch.full_like(rows.last_reader, rows.input_ids.shape[1] - 1)
            fault = self._gaps(self._run(replace(rows, last_reader=end), form))[0]
            if not fault > self.allowed[0]:
                return f"rounding explains {self.allowed[0]:.2g}, which would hide a row without its mask, {fault:.2g}"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a model can raise anything for a mask or positions that it does not support
            return f"it failed with {form}: {type(error).__name__}: {error}"
        return None

    def is_relative(self, apart: GroupRows) -> bool:
        """Return whether hidden states stay the same when all positions grow by the same number."""
        later = replace(apart, position_ids=apart.position_ids + 3)
        return self._gaps(self._run(later, None))[0] <= self.allowed[0]

    def _run(self, rows: GroupRows, form: MaskForm | None, moved: bool = False) -> tuple[Tensor, ...]:
        """Return hidden states (M, H), and the gradient (ids, E) of a weighted sum with respect to embedded tokens."""
        given, amend = inputs_of(self.target, rows, form, self.positions)

        def job(hidden: Tensor) -> Tensor:
            return hidden.flatten(0, 1)[rows.index.to(hidden.device)]

        with torch.set_grad_enabled(self.gradients), _embedded(self.target.base, moved, self.gradients) as embedded:
            hidden = hf_call.run(self.target, given, job, check=True, amend=amend)
            if not self.gradients:
                return (hidden,)
            upstream = torch.linspace(-1, 1, hidden.numel(), dtype=torch.float32).reshape(hidden.shape).to(hidden)
            (gradient,) = torch.autograd.grad((hidden.float() * upstream.float()).sum(), embedded[:1])
        ids = rows.input_ids.flatten().to(gradient.device)
        names, place = ids[rows.attention_mask.flatten().to(ids.device)].unique(return_inverse=True)
        kept = gradient.flatten(0, -2)[rows.attention_mask.flatten().to(ids.device)].float()
        summed = kept.new_zeros(len(names), kept.shape[-1]).index_add_(0, place, kept)
        return hidden.detach(), summed

    def _gaps(self, other: tuple[Tensor, ...]) -> list[float]:
        """Return the largest gap of the three responses' hidden states and, if computed, the gap of the gradient.

        Each gap is the largest among three tokens in four, because experts may flip in the rest.
        """
        first = _distance(other[0], self.plain[0]).split(list(_RESPONSES))
        rest = zip(other[1:], self.plain[1:], strict=True)
        return [max(map(_of_most, first)), *(_of_most(_distance(*pair)) for pair in rest)]


def _distance(ours: Tensor, theirs: Tensor) -> Tensor:
    ours, theirs = ours.float(), theirs.float()
    return ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp(min=1e-30)).cpu()


def _of_most(gaps: Tensor) -> float:
    return float(gaps.sort().values[-(-3 * len(gaps) // 4) - 1])


def _eps_of(base: nn.Module) -> float:
    """Return the machine epsilon of the narrowest dtype in which a forward computes."""
    dtypes = {each.dtype for each in base.parameters() if each.is_floating_point()}
    device = next(base.parameters()).device.type
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    return max(torch.finfo(dtype).eps for dtype in dtypes if dtype.itemsize > 1)


@contextmanager
def _embedded(base: Any, moved: bool, leaf: bool) -> Iterator[list[Tensor]]:
    """Make the embedded tokens a leaf and yield it in a list; if `moved`, change them by one rounding."""
    found: list[Tensor] = []

    def hook(module: nn.Module, args: object, output: Tensor) -> Tensor:
        output = output.detach()
        if moved:
            eps = max(torch.finfo(output.dtype).eps, _eps_of(base))
            signs = torch.arange(output.numel(), device=output.device).mul(2654435761).bitwise_right_shift(7) & 1
            output = output * (1 + eps * (2 * signs - 1).reshape(output.shape)).to(output.dtype)
        output = output.requires_grad_(leaf)
        found.append(output)
        return output

    handle = base.get_input_embeddings().register_forward_hook(hook)
    try:
        yield found
    finally:
        handle.remove()
