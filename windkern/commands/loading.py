"""Show that a command has begun while it imports torch and the rest, which takes seconds."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from windkern.display import Display


@contextlib.contextmanager
def loading(*, lines: bool = True) -> Iterator[Display | None]:
    """Yield a display that says that packages are being loaded; None without rich, which the command will ask for.

    Args:
        lines: whether to print lines where no bar can be drawn.
    """
    if importlib.util.find_spec("rich") is None:
        yield None
        return
    from windkern.display import Display

    os.environ.setdefault("TQDM_DISABLE", "1")  # for bars of libraries that have no switch; read when tqdm is imported
    with Display(lines=lines) as display:
        display.phase(0, "loading packages")
        yield display
