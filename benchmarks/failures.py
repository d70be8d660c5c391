"""A plugin of pytest: every failure is printed in full as it happens, so that a run that is cut off has told of it.

python -m pytest -p benchmarks.failures ...
"""

from __future__ import annotations

import sys


def pytest_runtest_logreport(report) -> None:
    if report.failed:
        print(f"\n-- {report.nodeid} ({report.when})\n{report.longreprtext}", file=sys.__stdout__, flush=True)
