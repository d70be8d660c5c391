"""Show the losses for `windkern losses`: the table, the details of one, and a picture of its value and slope."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from windkern._checks import check_choice
from windkern._figures import picture, plain_table
from windkern.losses import LOSSES, Loss
from windkern.terminal import printable

POINTS = 241
MOST = 6  # curves in a picture that shows every response of every variant
DASHES = ("-", "--", "-.", (0, (1, 1.2)))  # curves that coincide show through each other
GROUP = 4  # responses of a group where the loss takes any number
REWARDS = torch.tensor([1.5, 0.5, -0.5, -1.5], dtype=torch.float64)
NAMED = {  # the responses of losses that take this many, in the order of the columns
    2: ("chosen", "rejected"),
    3: ("policy's own, worse than both", "anchor's better", "anchor's worse"),
}
# Constants of the pictured group, (B, N) -> tensor. Log-probs of frozen policies equal those at the start.
CONSTANTS: dict[str, Callable[[int, int], Tensor]] = {
    "prefs": lambda B, N: (REWARDS[:N, None] - REWARDS[:N]).sigmoid().expand(B, N, N),
    "rewards": lambda B, N: (REWARDS[:N] if N != 3 else torch.tensor([-1.0, 1.0, 0.0]).double()).expand(B, N),
    "lengths": lambda B, N: torch.full((B, N), 4),
    "desirable": lambda B, N: (REWARDS[:N] > 0).expand(B, N),
    "kl_gaps": lambda B, N: torch.zeros(1, dtype=torch.float64),
}


@dataclass(frozen=True)
class Curve:
    """A loss along a line: one response's log-prob moves, all else stays."""

    label: str
    response: int  # that moves
    moves: list[float]  # nats
    values: list[float]
    slopes: list[float]  # of the value in the log-prob that moves


WIDE = 120  # columns of a terminal that all columns of the table need


def _start(loss: Loss) -> Tensor:
    """Return (1, N) or (1, N, 1) log-probs at the start, where all policies agree."""
    sizes = [size if isinstance(size, int) else {"B": 1, "N": GROUP, "T": 1}[size] for size in loss.shape]
    return torch.linspace(-10.0, -13.0, sizes[1], dtype=torch.float64).view(sizes)


def _constants(loss: Loss, start: Tensor) -> dict[str, Tensor]:
    """Return the inputs of the loss except logps; of optional tensors, those that CONSTANTS has."""
    made = {}
    for entry in loss.inputs[1:]:
        name = entry.split("|")[0].strip(" ?")
        if name in CONSTANTS:
            made[name] = CONSTANTS[name](*start.shape[:2])
        elif name.endswith("_logps") and not entry.endswith("?"):
            made[name] = start
    return made


def _labels(loss: Loss, constants: dict[str, Tensor]) -> list[str]:
    N = _start(loss).shape[1]
    if N in NAMED:
        return list(NAMED[N])
    if "desirable" in constants:
        return ["desirable", "", "", "undesirable"]  # the others are the same again
    if "prefs" in constants:
        return [f"win rate {rate:.2f}" for rate in constants["prefs"][0].mean(-1).tolist()]
    if "rewards" in constants:
        return [f"reward {reward:+.1f}" for reward in constants["rewards"][0].tolist()]
    return [f"response {place + 1}" for place in range(N)]


def curves(loss: Loss) -> list[Curve]:
    """Return a curve for each response and variant; with many of both, the first response alone moves."""
    start = _start(loss)
    constants = _constants(loss, start)
    moving = [(place, label) for place, label in enumerate(_labels(loss, constants)) if label]
    if loss.variants is None:
        return [_curve(loss, start, place, label, loss.settings) for place, label in moving]
    argument, names = loss.variants
    if len(names) * len(moving) > MOST:
        moving = [(0, "")]
    return [
        _curve(loss, start, place, f"{name}, {label}" if label else name, {**loss.settings, argument: name})
        for name in names
        for place, label in moving
    ]


def _curve(loss: Loss, start: Tensor, response: int, label: str, settings: dict[str, object]) -> Curve:
    moves, values, slopes = torch.linspace(-loss.span, loss.span, POINTS, dtype=start.dtype), [], []
    for part in moves.split(POINTS if loss.separable else 1):  # the others would couple the points
        fixed = start.expand(len(part), *start.shape[1:])
        logps = fixed.clone()
        logps[:, response] += part.view(-1, *[1] * (start.dim() - 2))
        logps.requires_grad_()
        value = loss.function(logps, **_constants(loss, fixed), **settings, reduction="none")
        (gradient,) = torch.autograd.grad(value.sum(), logps)
        values += value.tolist()
        slopes += gradient[:, response].reshape(len(part)).tolist()
    return Curve(label, response, moves.tolist(), values, slopes)


def draw(path: Path, loss: Loss) -> None:
    """Draw value (left) and slope (right) as a PNG."""
    found = curves(loss)
    moved = _first(loss) if all(curve.response == 0 for curve in found) else "a response"
    with picture(path, nrows=1, ncols=2, figsize=(9.6, 4.4)) as (figure, (left, right)):
        for number, curve in enumerate(found):
            style = {
                "color": f"C{number}",
                "linestyle": DASHES[number % len(DASHES)],
                "linewidth": 2,
                "label": curve.label,
            }
            left.plot(curve.moves, curve.values, **style)
            right.plot(curve.moves, curve.slopes, **style)
        right.axhline(0, color="0.6", linewidth=1)
        for axes, name, series in ((left, "value", "values"), (right, "slope", "slopes")):
            axes.set_title(name, fontsize=10)
            axes.axvline(0, color="0.6", linewidth=1, linestyle="--")
            axes.set_xlabel(f"log-prob of {moved}, nats from the start")
            axes.set_ylim(*_window([getattr(curve, series) for curve in found]))
            axes.grid(color="0.92")
            axes.set_xlim(-loss.span, loss.span)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(found), 6), frameon=False)
        numbers = {name: value for name, value in loss.settings.items() if not isinstance(value, Tensor)}
        settings = ", ".join(f"{name} = {value:g}" for name, value in numbers.items())
        figure.suptitle(f"{loss.name}: {loss.formula}" + (f"\n{settings}" if settings else ""), fontsize=10)


def _first(loss: Loss) -> str:
    """Name the response that moves in pictures of variants."""
    label = _labels(loss, _constants(loss, _start(loss)))[0]
    return f"the {label} response" if label in NAMED[2] else f"the response with {label}"


def _window(series: list[list[float]]) -> tuple[float, float]:
    """Return limits that show most of every curve; a steep one may leave them, but not flatten the others."""
    ranges = sorted(max(values) - min(values) for values in series if max(values) - min(values) > 1e-9) or [1.0]
    reach = 2.5 * ranges[(len(ranges) - 1) // 2]
    middles = [values[len(values) // 2] for values in series]
    low = max(min(map(min, series)), min(middles) - reach)
    high = min(max(map(max, series)), max(middles) + reach)
    edge = 0.05 * (high - low)
    return low - edge, high + edge


def as_dict(loss: Loss) -> dict[str, object]:
    """Return the row of a loss in the table of losses, for programs."""
    return {
        "name": loss.name,
        "formula": loss.formula,
        "inputs": list(loss.inputs),
        "shape": list(loss.shape),
        "source": loss.source,
        "separable": loss.separable,
        "when": loss.when,
        "signature": str(inspect.signature(loss.function)),
        "variants": {} if loss.variants is None else {loss.variants[0]: list(loss.variants[1])},
    }


def print_table(console: Any) -> None:
    """Print every loss, one row each."""
    from rich.markup import escape

    table = plain_table(row_styles=["", "dim"])
    table.add_column("name", no_wrap=True, style="bold")
    columns = [("formula of a group", 5), ("inputs", 3), ("source", 3), ("separable", None), ("when", 4)]
    if console.width < WIDE:  # words would break: the rest is in `windkern losses NAME`
        columns = [column for column in columns if column[0] in ("formula of a group", "when")]
    for name, ratio in columns:
        table.add_column(name, ratio=ratio, overflow="fold")
    for loss in LOSSES.values():
        cells = {
            "formula of a group": loss.formula,
            "inputs": " ".join(loss.inputs),
            "source": loss.source,
            "separable": "yes" if loss.separable else "no",
            "when": loss.when,
        }
        table.add_row(escape(loss.name), *(escape(cells[name]) for name, _ in columns))
    console.print(table)
    console.print(
        "l policy, o sampler, r reference (log-probs); w win rate, R reward. Separable losses work inside fused_loss. "
        "`windkern losses NAME` shows one of them, with a picture.",
        highlight=False,
    )


def print_details(console: Any, loss: Loss) -> None:
    """Print all that the table and the docstring say of one loss, up to its arguments."""
    from rich.markup import escape

    signature = escape(str(inspect.signature(loss.function)))
    console.print(f"[bold]wk.losses.{loss.name}[/bold]{signature}\n", highlight=False)
    about = (inspect.getdoc(loss.function) or "").split("\nArgs:")[0].rstrip()
    console.print(escape(about) + "\n", highlight=False, soft_wrap=True)
    for name, text in (
        ("inputs", ", ".join(loss.inputs)),
        ("logps", f"({', '.join(map(str, loss.shape))})"),
        ("source", loss.source),
        ("in fused_loss", "yes" if loss.separable else "no"),
        ("when", loss.when),
    ):
        console.print(f"[bold]{name:>13}[/bold]  {escape(text)}", highlight=False, soft_wrap=True)


def show(name: str | None, *, output: Path | None = None, as_json: bool = False) -> int:
    """Print every loss, or one and draw its picture.

    Args:
        name: name of a loss; None for the table of all.
        output: file for the picture. None: losses/NAME.png, or no picture with `as_json`.
        as_json: print JSON instead of tables.

    Returns:
        0.

    Raises:
        ValueError: there is no such loss, or `output` is given without `name`.
    """
    from rich.console import Console

    if name is None:
        if output is not None:
            raise ValueError("--output is for the picture of one loss; name it: windkern losses NAME --output FILE")
        if as_json:
            print(json.dumps([as_dict(loss) for loss in LOSSES.values()], indent=1))
        else:
            print_table(Console())
        return 0
    loss = LOSSES[check_choice("NAME", name, LOSSES)]
    path = output or (None if as_json else Path("losses") / f"{loss.name}.png")
    if path is not None:
        draw(path, loss)
    if as_json:
        print(json.dumps(as_dict(loss) | ({} if path is None else {"picture": str(path)}), indent=1))
        return 0
    console = Console()
    print_details(console, loss)
    console.print(f"\npicture: {printable(path)}", markup=False, emoji=False, highlight=False, soft_wrap=True)
    return 0
