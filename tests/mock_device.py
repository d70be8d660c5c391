"""Tensors that claim to be on a GPU, on a machine without one: they have shapes, dtypes and addresses, but no numbers.

Code that gets them allocates nothing, for any size, and runs as on a GPU up to the launches of kernels, with autograd.
Triton kernels accept them under `mock_driver`, whose launches do nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

GRANULE = 512  # bytes that torch's allocator for CUDA aligns to
_BASE = 1 << 40
_aten = torch.ops.aten

# The Python functions of windkern's ops, recorded as they are registered: torch runs them only through its dispatcher.
_bodies: dict[str, Callable] = {}
_impl = torch.library.Library.impl


def _note(library, op_name, fn, *arguments, **options):
    _bodies.setdefault(str(op_name), fn)
    return _impl(library, op_name, fn, *arguments, **options)


assert "windkern.ops" not in sys.modules, "import mock_device before windkern"
with mock.patch.object(torch.library.Library, "impl", _note):
    for module in ("logprobs", "pairs", "sequence", "fused_loss"):
        importlib.import_module(f"windkern.ops.{module}")


class GpuTensor(Tensor):
    """Wraps a tensor on the meta device. Autograd treats it as a CPU tensor: it does not ask Python for the device."""

    shadow: Tensor
    index: int

    @staticmethod
    def __new__(cls, shadow: Tensor, index: int):
        self = Tensor._make_wrapper_subclass(
            cls,
            shadow.shape,
            strides=shadow.stride(),
            storage_offset=shadow.storage_offset(),
            dtype=shadow.dtype,
            device="cpu",
        )
        self.shadow, self.index = shadow, index
        return self

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.index)

    @property
    def is_cuda(self) -> bool:
        return True

    def data_ptr(self) -> int:
        """Return an address at a granule, where torch's allocations begin; which one does not matter."""
        return _BASE + self.shadow.storage_offset() * self.shadow.element_size()

    def __repr__(self, **_) -> str:
        return f"GpuTensor({tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _on_meta(func, args, kwargs or {})


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """Map a function over the arguments of an op: tensors, and lists of them."""
    if isinstance(value, (tuple, list)):
        return type(value)([_map(function, part) for part in value])
    return function(value)


def _on_meta(func, args, kwargs):
    """Run `func` on the wrapped tensors; a tensor that is written in place is returned itself."""
    given: dict[int, GpuTensor] = {}

    def unwrap(value):
        if not isinstance(value, GpuTensor):
            return value
        given[id(value.shadow)] = value
        return value.shadow

    args = [_map(unwrap, value) for value in args]
    kwargs = {name: _map(unwrap, value) for name, value in kwargs.items()}
    indices = {tensor.index for tensor in given.values()}
    device = kwargs.get("device")
    if device is not None and device.type == "cuda":
        indices.add(device.index or 0)
        kwargs["device"] = "meta"
    if len(indices) != 1:
        raise RuntimeError(f"{func}: tensors of several GPUs, {sorted(indices)}")
    (index,) = indices
    result = _product(func, args, kwargs) if func in _PRODUCTS else func(*args, **kwargs)

    def wrap(value):
        if not isinstance(value, Tensor):
            return value
        return given[id(value)] if id(value) in given else GpuTensor(value, index)

    return _map(wrap, result)


# Products of 16-bit operands into float32 exist on CUDA only.
_PRODUCTS = {
    overload
    for packet in (_aten.mm, _aten.addmm)
    for overload in (getattr(packet, name) for name in packet.overloads())
    if "dtype" in overload._overloadname
}


def _product(func, args, kwargs):
    left, right = args[-3:-1] if len(args) > 3 else args[:2]
    if "out" in kwargs:
        return kwargs["out"]
    dtype = kwargs.get("out_dtype", args[-1])
    return torch.empty(left.shape[0], right.shape[1], dtype=dtype, device="meta")


class _OnGpu(TorchDispatchMode):
    """Handles ops of tensors on a GPU, factories of such tensors, and the bodies of windkern's ops."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "windkern":
            with self:  # torch leaves a mode before it calls it
                return _bodies[func._opname](*args, **kwargs)
        device = kwargs.get("device")
        if GpuTensor in types or (device is not None and device.type == "cuda"):
            return _on_meta(func, args, kwargs)
        return func(*args, **kwargs)


class Devices:
    """The current GPU, as torch's device guards set it; `visited` has all GPUs that were made current."""

    def __init__(self) -> None:
        self.current = 0
        self.visited: list[int] = []

    def exchange(self, index: int) -> int:
        before = self.current
        if index >= 0:
            self.current = index
            self.visited.append(index)
        return before


@contextlib.contextmanager
def gpus() -> Iterator[Devices]:
    """Make factories accept "cuda" devices, and torch.cuda.device, set_device and current_device work."""
    devices = Devices()
    with contextlib.ExitStack() as stack:
        for name, value in (
            ("_lazy_init", lambda: None),
            ("_exchange_device", devices.exchange),
            ("_maybe_exchange_device", devices.exchange),
            ("set_device", lambda device: devices.exchange(torch.device("cuda", device).index)),
            ("current_device", lambda: devices.current),
            ("is_current_stream_capturing", lambda: False),
            ("get_device_capability", lambda device=None: (9, 0)),
        ):
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(_OnGpu())
        yield devices
