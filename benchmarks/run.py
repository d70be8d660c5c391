"""Measure time, peak memory and error of every provider, side by side in one process.

    python -m benchmarks.run [--cases PATTERNS] [--peers PATTERNS] [--seconds N] [--minutes N] [--out FILE] [--append]

Rows that are already in FILE are skipped, and FILE is written after every round, so a run that was killed continues
where it stopped. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from benchmarks import exact, record, tables, timing
from benchmarks.cases import Case, Problem, make_problem, select_cases
from benchmarks.peers import all_providers
from benchmarks.provider import Provider, Result, Step, quiet, through_onednn

DEFAULT_SECONDS = 20.0
FASTER = 1.1
HOPELESS = 10.0  # times the fastest first call: such a row is not run again
CLEARLY_SLOWER = 1.5  # noise does not explain this ratio of first calls
DEVICE_BROKEN = 3  # exit code


def select_providers(patterns: str = "*", device: str = "cpu") -> list[Provider]:
    """Return providers matching any of the comma-separated shell patterns; a bare "*" matches those run by default.

    Raises:
        ValueError: a pattern matches nothing.
    """
    providers = all_providers(device)
    for pattern in patterns.split(","):
        if not any(fnmatchcase(provider.name, pattern) for provider in providers):
            names = ", ".join(provider.name for provider in providers)
            raise ValueError(f"no peer matches {pattern!r}; there are {names}")
    return [
        provider
        for provider in providers
        if any(
            fnmatchcase(provider.name, pattern) and (provider.by_default or pattern != "*")
            for pattern in patterns.split(",")
        )
    ]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _reason(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:300]


def warm_up_libraries() -> None:
    """Load the code of both libraries in both dtypes, so that it does not count as memory of a case."""
    for dtype in (torch.float32, torch.bfloat16):
        left = torch.zeros(256, 256, dtype=dtype)

        def products(left=left) -> Result:
            return Result((left @ left.t()).float().log_softmax(-1))

        products()
        through_onednn(products)()


class BrokenDeviceError(Exception):
    """Raised when a provider, named by the message, left a device that refuses all further work of this process."""


class CaseRun:
    """Runs one case: builds the providers, checks and measures each once, then times them in turns."""

    def __init__(self, case: Case, providers: list[Provider], seconds: float):
        self.case = case
        self.seconds = seconds
        self.problem: Problem = make_problem(case)
        self.providers = {provider.name: provider for provider in providers}
        self.rows: dict[str, dict[str, Any]] = {
            name: self._blank(provider) for name, provider in self.providers.items()
        }
        self.steps: dict[str, Step] = {}
        self.samples: dict[str, list[float]] = {}
        self.first: dict[str, float] = {}
        self._exact: dict[str, exact.Exact] = {}
        self._plain_errors: dict[str, float] | None = None

    def _blank(self, provider: Provider) -> dict[str, Any]:
        case, shape = self.case, self.case.shape
        return {
            "case": case.name,
            "provider": provider.name,
            "label": provider.label,
            "what": provider.what,
            "level": provider.level,
            "package": provider.package,
            "version": provider.version(),
            "rows": shape.rows,
            "hidden": shape.hidden,
            "vocab": shape.vocab,
            "shape": shape.name,
            "source": shape.source,
            "mode": case.mode,
            "dtype": case.dtype_name,
            "device": case.device,
            "flops": case.flops,
            "load": round(os.getloadavg()[0], 2),
            "status": "ok",
            "reason": None,
            "complete": False,
            "command": f"python -m benchmarks.run --device {case.device} --cases {case.name} --peers {provider.name}",
        }

    def _stop(self, name: str, status: str, reason: str) -> None:
        self.rows[name] |= {"status": status, "reason": reason, "complete": True}
        self.steps.pop(name, None)
        self.samples.pop(name, None)

    def prepare(self) -> None:
        """Build, compile and check each provider that can run the case, and measure its memory."""
        if any(provider.compiles for provider in self.providers.values()):
            with quiet():
                # Hazard: torch compiles a function only a few times, then silently runs it eagerly.
                torch._dynamo.reset()
                torch._inductor.config.compile_threads = 1  # no compiler processes during the timed calls
        for name in self.providers:
            self.add(name)
            _say(f"  {name:<24} {self._state(name)}")

    def add(self, name: str) -> None:
        """Prepare one provider for timing, or record why it cannot be timed."""
        provider = self.providers[name]
        problem = provider.why_not(self.case) or self._why_not_onednn(provider)
        if problem is not None:
            self._stop(name, *problem)
            return
        try:
            with quiet():
                self._first_call(provider)
        except Exception as error:
            self._stop(name, "failed", _reason(error))
            if not timing.works(self.case.device):
                raise BrokenDeviceError(name) from error

    def _why_not_onednn(self, provider: Provider) -> tuple[str, str] | None:
        """Return why a row with oneDNN is skipped: it is informative only where oneDNN is faster."""
        floors = {
            other.onednn: self.first.get(other.name) for other in self.providers.values() if other.level == "floor"
        }
        mkl, onednn = floors.get(False), floors.get(True)
        if not provider.onednn or provider.level == "floor" or mkl is None or onednn is None or mkl > FASTER * onednn:
            return None
        return "same", "the products of oneDNN are no faster than those of MKL here: see the row without it"

    def _first_call(self, provider: Provider) -> None:
        name, row = provider.name, self.rows[provider.name]
        step = self.steps[name] = provider.prepare(self.problem)
        row["detail"] = step.detail
        if provider.compiles:
            row["compile_s"] = round(timing.timed(step.call)[0], 2)
        elif self.case.device != "cpu":
            step.call()  # kernels are compiled at their first launch
        measured = timing.measure(step.call, self.case.device)
        self.first[name] = measured.seconds
        self.samples[name] = []
        if provider.level == "floor":
            return  # its buffers exist already, and it computes nothing to check
        result = step.in_order(measured.result)
        found = exact.errors(*result, self._exact_of(provider.level))
        row["errors"] = found
        if measured.peak_bytes is not None:
            returned = self.case.gradient_bytes + result.output.numel() * result.output.element_size()
            row["peak_bytes"] = measured.peak_bytes
            row["extra_bytes"] = max(0, measured.peak_bytes - returned)
        if name == "plain":
            self._plain_errors = found
        if provider.is_ours:
            slack = self._exact_of(provider.level).slack
            wrong = exact.beyond_budget(found, self._plain(), self.case.dtype, slack)
            if wrong is not None:
                self._stop(name, "wrong", wrong)

    def _exact_of(self, level: str) -> exact.Exact:
        if level not in self._exact:
            self._exact[level] = exact.EXACT[level](self.problem)
        return self._exact[level]

    def _plain(self) -> dict[str, float]:
        """Return plain PyTorch's errors, the yardstick of the gate, whether or not it is timed."""
        if self._plain_errors is None:
            plain = next(provider for provider in all_providers(self.case.device) if provider.name == "plain")
            result = plain.prepare(self.problem).call()
            self._plain_errors = exact.errors(*result, self._exact_of("tokens"))
        return self._plain_errors

    def _state(self, name: str) -> str:
        row = self.rows[name]
        if row["status"] != "ok":
            return f"{row['status']}: {row['reason']}"
        extra = row.get("extra_bytes")
        memory = "" if extra is None else f"  {extra / 2**20:8.0f} MiB"
        compiled = f"  (compiled in {row['compile_s']:.0f} s)" if "compile_s" in row else ""
        return f"{self.first[name]:8.3f} s{memory}{compiled}"

    def time(self, results: record.Results) -> None:
        """Time all providers in interleaved rounds; every row is in the file after every round."""
        self._keep_faster_floor()
        # Reason: the first call paid for its pages, so another one decides how often a row is worth repeating.
        fastest = self._fastest(self.first)
        hopeless = {name for name in self.steps if self.first[name] > HOPELESS * fastest}
        self.samples |= {name: [self.first[name]] for name in hopeless}
        self._rounds({name: 1 for name in self.steps if name not in hopeless}, results)
        share, timed = self.seconds / max(1, len(self.steps)), {name: self.samples[name][0] for name in self.steps}
        fastest = self._fastest(timed)
        counts = {
            name: timing.further_samples(first, share, fastest) - 1
            for name, first in timed.items()
            if self.providers[name].level != "floor" and name not in hopeless
        }
        # Reason: all ratios rest on the floor, and the speed of a virtual machine drifts by a third within a case.
        most = max([timing.MIN_SAMPLES - 1, *counts.values()])
        counts |= {name: most for name in self.steps if self.providers[name].level == "floor"}
        self._rounds({name: count for name, count in counts.items() if count > 0}, results)
        floor = self.floor()
        disputed = timing.disputed(self.samples, floor[0] if floor else None)
        if disputed:
            self._rounds(dict.fromkeys(disputed, 1), results)
        self.store(results, complete=True)

    def _fastest(self, seconds: dict[str, float]) -> float:
        return min((seconds[name] for name in self.steps if self.providers[name].level != "floor"), default=math.inf)

    def _rounds(self, counts: dict[str, int], results: record.Results) -> None:
        before = {name: list(samples) for name, samples in self.samples.items()}

        def after_round(samples: dict[str, list[float]]) -> None:
            self.samples = {name: old + samples.get(name, []) for name, old in before.items()}
            self.store(results, complete=False)

        with quiet():
            calls = {name: self.steps[name].call for name in counts}
            timing.interleave(calls, counts, after_round, self.case.device, self._peak_bytes())

    def _peak_bytes(self) -> int:
        return max((self.rows[name].get("peak_bytes", 0) for name in self.steps), default=0)

    def _keep_faster_floor(self) -> None:
        """Drop the slower of two libraries for the bare products, to save its time."""
        floors = [name for name in self.steps if self.providers[name].level == "floor"]
        fastest = min(floors, key=self.first.get, default=None)
        for name in floors:
            if self.first[name] > CLEARLY_SLOWER * self.first[fastest]:
                self.rows[name]["first_s"] = self.first[name]
                self._stop(name, "cannot", f"slower than {fastest} in its first call: not the floor here")

    def floor(self) -> tuple[float, str] | None:
        medians = {
            name: timing.summary(samples)["median_s"]
            for name, samples in self.samples.items()
            if samples and self.providers[name].level == "floor"
        }
        return min((value, name) for name, value in medians.items()) if medians else None

    def store(self, results: record.Results, *, complete: bool) -> None:
        floor = self.floor()
        for name, row in self.rows.items():
            if results.is_complete(self.case.name, name):
                continue  # measured again only as the yardstick of new rows
            if row["status"] == "ok":
                samples = self.samples[name]
                row["complete"] = complete
                if samples:
                    row |= {"samples_s": [round(value, 6) for value in samples], **timing.summary(samples)}
                if samples and floor is not None:
                    row |= {"floor_s": floor[0], "floor": floor[1], "times_floor": row["median_s"] / floor[0]}
            results.put(row)
        results.save()


def run_case(case: Case, providers: list[Provider], results: record.Results, seconds: float) -> bool:
    """Measure the missing rows of a case; return whether a result of ours was wrong."""
    missing = [provider for provider in providers if not results.is_complete(case.name, provider.name)]
    if not missing:
        _say(f"{case.name}: already measured")
        return False
    # The floor always runs too, so that the multiples of it come from the same minutes.
    runs = any(provider.why_not(case) is None for provider in missing)
    everybody = all_providers(case.device)
    floors = [provider for provider in everybody if runs and provider.level == "floor"]
    names = {provider.name for provider in [*missing, *floors]}
    started = time.perf_counter()
    _say(f"{case.name}")
    with timing.settled_heap():
        case_run = CaseRun(case, [provider for provider in everybody if provider.name in names], seconds)
        try:
            case_run.prepare()
        except BrokenDeviceError as error:
            results.put(case_run.rows[str(error)] | {"broke_device": True})  # the next process skips it
            results.save()
            raise
        case_run.time(results)
    _say(f"  done in {time.perf_counter() - started:.0f} s")
    return any(row["status"] == "wrong" for row in case_run.rows.values())


def main(arguments: list[str] | None = None) -> int:
    """Run and print the table; return 1 if a result of ours is over its error budget, 3 if a device broke, else 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cases", default="*", help="shell patterns over SHAPE/MODE/DTYPE, comma-separated")
    parser.add_argument("--peers", default="*", help="shell patterns over provider names, comma-separated")
    parser.add_argument("--seconds", type=float, default=DEFAULT_SECONDS, help="timed seconds per case, for all rows")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch (default: torch's choice)")
    parser.add_argument("--minutes", type=float, default=None, help="start no further case after this many minutes")
    parser.add_argument("--out", type=Path, default=None, help="results file; rows in it are not measured again")
    parser.add_argument("--append", action="store_true", help="add to a file made by other code or versions")
    parser.add_argument("--list", action="store_true", help="print cases and providers, measure nothing")
    chosen = parser.parse_args(arguments)
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    try:
        if chosen.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda needs a GPU that torch can use, and there is none")
        cases = select_cases(chosen.cases, chosen.device)
        providers = select_providers(chosen.peers, chosen.device)
        if chosen.list:
            print("\n".join(case.name for case in cases))
            print("\n".join(f"{provider.name:<24} {provider.what}" for provider in providers))
            return 0
        path = chosen.out or record.default_path(device=chosen.device)
        kind = "speed-gpu" if chosen.device == "cuda" else "speed-masked" if record.masks() else "speed"
        results = record.Results(path, kind, {"seconds": chosen.seconds}, append=chosen.append, device=chosen.device)
    except ValueError as error:
        parser.error(str(error))
    no_memory = timing.why_no_memory()
    if no_memory is not None and chosen.device == "cpu":
        _say(f"no peak memory: {no_memory}")
    if chosen.device == "cpu":
        warm_up_libraries()
    started, wrong = time.monotonic(), False
    for index, case in enumerate(cases):
        if chosen.minutes is not None and time.monotonic() - started > 60 * chosen.minutes:
            _say(f"out of time: {len(cases) - index} cases left; the same command continues from here")
            break
        try:
            wrong |= run_case(case, providers, results, chosen.seconds)
        except BrokenDeviceError as error:
            _say(f"{error} left the device unusable for this process; the same command continues without it")
            return DEVICE_BROKEN
        if chosen.device == "cuda":
            torch.cuda.empty_cache()
    tables.show([row for row in results.data["rows"] if row["case"] in {case.name for case in cases}])
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
