"""The choice of a library for each CPU, and that none runs a product that it computes wrongly or very slowly."""

import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from cases import NARROW, UNLIMITED, Problem, Shape

import windkern as wk
from windkern.kernels import cpu_libraries, cpu_products
from windkern.plan import _walk_of
from windkern.train.models import dtype_named

CPUINFO = (
    "processor\t: 0\nvendor_id\t: {}\ncpu family\t: {}\nflags\t\t: fpu {}\n\n"
    "processor\t: 1\nvendor_id\t: Other\ncpu family\t: 1\nflags\t\t: fpu\n"
)
ZEN_3, ZEN_4, ZEN_5 = (
    ("AuthenticAMD", 25, "avx2"),
    ("AuthenticAMD", 25, "avx2 avx512f"),
    ("AuthenticAMD", 26, "avx512f"),
)
# The masks under which this machine computes like one with only AVX2.
AVX2_ONLY = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "WINDKERN_CPP_ISA": "avx2",
}

needs_cpp = pytest.mark.skipif(cpu_libraries._cpp is None, reason="needs the C++ extension")


def on_processor(monkeypatch, vendor: str, family: int, flags: str) -> None:
    """Make /proc/cpuinfo describe another processor."""
    cpu_libraries._processor.cache_clear()
    monkeypatch.setattr(cpu_libraries.Path, "exists", lambda path: True)
    monkeypatch.setattr(cpu_libraries.Path, "read_text", lambda path: CPUINFO.format(vendor, family, flags))


@pytest.fixture(autouse=True)
def the_processor_is_read_again():
    yield
    cpu_libraries._processor.cache_clear()


@pytest.mark.parametrize(
    ("processor", "mask", "family"),
    [
        (ZEN_3, "", 0),
        (ZEN_4, "", 25),
        (ZEN_4, "AVX2", 0),
        (ZEN_4, "AVX512_CORE", 25),
        (ZEN_5, "ALL", 26),
        (ZEN_5, "sse41", 0),
        (("GenuineIntel", 6, "avx512f"), "", 0),
    ],
)
def test_onednn_is_wanted_where_mkl_leaves_avx512_unused(monkeypatch, processor, mask, family):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    on_processor(monkeypatch, *processor)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", mask)
    assert cpu_libraries.amd_avx512_family() == family


@pytest.mark.parametrize(
    ("flags", "capability", "mask", "fast"),
    [
        ("avx512f avx512_bf16", "AVX512", "", True),
        ("avx512f amx_bf16", "AVX512", "AVX512_CORE_AMX", True),
        ("avx512f avx512_bf16", "AVX512", "AVX512_CORE", False),
        ("avx512f avx512_bf16", "AVX2", "", False),
        ("avx512f", "AVX512", "", False),
        ("avx2", "AVX2", "", False),
    ],
)
def test_auto_is_bfloat16_where_a_cpu_multiplies_it(monkeypatch, flags, capability, mask, fast):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    on_processor(monkeypatch, "GenuineIntel", 6, flags)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", mask)
    assert cpu_libraries.has_bfloat16_products() == fast
    assert dtype_named("auto", "cpu") == (torch.bfloat16 if fast else torch.float32)
    assert dtype_named("auto", "cuda") == torch.bfloat16
    assert dtype_named("float16", "cpu") == torch.float16


@pytest.mark.parametrize(
    ("runnable", "vendor", "isa", "chosen"),
    [
        (["amx", "avx512bf16"], "GenuineIntel", "", "amx"),
        (["avx512bf16"], "GenuineIntel", "", None),
        (["avx512bf16"], "AuthenticAMD", "avx512", "avx512bf16"),
        (["amx", "avx512bf16"], "GenuineIntel", "avx2", None),
        ([], "AuthenticAMD", "", None),
    ],
)
def test_the_bfloat16_product_is_the_fastest_the_cpu_has(monkeypatch, runnable, vendor, isa, chosen):
    monkeypatch.setattr(cpu_products, "_cpp", SimpleNamespace(bf16_products=lambda: runnable))
    on_processor(monkeypatch, vendor, 6, "avx512f")
    monkeypatch.setenv("WINDKERN_CPP_ISA", isa)
    assert cpu_products._choose() == chosen


def in_another_process(code: str, **variables: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "2", **variables}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


SMALL_TEAM = """
import torch, windkern as wk
from windkern.kernels import cpu_libraries
cpu_libraries.ONEDNN = cpu_libraries.ONEDNN_WEIGHT_GRAD = True  # as on Zen 5
torch.manual_seed(0)
torch.set_num_threads(2)
hidden, weight = torch.randn(64, 32), torch.randn(2049, 32)
targets = torch.randint(2049, (64,))

def found(log_probs, dtype):
    leaves = [value.to(dtype, copy=True).requires_grad_() for value in (hidden, weight)]
    logps = log_probs(*leaves)
    return logps, *torch.autograd.grad(logps.sum(), leaves)

exact = found(lambda h, w: (h @ w.T).log_softmax(-1).gather(1, targets[:, None])[:, 0], torch.float64)
for backend in ("cpp", "torch"):
    for budget in (0, None):
        got = found(
            lambda h, w: wk.token_logps(h, w, targets, memory_budget=budget, backend=backend).logps, torch.float32
        )
        for mine, wanted in zip(got, exact, strict=True):
            assert (mine - wanted).norm() <= 1e-5 * wanted.norm(), backend
"""


@needs_cpp
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
@pytest.mark.parametrize("variables", [{}, {"OMP_THREAD_LIMIT": "1"}, {"OMP_DYNAMIC": "true"}], ids=str)
def test_results_are_right_where_openmp_gives_fewer_threads(variables):
    in_another_process(SMALL_TEAM, **variables)


@needs_cpp
@pytest.mark.parametrize(
    ("name", "value"),
    [("OMP_THREAD_LIMIT", "1"), ("OMP_THREAD_LIMIT", "64"), ("OMP_DYNAMIC", "true"), ("OMP_MAX_ACTIVE_LEVELS", "0")],
)
def test_a_team_that_may_be_smaller_is_not_exact(name, value):
    asks = "from windkern import _cpp; print(_cpp.openmp_team_is_exact())"
    assert in_another_process(asks) == "True"
    assert in_another_process(asks, **{name: value}) == "False"


@needs_cpp
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="calls libgomp by name")
def test_a_team_inside_a_parallel_region_is_not_exact():
    body_of = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    answers = []
    body = body_of(lambda data: answers.append(cpu_libraries._cpp.openmp_team_is_exact()))
    ctypes.CDLL("libgomp.so.1").GOMP_parallel(body, None, 1, 0)
    answers.append(cpu_libraries._cpp.openmp_team_is_exact())
    assert answers == [False, True]


@needs_cpp
def test_onednn_is_not_trusted_where_torch_has_another_openmp(monkeypatch):
    assert cpu_libraries.onednn_is_safe()
    threads = torch.get_num_threads()
    cpu_libraries._shares_openmp_with_torch.cache_clear()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)  # whatever is set elsewhere
    try:
        assert not cpu_libraries.onednn_is_safe()
    finally:
        cpu_libraries._shares_openmp_with_torch.cache_clear()
    monkeypatch.undo()
    assert torch.get_num_threads() == threads


@pytest.fixture
def multiplied(monkeypatch):
    """Record the dtypes of all products of torch."""
    dtypes = set()

    def watched(function):
        def call(*args, **kwargs):
            dtypes.update(each.dtype for each in args if isinstance(each, torch.Tensor))
            return function(*args, **kwargs)

        return call

    for owner, name in ((torch, "mm"), (torch, "addmm"), (torch.Tensor, "addmm_")):
        monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    return dtypes


@pytest.fixture
def without_bf16_products(monkeypatch):
    monkeypatch.setattr(cpu_products, "PRODUCT", None)
    _walk_of.cache_clear()
    yield
    _walk_of.cache_clear()


@pytest.mark.parametrize("gear", ["scoring", "frozen_head", "frozen_body", "trained"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_torch_multiplies_no_16_bit_operands_on_a_cpu(without_bf16_products, multiplied, dtype, gear):
    """Without instructions for them, torch multiplies them 20 to 40 times slower than float32 ones."""
    problem = Problem(Shape((3, 11), (24, 5), 1003), "all")
    for budget in (NARROW, UNLIMITED):
        problem.run(wk.token_logps, dtype, gear, memory_budget=budget, backend="torch")
        problem.run(wk.token_logps, dtype, gear, memory_budget=budget, batch_invariant=True)
    assert multiplied == {torch.float32}


def test_masks_of_an_avx2_cpu_reach_the_choice():
    """On any machine, masks that leave only AVX2 exclude bfloat16 products and oneDNN."""
    asks = (
        "from windkern.kernels import cpu_libraries, cpu_products; "
        "print(cpu_products.PRODUCT, cpu_libraries.ONEDNN, cpu_libraries.ONEDNN_WEIGHT_GRAD)"
    )
    assert in_another_process(asks, **AVX2_ONLY) == "None False False"
