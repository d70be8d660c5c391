"""Sizes as a plan needs them: numbers, also where torch.compile and torch.export hold symbols."""

from __future__ import annotations

import math

import torch


def fixed_size(size: int) -> int:
    """`size` as a number: torch.compile may hold the sizes of the head as symbols, and a head keeps its sizes."""
    return len(range(size)) if torch.compiler.is_compiling() else int(size)


def bounded_rows(rows: int) -> int:
    """The row count to plan for: `rows`, or a bound of it where it is a symbol.

    Under torch.compile that is the next power of two: the plan of more rows fits the budget for fewer, and one graph
    serves a whole octave of row counts. Under torch.export it is the bound the caller gave.
    """
    if type(rows) is int and not torch.compiler.is_compiling():
        return rows
    from torch.fx.experimental.symbolic_shapes import has_static_value

    if has_static_value(rows):
        return int(rows)
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
        return _largest(rows)  # type: ignore[arg-type]  # a symbol here
    bound = 64
    while bound < rows:
        bound *= 2
    return bound


def _largest(rows: torch.SymInt) -> int:
    """The upper end of a symbol's range, from torch.export's Dim(max=...)."""
    upper = rows.node.shape_env.bound_sympy(rows.node.expr).upper
    if not upper < math.inf:
        raise ValueError(
            "torch.export plans for the most rows there can be, and this dimension has no upper end; give one with "
            "torch.export.Dim(name, max=...)"
        )
    return int(upper)
