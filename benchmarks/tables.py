"""Tables of results: on the terminal after a run, in Markdown for the README."""

from __future__ import annotations

from typing import Any

from benchmarks.cases import DTYPES, PRODUCTS, TINY, all_cases

Row = dict[str, Any]
MIB = 2**20
MODE_TITLES = {
    "trained": "Trained head (gradients of hidden and weight, three products)",
    "frozen": "Frozen head (gradient of hidden, two products)",
    "scoring": "Scoring (no gradient, one product)",
}


def measured(row: Row) -> bool:
    return row["status"] == "ok" and "times_floor" in row


def is_ours(row: Row) -> bool:
    return row["package"] == "windkern"


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.995 else f"{value * 1e3:.0f} ms" if value >= 0.01 else f"{value * 1e3:.2g} ms"


def memory(num_bytes: int | None) -> str:
    if num_bytes is None:
        return "?"
    return f"{num_bytes / MIB / 1024:.2f} GiB" if num_bytes >= 1024 * MIB else f"{num_bytes / MIB:.0f} MiB"


def by_case(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows grouped by case, cases in the order of `cases.py`."""
    order = {case.name: index for index, case in enumerate(all_cases())}
    grouped: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: order.get(row["case"], len(order))):
        grouped.setdefault(row["case"], []).append(row)
    return grouped


def best(rows: list[Row], level: str, *, ours: bool) -> Row | None:
    """The fastest row of a case at one level, ours or the peers'. Compared as multiples of the floor, because rows of
    one file may come from several runs."""
    found = [row for row in rows if measured(row) and row["level"] == level and is_ours(row) == ours]
    return min(found, key=lambda row: row["times_floor"], default=None)


def show(rows: list[Row]) -> None:
    """Print every case as one table; with rich where it is installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        Console = Table = None
    header = ("provider", "median", "20-80 %", "n", "x floor", "x best peer", "extra memory", "worst error", "note")
    for name, group in by_case(rows).items():
        lines = [_line(row, group) for row in group]
        if Table is None:
            widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
            print(f"\n{name}")
            for line in [header, *lines]:
                print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        else:
            table = Table(*header, title=name, title_justify="left")
            for row, line in zip(group, lines, strict=True):
                table.add_row(*line, style="bold" if is_ours(row) else None)
            Console().print(table)


def _line(row: Row, group: list[Row]) -> tuple[str, ...]:
    if not measured(row):
        return (row["label"], row["status"], "", "", "", "", "", "", row["reason"] or "unfinished")
    peer = best(group, row["level"], ours=False)
    against = "" if peer is None or row["level"] == "floor" else f"{row['times_floor'] / peer['times_floor']:.2f}"
    worst = max(row.get("errors", {"": None}).items(), key=lambda item: item[1] or 0.0)
    return (
        row["label"],
        seconds(row["median_s"]),
        f"{seconds(row['p20_s'])} - {seconds(row['p80_s'])}",
        str(row["num_samples"]),
        f"{row['times_floor']:.2f}",
        against,
        memory(row["extra_bytes"]) if "extra_bytes" in row else "",
        "" if worst[1] is None else f"{worst[0]} {worst[1]:.1e}",
        row.get("detail", "") + ("" if row["complete"] else " (unfinished)"),
    )


# Markdown ------------------------------------------------------------------------------------------------------------


def markdown_speed(data: dict[str, Any]) -> str:
    """Tables for the README, a mode each; then the rows we lose, with what the winner pays; then who cannot."""
    rows = [row for row in data["rows"] if row["complete"] and row["shape"] != TINY.name]
    parts = [_caption(data, rows)]
    for mode in PRODUCTS:
        parts += _mode_table([row for row in rows if row["mode"] == mode], mode)
    parts += [_losses(rows), _absent(rows)]
    return "\n".join(part for part in parts if part)


def _caption(data: dict[str, Any], rows: list[Row]) -> str:
    run = data["runs"][max((row["run"] for row in rows), default=-1)]
    machine, versions = run["machine"], run["machine"]["versions"]
    peers = ", ".join(
        f"{name} {version}" for name, version in versions.items() if version and name not in ("windkern",)
    )
    commit = (run["commit"] or "unknown")[:9] + (" with local changes" if run["dirty"] else "")
    return (
        f"{machine['cpu']}, {machine['threads']} threads, {machine['instruction_set']}; {peers}; commit {commit}, "
        f"{run['date'][:10]}. Columns are tokens x hidden x vocabulary. Each cell: median time as a multiple of the bare "
        "matrix products (first row: their time), and peak memory beyond outputs and gradients. Bold: the fastest. "
        "Loss-level rows compute a whole DPO loss and compare with each other only.\n"
    )


def _mode_table(rows: list[Row], mode: str) -> list[str]:
    columns = list(dict.fromkeys((dtype, row["shape"]) for dtype in DTYPES for row in rows if row["dtype"] == dtype))
    if not columns:
        return []
    cells = {(row["label"], row["dtype"], row["shape"]): row for row in rows}
    groups = by_case(rows)
    winners = {
        (group[0]["dtype"], group[0]["shape"], level): min(
            (row["times_floor"] for row in group if measured(row) and row["level"] == level), default=None
        )
        for group in groups.values()
        for level in ("tokens", "loss")
    }
    lines = [
        f"**{MODE_TITLES[mode]}**\n",
        "| | " + " | ".join(f"{dtype} {shape}" for dtype, shape in columns) + " |",
        "|---|" + "---:|" * len(columns),
        "| bare products | " + " | ".join(_floor_cell(rows, *column) for column in columns) + " |",
    ]
    for level in ("tokens", "loss"):
        labels = dict.fromkeys(row["label"] for row in rows if row["level"] == level and measured(row))
        for label in labels:
            row_cells = [_cell(cells.get((label, *column)), winners.get((*column, level))) for column in columns]
            lines.append(f"| {label}{' (loss)' * (level == 'loss')} | " + " | ".join(row_cells) + " |")
    return [*lines, ""]


def _floor_cell(rows: list[Row], dtype: str, shape: str) -> str:
    found = [row["floor_s"] for row in rows if measured(row) and (row["dtype"], row["shape"]) == (dtype, shape)]
    return seconds(min(found)) if found else "-"


def _cell(row: Row | None, winner: float | None) -> str:
    if row is None or row["status"] in ("cannot", "absent"):
        return "-"
    if not measured(row):
        return row["status"]
    times = f"{row['times_floor']:.2f}x"
    if row["times_floor"] == winner:
        times = f"**{times}**"
    return f"{times}, {memory(row.get('extra_bytes'))}"


def _losses(rows: list[Row]) -> str:
    """Every case in which a peer is faster than the fastest of ours, and what that peer pays for it."""
    lines = []
    for name, group in by_case(rows).items():
        for level in ("tokens", "loss"):
            ours, peer = best(group, level, ours=True), best(group, level, ours=False)
            if ours is None or peer is None or peer["times_floor"] >= ours["times_floor"]:
                continue
            lines.append(
                f"- {name}: {peer['label']} is {ours['times_floor'] / peer['times_floor']:.2f} times as fast as "
                f"{ours['label']}{_price(peer, ours)}."
            )
    if not lines:
        return "In no case is a peer faster.\n"
    return "Cases we lose:\n" + "\n".join(lines) + "\n"


def _price(peer: Row, ours: Row) -> str:
    parts = []
    if peer.get("extra_bytes") and ours.get("extra_bytes"):
        parts.append(f"takes {memory(peer['extra_bytes'])} where ours takes {memory(ours['extra_bytes'])}")
    common = [name for name in peer.get("errors", {}) if ours.get("errors", {}).get(name)]
    if common:
        worst = max(common, key=lambda name: peer["errors"][name] / ours["errors"][name])
        parts.append(f"its {worst} error is {peer['errors'][worst] / ours['errors'][worst]:.2g} times ours")
    return "; it " + ", ".join(parts) if parts else ""


def _absent(rows: list[Row]) -> str:
    """Who could do no case at all, or failed in some, and why."""
    lines = {}
    for label in dict.fromkeys(row["label"] for row in rows):
        group = [row for row in rows if row["label"] == label]
        if group[0]["level"] == "floor":
            continue
        if not any(row["status"] == "ok" for row in group):
            lines[label] = group[0]["reason"]
        for row in group:
            if row["status"] in ("failed", "wrong"):
                lines[f"{label}, {row['case']}"] = f"{row['status']}: {row['reason']}"
    return "".join(f"- {label}: {reason}.\n" for label, reason in lines.items()) and (
        "Not measured:\n" + "".join(f"- {label}: {reason}.\n" for label, reason in lines.items())
    )


def markdown_errors(data: dict[str, Any]) -> str:
    """The error table: plain torch beside every gear of ours, by dtype, best in bold."""
    run = data["runs"][max((row["run"] for row in data["rows"]), default=-1)]
    versions = run["machine"]["versions"]
    lines = [
        f"Relative error against float64 (Frobenius norm) on {data['rows'][0]['source']}, random upstream for each token; "
        f"torch {versions['torch']}, {run['machine']['cpu']}, {run['date'][:10]}. Last column: the worst single log-prob, "
        "in nats. Bold: the smallest.\n",
        "| dtype | | logps | dhidden | dweight | worst log-prob |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for dtype in dict.fromkeys(row["dtype"] for row in data["rows"]):
        group = [row for row in data["rows"] if row["dtype"] == dtype and row["status"] == "ok"]
        smallest = {
            name: min((row["errors"][name] for row in group if name in row["errors"]), default=None)
            for name in ("logps", "dhidden", "dweight", "worst_logp")
        }
        for row in group:
            cells = []
            for name, least in smallest.items():
                value = row["errors"].get(name)
                text = "-" if value is None else f"{value:.2g}"
                cells.append(f"**{text}**" if value is not None and f"{least:.2g}" == text else text)
            lines.append(f"| {dtype} | {row['label']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
