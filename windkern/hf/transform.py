"""Find scale, softcap and masked columns of a model's logits from its output for numbers that we chose."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from windkern.hf.call import Target
from windkern.hf.head import UnsupportedModelError
from windkern.transform import LogitTransform

REMEDY = "compute hidden states yourself and call windkern.sequence_logps with the right transform"
_MASK = -1e4  # a column that is always at or below this is masked: its exp is 0 next to any other logit
_SAMPLE = 256  # columns on which candidates are tried first
# Fields of a configuration that describe the logits, and the scale they stand for (None: a softcap).
_CLAIMS = {
    "logit_scale": lambda value: value,  # Cohere
    "logits_scaling": lambda value: 1 / value,  # Granite
    "lm_head_multiplier": lambda value: value,  # Falcon-H1
    "final_logit_softcapping": None,  # Gemma
}


def probe(rows: int, vocab: int, dtype: torch.dtype) -> Tensor:
    """Return (rows, V) float64 with values of `dtype` from 2^-8 to 2^12 (2^9 in float16), all sizes in each column.

    Signs are random. Small values reveal the scale, large ones a softcap.
    """
    random = torch.Generator().manual_seed(0)  # Reason: leave the caller's random state alone
    top = 8 if dtype == torch.float16 else 11
    sizes = 2 ** torch.linspace(-8, top, rows, dtype=torch.float64)
    place = (torch.arange(rows)[:, None] + torch.arange(vocab)) % rows
    mantissa = 1 + torch.rand(rows, vocab, generator=random, dtype=torch.float64)
    sign = torch.randint(2, (rows, vocab), generator=random) * 2 - 1
    return (sizes[place] * mantissa * sign).to(dtype).double()


def numbers_of(base: nn.Module) -> tuple[tuple[str, float], ...]:
    """Return names and values that may be a scale or cap: of the configuration, its text part, and the model.

    An integer counts only if its name suggests it: a scale of 1 / 2 layers is a coincidence, and counters change.
    """
    config: Any = base.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return tuple(
        (name, value)
        for holder in ((config,) if text is config else (config, text)) + (base,)
        for name, value in vars(holder).items()
        if type(value) is float or (type(value) is int and _speaks(name))
        if math.isfinite(value)
    )


def read(
    target: Target,
    given: Tensor,
    made: Tensor,
    exact: Tensor,
    logits: Tensor,
    dtype: torch.dtype,
    rounding: float,
) -> tuple[LogitTransform, Tensor | None]:
    """Return the transform from `given` to `made`, and the columns (V',) that it masks.

    Args:
        given: (T, V') float64, what the head returned; made: (T, V') float64, the model's logits for it.
        exact: (T, V') float64, the head's product for real hidden states; logits: (T, V') float64, the model's logits
            for them.
        dtype: of the product that the head returns.
        rounding: relative error that rounding can cause in an element of the product.

    Raises:
        UnsupportedModelError: the configuration does not have such a scale and softcap, or some columns are replaced by
            constants that are not a mask.
    """
    masked = _masked(target, made, logits)
    given, made, exact, logits = (each[:, ~masked] for each in (given, made, exact, logits))
    transform = _fit(target, given, made, dtype)
    if transform.softcap is not None and bool(masked.any()):
        raise UnsupportedModelError(
            f"{target.name} caps its logits and then masks {int(masked.sum())} of them, but windkern supports only one "
            f"of the two; {REMEDY}"
        )
    expected, size = _apply(transform, exact), transform.scale * exact.square().mean(-1, keepdim=True).sqrt()
    error = float(((logits - expected).abs() / (expected.abs() + size).clamp(min=1e-30)).max())
    if not error <= rounding + 4 * torch.finfo(dtype).eps:  # of the product, and of the transform's few steps
        raise UnsupportedModelError(
            f"{target.name} transforms the logits of real tokens differently from other numbers: they differ from "
            f"{transform} by {error:.3g} of their size; {REMEDY}"
        )
    return transform, masked if bool(masked.any()) else None


def _apply(transform: LogitTransform, logits: Tensor) -> Tensor:
    scaled = transform.scale * logits
    return scaled if transform.softcap is None else transform.softcap * (scaled / transform.softcap).tanh()


def _masked(target: Target, made: Tensor, logits: Tensor) -> Tensor:
    """Return the columns (V',) that hold the same very negative number whatever the head returns."""
    constant = (made == made[0]).all(0)
    masked = constant & (made[0] <= _MASK) & (logits <= _MASK).all(0)
    replaced = constant & ~masked
    if bool(replaced.any()):
        column = int(replaced.nonzero()[0])
        raise UnsupportedModelError(
            f"{target.name} replaces {int(replaced.sum())} of its {made.shape[-1]} logits by constants (token {column} "
            f"has {float(made[0, column]):.4g}), whatever its head returns; {REMEDY}"
        )
    if not bool(made[:, ~masked].isfinite().all()) or bool(masked.all()):
        raise UnsupportedModelError(f"{target.name} turns finite numbers into infinite logits or NaN; {REMEDY}")
    return masked


def _slack(dtype: torch.dtype) -> float:
    """Return the relative error of a few roundings: random in a short format, a last digit or two in a long one."""
    eps = torch.finfo(dtype).eps
    return eps if eps > 1e-4 else 8 * eps


def _fits(transform: LogitTransform, given: Tensor, made: Tensor, dtype: torch.dtype) -> bool:
    """Return whether the model's logits are those of the transform, up to a few roundings."""
    expected, slack = _apply(transform, given), _slack(dtype)
    gap, least = made - expected, torch.finfo(dtype).tiny * slack
    return bool((gap.abs() <= 4 * slack * expected.abs() + least).all()) and bool(gap.norm() <= slack * expected.norm())


def _fit(target: Target, given: Tensor, made: Tensor, dtype: torch.dtype) -> LogitTransform:
    """Return the scale and softcap among the model's numbers that explain its logits."""
    part = given[:, :_SAMPLE], made[:, :_SAMPLE]
    small = given.abs() <= given.abs().min() * 4
    scale = float((made[small] / given[small]).median())
    for candidate in _candidates(target, scale, float(made.abs().max()), _slack(dtype)):
        if _fits(candidate, *part, dtype) and _fits(candidate, given, made, dtype):
            return candidate
    plain = scale > 0 and _fits(LogitTransform(scale=scale), given, made, torch.float16)
    what = f"multiplies the output of its head by {scale:.6g}" if plain else "transforms the output of its head"
    raise UnsupportedModelError(
        f"{target.name} {what}, which its configuration does not explain ({_pairs(given, made)}); {REMEDY}"
    )


def _pairs(given: Tensor, made: Tensor) -> str:
    return ", ".join(f"{float(a):.4g} -> {float(b):.4g}" for a, b in zip(given[:, 0], made[:, 0], strict=True))


def _candidates(target: Target, scale: float, top: float, slack: float) -> Iterator[LogitTransform]:
    """Yield transforms from the model's numbers near the measured scale, telling names first, then by distance.

    Args:
        scale: the measured slope at zero.
        top: the largest logit of the model.
    """
    near = max(slack, 1e-3)
    numbers = [(name, value) for name, value in numbers_of(target.base) if value > 0]
    found = [("logits", 1.0), *numbers, *((name, 1 / value) for name, value in numbers)]
    scales = sorted((not _speaks(name), abs(value / scale - 1), value) for name, value in found if scale > 0)
    caps = sorted((not _speaks(name), value) for name, value in numbers if value >= top * (1 - near))
    for _, gap, value in scales:
        if gap <= near:
            yield LogitTransform(scale=value)
            yield from (LogitTransform(scale=value, softcap=cap) for _, cap in caps)


def _speaks(name: str) -> bool:
    return any(part in name for part in ("logit", "lm_head", "output_", "scal", "cap", "mult"))


def unfollowed(target: Target, transform: LogitTransform) -> Iterator[tuple[str, float, LogitTransform]]:
    """Yield each claim of the model's configuration that its logits do not follow: name, value and claimed transform.

    A wrapper around a text model is free to ignore the configuration of its text part.
    """
    for name, meaning in _CLAIMS.items():
        value = vars(target.base.config).get(name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
            continue
        if meaning is None:
            followed, claimed = transform.softcap == value, LogitTransform(scale=transform.scale, softcap=value)
        else:
            claimed = LogitTransform(scale=meaning(value), softcap=transform.softcap)
            followed = any(math.isclose(transform.scale, each, rel_tol=1e-3) for each in (value, 1 / value))
        if not followed:
            yield name, value, claimed


def refusal(
    target: Target, name: str, value: float, claimed: LogitTransform, exact: Tensor, logits: Tensor
) -> UnsupportedModelError:
    """Return the error for a claim that the logits do not follow; `exact` and `logits` are as in `read`."""
    ours, theirs = (each.log_softmax(-1) for each in (_apply(claimed, exact), logits))
    error = float((ours - theirs).abs().nan_to_num(0.0).max())  # a masked column is -inf in both or in one
    return UnsupportedModelError(
        f"config.{name} is {value}, but {target.name} does not follow it: log-probs with {claimed} differ from those "
        f"of its logits by {error:.3g} nats. Set config.{name} to None if the model was trained without it; else "
        f"{REMEDY}"
    )
