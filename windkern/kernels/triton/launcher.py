"""Launch Triton kernels with little work on the host.

Triton's own launch looks at every argument in Python: 45 us on the host of an H100, in which the GPU multiplies half a
slab of 512 rows. Here a kernel that was compiled for arguments of the same kind is launched at once.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl
from torch import Tensor
from triton.runtime import driver

_ALIGNED = 16  # bytes, or elements of a stride: what Triton compiles kernels apart for


class _Launcher:
    """The compiled forms of one kernel by the kind of its arguments: what Triton looks at before it compiles."""

    def __init__(self, kernel: Any, args: tuple, constants: dict[str, Any]):
        self.kernel = kernel
        self.compiled: dict[tuple, Any] = {}
        given = list(zip(kernel.params, args, strict=False))
        self.tensors = [p.num for p, value in given if isinstance(value, Tensor)]
        self.pointers = [k for k in self.tensors if not kernel.params[k].do_not_specialize_on_alignment]
        counts = [p for p, value in given if isinstance(value, int)]
        self.numbers = [p.num for p in counts if not p.do_not_specialize]
        self.free = [p.num for p in counts if p.do_not_specialize]
        self.rest = [p.name for p in kernel.params[len(args) :]]
        # Triton passes floats in float32 unless they are constants, which only its own launch understands.
        self.quick = not any(isinstance(value, tl.constexpr) for value in (*args, *constants.values()))

    def kind(self, device: int, args: tuple, constants: dict[str, Any]) -> tuple:
        """Return all that decides which compiled form serves these arguments."""
        return (
            device,
            *[args[k].dtype for k in self.tensors],
            *[args[k].data_ptr() % _ALIGNED == 0 for k in self.pointers],
            *[(args[k] % _ALIGNED == 0, args[k] == 1, args[k] >> 31) for k in self.numbers],
            *[args[k] >> 31 for k in self.free],
            *constants.values(),
        )


_launchers: dict[tuple, _Launcher] = {}


def forget() -> None:
    """Forget all compiled forms, for another driver of Triton."""
    _launchers.clear()


def launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """Run `kernel[(programs,)](*args, **constants)`; `args` are the kernel's first parameters, the first a tensor."""
    if not hasattr(kernel, "params"):  # the interpreter's
        kernel[(programs,)](*args, **constants)
        return
    place = id(kernel), len(args), args[0].dtype  # a launcher holds its kernel, so that the number stays its own
    launcher = _launchers.get(place)
    if launcher is None:
        launcher = _launchers[place] = _Launcher(kernel, args, constants)
    if not launcher.quick:
        kernel[(programs,)](*args, **constants)
        return
    device = driver.active.get_current_device()
    kind = launcher.kind(device, args, constants)
    compiled = launcher.compiled.get(kind)
    if compiled is None:
        launcher.compiled[kind] = kernel[(programs,)](*args, **constants)
        return
    stream = driver.active.get_current_stream(device)
    compiled[(programs, 1, 1)](*args, *[constants[name] for name in launcher.rest], stream=stream)
