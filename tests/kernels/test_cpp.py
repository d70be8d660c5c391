"""The C++ back end: each instruction set against PyTorch, a build without warnings, and reasons where it is absent."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
from cases import SHAPES, UNLIMITED, Problem, Shape
from tolerances import assert_within

import windkern as wk
from windkern.kernels.contract import Kept, RowState, Slab
from windkern.kernels.native import cpp as cpp_rows
from windkern.kernels.native import pointers
from windkern.kernels.torch import rows as torch_rows
from windkern.transform import LogitTransform

ROOT = Path(__file__).parents[2]


def extension():
    """Return windkern._cpp; without it, skip the test, or fail it if WINDKERN_REQUIRE_CPP=1."""
    if os.environ.get("WINDKERN_REQUIRE_CPP") == "1":
        return importlib.import_module("windkern._cpp")
    return pytest.importorskip("windkern._cpp", reason=str(wk.backends.why_not("cpp", "cpu")))


_cpp = extension()
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(params=_cpp.instruction_sets())
def instruction_set(request, monkeypatch):
    monkeypatch.setattr(cpp_rows, "_kernels", _cpp.Kernels(request.param))
    return request.param


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gear", ["frozen_head", "trained"])
def test_every_instruction_set(instruction_set, dtype, gear):
    for shape in (SHAPES["odd"], SHAPES["tiny"], Shape((5,), (8,), 131)):
        problem = Problem(shape, "all")
        exact, plain = problem.exact(dtype, gear), problem.plain(dtype, gear)
        for budget in (0, UNLIMITED):
            ours = problem.run(wk.token_logps, dtype, gear, memory_budget=budget, backend="cpp")
            for name, value in ours.items():
                assert_within(value, exact[name], plain[name], dtype, f"{instruction_set} {name}")


def test_every_instruction_set_on_pairs(instruction_set):
    scores, rewards = torch.randn(2, 37), torch.randn(2, 37)
    where = torch.rand(2, 37) < 0.7
    for loss in ("square", "logistic", "hinge"):
        ours = cpp_rows.pair_terms(scores, None, rewards, where, "bradley_terry", loss)
        plain = torch_rows.pair_terms(scores.double(), None, rewards.double(), where, "bradley_terry", loss)
        for got, want in zip(ours, plain, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_exponential_is_exact_to_rounding(instruction_set, dtype):
    """Kept exp(y - max) of one slab, for gaps from 0 to the smallest normal number and beyond."""
    low = -90.0 if dtype == torch.float32 else -720.0
    z = torch.linspace(low, 0.0, 20001, dtype=dtype).unsqueeze(0)
    z[0, 5] = -torch.inf
    kept, offset = torch.empty_like(z), torch.empty(1, 1, dtype=dtype)
    state = RowState(*(torch.full((1,), start, dtype=dtype) for start in (-torch.inf, 0.0, -torch.inf)), None)
    exact = z.double().exp()
    slab = Slab(z.clone(), None, torch.tensor([3]), 0, LogitTransform())
    cpp_rows.slab_forward(slab, state, Kept(kept, offset))
    normal = exact > torch.finfo(dtype).tiny * 1.01
    relative = ((kept.double() - exact) / exact)[normal].abs().max()
    assert relative <= 2 * torch.finfo(dtype).eps
    assert (kept[~normal].double() - exact[~normal]).abs().max() <= torch.finfo(dtype).tiny * 1.02
    assert kept[0, 5] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_storage_rounds_to_nearest_even(instruction_set, dtype):
    z = -4 * torch.rand(3, 1001)
    kept, offset = torch.empty(3, 1001, dtype=dtype), torch.empty(3, 1)
    state = RowState(*(torch.full((3,), start) for start in (-torch.inf, 0.0, -torch.inf)), None)
    slab = Slab(z.clone(), None, torch.tensor([0, 1, 2]), 0, LogitTransform())
    cpp_rows.slab_forward(slab, state, Kept(kept, offset))
    wanted = (z.double() - offset.double()).exp().float().to(dtype)
    apart = (kept.view(torch.int16).int() - wanted.view(torch.int16).int()).abs()
    assert apart.max() <= 1  # exp itself can differ by its rounding at a tie
    assert (apart == 0).float().mean() > 0.99


def test_threads_follow_torch():
    problem = Problem(SHAPES["odd"], "all")
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(problem.run(wk.token_logps, torch.float32, "trained", backend="cpp"))
    finally:
        torch.set_num_threads(before)
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-5, atol=1e-5)


def test_an_instruction_set_that_is_not_there_is_a_reason_not_a_crash():
    code = "import windkern as wk; print(wk.backends.available('cpu'), wk.backends.why_not('cpp', 'cpu'))"
    environment = {**os.environ, "WINDKERN_CPP_ISA": "avx1024", "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("('torch',) WINDKERN_CPP_ISA='avx1024' is not an instruction set of this CPU")


def test_it_is_the_default_on_a_cpu():
    assert wk.backends.available("cpu")[0] == "cpp"
    assert "it runs on a CPU" in wk.backends.why_not("cpp", "cuda")


def without_extension(monkeypatch):
    """Return `cpp_rows` as it is if windkern._cpp cannot be imported."""
    monkeypatch.setitem(sys.modules, "windkern._cpp", None)
    monkeypatch.delattr(wk, "_cpp", raising=False)
    without = importlib.util.module_from_spec(cpp_rows.__spec__)
    cpp_rows.__spec__.loader.exec_module(without)
    return without


def test_without_the_extension_the_reason_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(pointers, "PACKAGE", tmp_path)  # deliberately left out: no file, and no warning
    without = without_extension(monkeypatch)
    reason = without.why_not(torch.device("cpu"), torch.float32)
    assert "was installed without its extension _cpp; reinstall windkern with a C++17 compiler" in reason
    monkeypatch.setattr(cpp_rows, "why_not", without.why_not)
    assert "cpp" not in wk.backends.available("cpu")
    with pytest.raises(wk.BackendUnavailableError, match="C\\+\\+17 compiler"):
        wk.token_logps(torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([0]), backend="cpp")


@pytest.mark.parametrize(
    ("suffix", "words"),
    [(EXTENSION_SUFFIXES[0], "cannot be loaded"), (".cpython-38-x86_64-linux-gnu.so", "is for another Python")],
)
def test_an_extension_that_does_not_load_is_not_passed_over_in_silence(monkeypatch, tmp_path, suffix, words):
    (tmp_path / f"_cpp{suffix}").touch()
    monkeypatch.setattr(pointers, "PACKAGE", tmp_path)
    with pytest.warns(RuntimeWarning, match=f"extension _cpp {words}.*; another back end runs instead"):
        without = without_extension(monkeypatch)
    assert words in without.why_not(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(("required", "outcome"), [("1", ImportError), ("0", pytest.skip.Exception)])
def test_where_it_is_required_a_missing_extension_is_no_skip(monkeypatch, required, outcome):
    monkeypatch.setitem(sys.modules, "windkern._cpp", None)
    monkeypatch.setenv("WINDKERN_REQUIRE_CPP", required)
    with pytest.raises(outcome):
        extension()


def test_planted_faults_are_caught(monkeypatch):
    """A C++ kernel with shifted targets or without bias fails the comparison that the real one passes."""
    problem = Problem(SHAPES["odd"], "all")
    exact, plain = problem.exact(torch.float32, "trained"), problem.plain(torch.float32, "trained")
    original = cpp_rows._slab

    def compare():
        for name, value in problem.run(wk.token_logps, torch.float32, "trained", backend="cpp").items():
            assert_within(value, exact[name], plain[name], torch.float32, name)

    compare()
    for fault in (
        lambda slab, values: original(slab._replace(start=slab.start + 1), values),
        lambda slab, values: original(slab._replace(bias=None), values),
        lambda slab, values: original(slab._replace(transform=LogitTransform()), values),
    ):
        monkeypatch.setattr(cpp_rows, "_slab", fault)
        with pytest.raises((AssertionError, ValueError)):
            compare()


def test_the_extension_links_no_torch():
    listed = subprocess.run(["ldd", _cpp.__file__], capture_output=True, text=True, check=True).stdout
    linked = re.sub(r"\(0x[0-9a-f]+\)", "", listed)  # an address can read c10
    assert "torch" not in linked and "c10" not in linked


@pytest.mark.slow
@needs_compiler
def test_kernels_are_clean_under_sanitizers(tmp_path):
    """-fsanitize=address,undefined over odd shapes, with warnings as errors."""
    kernels, products = ["portable", "avx2", "avx512"], ["amx", "avx512bf16"]
    sources = ["dispatch", *(f"kernels_{name}" for name in kernels), *(f"products_{name}" for name in products)]
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    avx512 = [*avx2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
    bf16 = [*avx512, "-mavx512bf16", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # GCC's own headers
    flags = {"kernels_avx2": avx2, "kernels_avx512": avx512, "products_avx512bf16": bf16}
    flags["products_amx"] = [*bf16, "-mamx-tile", "-mamx-bf16"]
    common = [
        "g++",
        "-std=c++17",
        "-O0",
        "-fopenmp",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-psabi",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        f"-I{ROOT}/csrc",
    ]
    objects = []
    for source in sources:
        objects.append(str(tmp_path / f"{source}.o"))
        command = [*common, *flags.get(source, []), "-c", f"{ROOT}/csrc/cpu/{source}.cpp", "-o", objects[-1]]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    program = str(tmp_path / "sanitize")
    link = [*common, f"{ROOT}/tests/native/sanitize.cpp", *objects, "-o", program]
    done = subprocess.run(link, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    ran = subprocess.run([program], capture_output=True, text=True, env={"ASAN_OPTIONS": "detect_leaks=1"})
    assert ran.returncode == 0 and ran.stdout == "clean\n", ran.stderr[-3000:]
