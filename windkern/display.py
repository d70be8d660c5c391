"""Show the progress of a command: a bar where stdout is a terminal, occasional lines where it is not."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from windkern.forecast import Forecast
from windkern.terminal import printable

RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")  # the variables accelerate reads
FRAMES = 5  # frames of the bar per second
LOOK = 1.0  # seconds between checks whether a line is due
Part = str | tuple[str, str]  # text, or text and its style


def clock(seconds: float) -> str:
    """Return hours, minutes and seconds as text.

    Example:
        >>> clock(83.6), clock(3600)
        ('1:24', '1:00:00')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@dataclass
class _Running:
    """The phase that is under way."""

    iteration: int
    name: str
    steps: int
    unit: str
    done: float
    partly: float = 0.0  # steps' worth of work under way

    @property
    def share(self) -> float:
        return min(1.0, (self.done + self.partly) / max(1, self.steps))


class Display:
    """Shows the progress of a command from its first second; a context manager around the whole command.

    In a terminal the last two lines move: they show the current phase, a bar, the time since the start and an estimate
    of the time left, and they vanish at the end. Elsewhere (a pipe, nohup, the log of a job) a line says when a phase
    begins, and another one every `pause` seconds how far it is, without escape codes. In later iterations, a phase that
    begins soon after the previous line gets no line. Only the first of several processes shows anything.

    Args:
        console: where to print; None for stdout.
        animated: whether to draw the bar; None: if the output is an interactive terminal.
        lines: whether to print lines where no bar is drawn.
        seconds: clock, as time.monotonic.
        pause: seconds between two lines about one phase.
        look: seconds between checks whether a line is due; None checks only when something has happened.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        animated: bool | None = None,
        lines: bool = True,
        seconds: Callable[[], float] = time.monotonic,
        pause: float = 20.0,
        look: float | None = LOOK,
    ):
        self.console = console or Console()
        if any(os.environ.get(name, "0") != "0" for name in RANKS):
            self.console.quiet = True
        if animated is None:
            animated = self.console.is_interactive and self.console.file.isatty()
        self._lines, self._seconds, self._pause, self._look = lines and not animated, seconds, pause, look
        self._start, self._last = seconds(), seconds()
        self._lock, self._stopped, self._begun = threading.RLock(), threading.Event(), False
        self._running: _Running | None = None
        self._known: set[tuple[str, str]] = set()  # phases that have had a line
        self.plan()
        self._spinner = Spinner("dots")
        self._live = (
            Live(console=self.console, refresh_per_second=FRAMES, transient=True, get_renderable=self._frame)
            if animated
            else None
        )

    def __enter__(self) -> Display:
        if self._begun or self.console.quiet:
            return self
        self._begun = True
        if self._live is not None:
            self._live.start()
        elif self._lines and self._look is not None:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Remove the bar and stop printing lines; text that is printed afterwards stays in place."""
        with self._lock:  # wait for a line that is being printed
            self._stopped.set()
        if self._live is not None:
            self._live.stop()

    def hush(self, quiet: bool) -> None:
        """Show nothing from now on if `quiet`."""
        if quiet:
            self.stop()
        self.console.quiet = quiet

    def plan(self, word: str = "iteration", iterations: int = 0, **phases: dict[tuple[str, str], float]) -> None:
        """Announce the phases `before`, in `each` iteration and `after`, as `Forecast` takes them."""
        with self._lock:
            self._word, self._iterations = word, iterations
            self._forecast = Forecast(iterations=iterations, clock=self._seconds, **phases)

    @property
    def animated(self) -> bool:
        """Whether a bar is drawn."""
        return self._live is not None

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._seconds() - self._start

    @property
    def left(self) -> str:
        """An estimate of the time left, such as "3:10 left"; empty while there is none."""
        left = self._forecast.left
        return f"{clock(left)} left" if left is not None and left >= 1 else ""

    # The methods of windkern.train.report.progress.Progress.

    def phase(self, iteration: int, name: str, steps: int = 1, unit: str = "", done: int = 0) -> None:
        with self._lock:
            self._running = running = _Running(iteration, name, steps, unit, done)
            self._forecast.begin(iteration, (name, unit), running.share)
            new = (name, unit) not in self._known
            self._known.add((name, unit))
            self._line(0.0 if new else self._pause / 4)

    def advance(self, steps: float = 1) -> None:
        if self._running is not None:
            self._move(min(self._running.steps, self._running.done + steps), 0.0)

    def under_way(self, steps: float) -> None:
        if self._running is not None:
            self._move(self._running.done, max(steps, self._running.partly))

    def note(self, text: str) -> None:
        self.print((text, "yellow"))

    # Text on the screen.

    def print(self, *parts: Part, rich: RenderableType | None = None) -> None:
        """Print a line above the bar: texts, each with or without a style, made printable; or a rich renderable."""
        if rich is None:
            texts = [(part, "") if isinstance(part, str) else part for part in parts]
            rich = Text.assemble(*((printable(text), style) for text, style in texts))
        # Hazard: the bar's thread waits for our lock while it holds rich's. Remedy: with a bar, ours is not held here.
        # Reason: in a terminal lines break between words, in a file they do not break.
        self.console.print(rich, soft_wrap=isinstance(rich, Text) and self._live is None)

    def _move(self, done: float, partly: float) -> None:
        with self._lock:
            if self._running is None:
                return
            self._running.done, self._running.partly = done, partly
            self._forecast.move(self._running.share)
            self._line(self._pause)

    def _watch(self) -> None:
        while not self._stopped.wait(self._look):
            with self._lock:
                self._line(self._pause)

    def _line(self, pause: float) -> None:
        """Print the progress if `pause` seconds have passed since the previous line."""
        if self._lines and self._running and not self._stopped.is_set() and self._seconds() - self._last >= pause:
            self._last = self._seconds()
            left = f", {self.left}" if self.left else ""
            self.print(f"{clock(self.elapsed)} {self._description()}{left}")

    def _description(self) -> str:
        running = self._running
        if running is None:
            return "starting"
        place = ""
        if 1 <= running.iteration <= self._iterations:
            place = f"{self._word} {running.iteration}/{self._iterations}: "
        counts = f" {int(running.done)} of {running.steps}" if running.steps > 1 or running.unit else ""
        return f"{place}{running.name}{counts}{' ' if running.unit else ''}{running.unit}"

    def _frame(self) -> RenderableType:
        with self._lock:
            text = printable(self._description())
            share, elapsed, left = self._forecast.share, clock(self.elapsed), self.left
        sign = cast(Text, self._spinner.render(self.console.get_time()))
        row = Table.grid(expand=True, padding=(0, 2, 0, 0), pad_edge=False)
        row.add_column(ratio=1)
        for _ in range(3):
            row.add_column(no_wrap=True, justify="right")
        bar = ProgressBar(total=1.0, completed=share) if share else ProgressBar(total=None, pulse=True)
        row.add_row(bar, f"{share:.0%}".replace("%", " %") if share else "", elapsed, left)
        return Group(Text.assemble(sign, " ", text, no_wrap=True, overflow="ellipsis"), row)
