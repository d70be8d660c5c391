"""csrc/cuda compiled two ways for the tests: for the CPU under the emulator, and by nvcc as the package builds it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from filelock import FileLock

import windkern as wk
from windkern.kernels import cuda_rows

ROOT = Path(__file__).parents[1]
CUDA = ROOT / "csrc" / "cuda"
EMULATOR_FLAGS = (
    "-std=c++17 -U_FORTIFY_SOURCE -fPIC -fvisibility=hidden -fno-strict-aliasing "
    f"-Wall -Wextra -Werror -Wno-unknown-pragmas -DWK_ISA=emulated -I{ROOT}/tests/native/cuda_emulator -I{ROOT}/csrc"
).split()


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"
    return done.stdout


def compile_emulated(folder: Path, flags: list[str], *, binding: bool) -> list[str]:
    """Objects of csrc/cuda for the emulator, two at a time."""
    sources = sorted(CUDA.glob("*.cu")) + [CUDA / "device.cpp"] + [CUDA / "binding.cpp"] * binding
    python: list[str] = []
    if binding:
        import pybind11

        python = ["-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include()]

    def one(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        run(["g++", *EMULATOR_FLAGS, *flags, *python, "-x", "c++", "-c", str(source), "-o", target])
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, sources))


def shared_folder(tmp_path_factory) -> Path:
    """One folder for all processes of a test run."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def once(shared: Path, name: str, make: Callable[[Path], None]) -> Path:
    """`make` fills a folder once for all test processes."""
    folder = shared / name
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            (folder / "done").touch()
    return folder


def build_emulated(folder: Path) -> None:
    objects = compile_emulated(folder, ["-O1"], binding=True)
    run(["g++", "-shared", *objects, "-o", str(folder / "_cuda.so")])


def load_emulated(folder: Path) -> ModuleType:
    # Hazard: pybind11 returns a module it has already made under that full name. Remedy: the folder is part of it.
    spec = importlib.util.spec_from_file_location(f"{folder.name}._cuda", folder / "_cuda.so")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def install(monkeypatch, module: ModuleType) -> None:
    """The CUDA back end runs on CPU tensors through `module`, with stream 0 of no device."""

    @contextmanager
    def queue_of(tensor: torch.Tensor) -> Iterator[object]:
        assert tensor.device.type == "cpu"
        yield module.Queue(-1, 0)

    monkeypatch.setattr(cuda_rows, "_cuda", module)
    monkeypatch.setattr(cuda_rows, "_queue_of", queue_of)
    monkeypatch.setattr(cuda_rows, "why_not", lambda device, dtype: None)
    assert wk.backends.why_not("cuda", "cpu") is None
