"""Measure the matrix products of a walk on a GPU by slab width, and a copy: the inputs of the plan's cost model.

    python -m benchmarks.products [--out out/products.json]

    logits        (M, W)  = hidden @ weight.T            into float32, and into bfloat16
    dhidden       (M, H)  = dz @ weight                  into float32 by mm, and added to float32 by addmm
    dweight       (W, H)  = dz.T @ hidden                into bfloat16

The difference of addmm and mm is the cost of summing dhidden slab by slab: it is read and written once per slab.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.bandwidth import COPY_BYTES, EventTimer, Timer, copy_rate

ROWS, HIDDEN = 8192, 4096
# Powers of two, widths whose 128 x 256 tiles fill 132 multiprocessors (4224, 8448, 16896), and some that do not.
WIDTHS = (1024, 2048, 2112, 4096, 4224, 8064, 8192, 8448, 16384, 16896)
SAMPLES = 10


def calls(rows: int, inner: int, width: int, device: str) -> dict[str, Callable[[], Any]]:
    made = {"device": device, "dtype": torch.bfloat16}
    hidden, weight, dz = (torch.randn(*shape, **made) for shape in ((rows, inner), (width, inner), (rows, width)))
    low, wide = torch.empty_like(dz), torch.empty(rows, width, device=device)
    total, dweight = torch.zeros(rows, inner, device=device), torch.empty_like(weight)
    float32 = {"out_dtype": torch.float32}
    return {
        "logits, float32": lambda: torch.mm(hidden, weight.t(), out=wide, **float32),
        "logits, bfloat16": lambda: torch.mm(hidden, weight.t(), out=low),
        "dhidden, mm": lambda: torch.mm(dz, weight, out=total, **float32),
        "dhidden, addmm": lambda: torch.addmm(total, dz, weight, out=total, **float32),
        "dweight": lambda: torch.mm(dz.t(), hidden, out=dweight),
    }


def measure(
    timer: Timer,
    device: str,
    *,
    rows: int = ROWS,
    inner: int = HIDDEN,
    widths: tuple[int, ...] = WIDTHS,
    copy_bytes: int = COPY_BYTES,
    save: Callable[[dict[str, Any]], None] = lambda data: None,
) -> dict[str, Any]:
    """Measure all products at all widths, and save after each width."""
    copy = copy_rate(timer, SAMPLES, device, copy_bytes)
    print(f"copy on the device: {copy / 1e9:.0f} GB/s", flush=True)
    found: list[dict[str, Any]] = []
    data = {"schema": record.SCHEMA, "kind": "products", "copy_bytes_per_s": copy, "rows": found}
    for width in widths:
        for name, call in calls(rows, inner, width, device).items():
            row = {"product": name, "rows": rows, "hidden": inner, "width": width}
            found.append(row)
            try:
                taken = timer.seconds(call, lambda: None, SAMPLES)
            except (RuntimeError, TypeError) as error:  # not every torch multiplies bfloat16 into float32
                row["cannot"] = str(error).splitlines()[0]
                print(f"{width:6d} {name:17s} cannot: {row['cannot'][:80]}", flush=True)
                continue
            median = statistics.median(taken)
            rate = 2 * rows * inner * width / median
            row |= {"median_s": median, "samples_s": taken, "flops_per_s": rate}
            print(f"{width:6d} {name:17s} {1e6 * median:9.1f} us {rate / 1e12:7.1f} TFLOP/s", flush=True)
        save(data)
    return data


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.products", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/products.json"), metavar="FILE")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("products are timed on a GPU, and torch sees none")
    run = {"runs": [record.run_info({"samples": SAMPLES}, device="cuda")]}
    measure(EventTimer(), "cuda", save=lambda data: record.write_atomically(chosen.out, {**data, **run}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
