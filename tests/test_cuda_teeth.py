"""The tests of the CUDA kernels can fail: planted faults are caught, and the emulator finds what it is there for."""

import shutil
import subprocess
from pathlib import Path

import cuda_tools
import pytest
import torch
from cases import SHAPES, Problem
from cuda_cases import Rows, compare
from test_logprobs import check

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

# (file, what it says, what the fault says)
FAULTS = {
    "dropped tail": ("forward.cu", "first < packs; first += at_once", "first + at_once <= packs; first += at_once"),
    "missing merge": ("forward.cu", "    merge(part, here);\n", "    part = here;\n"),
    "target off by one": (
        "backward.cu",
        "if (row.column == columns.at(column_tile, k))",
        "if (row.column + 1 == columns.at(column_tile, k))",
    ),
    "missing barrier": ("backward.cu", "thread);\n    __syncthreads();\n", "thread);\n"),
}


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> Path:
    pytest.importorskip("pybind11")
    return cuda_tools.once(cuda_tools.shared_folder(tmp_path_factory), "emulated", cuda_tools.build_emulated)


def build_with(fault: str, objects: Path, folder: Path):
    """The emulated module with one line of one file changed; the other objects are those of the real one."""
    name, right, wrong = FAULTS[fault]
    csrc = folder / "csrc"
    shutil.copytree(cuda_tools.ROOT / "csrc", csrc)
    source = csrc / "cuda" / name
    text = source.read_text()
    assert text.count(right) == 1
    source.write_text(text.replace(right, wrong))
    changed = str(folder / "changed.o")
    cuda_tools.run(["g++", *cuda_tools.EMULATOR_FLAGS, "-O1", "-x", "c++", "-c", str(source), "-o", changed])
    others = [str(path) for path in objects.glob("*.o") if path.stem != source.stem]
    cuda_tools.run(["g++", "-shared", changed, *others, "-o", str(folder / "_cuda.so")])
    return cuda_tools.load_emulated(folder)


def exercise(monkeypatch):
    """What the fault's kernels are compared on: a wide slab, then the walk."""
    for order in ("forward", "reverse"):
        monkeypatch.setenv("CUDA_EMULATOR_ORDER", order)
        for kernel, options in (("forward", (False,)), ("backward", (True, False, True))):
            compare(lambda: Rows(5, 1003, torch.float32, "softcap", bias=True), kernel, *options)
        check(Problem(SHAPES["odd"], "all"), torch.float32, "trained", memory_budget=0, backend="cuda")


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault(fault, objects, tmp_path, monkeypatch):
    cuda_tools.install(monkeypatch, cuda_tools.load_emulated(objects))
    exercise(monkeypatch)
    cuda_tools.install(monkeypatch, build_with(fault, objects, tmp_path))
    with pytest.raises(AssertionError):
        exercise(monkeypatch)


def test_the_emulator_finds_what_breaks_on_a_gpu(tmp_path):
    source, program = cuda_tools.ROOT / "tests" / "native" / "emulator_teeth.cu", str(tmp_path / "teeth")
    cuda_tools.run(["g++", *cuda_tools.EMULATOR_FLAGS, "-O0", "-x", "c++", str(source), "-o", program])
    for fault, message in (
        ("ends", "32 threads ended while others wait"),
        ("branch", "threads wait at different barriers"),
        ("part", "threads ended while others wait"),
    ):
        assert message in cuda_tools.run([program, fault])
    sums = [
        subprocess.run([program, "race"], capture_output=True, text=True, env={"CUDA_EMULATOR_ORDER": order}).stdout
        for order in ("forward", "reverse")
    ]
    assert sums[0] != sums[1]


def test_kernels_are_clean_under_sanitizers(tmp_path):
    """-fsanitize=address,undefined over odd shapes: every array is exactly as large as the contract says."""
    flags = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    objects = cuda_tools.compile_emulated(tmp_path, flags, binding=False)
    native, program = cuda_tools.ROOT / "tests" / "native", str(tmp_path / "sanitize")
    sources = [str(native / name) for name in ("sanitize.cpp", "cuda_table.cpp")]
    cuda_tools.run(["g++", *cuda_tools.EMULATOR_FLAGS, *flags, *sources, *objects, "-o", program])
    command = [program, "3", "64", "520", "pairs", "5"]
    ran = subprocess.run(command, capture_output=True, text=True, env={"ASAN_OPTIONS": "detect_leaks=0"})
    assert ran.returncode == 0 and ran.stdout == "clean\n", ran.stderr[-3000:]
