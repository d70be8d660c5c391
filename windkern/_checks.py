"""Argument checks: the only place that words errors a caller can cause."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def check_tensor(name: str, value: object) -> Tensor:
    """Refuse what is not a plain, non-empty-storage torch tensor (a sharded one names the way out)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if type(value).__name__ == "DTensor":
        raise TypeError(
            f"{name} is a DTensor (sharded by FSDP2 or tensor parallelism); gather it first, e.g. "
            f"with windkern.sharding.gathered({name}) or {name}.full_tensor()"
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
    """`expected` holds a number where the size is fixed and a letter where any size will do."""
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


def check_number(name: str, value: float, *, above: float | None = None, least: float | None = None) -> float:
    """A finite Python number, greater than `above` or at least `least` where given."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < math.inf:
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    if above is not None and not value > above:
        raise ValueError(f"{name} must be greater than {above}, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return value


def check_count(name: str, value: int, least: int = 0) -> int:
    """A Python or symbolic integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value
