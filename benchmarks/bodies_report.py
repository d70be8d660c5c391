"""Draw the table and the picture of the results of `benchmarks.bodies`, from its JSON alone.

python -m benchmarks.bodies_report [RESULTS.json] [--out docs/img/bodies.png]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.tables import memory, seconds

Row = dict[str, Any]
NAMES = {
    "smollm2": "SmolLM2-135M",
    "stack": "Llama-3.2-1B, 2 layers",
    "1b": "Llama-3.2-1B",
    "tiny": "tiny",
}
COLOURS = {"smollm2": "#0b3d91", "stack": "#d9480f", "1b": "#2e8b57", "tiny": "#6e6e6e"}
WORK = {"score": "scoring", "step": "forward and backward"}
PEERS = {"unshared": "unshared rows", "trl": "TRL's path"}
ALLOWED = 1.03  # largest time where rows are shared, as a multiple of unshared rows


def by_cell(data: dict[str, Any]) -> dict[tuple[str, int, int, int], dict[tuple[str, str], Row]]:
    """Return rows by (model, prompt, response, N), then by (work, provider); short prompts and few responses first."""
    cells: dict[tuple[str, int, int, int], dict[tuple[str, str], Row]] = {}
    order = list(NAMES)
    key = lambda row: (order.index(row["model"]), row["n"], row["prompt"])  # noqa: E731
    for row in sorted(data["rows"], key=key):
        cell = (row["model"], row["prompt"], row["response"], row["n"])
        cells.setdefault(cell, {})[row["work"], row["provider"]] = row
    return cells


def markdown(data: dict[str, Any]) -> str:
    """Return a table with a line for each model and case: medians, and the others' times as multiples of them."""
    run = data["runs"][max(row["run"] for row in data["rows"])]
    machine, versions = run["machine"], run["machine"]["versions"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    commit = (run["commit"] or "unknown")[:9] + (" with local changes" if run["dirty"] else "")
    lines = [
        f"{where}; torch {versions['torch']}, transformers {versions['transformers']}, TRL {versions['trl']}; commit "
        f"{commit}, {run['date'][:10]}. One group of N responses of R tokens to a prompt of P tokens. A time is the "
        "median with the prompt shared; the two factors are how many times as long unshared rows and TRL's path take. "
        "Memory is the peak beyond weights and gradients: shared, unshared, TRL.\n",
        "| model | P, R, N | tokens, unshared | scoring | forward and backward | memory, scoring | memory, both |",
        "|---|---|---:|---:|---:|---|---|",
    ]
    for (name, *case), rows in by_cell(data).items():
        any_row = next(iter(rows.values()))
        tokens = ", ".join(
            str(next(row["tokens"] for (_, who), row in rows.items() if who == provider))
            for provider in ("shared", "unshared")
        )
        auto = "" if any_row.get("chosen", True) else " (`auto` does not share)"
        cells = [_times(rows, work) for work in WORK] + [_memory(rows, work) for work in WORK]
        lines.append(f"| {NAMES[name]} | {', '.join(map(str, case))}{auto} | {tokens} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _verdict(data)])


def _times(rows: dict[tuple[str, str], Row], work: str) -> str:
    ours = rows.get((work, "shared"))
    if ours is None:
        return "-"
    peers = [rows.get((work, peer)) for peer in PEERS]
    factors = [f"{peer['median_s'] / ours['median_s']:.2f} x" for peer in peers if peer is not None]
    return ", ".join([seconds(ours["median_s"]), *factors])


def _memory(rows: dict[tuple[str, str], Row], work: str) -> str:
    found = [rows.get((work, provider)) for provider in ("shared", *PEERS)]
    return ", ".join(memory(row["peak_bytes"]) for row in found if row is not None) or "-"


def slowest_chosen(data: dict[str, Any]) -> tuple[float, Row] | None:
    """Return the largest multiple of the time of unshared rows in cells where "auto" shares, with its row."""
    found = []
    for rows in by_cell(data).values():
        for work in WORK:
            ours, theirs = rows.get((work, "shared")), rows.get((work, "unshared"))
            if ours is not None and theirs is not None and ours.get("chosen", True):
                found.append((ours["median_s"] / theirs["median_s"], ours))
    return max(found, key=lambda pair: pair[0], default=None)


def _verdict(data: dict[str, Any]) -> str:
    slowest = slowest_chosen(data)
    if slowest is None:
        return "`auto` shares in none of these cases."
    factor, row = slowest
    case = (
        f"{WORK[row['work']]} with {NAMES[row['model']]} at P = {row['prompt']}, R = {row['response']}, N = {row['n']}"
    )
    kept = "within" if factor <= ALLOWED else "beyond"
    return (
        f"Where `auto` shares, the least gain is in {case}: {factor:.2f} times the time of unshared rows, {kept} the "
        f"{ALLOWED:.2f} allowed."
    )


def draw(data: dict[str, Any], path: Path) -> None:
    """Draw the speed-up of sharing over unshared rows and over TRL's path, as a function of P / R."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(PEERS), len(WORK), figsize=(9.5, 6.2), layout="constrained", sharex=True, sharey="row"
    )
    cells = by_cell(data)
    lines = list(dict.fromkeys((name, count) for name, _, _, count in cells))
    for i, peer in enumerate(PEERS):
        for j, work in enumerate(WORK):
            for name, count in lines:
                _line(axes[i][j], cells, name, count, work, peer)
            _style(axes[i][j], f"{WORK[work]}, against {PEERS[peer]}")
        axes[i][0].set_ylabel("times as fast (higher is better)", fontsize=9)
        axes[i][0].set_ylim(bottom=0)  # Reason: the panels of a row share the axis, so both must be drawn before
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=9, frameon=False)
    run = data["runs"][max(row["run"] for row in data["rows"])]
    machine = run["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    response = data["rows"][0]["response"]
    figure.supxlabel(
        f"length of the prompt / length of a response ({response} tokens); hollow: `auto` does not share\n"
        f"{where}, torch {machine['versions']['torch']}",
        fontsize=8,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _line(axis, cells: dict, name: str, count: int, work: str, peer: str) -> None:
    points = []
    for (model, prompt, response, n), rows in cells.items():
        ours, theirs = rows.get((work, "shared")), rows.get((work, peer))
        if (model, n) == (name, count) and ours is not None and theirs is not None:
            points.append((prompt / response, theirs["median_s"] / ours["median_s"], ours.get("chosen", True)))
    points.sort()
    if not points:
        return
    colour, style = COLOURS[name], "-" if count > 2 else "--"
    axis.plot(
        [x for x, _, _ in points], [y for _, y, _ in points], style, color=colour, label=f"{NAMES[name]}, N = {count}"
    )
    for x, y, chosen in points:
        axis.plot([x], [y], "o", color=colour, markerfacecolor=colour if chosen else "white", markersize=5)


def _style(axis, title: str) -> None:
    axis.set_title(title, fontsize=9.5, loc="left")
    axis.set_xscale("log", base=2)
    axis.set_xticks([0.25, 1, 4], ["1/4", "1", "4"])
    axis.set_xlim(0.22, 4.6)
    axis.axhline(1.0, color="#444444", linewidth=1)
    axis.grid(color="#d8d8d8", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(axis="both", which="both", labelsize=8.5, length=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bodies_report", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="?", default=None)
    parser.add_argument("--out", type=Path, default=record.ROOT / "docs" / "img" / "bodies.png")
    chosen = parser.parse_args(arguments)
    try:
        data = record.newest("bodies") if chosen.results is None else record.read(chosen.results)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    draw(data, chosen.out)
    print(markdown(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
