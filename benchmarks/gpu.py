"""Run everything that needs a GPU in a fixed time; `make gpu` calls this.

    python -m benchmarks.gpu [--out out] [--minutes 9] [--call 1|2] [--steps build,smoke,table,...]

Needs torch, Triton, pytest and nvcc, but no network. The first call builds, checks and measures, the most important
first; the second tunes, sanitizes and measures the rest. The results of each step are in OUT/gpu.tgz within seconds, so
a call that is cut off loses nothing. Rows that a results file of this GPU in benchmarks/results already has are not
measured again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import windkern as wk
from benchmarks import record
from benchmarks.run import DEVICE_BROKEN

LEAST_SECONDS = 15  # a step with less time is not started
GRACE = 10  # seconds between the request to stop, on which pytest prints its failures, and the kill
PACK_EVERY = 15.0
TAIL = 25
MAIN_HEAD = "4096x128256"
MAIN_ROWS = (8192, 2048, 512)
# In order of importance; `gemm` is the floor.
MAIN_PEERS = ("gemm", "plain")
SANITIZER = "tests/kernels/test_gpu_cuda.py::test_clean_under_compute_sanitizer"


class Step(NamedTuple):
    """One program, which can take at most `seconds`; time it does not use goes to later steps."""

    name: str
    seconds: float
    command: Callable[[Path, float], list[str]]  # from the folder of results and its seconds
    environment: dict[str, str] = {}  # noqa: RUF012 (a constant)


def _module(name: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)]


def _minutes(seconds: float) -> str:
    """Return the minutes for a program that stops on its own, early enough to write its results."""
    return f"{max(0.1, (seconds - GRACE) / 60):.2f}"


def _build(results: Path, seconds: float) -> list[str]:
    return [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]


def _build_environment() -> dict[str, str]:
    """Return the variables of a build for this GPU only; the step fails without a working nvcc."""
    major, minor = torch.cuda.get_device_capability()
    return {"WINDKERN_BUILD_CUDA": "1", "WINDKERN_BUILD_CPP": "0", "WINDKERN_CUDA_ARCHS": f"{major}{minor}"}


def _speed(results: Path, seconds: float, *more: str) -> list[str]:
    path = results / record.default_path(device="cuda").name
    common = ("--device", "cuda", "--append", "--seconds", 3, "--out", path, "--minutes", _minutes(seconds))
    return _module("run", *common, *more)


def _main_cases(rows: tuple[int, ...] = MAIN_ROWS) -> str:
    return ",".join(f"{count}x{MAIN_HEAD}/*/bf16" for count in rows)


def _table(results: Path, seconds: float) -> list[str]:
    # The back end in plain PyTorch takes five times as long, which nobody needs to see in every case.
    ours = [f"windkern-{name}" for name in wk.backends.available("cuda", torch.bfloat16) if name != "torch"]
    return _speed(results, seconds, "--cases", _main_cases(), "--peers", ",".join([*MAIN_PEERS, *ours]))


def _peers(results: Path, seconds: float) -> list[str]:
    return _speed(results, seconds, "--cases", _main_cases(MAIN_ROWS[:1]))


def _tests(results: Path, seconds: float) -> list[str]:
    files = map(str, sorted(Path("tests").rglob("test_gpu*.py")))
    parallel = ("-n", "8", "--dist", "worksteal", "--maxfail", "30", "--session-timeout", str(int(seconds - GRACE)))
    # Reason: a library newer than those tested here may warn, which does not mean that a kernel failed.
    shown = ("-p", "benchmarks.failures", "-W", "default", "-rs", "--tb", "short")
    return [sys.executable, "-m", "pytest", "-m", "gpu", *files, *parallel, *shown, "--deselect", SANITIZER]


def _sanitize(results: Path, seconds: float) -> list[str]:
    return [sys.executable, "-m", "pytest", "-m", "gpu", SANITIZER, "-p", "benchmarks.failures", "-W", "default", "-rs"]


FIRST = (
    Step("build", 90, _build),
    Step("smoke", 60, lambda results, seconds: _module("smoke", "--seconds", int(seconds - GRACE))),
    Step("table", 120, _table),
    Step("products", 40, lambda results, seconds: _module("products", "--out", results / "products.json")),
    Step("tests", 120, _tests),
    Step("bandwidth", 45, lambda results, seconds: _module("bandwidth", "--dtypes", "bf16", "--out", results)),
    Step("kernels", 40, lambda results, seconds: _module("kernels", "--out", results / "kernels.txt")),
    Step("peers", 150, _peers),
    Step(
        "step",
        75,
        lambda results, seconds: _module("step", "--out", results / "step.json", "--minutes", _minutes(seconds)),
    ),
    Step(
        "bodies",
        45,
        lambda results, seconds: _module(
            *("bodies", "--device", "cuda", "--models", "1b", "--cases", "200x8", "--minutes", _minutes(seconds)),
            *("--append", "--out", results / "bodies.json", "--picture", results / "bodies.png"),
        ),
    ),
    Step(
        "pairs",
        40,
        lambda results, seconds: _module(
            "pairs", "--device", "cuda", "--out", results / "pairs.json", "--picture", results / "pairs.png"
        ),
    ),
    Step("speed", 600, _speed),
)
SECOND = (
    Step("build", 90, _build),
    Step(
        "tune",
        240,
        lambda results, seconds: _module("tune", "--out", results / "tune.json", "--minutes", _minutes(seconds)),
    ),
    Step("sanitize", 150, _sanitize),
    Step("widths", 90, lambda results, seconds: _module("widths", "--out", results / "widths.json")),
    Step("speed", 600, _speed),
)
CALLS = {"1": FIRST, "2": SECOND}


def pack(results: Path, out: Path) -> None:
    """Write OUT/gpu.tgz with all results so far; the file is complete at any moment."""
    partial = out / "gpu.tgz.part"
    with tarfile.open(partial, "w:gz") as archive:
        archive.add(results, arcname="gpu")
    os.replace(partial, out / "gpu.tgz")


def bring_earlier_rows(results: Path) -> None:
    """Copy the newest results of this GPU to where the run adds to them."""
    target = results / record.default_path(device="cuda").name
    stem = target.name[: -len("-0000-00-00.json")]
    earlier = sorted(record.RESULTS.glob(f"{stem}-*.json"))
    if earlier and not target.exists():
        shutil.copy(earlier[-1], target)


def _stop(process: subprocess.Popen) -> None:
    """Ask all processes of a step to stop, then kill them."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def run_command(
    command: list[str], log: Path, seconds: float, environment: dict[str, str], meanwhile: Callable[[], None]
) -> str:
    """Run a program with its output in the log, call `meanwhile` regularly, and return how the program ended."""
    given = {**os.environ, "PYTHONPATH": os.pathsep.join([".", os.environ.get("PYTHONPATH", "")]), **environment}
    given["PYTHONUNBUFFERED"] = "1"
    deadline = time.monotonic() + seconds
    with log.open("w") as file:
        # Reason: a process group, so that its children are killed with it, but no session, so that it ends with us.
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=given, cwd=record.ROOT, preexec_fn=os.setpgrp
        )
        try:
            while True:
                left = deadline - time.monotonic()
                try:
                    code = process.wait(max(0.01, min(PACK_EVERY, left)))
                    return "ok" if code == 0 else f"exit code {code}"
                except subprocess.TimeoutExpired:
                    if left <= 0:
                        return f"stopped after {seconds:.0f} s"
                    meanwhile()
        finally:
            if process.poll() is None:
                _stop(process)


class Run:
    """Runs steps one after the other until the time is over."""

    def __init__(
        self,
        out: Path,
        results: Path,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
        run: Callable[..., str] = run_command,
    ):
        self.out, self.results, self.clock, self.run = out, results, clock, run
        self.deadline = clock() + seconds
        self.ended: dict[str, str] = {}

    def left(self) -> float:
        # Reason: the last program takes up to twice its grace to stop.
        return self.deadline - self.clock() - 2 * GRACE

    def step(self, step: Step) -> None:
        """Run a step; if a peer broke the device for the process, run it again, which continues without that row."""
        stop, attempt = self.clock() + step.seconds, 0
        while True:
            seconds = min(self.left(), stop - self.clock())
            if seconds < LEAST_SECONDS:
                self.ended.setdefault(step.name, "no time left")
                return
            name = f"{step.name}-{attempt}" if attempt else step.name
            started = self.clock()
            ended = self._run_once(step, self.results / f"{name}.log", seconds)
            self.ended[step.name] = ended
            self._tell(name, ended, self.clock() - started)
            pack(self.results, self.out)
            if ended != f"exit code {DEVICE_BROKEN}":
                return
            attempt += 1

    def _run_once(self, step: Step, log: Path, seconds: float) -> str:
        environment = dict(step.environment)
        try:
            if step.name == "build":
                environment |= _build_environment()
            command = step.command(self.results, seconds)
        except Exception as error:  # a step that cannot start must not stop the others
            log.write_text(f"{type(error).__name__}: {error}\n")
            return "not begun"
        return self.run(command, log, seconds, environment, lambda: pack(self.results, self.out))

    def _tell(self, name: str, ended: str, seconds: float) -> None:
        log = self.results / f"{name}.log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        print(f"\n== {name}: {ended}, {seconds:.0f} s", *lines[-TAIL:], sep="\n", flush=True)

    def summary(self) -> str:
        return "\n".join(f"{name:<10} {how}" for name, how in self.ended.items())


def main(argv: list[str] | None = None) -> int:
    """Run the steps and print a summary; return 1 if a step did not end well, else 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="gpu.tgz goes here (default: out)")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all steps together (default: 9)")
    parser.add_argument("--call", choices=tuple(CALLS), default="1", help="1: check and measure, 2: tune and the rest")
    parser.add_argument("--steps", default=None, help="comma-separated (default: all of the call)")
    chosen = parser.parse_args(argv)
    steps = {step.name: step for step in CALLS[chosen.call]}
    names = list(steps) if chosen.steps is None else chosen.steps.split(",")
    unknown = sorted(set(names) - set(steps))
    if unknown:
        parser.error(f"unknown step {', '.join(unknown)}; call {chosen.call} has {', '.join(steps)}")
    if not torch.cuda.is_available():
        parser.error("this needs a machine with a GPU, and torch sees none; `make test` needs no GPU")
    out = chosen.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="windkern-gpu-") as folder:
        run = Run(out, Path(folder), 60 * chosen.minutes)
        bring_earlier_rows(run.results)
        for name in names:
            run.step(steps[name])
        (run.results / "summary.txt").write_text(run.summary() + "\n")
        pack(run.results, out)
    print(f"\n{run.summary()}\n{out / 'gpu.tgz'}")
    return int(any(how != "ok" for how in run.ended.values()))


if __name__ == "__main__":
    sys.exit(main())
