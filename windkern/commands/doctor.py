"""`windkern doctor`: show devices, which back ends run here, why others do not, and whether they are right."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from windkern._figures import plain_table
from windkern.commands.loading import loading
from windkern.terminal import printable

if TYPE_CHECKING:
    from windkern.commands.diagnosis import BackendState, Check, Device
    from windkern.display import Display

SUMMARY = "which back ends run here, why others do not, and whether they are right"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command to its parser."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(arguments: argparse.Namespace) -> int:
    """Print the findings; return 0 if every back end that runs is right, else 1."""
    with loading(lines=False) as display:
        from windkern.commands import diagnosis

        on = diagnosis.devices()
        found = diagnosis.states(on)
        if arguments.json:
            report = diagnosis.as_dict(on, found, diagnosis.self_test(found))
            if display is not None:
                display.stop()
            print(json.dumps(report, indent=1))
            return 0 if report["ok"] else 1
        from windkern.train.models import require

        require("rich")
        assert display is not None  # rich is there
        display.phase(0, "testing every back end")
        checks = diagnosis.self_test(found)
    _print(display, on, found, checks)
    return 0 if all(check.ok for check in checks) else 1


def _print(display: Display, on: list[Device], found: list[BackendState], checks: list[Check]) -> None:
    from rich.table import Table
    from rich.text import Text

    from windkern.commands import diagnosis

    def table(*headers: str) -> Table:
        made = plain_table()
        for header in headers:
            made.add_column(header, overflow="fold", no_wrap=header not in ("why not", ""))
        return made

    packages = ", ".join(f"{name} {version}" for name, version in diagnosis.versions().items() if version is not None)
    missing = ", ".join(name for name, version in diagnosis.versions().items() if version is None)
    display.print(packages)
    if missing:
        display.print((f"not installed: {missing}", "dim"))
    for device in on:
        display.print((device.name, "bold"), f": {device.model}; {device.detail}")
        told = "; ".join(f"{dtype} by {said}" for dtype, said in device.products.items())
        display.print((f"products on {device.name}", "bold"), f": {told}")
    cpp = diagnosis.cpp_extension()
    state = (
        f": instruction sets {', '.join(cpp['instruction_sets'])}; in use {cpp['in_use']}; bfloat16 products with "
        f"float32 sums: {cpp['bf16_product'] or 'none, operands are widened to float32'}"
        if cpp["reason"] is None
        else f": not in use: {cpp['reason']}"
    )
    display.print(("C++ extension", "bold"), state)
    available = table("device", "back end", "runs", "why not")
    for each in found:
        runs = "[green]yes[/green]" if each.reason is None else "no"
        available.add_row(each.device, each.name, runs, Text(printable(each.reason or "")))
    display.print(rich=available)
    results = table("device", "back end", "type", *diagnosis.QUANTITIES, "")
    groups: dict[tuple[str, str, str], list[Check]] = {}
    for check in checks:
        groups.setdefault((check.device, check.backend, check.dtype), []).append(check)
    for (place, name, dtype), group in groups.items():
        errors = {check.quantity: check for check in group}
        cells = [
            f"{errors[each].error:.1e}" if each in errors and errors[each].error is not None else ""
            for each in diagnosis.QUANTITIES
        ]
        wrong = [check for check in group if not check.ok]
        verdict = Text("ok", "green")
        if wrong:
            verdict = Text.assemble(("wrong", "red"), f" {printable(wrong[0].message)}".rstrip())
        results.add_row(place, name, diagnosis.SHORT[dtype], *cells, verdict)
    display.print(
        "self-test: error in norm, relative to windkern.naive in float64; allowed: fp64 1e-11, fp32 4 x (plain "
        "PyTorch's error + eps), bf16 max(half of plain PyTorch's error, eps)"
    )
    display.print(rich=results)
