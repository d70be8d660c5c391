"""Print tables of results on the terminal after a run, and in Markdown for the documentation and the README."""

from __future__ import annotations

from typing import Any

from benchmarks.cases import DTYPES, PRODUCTS, TINY, all_cases
from benchmarks.provider import LEVELS

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
    """Group rows by case, with the cases in the order of `cases.py`."""
    order = {case.name: index for index, case in enumerate([*all_cases("cpu"), *all_cases("cuda")])}
    grouped: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: order.get(row["case"], len(order))):
        grouped.setdefault(row["case"], []).append(row)
    return grouped


def best(rows: list[Row], level: str, *, ours: bool) -> Row | None:
    """Return the fastest row of a case at one level, ours or the peers'.

    Rows are compared as multiples of the floor, because rows of one file can come from several runs.
    """
    found = [row for row in rows if measured(row) and row["level"] == level and is_ours(row) == ours]
    return min(found, key=lambda row: row["times_floor"], default=None)


_HEADER = ("", "median", "20-80 %", "n", "x floor", "x best peer", "extra memory", "worst error", "how")


def show(rows: list[Row]) -> None:
    """Print every case as a table, with rich if it is installed; then list the rows that could not run, and why."""
    for name, group in by_case(rows).items():
        lines = [_line(row, group) for row in group if measured(row)]
        if lines:
            _print_table(name, lines)
    reasons = dict.fromkeys(
        f"{row['label']}, {row['case']}: {row['status']}: {row['reason'] or 'unfinished'}"
        if row["status"] in ("failed", "wrong", "ok")
        else f"{row['label']}: {row['status']}: {row['reason']}"
        for row in rows
        if not measured(row)
    )
    print("\n".join(reasons))


def _print_table(title: str, lines: list[tuple[str, ...]]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(line[i]) for line in [_HEADER, *lines]) for i in range(len(_HEADER))]
        print(f"\n{title}")
        for line in [_HEADER, *lines]:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    table = Table(title=title, title_justify="left", box=None)
    last = len(_HEADER) - 1
    for index, column in enumerate(_HEADER):
        # On a narrow terminal, only the last column breaks into lines.
        width = None if index == last else max(len(line[index]) for line in [_HEADER, *lines])
        table.add_column(column, min_width=width, no_wrap=index < last, justify="right" if 0 < index < 7 else "left")
    for line in lines:
        table.add_row(*line)
    Console(width=max(160, Console().width), highlight=False).print(table)


def _line(row: Row, group: list[Row]) -> tuple[str, ...]:
    peer = best(group, row["level"], ours=False)
    against = "" if peer is None or row["level"] == "floor" else f"{row['times_floor'] / peer['times_floor']:.2f}"
    errors = row.get("errors", {})
    worst = max(errors, key=errors.get, default=None)
    return (
        row["label"],
        seconds(row["median_s"]),
        f"{seconds(row['p20_s'])} - {seconds(row['p80_s'])}",
        str(row["num_samples"]),
        f"{row['times_floor']:.2f}",
        against,
        memory(row["extra_bytes"]) if "extra_bytes" in row else "",
        "" if worst is None else f"{worst} {errors[worst]:.1e}",
        row.get("detail", "") + ("" if row["complete"] else " (unfinished)"),
    )


# Markdown ------------------------------------------------------------------------------------------------------------


def markdown_speed(data: dict[str, Any]) -> str:
    """Return a table of all cases for each mode; then the cases we lose, with the winner's price; then the absent."""
    rows = [row for row in data["rows"] if row["complete"] and row["shape"] != TINY.name]
    parts = [_caption(data, rows)]
    for mode in PRODUCTS:
        parts += _mode_table([row for row in rows if row["mode"] == mode], mode)
    parts += [_losses(rows), _absent(rows)]
    return "\n".join(part for part in parts if part is not None)


def markdown_summary(data: dict[str, Any]) -> str:
    """Return a few lines for the README: ours and the others on the widest shape, for log-probs with any upstream."""
    rows = [row for row in data["rows"] if row["complete"] and row["shape"] != TINY.name]
    shape = max((row["shape"] for row in rows), key=lambda name: [int(size) for size in name.split("x")][1:])
    machine = data["runs"][max(row["run"] for row in rows)]["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    lines = [f"| {shape} on {where} | windkern | plain logits | fastest peer |", "|---|---:|---:|---:|"]
    for mode in PRODUCTS:
        for dtype in DTYPES:
            case = [row for row in rows if (row["shape"], row["mode"], row["dtype"]) == (shape, mode, dtype)]
            plain = next((row for row in case if row["label"] == "plain logits" and measured(row)), None)
            ours, peer = (best(case, "tokens", ours=mine) for mine in (True, False))
            if ours is not None and peer is not None:
                name = f"{peer['label']}: {_cell(peer, None)}"
                lines.append(f"| {mode}, {dtype} | {_cell(ours, None)} | {_cell(plain, None)} | {name} |")
    return "\n".join(lines)


def _caption(data: dict[str, Any], rows: list[Row]) -> str:
    run = data["runs"][max((row["run"] for row in rows), default=-1)]
    machine, versions = run["machine"], run["machine"]["versions"]
    peers = ", ".join(
        f"{name} {version}" for name, version in versions.items() if version and name not in ("windkern",)
    )
    if "gpu" in machine:
        where = f"{machine['gpu']}, {machine['gpu_memory_gib']:.0f} GiB, CUDA {machine['cuda']}"
    else:
        where = f"{machine['cpu']}, {machine['threads']} threads, {machine['instruction_set']}"
        masks = " ".join(f"{name}={value}" for name, value in machine.get("masks", {}).items())
        where += f", masked by {masks}" if masks else ""
    commit = (run["commit"] or "unknown")[:9] + (" with local changes" if run["dirty"] else "")
    return (
        f"{where}; {peers}; commit {commit}, "
        f"{run['date'][:10]}. Columns are tokens x hidden x vocabulary. Each cell: median time as a multiple of the "
        "bare matrix products (first row: their time), and peak memory beyond outputs and gradients. Bold: the "
        "fastest. Rows of a whole loss (DPO of pairs, mean NLL) compare with each other only.\n"
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
        for level in LEVELS
    }
    lines = [
        f"**{MODE_TITLES[mode]}**\n",
        "| | " + " | ".join(f"{dtype} {shape}" for dtype, shape in columns) + " |",
        "|---|" + "---:|" * len(columns),
        "| bare products | " + " | ".join(_floor_cell(rows, *column) for column in columns) + " |",
    ]
    for level in LEVELS:
        labels = dict.fromkeys(row["label"] for row in rows if row["level"] == level and measured(row))
        for label in labels:
            row_cells = [_cell(cells.get((label, *column)), winners.get((*column, level))) for column in columns]
            lines.append(f"| {label} | " + " | ".join(row_cells) + " |")
    return [*lines, ""]


def _floor_cell(rows: list[Row], dtype: str, shape: str) -> str:
    found = [row["floor_s"] for row in rows if measured(row) and (row["dtype"], row["shape"]) == (dtype, shape)]
    return seconds(min(found)) if found else "-"


def _cell(row: Row | None, winner: float | None) -> str:
    if row is None or row["status"] in ("cannot", "absent"):
        return "-"
    if row["status"] == "same":
        return "as default"
    if not measured(row):
        return row["status"]
    times = f"{row['times_floor']:.2f}x"
    if row["times_floor"] == winner:
        times = f"**{times}**"
    return f"{times}, {memory(row.get('extra_bytes'))}"


def _losses(rows: list[Row]) -> str:
    """List the cases in which a peer is faster than the fastest of ours, and the price it pays."""
    lines = []
    for name, group in by_case(rows).items():
        for level in LEVELS:
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


def _absent(rows: list[Row]) -> str | None:
    """List the providers that could not run any case, or failed in some, and why."""
    lines = {}
    for label in dict.fromkeys(row["label"] for row in rows if row["level"] != "floor"):
        group = [row for row in rows if row["label"] == label]
        if not any(row["status"] in ("ok", "same") for row in group):
            lines[label] = group[0]["reason"]
        for row in group:
            if row["status"] in ("failed", "wrong"):
                lines[f"{label}, {row['case']}"] = f"{row['status']}: {row['reason']}"
    return "Not measured:\n" + "\n".join(f"- {name}: {reason}." for name, reason in lines.items()) if lines else None


def markdown_errors(data: dict[str, Any]) -> str:
    """Return the error table: plain torch next to every gear of one back end, by dtype, with the smallest in bold."""
    rows = data["rows"]
    run = data["runs"][max((row["run"] for row in rows), default=-1)]
    backends = list(dict.fromkeys(row["backend"] for row in rows if row["backend"] is not None))
    others = f" (the JSON also has {', '.join(backends[1:])})" if backends[1:] else ""
    lines = [
        f"Relative error against float64 (Frobenius norm) on {rows[0]['source']}, random upstream; "
        f"back end {backends[0] if backends else 'none'}{others}; torch {run['machine']['versions']['torch']}, "
        f"{run['machine']['cpu']}, {run['date'][:10]}. Last column: the worst single log-prob, in nats. Bold: the "
        "smallest.\n",
        "| dtype | | logps | dhidden | dweight | worst log-prob |",
        "|---|---|---:|---:|---:|---:|",
    ]
    shown = [row for row in rows if row["backend"] in (None, *backends[:1])]
    for dtype in dict.fromkeys(row["dtype"] for row in shown):
        group = [row for row in shown if row["dtype"] == dtype]
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
            over = "" if row["status"] == "ok" else " (over its budget)"
            lines.append(f"| {dtype} | {row['label']}{over} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
