"""The tests of the CUDA kernels can fail: planted faults are caught, and the emulator detects its kinds of errors."""

import shutil
import subprocess
from pathlib import Path

import cuda_tools
import pytest
import torch
from cases import SHAPES, Problem
from cuda_cases import Rows, compare
from test_cuda import every_kernel
from test_logprobs import check

from windkern.kernels.native import cuda as cuda_rows
from windkern.kernels.torch import rows as torch_rows

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

# (file, its text, the faulty text), and the .cu file to compile if the fault is in a header.
FAULTS = {
    "dropped tail": ("forward.cu", "first < packs; first += at_once", "first + at_once <= packs; first += at_once"),
    "missing merge": ("forward.cu", "    merge(part, here);\n", "    part = here;\n"),
    "target off by one": (
        "backward.cu",
        "if (row.column == columns.at(column_tile, k))",
        "if (row.column + 1 == columns.at(column_tile, k))",
    ),
    "slot nobody writes": ("team.h", "if (lane == 0) slots", "if (lane == 0 && threadIdx.x > 0) slots", "segments.cu"),
    "block above its bound": ("segments.cu", "segments, dim3(kThreads)", "segments, dim3(2 * kThreads)"),
    "log-prob of an ignored row": ("finish.cu", "scored ? logp : S(0)", "logp"),
    "log-sum-exp of an ignored row": ("finish.cu", "scored ? max + log_sum : S(0)", "max + log_sum"),
    "pivot follows every maximum": ("finish.cu", "max > pivot + S(kSettledRoom)", "max > pivot"),
    "sum relative to the old pivot": ("finish.cu", "sum * lane_exp(max - next)", "sum * lane_exp(max - pivot)"),
    "rescaled zeros of an ignored row": ("finish.cu", "rescales = scored && next", "rescales = next"),
    "entry left out": ("finish.cu", "scored && target < in.columns", "scored && target + 1 < in.columns"),
    "entry beside the target": ("finish.cu", "i == target ?", "i == target + 1 ?"),
    "kept values left behind": ("finish.cu", "widened(kept[i]) * factor)", "widened(kept[i]))"),
    "target of another row": ("finish.cu", "in.targets[first + r]", "in.targets[first]"),
    "hidden states of an ignored row": ("hidden.cu", "if (!ignored) load_any", "load_any"),
    "factor of an ignored row": ("hidden.cu", "ignored ? S(0) : S(-in.slope)", "S(-in.slope)"),
    "sign of the factors": ("hidden.cu", "S(-in.slope)", "S(in.slope)"),
    "factors forgotten": ("hidden.cu", "in.factor == nullptr ? S(1) : ((const S*)in.factor)[row]", "S(1)"),
    "another row of the head": ("hidden.cu", "target * in.head_stride", "row * in.head_stride"),
    "head that is not rounded": ("hidden.cu", "      round_to(in.rounded, found);\n", ""),
    "sums of an ignored row": ("hidden.cu", "if (target >= 0) {", "if (target >= 0 || in.head == nullptr) {"),
    "rows that stay compacted": ("hidden.cu", "in.places == nullptr ? row : in.places[row]", "row"),
    "spare row on top of a scored one": ("hidden.cu", "if (target < 0 && in.places != nullptr) return;", ""),
}
# Messages of the emulator for the faults that it detects itself; the others are visible in results.
SAID = {
    "slot nobody writes": "a thread reads what no thread of its block wrote",
    "block above its bound": "a block of 256 threads, the kernel's bound is 128",
}


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> Path:
    pytest.importorskip("pybind11")
    return cuda_tools.once(cuda_tools.shared_folder(tmp_path_factory), "emulated", cuda_tools.build_emulated)


def build_with(fault: str, objects: Path, folder: Path):
    """Build the emulated module with one line of one file changed, and the other objects from the real module."""
    name, right, wrong, *compiled = FAULTS[fault]
    cuda = cuda_tools.copy_sources(folder) / "cuda"
    text = (cuda / name).read_text()
    assert text.count(right) == 1
    (cuda / name).write_text(text.replace(right, wrong))
    source, changed = cuda / (compiled or [name])[0], str(folder / "changed.o")
    flags = [*cuda_tools.EMULATOR_FLAGS, *cuda_tools.WATCHED]
    cuda_tools.run(["g++", *flags, "-x", "c++", "-c", str(source), "-o", changed])
    others = [str(path) for path in objects.glob("*.o") if path.stem != source.stem]
    cuda_tools.run(["g++", "-shared", changed, *others, "-o", str(folder / "_cuda.so")])
    return cuda_tools.load_emulated(folder)


def exercise(monkeypatch):
    """Run the kernels of a fault on the comparisons: ends of a walk, a wide slab, the walk, and sums of segments."""
    for order in ("forward", "reverse"):
        monkeypatch.setenv("CUDA_EMULATOR_ORDER", order)
        for kernel, options in (
            ("finish", (True, True)),
            ("finish", (True, False)),
            ("factors", (torch.bfloat16, False)),
            ("grads", (torch.float32, False, False)),
            ("grads", (torch.float32, False, True)),
        ):
            compare(lambda: Rows(11, 40, torch.bfloat16), kernel, *options)
        for kernel, options in (("forward", (False,)), ("backward", (True, False, True))):
            compare(lambda: Rows(5, 1003, torch.float32, "softcap", bias=True), kernel, *options)
        check(Problem(SHAPES["odd"], "all"), torch.float32, "trained", memory_budget=0, backend="cuda")
        values, bounds = torch.randn(300), torch.tensor([0, 7, 300])
        torch.testing.assert_close(cuda_rows.segment_sum(values, bounds), torch_rows.segment_sum(values, bounds))


def test_without_a_fault(objects, monkeypatch):
    cuda_tools.install(monkeypatch, cuda_tools.load_emulated(objects))
    exercise(monkeypatch)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault(fault, objects, tmp_path, monkeypatch):
    cuda_tools.install(monkeypatch, build_with(fault, objects, tmp_path))
    with pytest.raises(RuntimeError if fault in SAID else AssertionError, match=SAID.get(fault)):
        exercise(monkeypatch)


@pytest.mark.parametrize("barrier", cuda_tools.barriers(of_tiles=False))
def test_every_barrier_is_missed(barrier, objects, monkeypatch):
    """Each is left out in turn, whether or not a result is wrong; test_cuda.py runs the same kernels with all."""
    monkeypatch.setattr(cuda_rows, "_DBIAS_TILES", 1)  # all rows in one block, which reads them batch after batch
    cuda_tools.install(monkeypatch, cuda_tools.load_emulated(objects))
    monkeypatch.setenv("CUDA_EMULATOR_SKIP", barrier)
    with pytest.raises(RuntimeError, match=r"without a barrier between|no thread of its block wrote"):
        every_kernel()


def build_teeth(folder: Path, flags: list[str]) -> str:
    """Build tests/native/emulator_teeth.cu as a program, with the watcher of memory accesses."""
    source, program = folder / "teeth.cpp", str(folder / "teeth")
    source.write_text(cuda_tools.with_bounds((cuda_tools.NATIVE / "emulator_teeth.cu").read_text()))
    objects = [f"{program}.o", str(folder / "watcher.o")]
    cuda_tools.run(["g++", *cuda_tools.EMULATOR_FLAGS, *flags, "-c", str(source), "-o", objects[0]])
    watcher = str(cuda_tools.NATIVE / "shared_memory.cpp")
    cuda_tools.run(["g++", *cuda_tools.EMULATOR_FLAGS, "-O1", "-c", watcher, "-o", objects[1]])
    cuda_tools.run(["g++", *objects, "-o", program])
    return program


def say(program: str, fault: str, order: str = "forward") -> str:
    ran = subprocess.run([program, fault], capture_output=True, text=True, env={"CUDA_EMULATOR_ORDER": order})
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_emulator_finds_what_breaks_on_a_gpu(tmp_path):
    program = build_teeth(tmp_path, ["-O0"])
    for fault, message in (
        ("ends", "32 threads ended while others wait"),
        ("branch", "threads wait at different barriers"),
        ("part", "threads ended while others wait"),
        ("bound", "a block of 64 threads, the kernel's bound is 32"),
    ):
        assert message in say(program, fault)
    assert say(program, "race") != say(program, "race", "reverse")
    # A seed gives the same order again, and different seeds give different orders.
    shuffled = [say(program, "race", f"random:{seed}") for seed in (1, 2, 1)]
    assert shuffled[0] == shuffled[2] and len({*shuffled, say(program, "race"), say(program, "race", "reverse")}) == 4


@pytest.mark.parametrize("level", ["-O0", "-O1"])
def test_the_watcher_finds_what_no_order_shows(level, tmp_path):
    program = build_teeth(tmp_path, [*cuda_tools.WATCHED, level])
    for fault, message in (
        ("race", "without a barrier between"),
        ("twice", "two threads write without a barrier between"),
        ("overwritten", "without a barrier between"),
        ("sum", "without a barrier between"),
        ("warp", "without a barrier between"),
        ("last block", "block 1: a thread reads what no thread of its block wrote"),
        ("aligned", "is not a multiple of 16"),
    ):
        for order in ("forward", "reverse", "random:1"):
            assert message in say(program, fault, order), (fault, order)
    assert len({say(program, "right", order) for order in ("forward", "reverse", "random:1")}) == 1
    assert say(program, "right").strip().isdigit()


@pytest.mark.slow  # the emulator of the other tests poisons memory and checks addresses too
def test_kernels_are_clean_under_sanitizers(tmp_path):
    """-fsanitize=address,undefined over odd shapes: every array is exactly as large as the contract says."""
    flags = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    objects = cuda_tools.compile_emulated(tmp_path, flags, binding=False)
    programs = {"sanitize": ["3", "64", "520", "pairs", "5"], "sanitize_tiles": []}
    for name, arguments in programs.items():
        sources = [f"{name}.cpp", *(["cuda_table.cpp"] if name == "sanitize" else [])]
        paths, program = [str(cuda_tools.NATIVE / source) for source in sources], str(tmp_path / name)
        cuda_tools.run(["g++", *cuda_tools.EMULATOR_FLAGS, *flags, *paths, *objects, "-o", program])
        environment = {"ASAN_OPTIONS": "detect_leaks=0"}
        ran = subprocess.run([program, *arguments], capture_output=True, text=True, env=environment)
        assert ran.returncode == 0 and ran.stdout == "clean\n", ran.stderr[-3000:]
