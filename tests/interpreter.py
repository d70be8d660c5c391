"""Avoid redundant work in Triton's interpreter, a third of the time of the tests that run in it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def patch_once_a_launch() -> None:
    """Patch the language once per launch.

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
