"""Make Triton's interpreter fast, and its products the same for a row wherever it lies in a tile."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def patch_once_a_launch() -> None:
    """Patch the language once per launch, which saves a third of the time of the tests that run in the interpreter.

    Triton patches it again in each call of a function inside a kernel, and never removes those patches.
    """
    patch, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[frozenset[int]] = set()

    @functools.cache
    def seen_by(fn: Callable[..., Any]) -> frozenset[int]:
        modules = (value for value in fn.__globals__.values() if inspect.ismodule(value))
        return frozenset(id(module) for module in modules if module in (tl, tl.core))

    def patch_first(fn: Callable[..., Any]) -> Any:
        if seen_by(fn) in patched:
            return None
        patched.add(seen_by(fn))
        return patch(fn)

    def launch(self: interpreter.GridExecutor, *arguments: Any, **options: Any) -> None:
        patched.clear()
        run(self, *arguments, **options)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_first, launch


def multiply_rows_alike() -> None:
    """Round products of `tl.dot` from float64.

    Reason: a GPU computes all rows of a tile alike. NumPy's BLAS does not: on a CPU with AVX2 alone, the bits of a row
    in float32 depend on where it lies.
    """
    dot = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: interpreter.InterpreterBuilder, a: Any, b: Any, d: Any, *options: Any) -> Any:
        wide = interpreter.TensorHandle(np.zeros_like(d.data, dtype=np.float64), tl.float64)
        a, b = (interpreter.TensorHandle(each.data.astype(np.float64), tl.float64) for each in (a, b))
        product = dot(self, a, b, wide, *options)
        return interpreter.TensorHandle(product.data.astype(d.data.dtype) + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot
