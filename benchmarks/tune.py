"""Choose the block sizes of the Triton kernels for the GPU of this machine.

    python -m benchmarks.tune [--out FILE] [--write] [--minutes N]

Times the row kernels at several block sizes against a device copy and against the CUDA back end, and the fused tiles
against a product followed by a row kernel, for hidden sizes from 512 to 4096. Prints the results, writes them to FILE,
and with --write puts the winners into windkern/kernels/tuned.json under the GPU's architecture.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks import record, timing
from windkern import backends
from windkern.kernels import tuned
from windkern.kernels.contract import Exps, Kept, RowState, RowStats, Slab, Upstream
from windkern.kernels.gemm import products_of
from windkern.transform import LogitTransform

ROWS, WIDTH = 8192, 8192
SAMPLES = 15
BACKWARD = [
    {"block": block, "warps": warps} for block, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (8192, 16))
]
ELEMENTS = (16, 32, 64)
TILES = [
    {"rows": rows, "columns": columns, "inner": 64, "warps": warps, "stages": stages, "group": group}
    for (rows, columns, warps), stages, group in itertools.product(
        ((128, 128, 8), (128, 128, 4), (128, 256, 8), (64, 256, 8), (256, 128, 8)), (3, 4), (8, 16)
    )
]
HIDDEN_SIZES = (512, 896, 1536, 2048, 2304, 3072, 4096)


def seconds(call: Callable[[], Any]) -> float:
    """Return the median over a few calls, with caches flushed in between."""
    call()
    return statistics.median(timing.timed(call, "cuda")[0] for _ in range(SAMPLES))


class Tuner:
    """Tries settings through the launchers, with the entries of the table replaced."""

    def __init__(self, deadline: float):
        from windkern.kernels.triton import rows as triton_rows
        from windkern.kernels.triton import tile as triton_tile

        self.rows_module, self.tile_module, self.deadline = triton_rows, triton_tile, deadline
        self.entry = dict(tuned.table(tuned.architecture()))
        self.log: list[dict[str, Any]] = []
        self.targets = torch.randint(0, WIDTH, (ROWS,), device="cuda")

    def _try(self, what: str, settings: dict[str, Any], call: Callable[[], Any], **more: Any) -> float:
        """Return seconds; infinity for settings that the compiler refuses, or after the deadline."""
        if time.monotonic() > self.deadline:
            return float("inf")
        try:
            took, problem = seconds(call), None
        except Exception as error:
            took, problem = float("inf"), f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        shown = None if problem else round(took * 1e3, 4)
        self.log.append({"what": what, **settings, **more, "ms": shown, "problem": problem})
        print(f"{what:<24} {settings} {more or ''} {shown if problem is None else problem}", flush=True)
        return took

    def _using(self, **changes: Any) -> None:
        """Make the launchers use these entries instead of the table's."""
        entry = {**self.entry, **changes}
        tuned.table = lambda architecture: entry

    def state(self) -> RowState:
        fresh = [torch.full((ROWS,), value, device="cuda") for value in (-torch.inf, 0.0, -torch.inf)]
        return RowState(*fresh, None)

    def copy_bandwidth(self) -> float:
        source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        took = seconds(lambda: target.copy_(source))
        self.log.append({"what": "copy", "gb_per_s": 2 * source.nbytes / took / 1e9})
        return 2 * source.nbytes / took

    def tune_rows(self, bandwidth: float) -> None:
        z = torch.randn(ROWS, WIDTH, device="cuda")
        kept = torch.empty(ROWS, WIDTH, dtype=torch.bfloat16, device="cuda")
        offset, state = torch.empty(ROWS, 1, device="cuda"), self.state()
        slab = Slab(z, None, self.targets, 0, LogitTransform())
        arguments = slab, state, Exps(kept, state.run_max.clone(), 0, None)
        forward_bytes, backward_bytes = 6 * z.numel(), 4 * z.numel()
        best = {}
        for elements in ELEMENTS:
            self._using(row_elements_per_thread=elements)
            best[elements] = self._try(
                "exps_rows", {"elements": elements}, lambda: self.rows_module.exps_forward(*arguments)
            )
        winner = min(best, key=best.get)
        self.entry["row_elements_per_thread"] = winner
        self.log.append({"what": "forward share of a copy", "share": forward_bytes / best[winner] / bandwidth})

        stats = RowStats(state.run_max, state.run_sum.log(), state.target_logit, None)
        upstream = Upstream(torch.randn(ROWS, device="cuda"), None, None)
        dz = torch.empty_like(kept)
        inputs = slab._replace(logits=None), Kept(kept, offset), stats, upstream, None, dz, None
        timed = []
        for settings in BACKWARD:
            self._using(backward=settings)
            took = self._try("backward_rows, kept", settings, lambda: self.rows_module.slab_backward(*inputs))
            timed.append((took, settings))
        took, self.entry["backward"] = min(timed, key=lambda pair: pair[0])
        self.log.append({"what": "backward share of a copy", "share": backward_bytes / took / bandwidth})
        self._using()
        self._prefer(arguments, inputs)

    def _prefer(self, forward: tuple, backward: tuple) -> None:
        """Order the back ends by the time of their forward and backward row kernels."""
        totals = {}
        for name in self.entry["prefer"]:
            if backends.why_not(name, "cuda") is None:
                kernels = backends.BACKENDS[name].kernels()
                totals[name] = self._try("forward + backward", {"backend": name}, _both(kernels, forward, backward))
        rest = [name for name in self.entry["prefer"] if name not in totals]
        self.entry["prefer"] = [*sorted(totals, key=totals.get), *rest]

    def tune_tiles(self) -> None:
        """Find the fastest tile for a small head, then the largest hidden size at which tiles beat slabs."""
        timed = []
        for settings in TILES:
            self._using(tile=settings)
            timed.append((self._try("tile_forward", settings, self._tiles(896), hidden=896), settings))
        self.entry["tile"] = min(timed, key=lambda pair: pair[0])[1]
        self._using()
        self.entry["tile_hidden"] = 0
        for hidden_size in HIDDEN_SIZES:
            tiled = self._try("tile_forward", {}, self._tiles(hidden_size), hidden=hidden_size)
            walked = self._try("product + forward_rows", {}, self._walk(hidden_size), hidden=hidden_size)
            if tiled >= walked:
                break
            self.entry["tile_hidden"] = hidden_size

    def _operands(self, hidden_size: int) -> Iterator[torch.Tensor]:
        for size in (ROWS, WIDTH):
            yield torch.randn(size, hidden_size, device="cuda").bfloat16()

    def _tiles(self, hidden_size: int) -> Callable[[], None]:
        hidden, weight = self._operands(hidden_size)
        slab = Slab(None, None, self.targets, 0, LogitTransform())
        arguments = slab, self.state(), None
        return lambda: self.tile_module.tile_forward(hidden, weight, *arguments)

    def _walk(self, hidden_size: int) -> Callable[[], None]:
        hidden, weight = self._operands(hidden_size)
        z = torch.empty(ROWS, WIDTH, device="cuda")
        slab, state = Slab(z, None, self.targets, 0, LogitTransform()), self.state()
        products = products_of("cuda", torch.bfloat16)

        def call() -> None:
            products.logits(hidden, weight, z)
            self.rows_module.slab_forward(slab, state, None)

        return call


def _both(kernels: ModuleType, forward: tuple, backward: tuple) -> Callable[[], None]:
    def call() -> None:
        kernels.exps_forward(*forward)
        kernels.slab_backward(*backward)

    return call


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/tune.json"), metavar="FILE")
    parser.add_argument("--write", action="store_true", help="put the winners into tuned.json")
    parser.add_argument("--minutes", type=float, default=3.0, help="try no further settings after this many minutes")
    chosen = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("block sizes are measured on a GPU, and torch sees none")
    tuner = Tuner(time.monotonic() + 60 * chosen.minutes)
    tuner.tune_rows(tuner.copy_bandwidth())
    tuner.tune_tiles()
    finished = time.monotonic() <= tuner.deadline
    architecture = tuned.architecture()
    document = {**record.run_info({}, "cuda"), "architecture": architecture, "entry": tuner.entry, "log": tuner.log}
    record.write_atomically(chosen.out, document)
    print(json.dumps({architecture: tuner.entry}, indent=1))
    if not finished:
        print("out of time: not all settings were tried, the table is left as it is", file=sys.stderr)
        return 1
    if chosen.write:
        entries = json.loads(tuned.PATH.read_text())
        entries[architecture] = tuner.entry
        tuned.PATH.write_text(json.dumps(entries, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
