"""Compile csrc/cuda in two ways for the tests: for the CPU under the emulator, and by nvcc like the package."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
from filelock import FileLock

import windkern as wk
from windkern.kernels.native import cuda as cuda_rows

ROOT = Path(__file__).parents[1]
NATIVE = ROOT / "tests" / "native"
EMULATOR_FLAGS = (
    "-std=c++17 -U_FORTIFY_SOURCE -fPIC -fvisibility=hidden -fno-strict-aliasing "
    f"-Wall -Wextra -Werror -Wno-unknown-pragmas -DWK_ISA=emulated -I{NATIVE}/cuda_emulator -I{ROOT}/csrc"
).split()
# Every load and store of a kernel calls tests/native/shared_memory.cpp, and every address is checked for alignment.
# Reason: g++ would load values that a branch skips (phiopt), and calls at the entry of functions take time.
WATCHED = ["-O1", "-fsanitize=thread,alignment", "-fno-ssa-phiopt", "--param=tsan-instrument-func-entry-exit=0"]


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"
    return done.stdout


def barriers(*, of_tiles: bool) -> list[str]:
    """Return file:line of every __syncthreads() of the kernels that multiply themselves, or of all others."""
    return [
        f"{path.name}:{number}"
        for path in sorted((ROOT / "csrc" / "cuda").iterdir())
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if "__syncthreads();" in line.split("//")[0] and ("tile" in path.name) == of_tiles
    ]


def _closing(text: str, start: int) -> int:
    """Return the position after the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place + 1
    raise AssertionError(f"unbalanced: {text[start : start + 80]}")


def with_bounds(text: str) -> str:
    """Return a source whose kernels begin with a check of their first __launch_bounds__, with the same lines."""
    parts, done = [], 0
    for found in re.finditer(r"__launch_bounds__(?=\()", text):
        stop = _closing(text, found.end())
        most = text[found.end() + 1 : stop - 1].split(",")[0]
        name = re.compile(r"\s*\w+(?=\()").match(text, stop)
        body = re.compile(r"\s*\{").match(text, _closing(text, name.end()))
        parts += [text[done : body.end()], f" ::cuda_emulator::check_bound({most});"]
        done = body.end()
    return "".join([*parts, text[done:]])


def copy_sources(folder: Path) -> Path:
    """Copy csrc in the form for the emulator."""
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    for path in (csrc / "cuda").iterdir():
        path.write_text(with_bounds(path.read_text()))
    return csrc


def compile_emulated(folder: Path, flags: list[str], *, binding: bool) -> list[str]:
    """Compile the objects of csrc/cuda for the emulator, two at a time."""
    cuda = copy_sources(folder) / "cuda"
    sources = [*sorted(cuda.glob("*.cu")), cuda / "device.cpp"]
    jobs = [(source, flags) for source in sources]
    if binding:
        import pybind11

        headers = ["-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include()]
        jobs += [(cuda / "binding.cpp", ["-O1", *headers]), (NATIVE / "shared_memory.cpp", ["-O2"])]

    def one(job: tuple[Path, list[str]]) -> str:
        source, options = job
        target = str(folder / f"{source.stem}.o")
        run(["g++", *EMULATOR_FLAGS, *options, "-x", "c++", "-c", str(source), "-o", target])
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, jobs))


def shared_folder(tmp_path_factory) -> Path:
    """Return a folder for all processes of a test run."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def once(shared: Path, name: str, make: Callable[[Path], None]) -> Path:
    """Let `make` fill a folder once for all test processes."""
    folder = shared / name
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            (folder / "done").touch()
    return folder


def build_emulated(folder: Path) -> None:
    objects = compile_emulated(folder, WATCHED, binding=True)
    run(["g++", "-shared", *objects, "-o", str(folder / "_cuda.so")])


def load_emulated(folder: Path) -> ModuleType:
    # Hazard: pybind11 returns an existing module with the same full name. Remedy: the folder is part of the name.
    spec = importlib.util.spec_from_file_location(f"{folder.name}._cuda", folder / "_cuda.so")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def emulated_module(tmp_path_factory) -> ModuleType:
    """Return the module under the emulator, built once for all test processes."""
    pytest.importorskip("pybind11")
    return load_emulated(once(shared_folder(tmp_path_factory), "emulated", build_emulated))


def install(monkeypatch, module: ModuleType, *, tiles: bool = False) -> None:
    """Make the CUDA back end run on CPU tensors through `module`, with stream 0 of no device.

    With `tiles` it multiplies 16-bit operands itself, as on a Hopper GPU.
    """

    @contextmanager
    def queue_of(tensor: torch.Tensor) -> Iterator[object]:
        assert tensor.device.type == "cpu"
        yield module.Queue(-1, 0)

    monkeypatch.setattr(cuda_rows, "_cuda", module)
    monkeypatch.setattr(cuda_rows, "_queue_of", queue_of)
    monkeypatch.setattr(cuda_rows, "why_not", lambda device, dtype: None)
    monkeypatch.setattr(cuda_rows, "_why_no_tiles", lambda: None if tiles else "the test wants slabs")
    assert wk.backends.why_not("cuda", "cpu") is None
