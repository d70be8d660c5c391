"""Show a run: its progress, a line per iteration, a table, completions, a picture and a JSON file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from windkern._figures import picture, plain_table
from windkern._files import to_json
from windkern.display import Display
from windkern.terminal import printable
from windkern.train.evaluation.evaluate import NORMAL_95, Estimate, Evaluation
from windkern.train.report.progress import Record


def quiet_libraries() -> None:
    """Turn off the progress bars of transformers and the hub, and all messages of transformers except errors."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def plus_minus(estimate: Estimate, digits: int = 2) -> str:
    """Write a mean with its standard error; a single prompt has none.

    Example:
        >>> plus_minus(Estimate(0.7461, 0.0312)), plus_minus(Estimate(0.7461, float("nan")))
        ('0.75 ± 0.03', '0.75')
    """
    mean = f"{estimate.mean:.{digits}f}"
    return mean if math.isnan(estimate.standard_error) else f"{mean} ± {estimate.standard_error:.{digits}f}"


def interval(estimate: Estimate, digits: int = 2) -> str:
    """Write the 95 % interval, or why there is none.

    Example:
        >>> interval(Estimate(0.75, 0.03)), interval(Estimate(0.75, float("nan")))
        ('95 % interval [0.69, 0.81]', 'no interval from a single prompt')
    """
    low, high = estimate.interval
    if math.isnan(low):
        return "no interval from a single prompt"
    return f"95 % interval [{low:.{digits}f}, {high:.{digits}f}]"


class LiveReport:
    """An observer that shows a run on a display, with one line for each finished iteration.

    Args:
        display: the display to show it on.
        iterations: number of iterations of the run.
    """

    def __init__(self, display: Display, iterations: int):
        self.display, self.iterations = display, iterations
        self.phase, self.advance, self.under_way = display.phase, display.advance, display.under_way
        self.note = display.note

    def finished(self, record: Record) -> None:
        parts: list[str | tuple[str, str]] = [f"{record.iteration:>2}/{self.iterations}"]
        if record.win_rate is not None:
            parts += ["  win rate ", (plus_minus(_estimate(record.win_rate, record.win_rate_se)), "bold")]
        if record.reward is not None or record.train_reward is not None:
            parts.append(f"  reward {record.train_reward if record.reward is None else record.reward:+.2f}")
        if record.kl is not None:
            parts.append(f"  KL {record.kl:4.1f}")
        if record.loss is not None:
            parts.append(f"  loss {record.loss:.3f}")
        parts.append(f"  {record.tokens_per_second:3.0f} tokens/s")
        if self.display.left and not self.display.animated:  # the bar has it, and 80 columns are full
            parts.append(f"  {self.display.left}")
        self.display.print(*parts)


def history_table(history: Sequence[Record]) -> Table:
    """Return a table with one row per iteration; empty columns are left out."""
    names = ("", "win rate", "reward", "KL, nats", "loss", "cut off", "tokens/s", "seconds")
    rows = [
        (
            str(record.iteration),
            "" if record.win_rate is None else plus_minus(_estimate(record.win_rate, record.win_rate_se)),
            "" if record.reward is None else f"{record.reward:+.2f}",
            "" if record.kl is None else plus_minus(_estimate(record.kl, record.kl_se), 1),
            "" if record.loss is None else f"{record.loss:.3f}",
            f"{record.truncated:.0%}",
            f"{record.tokens_per_second:.0f}",
            f"{record.seconds:.0f}",
        )
        for record in history
    ]
    table = plain_table()
    known = [k for k in range(len(names)) if any(row[k] for row in rows) or not rows]
    for k in known:
        table.add_column(names[k], justify="right")
    for row in rows:
        table.add_row(*(row[k] for k in known))
    return table


def print_completions(
    console: Console,
    prompts: Sequence[str],
    before: Sequence[Sequence[str]],
    after: Sequence[Sequence[str]],
    count: int,
    labels: tuple[str, str] = ("before", "after "),
) -> None:
    """Print the first response to each of the first prompts, before and after, without choosing among them."""
    for prompt, old, new in list(zip(prompts, before, after, strict=True))[:count]:
        console.print(Text("\n" + _one_line(prompt), style="bold"))
        for label, style, text in zip(labels, ("dim", "green"), (old[0], new[0]), strict=True):
            lines = Text(_one_line(text) or "(nothing)").wrap(console, max(40, console.width - 12))
            for line in lines:
                line.rstrip()
            body = Text("\n" + " " * 10).join(lines)
            console.print(Text.assemble(f"  {label}  ", body, style=style))


def _one_line(text: str) -> str:
    """Return a text without line breaks and control characters."""
    return printable(" ".join(text.split()))


def as_json(
    path: Path,
    *,
    settings: dict,
    history: Sequence[Record],
    final: Evaluation | None,
    prompts: Sequence[str],
    before: Sequence[Sequence[str]],
    after: Sequence[Sequence[str]],
    kind: str = "demo",
) -> None:
    """Write everything that a program can read back; `windkern plot` tells files apart by `kind`."""
    content = {
        "kind": kind,
        "settings": settings,
        "final": None
        if final is None
        else {
            "win_rate": final.win_rate.mean,
            "win_rate_se": final.win_rate.standard_error,
            "win_rate_95": list(final.win_rate.interval),
            "reward": None if final.reward is None else final.reward.mean,
            "kl": None if final.kl is None else final.kl.mean,
            "kl_se": None if final.kl is None else final.kl.standard_error,
        },
        "history": [record.as_dict() for record in history],
        "completions": [
            {"prompt": prompt, "before": list(old), "after": list(new)}
            for prompt, old, new in zip(prompts, before, after, strict=True)
        ],
    }
    path.write_text(to_json(content, indent=1, default=str) + "\n", encoding="utf-8")


def _estimate(mean: float, error: float | None) -> Estimate:
    return Estimate(mean, math.nan if error is None else error)


def _curve(
    start: float, measured: Iterable[tuple[int, float | None, float | None]]
) -> tuple[list[int], list[float], list[float]]:
    """Return iterations, values and half widths of 95 % intervals, from `start` on, without unmeasured ones."""
    known = [
        (step, value, math.nan if error is None else error) for step, value, error in measured if value is not None
    ]
    steps, values, errors = ([row[place] for row in known] for place in range(3))
    return [0, *map(int, steps)], [start, *values], [0.0, *(NORMAL_95 * error for error in errors)]


def draw(path: Path, history: Sequence[Record], final: Evaluation, title: str) -> None:
    """Draw win rate and KL against the iteration, with 95 % intervals, as a PNG.

    The win rate starts at 1/2 and the KL at 0, because the policy starts as the reference. Iterations that were not
    evaluated are left out.
    """
    last = max((record.iteration for record in history), default=0)
    measured = [(record.iteration, record.win_rate, record.win_rate_se) for record in history]
    steps, rates, reach = _curve(0.5, measured)
    with picture(path, nrows=2, figsize=(7.2, 5.4), sharex=True, height_ratios=(2.2, 1)) as (_, (top, bottom)):
        top.axhline(0.5, color="0.6", linewidth=1, linestyle="--")
        top.text(last, 0.507, "the reference itself", color="0.45", ha="right", va="bottom", fontsize=9)
        top.errorbar(
            steps, rates, reach, color="C0", marker="o", capsize=3, label="after each iteration, 95 % interval"
        )
        low, high = final.win_rate.interval
        top.errorbar(
            [last + 0.18],
            [final.win_rate.mean],
            [[final.win_rate.mean - low], [high - final.win_rate.mean]],
            color="C1",
            marker="D",
            capsize=4,
            label=f"end, more responses: {final.win_rate.mean:.2f} [{low:.2f}, {high:.2f}]",
        )
        top.set_ylabel("held-out win rate\nagainst the reference")
        top.set_ylim(min(0.45, min(rate - half for rate, half in zip(rates, reach, strict=True)) - 0.02), 1.0)
        top.legend(loc="upper left", frameon=False)
        top.set_title(printable(title), fontsize=11, parse_math=False)  # names can hold anything, dollar signs too
        evaluated = [record for record in history if record.win_rate is not None]
        steps, kls, reach = _curve(0.0, [(record.iteration, record.kl, record.kl_se) for record in evaluated])
        bottom.errorbar(steps, kls, reach, color="C3", marker="o", capsize=3)
        bottom.set_ylabel("KL to the\nreference, nats")
        bottom.set_ylim(bottom=min(0.0, *kls))
        bottom.set_xlabel("iteration")
        bottom.set_xticks(range(last + 1))
        for axes in (top, bottom):
            axes.grid(axis="y", color="0.9")
