"""Test launches without a GPU: how often Triton compiles, on which device it launches, and how large the grid is.

The launchers, Triton's binder and its cache are real; the tensors hold no numbers and the driver launches nothing.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import windkern as wk
from windkern.kernels import tuned

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
OPS = (
    "trained",
    "frozen",
    "scoring",
    "fused",
    "batch_invariant",
    "with_bias_and_entropy",
    "pair_loss",
    "win_rates",
    "sequences",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """The findings of all jobs of tests/mock_jobs.py."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "tests" / "mock_jobs.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def result(found: dict, job: str):
    if isinstance(found[job], dict):
        assert "failed" not in found[job], found[job]["failed"]
    return found[job]


@needs_triton
@pytest.mark.parametrize("op", OPS)
def test_kernels_are_launched_where_the_caller_is(found, op):
    """Inside torch.cuda.device(1), everything is on GPU 1, so the test below can pass."""
    there = result(found, f"guarded {op}")
    assert there["devices"] == [1] and there["current"] == 0 and there["kernels"]


@needs_triton
@pytest.mark.parametrize("op", OPS)
def test_kernels_are_launched_where_their_tensors_are(found, op):
    """Tensors are on GPU 1 while GPU 0 is current: Triton launches on the current device, whatever its arguments.

    This includes backward: autograd's threads for a GPU make its device current, but here it runs in the caller's.
    """
    there = result(found, f"devices {op}")
    assert there["devices"] == [1] and there["current"] == 0


# Two uses of a slab times the blocks of its widths, for each of two kernels: as many as a batch can need.
@needs_triton
@pytest.mark.parametrize(
    ("gear", "most"),
    [
        ("trained", 17),
        ("frozen", 8),
        ("scoring", 8),
    ],
)
def test_ragged_batches_compile_few_kernels(found, gear, most):
    """There are 50 row counts. Each compilation stops a training run for about a second, at an unpredictable step."""
    compiled = result(found, f"compilations {gear}")
    assert 0 < sum(compiled.values()) <= most, compiled


@needs_triton
def test_the_same_call_compiles_once(found):
    (launches, compiled), second = result(found, "compiled")["launches and compilations"]
    assert compiled > 0 and second == [2 * launches, compiled]


@needs_triton
def test_a_quick_launch_takes_the_kernel_that_triton_would_take(found):
    """Two calls share a compiled kernel where Triton's own launch shares it, and nowhere else."""
    counts = result(found, "kinds")
    assert counts["ours compiled"] == counts["triton compiled"] > 10
    assert counts["ours launched"] == counts["triton launched"] == counts["calls"]


@needs_triton
@pytest.mark.parametrize("op", ["pair_loss", "win_rates"])
def test_pairs_of_many_groups_fit_a_grid(found, op):
    """A grid has room for 65535 programs in y, so 70000 groups are in x."""
    assert result(found, f"grids {op}") == [[70000, 1, 1]]


@needs_triton
def test_the_hosts_time_is_measured_by_call_and_slab(found):
    """Only the counts are tested; the times decide nothing."""
    for seconds, in_triton, in_products, bare, launches, slabs in result(found, "host").values():
        assert min(seconds, in_triton, in_products, bare) > 0 and launches >= slabs > 1


class Properties:
    gcnArchName = "NVIDIA H100 80GB HBM3"

    def __init__(self, major: int, minor: int):
        self.major, self.minor = major, minor


@pytest.fixture
def two_kinds(monkeypatch):
    """A machine with an H100 as GPU 0 and an A100 as GPU 1, and a function that makes one current."""
    current = [0]
    kinds = {0: Properties(9, 0), 1: Properties(8, 0)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: kinds[index])
    tuned._architecture_of.cache_clear()
    wk.backends._preference.clear()
    yield lambda index: current.__setitem__(0, index)
    tuned._architecture_of.cache_clear()
    wk.backends._preference.clear()


def test_each_gpu_has_its_own_architecture(two_kinds):
    assert tuned.architecture() == "sm_90"
    two_kinds(1)
    assert tuned.architecture() == "sm_80" and tuned.architecture(0) == "sm_90"
    two_kinds(0)
    assert tuned.architecture() == "sm_90" and tuned.architecture(1) == "sm_80"


def test_auto_takes_what_is_fastest_on_the_tensors_gpu(two_kinds, monkeypatch):
    """It is not decided by the GPU that was current, or queried, first."""
    faster = {"sm_90": ("cuda", "torch"), "sm_80": ("torch", "cuda")}
    monkeypatch.setattr(tuned, "preferred", lambda arch=None, tiles=False: faster[arch or tuned.architecture()])
    monkeypatch.setattr(wk.backends, "why_not", lambda name, device, dtype: None)
    chosen = [wk.backends.resolve("auto", torch.device(name), torch.float32) for name in ("cuda:0", "cuda:1", "cuda:0")]
    assert chosen == ["cuda", "torch", "cuda"]


def test_a_named_back_end_is_asked_about_the_tensors_gpu(two_kinds, monkeypatch):
    asked = []
    monkeypatch.setattr(wk.backends, "why_not", lambda name, device, dtype: asked.append((name, device)))
    assert wk.backends.resolve("cuda", torch.device("cuda:1"), torch.float32) == "cuda"
    assert asked == [("cuda", "cuda:1")]
