"""Check arguments, and word the errors that a caller can cause."""

from __future__ import annotations

import difflib
import math
import numbers
import operator
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def check_tensor(name: str, value: object) -> Tensor:
    """Raise unless `value` is a plain dense torch tensor. The error for a sharded one says what to call."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else str(value.layout)
        raise TypeError(f"{name} must be a dense tensor, got {kind}; {name}.to_dense() or padding makes one")
    if type(value).__name__ == "DTensor":
        raise TypeError(
            f"{name} is a DTensor (sharded by FSDP2 or tensor parallelism); gather it first, e.g. "
            f"with windkern.sharding.gathered({name}) or {name}.full_tensor(), or keep a head sharded with "
            "windkern.sharding.vocab_parallel or streamed"
        )
    return value


def check_floating(name: str, value: object) -> Tensor:
    tensor = check_tensor(name, value)
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}")
    return tensor


def check_integer(name: str, value: object) -> Tensor:
    tensor = check_tensor(name, value)
    if tensor.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, got {tensor.dtype}")
    return tensor


def check_shape(name: str, tensor: Tensor, expected: Sequence[int | str]) -> None:
    """Raise unless `tensor` has the shape `expected`: a number is a fixed size, a letter stands for any size."""
    sizes = shape_of(tensor)
    fits = len(sizes) == len(expected) and all(
        isinstance(want, str) or want == got for want, got in zip(expected, sizes, strict=True)
    )
    if not fits:
        wanted = "(" + ", ".join(str(size) for size in expected) + ("," if len(expected) == 1 else "") + ")"
        raise ValueError(f"{name} must have shape {wanted}, got {sizes}")


def check_same_device(name: str, tensor: Tensor, reference_name: str, reference: Tensor) -> None:
    if tensor.device != reference.device:
        raise ValueError(f"{name} is on {tensor.device} but {reference_name} is on {reference.device}; move one")


def check_choice(name: str, value: str, choices: Iterable[str]) -> str:
    options = list(choices)
    if value not in options:
        near = difflib.get_close_matches(str(value), options, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}{hint}")
    return value


def _is_finite(value: numbers.Real) -> bool:
    if torch.compiler.is_compiling():  # the number may be a symbol
        return value - value == 0
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond float64
        return False


def check_number(name: str, value: float, *, above: float | None = None, least: float | None = None) -> float:
    """Return `value` if it is a finite real number, greater than `above` and at least `least` where given."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not _is_finite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    if above is not None and not value > above:
        raise ValueError(f"{name} must be greater than {above}, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return value


def check_int(name: str, value: object) -> int:
    """Return `value` as an integer: Python's, a symbol, or anything with `__index__` (NumPy's), but not a bool."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value  # type: ignore[return-value]  # a symbol stands for an int
    try:
        if isinstance(value, bool) or getattr(value, "dtype", None) == torch.bool:
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]  # raises without __index__
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {_described(value)}") from None


def check_count(name: str, value: object, least: int = 0) -> int:
    """Like `check_int`, for an integer of at least `least`."""
    number = check_int(name, value)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def check_index(name: str, value: object) -> int:
    """Like `check_int`, for an integer that an int64 tensor can hold."""
    number = check_int(name, value)
    if not -(1 << 63) <= number < 1 << 63:
        raise ValueError(f"{name} must fit into 64 bits, got {number}")
    return number


def check_flag(name: str, value: object) -> bool:
    """Return `value` as a bool: Python's or NumPy's True or False."""
    if isinstance(value, bool):
        return value
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {_described(value)}")


def _described(value: object) -> str:
    """Return the type of `value`, and the value itself where it is short."""
    shown = repr(value) if isinstance(value, (str, float, int, bool)) else ""
    return f"{type(value).__name__} {shown}".strip() if len(shown) <= 40 else type(value).__name__


def check_float_dtype(name: str, value: object) -> torch.dtype:
    if value not in FLOATS:
        raise TypeError(f"{name} must be torch.float64, float32, bfloat16 or float16, got {value!r}")
    return value


def check_each(name: str, value: object, check: Callable[[str, object], object], blocks: int | None = None) -> tuple:
    """Apply `check` to the value of each block: one value serves all `blocks`, a tuple or list has one for each."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * (blocks or 1)
    if not values or blocks not in (None, len(values)):
        wanted = "one value or more" if blocks is None else f"one value or {blocks} (one for each block)"
        raise ValueError(f"{name} must be {wanted}, got {len(values)}")
    return tuple(check(name, each) for each in values)


def check_device(name: str, device: object) -> torch.device:
    """Return `device` as a torch.device; a name is accepted."""
    try:
        return torch.device(device)  # type: ignore[call-overload]  # raises for anything else
    except (RuntimeError, TypeError):
        raise ValueError(f"{name} must be a torch.device or name one, such as 'cuda', got {device!r}") from None


# Preferences ----------------------------------------------------------------------------------------------------------

PREFS_TOLERANCE = 1e-4  # float32 sigmoids miss prefs + prefs^T = 1 by 1e-7, real asymmetry is a thousand times this
_PREFS_BLOCK = 1 << 20  # entries checked together: temporaries stay small next to the preferences


def readable(tensor: Tensor) -> bool:
    """Return whether values can be read at once: on a GPU Python would wait, under a compiler there are none."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_prefs_values(prefs: Tensor, where: Tensor | None) -> None:
    """Raise unless preferences (B, N, N) lie in [0, 1] and prefs + prefs^T = 1, among responses in `where` (B, N)."""
    groups, n = prefs.shape[:2]
    rows = max(1, min(n, _PREFS_BLOCK // max(1, n)))
    step = max(1, _PREFS_BLOCK // max(1, rows * n))
    worst = 0.0
    for first in range(0, groups, step):
        some = slice(first, first + step)
        for start in range(0, n, rows):
            part = slice(start, start + rows)
            forth, back = prefs[some, part], prefs[some, :, part].mT
            if where is not None:
                pairs = where[some, part, None] & where[some, None]
                forth, back = torch.where(pairs, forth, 0.5), torch.where(pairs, back, 0.5)
            if not ((forth >= 0) & (forth <= 1)).all():
                raise ValueError("prefs must lie in [0, 1] and hold no NaN (pass probabilities, not scores)")
            if forth.numel():
                worst = max(worst, float((forth + back - 1).abs().nan_to_num(torch.inf).max()))
    if worst > PREFS_TOLERANCE:
        raise ValueError(
            f"prefs[b, i, j] + prefs[b, j, i] must be 1 (1/2 on the diagonal), off by up to {worst:.3g}; "
            "(prefs + 1 - prefs.mT) / 2 makes them symmetric"
        )


def check_rewards_values(rewards: Tensor, where: Tensor | None, name: str = "rewards") -> None:
    """Raise unless the rewards (B, N) of the responses in `where` (B, N) are finite."""
    finite = rewards.isfinite()
    if not (finite if where is None else finite | ~where).all():
        raise ValueError(f"{name} must be finite for every response that is not masked")
