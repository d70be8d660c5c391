"""Draw time and peak memory of every provider from a results file, with one colour for each.

    python -m benchmarks.plot [RESULTS.json] [--out docs/img] [--prefix cpu]

Reads only the JSON; by default, the newest in benchmarks/results.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.cases import DTYPES, PRODUCTS, SHAPES
from benchmarks.tables import MIB, measured

# One colour per provider in all pictures: blue for ours, and a lighter tone of the sibling for oneDNN variants.
COLOURS = {
    "plain": "#6e6e6e",
    "plain-onednn": "#a9a9a9",
    "torch-chunked": "#9c5a2d",
    "torch-chunked-512": "#cf9a6b",
    "cce-compile": "#2e8b57",
    "cce-compile-onednn": "#7cc79b",
    "liger-dpo": "#b0307a",
    "liger-dpo-compiled": "#e07bb5",
    "windkern-torch": "#6f9fd8",
    "windkern-torch-all": "#6f9fd8",
    "windkern-torch-loss": "#6f9fd8",
    "windkern-cpp": "#0b3d91",
    "windkern-cpp-all": "#0b3d91",
    "windkern-cpp-loss": "#0b3d91",
    "windkern-triton": "#5b2a9d",
    "windkern-cuda": "#d9480f",
}
UNKNOWN_COLOUR = "#000000"
MARKERS = ("o", "^", "s", "D", "v", "P")
MODE_LABELS = {"trained": "trained head", "frozen": "frozen head", "scoring": "scoring"}


def plotted_rows(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the finished rows of real heads; smoke runs and floors are never drawn."""
    names = [shape.name for shape in SHAPES]
    return [
        row
        for row in data["rows"]
        if measured(row) and row["complete"] and row["level"] != "floor" and row["shape"] in names
    ]


def draw(data: dict[str, Any], rows: list[dict[str, Any]], value: str, path: Path) -> None:
    """Draw one picture: a panel for each mode and dtype, a line for each provider, a mark for each head."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    dtypes = [name for name in DTYPES if any(row["dtype"] == name for row in rows)]
    modes = [name for name in PRODUCTS if any(row["mode"] == name for row in rows)]
    lines = {mode: _lines([row for row in rows if row["mode"] == mode]) for mode in modes}
    # Reason: a logarithmic axis labels powers of 2, and has one label where all rows lie within a factor of 2.
    narrow = value == "times_floor" and max(row["times_floor"] for row in rows) < 2
    heights = [max(2, len(lines[mode])) for mode in modes]
    figure, axes = pyplot.subplots(
        len(modes),
        len(dtypes),
        figsize=(9.5, 0.205 * sum(heights) + 0.42 * len(modes) + 0.95),
        height_ratios=heights,
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for i, mode in enumerate(modes):
        for j, dtype in enumerate(dtypes):
            panel = [row for row in rows if (row["mode"], row["dtype"]) == (mode, dtype)]
            _panel(axes[i][j], panel, lines[mode], shapes, value, labels=j == 0, narrow=narrow)
            axes[i][j].set_title(f"{MODE_LABELS[mode]}, {dtype}", fontsize=9.5, loc="left")
    handles = [
        pyplot.Line2D(
            [], [], color="#444444", marker=MARKERS[k % len(MARKERS)], linestyle="", markersize=6, label=shape
        )
        for k, shape in enumerate(shapes)
    ]
    figure.legend(
        handles=handles, loc="outside upper center", ncols=len(shapes), fontsize=9, frameon=False, title=_TITLES[value]
    )
    machine = data["runs"][rows[0]["run"]]["machine"]
    figure.supxlabel(
        f"{_AXES[value]}\n{machine['cpu']}, {machine['threads']} threads, torch {machine['versions']['torch']}",
        fontsize=8,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


_AXES = {
    "times_floor": "time as a multiple of the bare matrix products (left is better)",
    "extra_mib": "peak MiB beyond outputs and gradients (left is better)",
}
_TITLES = {
    "times_floor": "Time of log-probs and gradients; marks are heads, tokens x hidden x vocabulary",
    "extra_mib": "Peak memory; marks are heads, tokens x hidden x vocabulary",
}


def _lines(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return (provider, label) from top to bottom: ours first, then the peers."""
    named = dict.fromkeys((row["provider"], row["label"]) for row in rows)
    return sorted(named, key=lambda line: not line[0].startswith("windkern"))


def _panel(
    axis,
    rows: list[dict[str, Any]],
    lines: list[tuple[str, str]],
    shapes: list[str],
    value: str,
    *,
    labels: bool,
    narrow: bool,
):
    places = {provider: -index for index, (provider, _) in enumerate(lines)}
    for row in rows:
        if value == "extra_mib" and "extra_bytes" not in row:
            continue
        x = row["times_floor"] if value == "times_floor" else max(1.0, row["extra_bytes"] / MIB)
        k = shapes.index(row["shape"])
        y = places[row["provider"]] + 0.22 * ((len(shapes) - 1) / 2 - k)
        colour = COLOURS.get(row["provider"], UNKNOWN_COLOUR)
        axis.plot([x], [y], marker=MARKERS[k % len(MARKERS)], color=colour, markersize=4.8, linestyle="")
    if not narrow:
        axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    if value == "times_floor":
        axis.axvline(1.0, color="#444444", linewidth=1)
    axis.grid(axis="x", color="#d8d8d8", linewidth=0.8)
    axis.grid(axis="y", color="#efefef", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.set_ylim(-len(lines) + 0.4, 0.6)
    axis.set_yticks([-index for index in range(len(lines))], [label if labels else "" for _, label in lines])
    axis.tick_params(axis="both", labelsize=8.5, length=0)
    for tick, (provider, _) in zip(axis.get_yticklabels(), lines, strict=False):
        tick.set_color(COLOURS.get(provider, UNKNOWN_COLOUR))
        tick.set_fontweight("bold" if provider.startswith("windkern") else "normal")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="?", default=None)
    parser.add_argument("--out", type=Path, default=record.ROOT / "docs" / "img")
    parser.add_argument("--prefix", default="cpu")
    chosen = parser.parse_args(arguments)
    try:
        data = record.newest("speed") if chosen.results is None else record.read(chosen.results)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    rows = plotted_rows(data)
    if not rows:
        parser.error("the file has no finished row of a real head; smoke runs are not drawn")
    for value, name in (("times_floor", "time"), ("extra_mib", "memory")):
        path = chosen.out / f"{chosen.prefix}-{name}.png"
        draw(data, rows, value, path)
        print(f"{path.name} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
