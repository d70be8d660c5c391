"""Choose the back end that runs the row kernels, and say why another one cannot."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType

import torch

from windkern._checks import check_choice, check_device, check_float_dtype
from windkern.kernels import tuned
from windkern.kernels.torch import rows as torch_rows

__all__ = ["BackendUnavailableError", "available", "why_not"]


class BackendUnavailableError(RuntimeError):
    """Raised when a back end that was requested by name cannot run here. The message says why."""


@dataclass(frozen=True)
class Backend:
    """One implementation of the row-kernel contract in `windkern.kernels.contract`."""

    name: str
    module: str  # as importlib.import_module takes it, relative to the package
    reason: Callable[[torch.device, torch.dtype], str | None]  # None where it can run
    # Columns of the forward's fused tiles, by hidden size, operand dtype and batch invariance; None: no tiles.
    tile_columns: Callable[[int, torch.dtype, bool], int | None] = lambda hidden_size, dtype, batch_invariant: None
    # Whether the current GPU runs kernels that multiply themselves, by hidden size and operand dtype.
    fuses: Callable[[int, torch.dtype], bool] = lambda hidden_size, dtype: False
    reads_in_place: Callable[[torch.Tensor], bool] = lambda head: True  # whether those read a head where it lies
    wide_dz: bool = True  # whether dz can be written wider than what was kept
    # Upper bound of a row kernel's temporary bytes, by rows, width, bytes per element and device type.
    scratch_bytes: Callable[[int, int, int, str], int] = torch_rows.scratch_bytes

    def kernels(self) -> ModuleType:
        return _imported(self.module)


@functools.cache
def _imported(module: str) -> ModuleType:
    return importlib.import_module(module, __package__)


def _partial_sums(rows: int, width: int, itemsize: int, device_type: str) -> int:
    """Bytes of the partial column sums that kernels with a row in registers write besides their results."""
    return min(rows, 256) * width * itemsize


def _always(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def _cpp_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    return BACKENDS["cpp"].kernels().why_not(device, dtype)


def _cuda_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    return BACKENDS["cuda"].kernels().why_not(device, dtype)


def _cuda_fuses(hidden_size: int, dtype: torch.dtype) -> bool:
    return BACKENDS["cuda"].kernels().why_not_tiles(hidden_size, dtype) is None


def _cuda_reads_in_place(head: torch.Tensor) -> bool:
    return BACKENDS["cuda"].kernels().reads_in_place(head)


def _triton_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda" and not (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"it runs on NVIDIA and AMD GPUs, not on {device.type} (TRITON_INTERPRET=1 runs it slowly on a CPU)"
    try:
        BACKENDS["triton"].kernels()
    except ImportError as error:
        return f"Triton cannot be imported ({error}); GPU builds of torch include it, else: pip install 'triton>=3.4'"
    return None


# In order of preference: "auto" takes the first that can run; on a GPU in the order of `kernels/tuned.json`.
BACKENDS = {
    "cpp": Backend("cpp", ".kernels.native.cpp", _cpp_reason),
    "triton": Backend(
        "triton", ".kernels.triton.rows", _triton_reason, tuned.tile_columns, scratch_bytes=_partial_sums
    ),
    "cuda": Backend(
        "cuda",
        ".kernels.native.cuda",
        _cuda_reason,
        fuses=_cuda_fuses,
        reads_in_place=_cuda_reads_in_place,
        wide_dz=False,
        scratch_bytes=_partial_sums,
    ),
    "torch": Backend("torch", ".kernels.torch.rows", _always),
}


def why_not(name: str, device: str | torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Return why back end `name` cannot run on `device` with operands of `dtype`, or None if it can.

    Raises:
        ValueError: no back end, or no device, has that name.
        TypeError: `dtype` is not one that windkern supports.

    Example:
        >>> why_not("torch", "cpu") is None
        True
    """
    check_choice("backend", name, BACKENDS)
    return BACKENDS[name].reason(check_device("device", device), check_float_dtype("dtype", dtype))


def available(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
    """Return the back ends that can run on `device`, most preferred first.

    Example:
        >>> "torch" in available("cpu")
        True
    """
    return tuple(name for name in BACKENDS if why_not(name, device, dtype) is None)


def resolve(requested: str, device: torch.device, dtype: torch.dtype, *, tiles: bool = False) -> str:
    """Return the name of the back end that will run. One that is requested by name but cannot run raises.

    `tiles` says whether the call may keep its logits in registers.
    """
    if requested == "auto":
        return _preferred(device.type, device.index, dtype, tiles)
    check_choice("backend", requested, ["auto", *BACKENDS])
    reason = _reason(requested, device.type, device.index, dtype)
    if reason is not None:
        raise BackendUnavailableError(f"backend={requested!r} cannot run on {device} with {dtype}: {reason}")
    return requested


_preference: dict[tuple[str, torch.dtype, bool], str] = {}


def _preferred(device_type: str, index: int | None, dtype: torch.dtype, tiles: bool) -> str:
    device = _name(device_type, index)
    key = (device, dtype, tiles)  # by device: a machine can have different GPUs
    if key not in _preference:
        names = BACKENDS if device_type != "cuda" else tuned.preferred(tuned.architecture(index), tiles=tiles)
        # Reason: stop at the first one, because checking the others would import modules that are never used.
        _preference[key] = next(name for name in names if why_not(name, device, dtype) is None)
    return _preference[key]


def _reason(name: str, device_type: str, index: int | None, dtype: torch.dtype) -> str | None:
    return why_not(name, _name(device_type, index), dtype)


def _name(device_type: str, index: int | None) -> str:
    return device_type if index is None else f"{device_type}:{index}"


def planned(requested: str, device: torch.device, dtype: torch.dtype, *, tiles: bool) -> str:
    """Return the name of the back end to plan for, even on a machine without such a device."""
    if requested != "auto":
        return requested
    if device.type == "cuda" and not torch.cuda.is_available():
        return tuned.preferred(tiles=tiles)[0]
    return _preferred(device.type, device.index, dtype, tiles)


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager:
    """Make the device of `tensor` current: Triton launches on the current device, wherever its arguments are."""
    if not tensor.is_cuda or torch.compiler.is_compiling() or tensor.get_device() == torch.cuda.current_device():
        return _NO_CONTEXT
    return torch.cuda.device(tensor.device)


_NO_CONTEXT = nullcontext()  # Reason: a call enters one three times while its GPU waits


def tile_columns(name: str, hidden_sizes: tuple[int, ...], dtype: torch.dtype, batch_invariant: bool) -> int | None:
    """Tile width if back end `name` runs the forward in fused tiles for these sizes, else None."""
    return None if len(hidden_sizes) > 1 else BACKENDS[name].tile_columns(hidden_sizes[0], dtype, batch_invariant)


def may_fuse(
    blocks: int, dtype: torch.dtype, *, trains: bool, entropy: bool, capped: bool, batch_invariant: bool
) -> bool:
    """Return whether a call can keep its logits in registers on a GPU with the kernels for it, see `WalkSpec.fused`.

    One that cannot may run faster on another back end.
    """
    if blocks > 1 or capped or batch_invariant:
        return False
    return (dtype == torch.bfloat16 and not (trains and entropy)) or (dtype == torch.float16 and not trains)


def fuses(name: str, hidden_sizes: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Return whether back end `name` has kernels on the current GPU that multiply and take exponentials at once."""
    return len(hidden_sizes) == 1 and BACKENDS[name].fuses(hidden_sizes[0], dtype)


# torch.compile runs these while it traces instead of tracing them, because they import modules. The attribute is the
# one that torch.compiler.assume_constant_result sets; calling that would cost a second of imports.
_preferred._dynamo_marked_constant = True  # type: ignore[attr-defined]
_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


def debug_mode() -> bool:
    """Return whether WINDKERN_DEBUG=1 asks for checks of values on a GPU too, at the cost of synchronisations."""
    return os.environ.get("WINDKERN_DEBUG", "0") not in ("", "0")


def checks_values(device: torch.device) -> bool:
    """Return whether values on `device` are checked: always on a CPU, on a GPU in debug mode."""
    return device.type == "cpu" or debug_mode()
