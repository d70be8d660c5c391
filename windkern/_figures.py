"""Create pictures and tables in one style for all commands."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


@contextlib.contextmanager
def picture(path: Path, *, dpi: int = 150, **options: Any) -> Iterator[tuple[Figure, Any]]:
    """Yield a new figure and its axes, and write it to a PNG at the end. No display is needed.

    Args:
        path: the file; its folder is created if it does not exist.
        dpi: dots per inch.
        options: of `matplotlib.pyplot.subplots`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(layout="constrained", **options)
    try:
        yield figure, axes
        for each in figure.axes:
            each.spines[["top", "right"]].set_visible(False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=dpi)
    finally:
        pyplot.close(figure)


def plain_table(**options: Any) -> Table:
    """Return a `rich.table.Table` whose only line is under the header."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), **options)
