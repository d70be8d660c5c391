"""Time whole calls by slab width on a GPU, beside the bare products: what the plan's cost model must predict.

    python -m benchmarks.widths [--rows 8192,2048,512] [--out out/widths.json]

Each case runs with every width of a list, with several slabs per product where the gear multiplies several at once, and
with the plan's own choice (width 0). All calls of a case take turns. "predicted" is the cost model's time.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

import windkern as wk
from benchmarks import record, timing
from benchmarks.cases import Case, Problem, make_problem, select_cases
from benchmarks.ours import our_providers
from benchmarks.peers import all_providers
from windkern import costs

plan = sys.modules["windkern.plan"]
WIDTHS = (1024, 2048, 3072, 4096, 5120, 6144, 7168, 8448, 11776, 16128)
AT_ONCE = (1, 2, 4)
HEADS = ("4096x128256",)
SAMPLES = 7


class Choice(NamedTuple):
    """A forced slab width and number of slabs per product; 0 leaves both to the plan."""

    width: int = 0
    at_once: int = 1


@contextlib.contextmanager
def forced(choice: Choice) -> Iterator[None]:
    """Make every plan inside take this choice."""
    with contextlib.ExitStack() as stack:
        if choice.width:
            widths = lambda vocab_size, widest: [min(choice.width, widest)]  # noqa: E731
            stack.enter_context(mock.patch.object(costs, "_gpu_widths", widths))
            stack.enter_context(mock.patch.object(costs, "SLABS_AT_ONCE", (choice.at_once,)))
        _forget()
        try:
            yield
        finally:
            _forget()


def _forget() -> None:
    plan._walk_of.cache_clear()
    plan._spec_values.cache_clear()


def choices(case: Case, widths: tuple[int, ...]) -> list[Choice]:
    several = AT_ONCE if case.mode == "frozen" else AT_ONCE[:1]
    return [Choice(), *(Choice(width, count) for width in widths for count in several if width * count <= 16384)]


def _planned(case: Case) -> wk.Plan:
    shape = case.shape
    grads = {"hidden_grad": case.wants_hidden, "weight_grad": case.wants_weight}
    return wk.plan(shape.rows, shape.hidden, shape.vocab, case.dtype, device=case.device, **grads)


def measure(case: Case, widths: tuple[int, ...] = WIDTHS, samples: int = SAMPLES) -> list[dict[str, Any]]:
    """Return a row for each choice, with its median seconds and those of the bare products."""
    problem: Problem = make_problem(case)
    backend = wk.backends.resolve("auto", torch.device(case.device), case.dtype)
    ours = our_providers(backend, preferred=True)[0].prepare(problem).call
    floor = next(each for each in all_providers(case.device) if each.level == "floor").prepare(problem).call
    calls: dict[Choice | None, Callable[[], Any]] = {None: floor}
    plans: dict[Choice, wk.Plan] = {}
    for choice in choices(case, widths):
        with forced(choice):
            plans[choice] = _planned(case)
        calls[choice] = ours
    taken: dict[Choice | None, list[float]] = {choice: [] for choice in calls}
    for turn in range(samples + 1):
        for choice, call in calls.items():
            with forced(choice or Choice()):
                call()  # plans again
                seconds = timing.timed(call, case.device)[0]
            if turn:
                taken[choice].append(seconds)
    median = {choice: statistics.median(each) for choice, each in taken.items()}
    rows = []
    for choice, made in plans.items():
        row = {"case": case.name, **choice._asdict(), "slab_width": made.slab_width, "slabs_kept": made.slabs_kept}
        row |= {"slabs_at_once": made.walk.slabs_at_once, "predicted_s": made.seconds, "peak_bytes": made.peak_bytes}
        row |= {"median_s": median[choice], "floor_s": median[None], "samples_s": taken[choice]}
        rows.append(row)
        print(
            f"{case.name:30s} width {made.slab_width:6d} x {made.walk.slabs_at_once} kept {made.slabs_kept:3d}"
            f"{' (the plan)' if not choice.width else '':11s} {1e3 * median[choice]:8.3f} ms "
            f"{median[choice] / median[None]:5.2f}, predicted {1e3 * made.seconds:8.3f}",
            flush=True,
        )
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.widths", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="8192,2048,512")
    parser.add_argument("--heads", default=",".join(HEADS))
    parser.add_argument("--out", type=Path, default=Path("out/widths.json"), metavar="FILE")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("widths are timed on a GPU, and torch sees none")
    found: list[dict[str, Any]] = []
    for head in chosen.heads.split(","):
        for rows in chosen.rows.split(","):
            for case in select_cases(f"{rows}x{head}/*/bf16", "cuda"):
                found += measure(case)
                run = {"runs": [record.run_info({"samples": SAMPLES}, device="cuda")]}
                document = {"schema": record.SCHEMA, "kind": "widths", "rows": found, **run}
                record.write_atomically(chosen.out, document)
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
