"""A pytest plugin that prints every failure in full as it happens, so that a killed run has reported it.

python -m pytest -p benchmarks.failures ...
"""

from __future__ import annotations

import sys


def pytest_runtest_logreport(report) -> None:
    if report.failed:
        print(f"\n-- {report.nodeid} ({report.when})\n{report.longreprtext}", file=sys.__stdout__, flush=True)
