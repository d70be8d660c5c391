"""Make the table of heads sharded over processes, from the rows of benchmarks/sharded.py."""

from __future__ import annotations

from typing import Any

from benchmarks import tables

TITLES = {
    "tensor": "The vocabulary is cut, the ranks hold the same rows",
    "data": "The rows are cut, the head as FSDP2 cuts it",
}
MODES = {"scoring": "scoring", "frozen": "frozen head", "trained": "trained"}


def markdown(data: dict[str, Any]) -> str:
    """Return a table for each kind of sharding: time over that of the same work alone, and peak memory of a rank."""
    rows = data["rows"]
    lines = [_caption(data)]
    for cut, title in TITLES.items():
        group = [row for row in rows if row["cut"] == cut]
        modes = [mode for mode in MODES if any(row["mode"] == mode for row in group)]
        if not modes:
            continue
        lines += [f"| {title} | " + " | ".join(MODES[mode] for mode in modes) + " |", "|---|" + "---:|" * len(modes)]
        cells = {(row["provider"], row["mode"]): row for row in group}
        for provider in dict.fromkeys(row["provider"] for row in group):
            lines.append(f"| {provider} | " + " | ".join(_cell(cells.get((provider, mode))) for mode in modes) + " |")
        lines.append("")
    absent = {row["provider"]: row["reason"] for row in rows if row["status"] != "ok"}
    lines += [f"- {provider} was not measured: {reason}" for provider, reason in absent.items()]
    return "\n".join(lines)


def _caption(data: dict[str, Any]) -> str:
    run = data["runs"][max(row["run"] for row in data["rows"])]
    machine, settings = run["machine"], run["settings"]
    commit = (run["commit"] or "unknown")[:9] + (" with local changes" if run["dirty"] else "")
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in ("torch", "liger-kernel"))
    shapes = dict.fromkeys(f"{row['dtype']} {row['shape']}" for row in data["rows"])
    return (
        f"{machine['cpu']}, {settings['processes']} processes with a thread each, gloo; {versions}; commit {commit}, "
        f"{run['date'][:10]}; load {machine['load_at_start']:.1f} before. "
        f"{', '.join(shapes)} (tokens x hidden x vocabulary). "
        "Each cell: time as a multiple of the same work without the other ranks (first row: its time), and what a call "
        "adds to a rank's memory, gradients included; in brackets the bound.\n"
    )


def _cell(row: dict[str, Any] | None) -> str:
    if row is None or row["status"] != "ok":
        return "-"
    time = tables.seconds(row["median_s"]) if row["alone"] else f"{row['times_alone']:.2f}x"
    bound = "" if row["bound_bytes"] is None else f" ({tables.memory(row['bound_bytes'])})"
    return f"{time}, {tables.memory(row['peak_bytes'])}{bound}"
