"""Compare two results files row by row.

    python -m benchmarks.compare OLD.json NEW.json [--slowdown 1.10] [--memory 1.10] [--seconds] [--only PATTERNS]

Times are compared as multiples of the floor that was measured next to them, so that a busier or slower machine does not
look like slower code; --seconds compares seconds. Exits with 1 if a row of windkern is slower, or takes more memory,
than allowed, or is no longer measured.
"""

from __future__ import annotations

import argparse
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.tables import is_ours, measured

# Bytes below which a ratio of memory is noise: pages and allocator waste.
MEMORY_NOISE = 8 << 20


def _rows(path: Path, only: str) -> dict[tuple[str, str], dict[str, Any]]:
    patterns = only.split(",")
    return {
        (row["case"], row["provider"]): row
        for row in record.read(path)["rows"]
        if any(fnmatchcase(row["provider"], pattern) for pattern in patterns)
    }


def compare(
    old: dict[tuple[str, str], dict], new: dict[tuple[str, str], dict], *, slowdown: float, memory: float, field: str
) -> tuple[list[str], list[str]]:
    """Return a line for each row of the old file that was measured, and the complaints."""
    lines, complaints = [], []
    for key, before in old.items():
        if not measured(before):
            continue
        after, name = new.get(key), " ".join(key)
        if after is None or not measured(after):
            status = "missing" if after is None else f"{after['status']}: {after['reason']}"
            lines.append(f"{name:<56} {status}")
            if after is not None and is_ours(after):
                complaints.append(f"{name}: no longer measured ({status})")
            continue
        ratio = after[field] / before[field]
        line = f"{name:<56} {before[field]:9.3f} -> {after[field]:9.3f}  time x {ratio:.2f}"
        if is_ours(after) and ratio > slowdown:
            complaints.append(f"{name}: {ratio:.2f} times as long, {slowdown:.2f} is allowed")
        if "extra_bytes" in before and "extra_bytes" in after:
            grown = (after["extra_bytes"] + MEMORY_NOISE) / (before["extra_bytes"] + MEMORY_NOISE)
            line += f"  memory x {grown:.2f}"
            if is_ours(after) and grown > memory:
                complaints.append(f"{name}: {grown:.2f} times the memory, {memory:.2f} is allowed")
        lines.append(line)
    return lines, complaints


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--slowdown", type=float, default=1.10, help="largest allowed ratio of times")
    parser.add_argument("--memory", type=float, default=1.10, help="largest allowed ratio of extra memory")
    parser.add_argument("--seconds", action="store_true", help="compare seconds, not multiples of the floor")
    parser.add_argument("--only", default="*", help="shell patterns over provider names, comma-separated")
    chosen = parser.parse_args(arguments)
    try:
        old, new = _rows(chosen.old, chosen.only), _rows(chosen.new, chosen.only)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    lines, complaints = compare(
        old,
        new,
        slowdown=chosen.slowdown,
        memory=chosen.memory,
        field="median_s" if chosen.seconds else "times_floor",
    )
    if not lines:
        parser.error("the files have no measured row in common")
    print("\n".join(lines))
    print("\n".join(complaints) if complaints else "no slowdown", file=sys.stderr if complaints else sys.stdout)
    return int(bool(complaints))


if __name__ == "__main__":
    sys.exit(main())
