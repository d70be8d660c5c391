"""Rewrite the result tables of the documentation, and the short one of README.md, from the newest results files.

    python -m benchmarks.readme [--page FILE ...] [--results FOLDER] [--check]

Replaces the text between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->` for the names summary, summary-gpu, cpu,
avx2, older, masked, gpu, errors, bodies and sharded. --check writes nothing and exits with 1 if the tables are out of
date.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from benchmarks import bodies_report, record, sharded_table, tables

PAGES = ("README.md", "docs/benchmarks.md", "docs/concepts/numerics.md", "docs/shared_prompts.md", "docs/sharding.md")
SECTIONS = {
    "summary": ("speed", tables.markdown_summary),
    "summary-gpu": ("speed-gpu", tables.markdown_summary),
    "cpu": ("speed", tables.markdown_speed),
    "avx2": ("speed-avx2", tables.markdown_speed),
    "zen5": ("speed-zen5", tables.markdown_speed),
    "masked": ("speed-masked", tables.markdown_speed),
    "gpu": ("speed-gpu", tables.markdown_speed),
    "errors": ("errors", tables.markdown_errors),
    "bodies": ("bodies", bodies_report.markdown),
    "sharded": ("sharded", sharded_table.markdown),
}


def replace_between(text: str, section: str, body: str) -> str:
    """Replace the text between the markers of a section.

    Raises:
        ValueError: the pair of markers does not occur exactly once.
    """
    pattern = re.compile(rf"(<!-- bench:{section} -->)(.*?)(<!-- /bench:{section} -->)", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"the markers <!-- bench:{section} --> ... <!-- /bench:{section} --> must occur once")
    return pattern.sub(lambda found: f"{found[1]}\n{body.strip()}\n{found[3]}", text)


def rewritten(text: str, results: Path) -> str:
    """Return the text of a page with all its marked sections up to date."""
    for section, (kind, table) in SECTIONS.items():
        if f"<!-- bench:{section} -->" in text:
            text = replace_between(text, section, table(record.newest(kind, results)))
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__.splitlines()[0])
    parser.add_argument("--page", type=Path, nargs="+", default=[record.ROOT / page for page in PAGES])
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    parser.add_argument("--check", action="store_true")
    chosen = parser.parse_args(arguments)
    stale = []
    for page in chosen.page:
        try:
            before = page.read_text()
            after = rewritten(before, chosen.results)
        except (OSError, ValueError) as error:
            parser.error(f"{page.name}: {error}")
        if "<!-- bench:" not in before:
            parser.error(f"{page.name} has no markers <!-- bench:NAME --> ... <!-- /bench:NAME -->")
        if after != before:
            stale.append(page.name)
            if not chosen.check:
                page.write_text(after)
    if chosen.check:
        print(f"{', '.join(stale)}: out of date, run benchmarks.readme" if stale else "up to date")
        return int(bool(stale))
    return 0


if __name__ == "__main__":
    sys.exit(main())
