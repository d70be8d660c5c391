"""An NVIDIA driver for Triton on a machine without a GPU: binder, cache and launchers are real, launches do nothing.

Use it in separate processes, without TRITON_INTERPRET, and import it before windkern's kernels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from windkern import backends

assert os.environ.get("TRITON_INTERPRET", "0") != "1", "the interpreter has no driver"

# The most blocks of a grid in x, y and z: a launch with more fails with "invalid argument".
GRID = (2**31 - 1, 65535, 65535)
SHARED = 227 << 10
SM_90 = GPUTarget("cuda", 90, 32)


class Launch(NamedTuple):
    kernel: str
    device: int  # on which Triton launched: the current one
    grid: tuple[int, int, int]


class _Utils:
    """The functions that Triton expects from a driver's C code."""

    def load_binary(self, *_) -> tuple[int, int, int, int, int]:
        return 0, 1, 32, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}


class Driver:
    """Records launches in `launches`; `current` returns the current device."""

    utils = _Utils()

    def __init__(self, current: Callable[[], int]):
        self.get_current_device = current
        self.launches: list[Launch] = []
        self.compiled: Counter[str] = Counter()  # by kernel

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return functools.partial(self.launch, metadata.name)

    def launch(self, name: str, x: int, y: int, z: int, *_: Any) -> None:
        # Plain comparisons: benchmarks.host times launches, and this stands in for C code.
        if not (0 < x <= GRID[0] and 0 < y <= GRID[1] and 0 < z <= GRID[2]):
            grid = (x, y, z)
            raise RuntimeError(f"Triton Error [CUDA]: invalid argument: {name} with a grid of {grid}, at most {GRID}")
        self.launches.append(Launch(name, self.get_current_device(), (x, y, z)))

    def get_current_stream(self, device: int) -> int:
        return 1000 + device

    def get_current_target(self) -> GPUTarget:
        return SM_90

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


class _Uncompiled:
    """Stands for a compiled kernel if only its key matters."""

    function, packed_metadata = 1, ()

    def __init__(self, run: Callable[..., None]):
        self.run = run

    def launch_metadata(self, *_) -> None:
        return None

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *_, stream: self.run(*grid)


@contextlib.contextmanager
def installed(current: Callable[[], int] = lambda: 0, *, compiles: bool = True) -> Iterator[Driver]:
    """Install the driver in Triton, with empty caches, and make the back end "triton" accept tensors on any device.

    Args:
        current: the number of the current device.
        compiles: False only counts compilations, in microseconds instead of a second for each.
    """
    from windkern.kernels.triton import launcher

    fake, function = Driver(current), triton.runtime.jit.JITFunction
    compile_one = function._do_compile

    def counted(self, key, signature, device, *arguments):
        fake.compiled[self._fn_name] += 1
        if compiles:
            return compile_one(self, key, signature, device, *arguments)
        kernel = self.device_caches[device][0][key] = _Uncompiled(functools.partial(fake.launch, self._fn_name))
        return kernel

    any_device = dataclasses.replace(backends.BACKENDS["triton"], reason=lambda device, dtype: None)
    caches = [kernel.device_caches for kernel in _kernels()]
    for cache in caches:
        cache.clear()
    launcher.forget()
    driver.set_active(fake)
    try:
        with (
            mock.patch.object(function, "_do_compile", counted),
            mock.patch.dict(backends.BACKENDS, {"triton": any_device}),
        ):
            yield fake
    finally:
        for cache in caches:
            cache.clear()
        launcher.forget()
        driver._active = None


def modules() -> tuple[ModuleType, ...]:
    """Return the modules of windkern that hold kernels and launch them."""
    from windkern.kernels.triton import backward as triton_backward
    from windkern.kernels.triton import exps as triton_exps
    from windkern.kernels.triton import finish as triton_finish
    from windkern.kernels.triton import hidden as triton_hidden
    from windkern.kernels.triton import pairs as triton_pairs
    from windkern.kernels.triton import rows as triton_rows
    from windkern.kernels.triton import tile as triton_tile

    return triton_rows, triton_exps, triton_backward, triton_finish, triton_hidden, triton_tile, triton_pairs


def _kernels() -> Iterator[Any]:
    """Yield all kernels of windkern: functions that Triton compiles for a launch."""
    for module in modules():
        for value in vars(module).values():
            if isinstance(value, triton.runtime.jit.JITFunction):
                yield value
