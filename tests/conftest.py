"""Fixtures shared by all tests. Uninitialised memory is NaN here, so a value that was not written cannot pass."""

import gc
import importlib.util
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported; tests/kernels/test_triton.py runs its kernels

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products, which torch may require

import windkern as wk
from windkern.commands import diagnosis

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    from interpreter import multiply_rows_alike, patch_once_a_launch

    patch_once_a_launch()
    multiply_rows_alike()

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # one core for each worker

try:
    from hypothesis import HealthCheck, settings
except ImportError:
    pass  # a machine with a GPU can run the tests of kernels without it
else:
    # The same examples on all machines, without a deadline, because a machine may be busy.
    slow = [HealthCheck.too_slow]
    settings.register_profile("suite", deadline=None, database=None, derandomize=True, suppress_health_check=slow)
    settings.load_profile("suite")


def pytest_report_header() -> str:
    """Shown without -q; tests/kernels/test_other_cpus.py reads it."""
    return f"CPU: {torch.backends.cpu.get_cpu_capability()} for torch, {diagnosis.cpp_extension()['in_use']} for C++"


@pytest.fixture(scope="module", autouse=True)
def _heap_of_earlier_tests_is_not_searched():
    """Exclude what is there from garbage collection, which every run of the trainer requests.

    Once a module, not once: compiled graphs and modules that tests import would add 0.4 s to each request by the end.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_wait_for_a_disk(monkeypatch):
    """Skip fsync: a killed process loses nothing that it has written, and no test has a power cut."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(autouse=True)
def _poisoned_memory_and_fixed_seed():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)  # Reason: bits depend on it, and a test may have failed midway
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[name for name in wk.backends.available("cpu") if name != "triton"])  # the interpreter is slow
def backend(request) -> str:
    return request.param
