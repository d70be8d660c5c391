"""Measure seconds and peak memory of a call, and interleave the calls of several providers."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import heap

MIN_SAMPLES = 3
MAX_SAMPLES = 25
# A longer call is repeated fewer times, so that a case with a dozen such calls ends in time.
LONG_CALL = 2.0
VERY_LONG_CALL = 5.0
FAR_BEHIND = 2.5  # times the fastest call of the case
# Hazard: a virtual machine can stop for a minute. If two samples differ by more than this ratio, a third is taken; if a
# single one takes this many floors, a second is taken.
DISPUTED_RATIO = 1.3
DISPUTED_FLOORS = 10.0

_FLUSH_BYTES = 256 << 20  # several times the second-level cache of any GPU
_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class Measured(NamedTuple):
    """Time, memory and result of one call."""

    seconds: float
    peak_bytes: int | None  # above the level just before the call; None if it cannot be read
    result: Any


def timed(call: Callable[[], Any], device: str = "cpu") -> tuple[float, Any]:
    """Return the seconds and the result of a call; on a GPU between two events, after its cache was overwritten."""
    if device == "cpu":
        start = time.perf_counter()
        result = call()
        return time.perf_counter() - start, result
    torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device).zero_()
    return _between_events(call)


def _between_events(call: Callable[[], Any]) -> tuple[float, Any]:
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before.record()
    result = call()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) / 1e3, result


def works(device: str) -> bool:
    """Return whether a device still computes: after an illegal access by a kernel, a GPU refuses all further work."""
    try:
        return float(torch.ones(1, device=device).sum()) == 1
    except RuntimeError:
        return False


def why_no_memory() -> str | None:
    """Return why peak memory cannot be measured here, or None."""
    try:
        _CLEAR_REFS.write_text("5")
        _kib("VmHWM")
    except (OSError, StopIteration) as error:
        return f"{_CLEAR_REFS} cannot be used: {type(error).__name__}"
    return None


def _kib(field: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def measure(call: Callable[[], Any], device: str = "cpu") -> Measured:
    """Run a call once and read the high-water mark of memory, which is reset just before the call.

    On a CPU it is that of resident memory: outputs, gradients, temporaries of any library, holes of the heap. On a GPU
    it is that of torch's allocator, which everything here uses.
    """
    if device != "cpu":
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        seconds, result = _between_events(call)
        return Measured(seconds, torch.cuda.max_memory_allocated() - allocated, result)
    if why_no_memory() is not None:
        return Measured(*_without_peak(call))
    gc.collect()
    heap.give_back()
    heap.trim()  # so that the level before the call is that of live memory
    _CLEAR_REFS.write_text("5")  # VmHWM = VmRSS
    before = _kib("VmRSS")
    seconds, result = timed(call)
    return Measured(seconds, max(0, _kib("VmHWM") - before) * 1024, result)


def _without_peak(call: Callable[[], Any]) -> tuple[float, None, Any]:
    seconds, result = timed(call)
    return seconds, None, result


def further_samples(first: float, share: float, fastest: float) -> int:
    """Return how often to repeat a call whose first run took `first` seconds; 0: the first run must do.

    `share` is its share of the case's seconds, `fastest` the shortest first call of the case. Time goes to the calls
    whose order is in doubt; a call that is far behind is repeated fewer times.
    """
    if first > VERY_LONG_CALL:
        return max(2 * int(first <= FAR_BEHIND * fastest), int(share / first))
    least = MIN_SAMPLES - (first > LONG_CALL) - (first > FAR_BEHIND * fastest)
    return min(MAX_SAMPLES, max(least, int(share / max(first, 1e-9))))


def disputed(samples: dict[str, list[float]], floor: float | None = None) -> list[str]:
    """Return the names of calls with too few samples to tell whether one of them was disturbed."""
    names = []
    for name, taken in samples.items():
        apart = 0 < len(taken) < MIN_SAMPLES and max(taken) > DISPUTED_RATIO * min(taken)
        unbelievable = len(taken) == 1 and floor is not None and taken[0] > DISPUTED_FLOORS * floor
        if apart or unbelievable:
            names.append(name)
    return names


@contextmanager
def settled_heap() -> Iterator[None]:
    """Exclude all live objects from garbage collections inside: with those of the libraries, each would take 0.2 s."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def interleave(
    calls: dict[str, Callable[[], Any]],
    counts: dict[str, int],
    after_round: Callable[[dict], None] | None = None,
    device: str = "cpu",
    peak_bytes: int = 0,
) -> dict[str, list[float]]:
    """Return samples in seconds by name, from rounds over all calls, with each call spread evenly over the rounds.

    On a CPU, memory for the `peak_bytes` of the largest call is touched before and kept until the end.

    Hazard: a call can pay for the one before it. Remedy: each round has an order of its own, the same in every run.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    rounds, order, shuffled = max(counts.values(), default=0), list(calls), random.Random(0)
    with heap.kept(peak_bytes) if device == "cpu" and peak_bytes else nullcontext():
        for index in range(rounds):
            shuffled.shuffle(order)
            with _no_garbage_collection():
                for name in order:
                    due = (index + 1) * counts[name] // rounds > index * counts[name] // rounds
                    if due:
                        seconds, result = timed(calls[name], device)
                        samples[name].append(seconds)
                        del result
            if after_round is not None:
                after_round(samples)
    return samples


def summary(samples: list[float]) -> dict[str, float | int]:
    """Return the median, the 20th and 80th percentile and the number of samples."""
    if len(samples) == 1:
        low = high = samples[0]
    else:
        low, *_, high = statistics.quantiles(samples, n=5, method="inclusive")
    return {"median_s": statistics.median(samples), "p20_s": low, "p80_s": high, "num_samples": len(samples)}
