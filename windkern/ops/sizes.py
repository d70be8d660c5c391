"""Turn sizes into the numbers that a plan needs, even where torch.compile and torch.export hold symbols."""

from __future__ import annotations

import math

import torch


def fixed_size(size: int) -> int:
    """Return `size` as an int: under torch.compile it may be symbolic, but a head never changes size."""
    return len(range(size)) if torch.compiler.is_compiling() else int(size)


def bounded_rows(rows: int) -> int:
    """Return the row count to plan for: `rows`, or an upper bound if it is symbolic.

    Under torch.compile the bound is the next power of two: a plan for more rows fits the budget for fewer, and one
    graph serves all row counts between half the bound and the bound. Under torch.export it is the caller's bound.
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
    """Return the upper bound of a symbol, from torch.export's Dim(max=...)."""
    upper = rows.node.shape_env.bound_sympy(rows.node.expr).upper
    if not upper < math.inf:
        raise ValueError(
            "torch.export plans for the largest number of rows, but this dimension has no upper bound; give one with "
            "torch.export.Dim(name, max=...)"
        )
    return int(upper)
