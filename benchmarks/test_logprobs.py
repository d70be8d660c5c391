"""Time each case and provider with pytest-benchmark, to select single rows and use pytest-benchmark's comparisons.

    python -m pytest benchmarks/test_logprobs.py --cases '512x896x151936/trained/*' --peers 'plain,windkern-*'

pytest-benchmark times one row after the other; published figures come from `benchmarks.run`, which alternates.
"""

import functools

import pytest

from benchmarks import timing
from benchmarks.cases import Case
from benchmarks.peers import all_providers
from benchmarks.provider import quiet
from benchmarks.run import CaseRun

pytest.importorskip("pytest_benchmark")
SECONDS = 5.0  # of timed calls for one row


@functools.lru_cache(maxsize=1)
def case_run(case: Case) -> tuple[CaseRun, float]:
    """Return the case with its float64 results, and the floor in seconds; cached until the next case begins."""
    run = CaseRun(case, all_providers(), SECONDS)
    floors = [name for name, provider in run.providers.items() if provider.level == "floor"]
    for name in floors:
        run.add(name)
    ready = [name for name in floors if name in run.steps]
    calls = {name: run.steps[name].call for name in ready}
    samples = timing.interleave(calls, dict.fromkeys(ready, timing.MIN_SAMPLES))
    return run, min(timing.summary(taken)["median_s"] for taken in samples.values())


def test_step(benchmark, case, provider):
    reason = provider.why_not(case)
    if reason is not None:
        pytest.skip(": ".join(reason))
    run, floor = case_run(case)
    run.add(provider.name)
    row = run.rows[provider.name]
    if row["status"] == "same":
        pytest.skip(row["reason"])
    if row["status"] != "ok":
        pytest.fail(f"{row['status']}: {row['reason']}")
    step, first = run.steps.pop(provider.name), run.first[provider.name]
    benchmark.group = case.name
    with quiet():
        rounds = max(1, timing.further_samples(first, SECONDS, fastest=first))
        benchmark.pedantic(step.call, rounds=rounds, iterations=1)
    kept = ("what", "version", "detail", "errors", "extra_bytes", "command")
    benchmark.extra_info.update({name: row[name] for name in kept if name in row}, floor_s=floor)
    if benchmark.stats is not None:  # None with --benchmark-disable
        benchmark.extra_info["times_floor"] = benchmark.stats.stats.median / floor
