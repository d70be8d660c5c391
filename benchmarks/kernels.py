"""Profile one call on a GPU: list kernels by total time, from torch's profiler.

python -m benchmarks.kernels [--case 8192x4096x128256/trained/bf16] [--backend NAME] [--out FILE]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import windkern as wk
from benchmarks.cases import make_problem, select_cases
from benchmarks.ours import our_providers

CALLS = 5


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="8192x4096x128256/trained/bf16")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--out", type=Path, default=Path("out/kernels.txt"), metavar="FILE")
    chosen = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("kernels are profiled on a GPU, and torch sees none")
    problem = make_problem(select_cases(chosen.case, "cuda")[0])
    backend = wk.backends.resolve(chosen.backend, torch.device("cuda"), problem.case.dtype)
    call = our_providers(backend, preferred=True)[0].prepare(problem).call
    call()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    text = profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=60)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(f"{problem.case.name}, backend {backend}, {CALLS} calls\n{text}\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
