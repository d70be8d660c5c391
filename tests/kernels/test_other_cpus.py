"""Results are right on other CPUs: numeric tests run again in processes that mask instructions of this one.

The variables are read when torch, its libraries and windkern are loaded, so each CPU gets its own pytest. The tests are
in other files, so it does not recurse.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_cpu_libraries import AVX2_ONLY

ROOT = Path(__file__).parents[2]
# Variables, and the instruction sets that torch and the C++ extension then detect.
MASKS = {
    "avx2": (AVX2_ONLY, "AVX2", "avx2"),
    "portable": ({"ATEN_CPU_CAPABILITY": "default", "WINDKERN_CPP_ISA": "portable"}, "DEFAULT", "portable"),
}
# One or two tests of every kind of result; all of them take 20 seconds on one core.
GROUP = (
    "losses/test_losses.py::test_groups_are_treated_apart_unless_it_says_otherwise",
    "losses/test_losses.py::test_order_of_prompts_and_of_responses_does_not_matter",
    "losses/test_losses.py::test_reductions_and_dtypes",
    "ops/test_pairs.py::test_parity",
    "ops/test_numerics.py",
    "ops/test_logprobs.py::test_parity_of_other_shapes",
    "ops/test_logprobs.py::test_ignored_rows_change_nothing_bitwise",
    "ops/test_fused_loss.py::test_parity",
    "ops/test_sequence.py",
    "ops/test_batch_invariant.py",
    "kernels/test_gemm.py",
)
FEWEST = 400  # tests that must have passed: some 450 without the C++ extension, 750 with it


@pytest.mark.parametrize("cpu", [pytest.param("avx2", marks=pytest.mark.slow), "portable"])
def test_results_are_right(cpu):
    if cpu == "avx2" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this CPU lacks AVX2")
    variables, capability, instructions = MASKS[cpu]
    # Hazard: with the variables of an xdist worker, the process would take itself for one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["--color=no", "--tb=short", *(f"tests/{part}" for part in GROUP)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    said = f"{variables}\n{done.stdout[-8000:]}{done.stderr[-2000:]}"
    assert done.returncode == 0, said
    header = rf"^CPU: {capability} for torch, ({instructions}|None) for C\+\+$"
    assert re.search(header, done.stdout, re.MULTILINE), said
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) >= FEWEST, said
