"""Everything a machine with a GPU is wanted for, in one command and a fixed time: what `make gpu` runs.

    python -m benchmarks.gpu [--out out] [--minutes 9] [--steps build,tests,bandwidth,pairs,tune,kernels,step,speed]

Needs torch, Triton, pytest and nvcc, no network. Each step logs to OUT/STEP.log and may take the time that is left;
the rows of `speed` come in the order of their importance, and rows that a results file of this GPU in
benchmarks/results already has are not measured again, so several short runs add up. A short table comes last.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.run import DEVICE_BROKEN

STEPS = ("build", "tests", "bandwidth", "pairs", "tune", "kernels", "step", "speed")
# Share of the whole time a step may take at the most; `speed` takes what is left.
SHARES = {
    "build": 0.3,
    "tests": 0.45,
    "bandwidth": 0.2,
    "pairs": 0.1,
    "tune": 0.25,
    "kernels": 0.1,
    "step": 0.2,
    "speed": 1.0,
}
LEAST_SECONDS = 20
TAIL = 25


def commands(out: Path, minutes: dict[str, float]) -> dict[str, list[str]]:
    python = sys.executable
    speed = out / record.default_path(device="cuda").name
    return {
        "build": [python, "setup.py", "-q", "build_ext", "--inplace"],
        "tests": [python, "-m", "pytest", "-m", "gpu", *map(str, sorted(Path("tests").glob("test_gpu*.py")))],
        "bandwidth": [python, "-m", "benchmarks.bandwidth", "--out", str(out)],
        "pairs": [
            *(python, "-m", "benchmarks.pairs", "--device", "cuda", "--out", str(out / "pairs.json")),
            *("--picture", str(out / "pairs.png")),
        ],
        "tune": [
            python,
            "-m",
            "benchmarks.tune",
            "--out",
            str(out / "tune.json"),
            "--minutes",
            f"{minutes['tune']:.2f}",
        ],
        "kernels": [python, "-m", "benchmarks.kernels", "--out", str(out / "kernels.txt")],
        "step": [
            *(python, "-m", "benchmarks.step", "--out", str(out / "step.json")),
            *("--minutes", f"{minutes['step']:.2f}"),
        ],
        "speed": [
            *(python, "-m", "benchmarks.run", "--device", "cuda", "--append", "--seconds", "4"),
            *("--out", str(speed), "--minutes", f"{minutes['speed']:.2f}"),
        ],
    }


def bring_earlier_rows(out: Path) -> None:
    """Put the newest results of this GPU where the run adds to them."""
    target = out / record.default_path(device="cuda").name
    stem = target.name[: -len("-0000-00-00.json")]
    earlier = sorted(record.RESULTS.glob(f"{stem}-*.json"))
    if earlier and not target.exists():
        shutil.copy(earlier[-1], target)


def run_step(name: str, command: list[str], log: Path, seconds: float) -> str:
    """Run one step, its output to the log and the end of it to the screen; how it ended."""
    started = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([".", os.environ.get("PYTHONPATH", "")])}
    with log.open("w") as file:
        try:
            code = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, timeout=seconds, env=environment, cwd=record.ROOT
            ).returncode
            ended = "ok" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {seconds:.0f} s"
    lines = log.read_text(errors="replace").splitlines()
    print(f"\n== {name}: {ended}, {time.monotonic() - started:.0f} s", *lines[-TAIL:], sep="\n", flush=True)
    return ended


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="logs and results go here (default: out)")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all steps together (default: 9)")
    parser.add_argument("--steps", default=",".join(STEPS), help="comma-separated (default: all)")
    chosen = parser.parse_args(argv)
    steps = chosen.steps.split(",")
    unknown = sorted(set(steps) - set(STEPS))
    if unknown:
        parser.error(f"unknown step {', '.join(unknown)}; there are {', '.join(STEPS)}")
    if not torch.cuda.is_available():
        parser.error("this is for a machine with a GPU, and torch sees none; `make test` needs no GPU")
    out = chosen.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    bring_earlier_rows(out)
    deadline, ended = time.monotonic() + 60 * chosen.minutes, {}
    for name in steps:
        left = deadline - time.monotonic()
        seconds = min(left, 60 * chosen.minutes * SHARES[name])
        if seconds < LEAST_SECONDS:
            ended[name] = "no time left"
            continue
        # Reason: these stop by themselves in time to write what they have.
        minutes = dict.fromkeys(("tune", "step", "speed"), max(0.2, seconds / 60 - 0.5))
        ended[name] = run_step(name, commands(out, minutes)[name], out / f"{name}.log", seconds)
        again = 0
        while ended[name] == f"exit code {DEVICE_BROKEN}" and deadline - time.monotonic() > LEAST_SECONDS:
            # A peer broke the device for its process: the rows behind it come from the next one.
            again, seconds = again + 1, min(deadline - time.monotonic(), seconds)
            minutes["speed"] = max(0.2, seconds / 60 - 0.5)
            ended[name] = run_step(name, commands(out, minutes)[name], out / f"{name}-{again}.log", seconds)
    print("\n" + "\n".join(f"{name:<10} {how}" for name, how in ended.items()))
    return int(any(how != "ok" for how in ended.values()))


if __name__ == "__main__":
    sys.exit(main())
