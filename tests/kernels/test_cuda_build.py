"""Test windkern._cuda as setup.py builds it: code for three GPUs without spills, with 128-bit accesses.

It must link neither a CUDA library nor torch, and import without a driver. The installed extension is tested if no
source is newer.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import cuda_tools
import pytest
import torch

import windkern as wk
from windkern.kernels.native import cuda as cuda_rows

ROOT = cuda_tools.ROOT
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
ARCHS = ("80", "90", "100")


def cuobjdump() -> str | None:
    """Return nvcc's cuobjdump, or the one in the triton package."""
    found = shutil.which("cuobjdump")
    nvcc = shutil.which("nvcc")
    if found is None and nvcc is not None:
        found = shutil.which("cuobjdump", path=str(Path(nvcc).resolve().parent))
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None:
        found = shutil.which("cuobjdump", path=str(Path(spec.origin).parent / "backends" / "nvidia" / "bin"))
    return found


needs_cuobjdump = pytest.mark.skipif(cuobjdump() is None, reason="needs cuobjdump")


def build_as_users_do(folder: Path) -> None:
    """Build the extension like a user, with warnings of all compiler passes as errors."""
    environment = {
        **os.environ,
        "WINDKERN_BUILD_CPP": "0",
        "WINDKERN_REQUIRE_CPP": "0",
        "WINDKERN_BUILD_CUDA": "1",
        "WINDKERN_CXXFLAGS": "-Werror -O0",
        "NVCC_APPEND_FLAGS": "-Werror all-warnings -Xcompiler -Werror",
    }
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "building windkern._cuda" in done.stderr


def installed(package: Path) -> Path | None:
    """Return the extension of a package if it was built from the current sources next to it."""
    sources = [package.parent / "setup.py", *package.parent.glob("csrc/**/*.*")]
    newest = max(path.stat().st_mtime for path in sources)
    fresh = [path for path in package.glob(f"_cuda*{EXTENSION_SUFFIXES[0]}") if path.stat().st_mtime > newest]
    return fresh[0] if fresh else None


def built(tmp_path_factory) -> Path:
    folder = cuda_tools.once(cuda_tools.shared_folder(tmp_path_factory), "nvcc", build_as_users_do)
    return next(folder.glob("windkern/_cuda*.so"))


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return installed(ROOT / "windkern") or built(tmp_path_factory)


@pytest.mark.slow
@needs_nvcc
def test_it_builds_without_a_warning(tmp_path_factory):
    assert built(tmp_path_factory).stat().st_size > 0


def test_an_extension_older_than_a_source_is_built_again(tmp_path):
    package, source = tmp_path / "windkern", tmp_path / "csrc" / "cuda" / "pairs.cu"
    for path in (package / f"_cuda{EXTENSION_SUFFIXES[0]}", source, tmp_path / "setup.py"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (2000, 2000))
    assert installed(package) is None
    os.utime(package / f"_cuda{EXTENSION_SUFFIXES[0]}", (3000, 3000))
    assert installed(package) == package / f"_cuda{EXTENSION_SUFFIXES[0]}"
    os.utime(source, (4000, 4000))
    assert installed(package) is None


def resources(library: Path) -> list[dict[str, str | int]]:
    """Return one row for each kernel and GPU."""
    text = cuda_tools.run([cuobjdump(), "--dump-resource-usage", str(library)])
    rows, arch, name = [], "", ""
    for line in text.splitlines():
        if found := re.search(r"arch = sm_(\d+)", line):
            arch = found.group(1)
        elif found := re.search(r"Function (\S+):", line):
            name = found.group(1)
        elif "REG:" in line:
            used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}
            rows.append({"arch": arch, "kernel": name, **used})
    return rows


@needs_nvcc
@needs_cuobjdump
def test_no_kernel_spills_or_uses_local_memory(library):
    rows = resources(library)
    for arch in ARCHS:
        kernels = [row["kernel"] for row in rows if row["arch"] == arch]
        for name, count in (
            ("score", 3),
            ("two_looks", 21),
            ("backward", 14),
            ("meet_for_loss", 12),
            ("end_rows", 4),
            ("factor_rows", 4),
            ("end_grad", 4),
        ):
            assert sum(bool(re.search(rf"\d{name}I", kernel)) for kernel in kernels) == count, (arch, name)
    for row in rows:
        assert row["STACK"] == row["LOCAL"] == 0, row
    # The launch bounds promise two blocks of 512 threads where a row is kept.
    assert all(row["REG"] <= 64 for row in rows if re.search("KeptOutput|ExpsOutput", row["kernel"]))


# Kernels of csrc/cuda/*_tiles.cu, as the compiler spells their names.
TILES = {"5tilesI": 8, "4joinE": 1, "6settleE": 1, "12guess_pivotsI": 1}


@needs_nvcc
@needs_cuobjdump
def test_kernels_that_multiply_are_built_for_hopper_alone(library):
    """With all registers that a block of 384 threads can have, and none of them spilt."""
    rows = resources(library)
    for name, count in TILES.items():
        found = [row for row in rows if name in row["kernel"]]
        assert len(found) == count and {row["arch"] for row in found} == {"90"}, name
        assert all(row["STACK"] == row["LOCAL"] == 0 for row in found)
        assert name != "5tilesI" or {row["REG"] for row in found} == {168}
    listed = cuda_tools.run([cuobjdump(), "--list-elf", str(library)])
    assert len(re.findall(r"\.sm_90a\.cubin", listed)) == 2


@needs_nvcc
@needs_cuobjdump
@pytest.mark.slow
def test_kernels_that_multiply_use_tensor_cores_and_the_copy_engine(library):
    """64 rows and 256 columns at once, of the operands' dtype; clusters copy to both of their blocks."""
    kernels = [row["kernel"] for row in resources(library) if "5tilesI" in row["kernel"]]
    sass = cuda_tools.run([cuobjdump(), "-sass", "-arch", "sm_90a", "-fun", ",".join(kernels), str(library)])
    functions = re.split(r"\n\s*Function : ", sass)[1:]
    assert len(functions) == len(kernels)
    for text in functions:
        name = text.split("\n", 1)[0]
        assert re.search(r"HGMMA\.64x256x16\.F32" + (r"\.BF16" if "BFloat16" in name else " "), text), name
        assert "UTMALDG.2D " in text and ("UTMALDG.2D.MULTICAST" in text) == ("Li2E" in name), name
        assert "USETMAXREG" in text and not re.search(r"\b(LDL|STL)\b", text), name


@needs_nvcc
@needs_cuobjdump
@pytest.mark.slow
def test_row_kernels_move_16_bytes_at_a_time(library):
    sass = cuda_tools.run([cuobjdump(), "-sass", "-arch", "sm_90", str(library)])
    functions = re.split(r"\n\s*Function : ", sass)[1:]
    wide = [
        text
        for text in functions
        if re.search(r"(two_looks|score|backward|again|factor_rows|end_grad)I.*Lb1E(EE|NS|Li)", text.split("\n", 1)[0])
    ]
    assert len(wide) == 1 + 9 + 6 + 3 + 2 + 2
    for text in wide:
        name = text.split("\n", 1)[0]
        assert re.search(r"LDG\.E\S*\.128", text), name
        assert "score" in name or re.search(r"STG\.E\S*\.128", text), name
    assert not any(re.search(r"\b(LDL|STL)\b", text) for text in functions)


@needs_nvcc
@needs_cuobjdump
def test_newer_gpus_find_ptx(library):
    listed = cuda_tools.run([cuobjdump(), "--list-ptx", str(library)])
    assert f"sm_{ARCHS[-1]}" in listed


@needs_nvcc
def test_it_links_nothing_of_cuda_or_torch(library):
    listed = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=True).stdout
    linked = re.sub(r"\(0x[0-9a-f]+\)", "", listed)  # an address can read c10
    for name in ("torch", "c10", "libcuda", "cudart"):
        assert name not in linked
    exported = cuda_tools.run(["nm", "-D", "--defined-only", str(library)])
    assert "PyInit__cuda" in exported
    assert not re.search(r" cuda[A-Z]\w+$", exported, re.MULTILINE)  # its runtime never answers torch's calls


@needs_nvcc
def test_it_imports_without_a_driver(library):
    code = (
        "import importlib.util as u, sys; spec = u.spec_from_file_location('windkern._cuda', sys.argv[1]);"
        "m = u.module_from_spec(spec); spec.loader.exec_module(m); print(m.device_problem(0), m.pair_tiles(33))"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code, str(library)], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.startswith("the CUDA driver is missing or cannot be used (")
    assert done.stdout.endswith(" 2\n")


@needs_nvcc
def test_a_launch_that_fails_names_kernel_and_error(library, monkeypatch):
    """Without a driver, every launch fails: the message has the file, the kernel and CUDA's own words."""
    if torch.cuda.is_available():
        pytest.skip("launches succeed here")
    spec = importlib.util.spec_from_file_location("windkern._cuda", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cuda_tools.install(monkeypatch, module)
    with pytest.raises(RuntimeError, match=r"segments\.cu:\d+: segment_sum: CUDA driver version is insufficient"):
        cuda_rows.segment_sum(torch.zeros(3), torch.tensor([0, 3]))


def test_reasons_are_told(monkeypatch):
    assert "it runs on an NVIDIA GPU, not on cpu" in wk.backends.why_not("cuda", "cpu")
    monkeypatch.setattr(cuda_rows, "_cuda", None)
    monkeypatch.setattr(cuda_rows, "_reason", "no module", raising=False)
    assert "WINDKERN_BUILD_CUDA=1" in wk.backends.why_not("cuda", "cuda")
    assert "cuda" not in wk.backends.available("cuda")
    with pytest.raises(wk.BackendUnavailableError, match="backend='cuda' cannot run on cpu"):
        wk.token_logps(torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([0]), backend="cuda")


class OneGPU:
    """A fake extension on a machine with one GPU that is new enough, to test the reasons after that."""

    def __init__(self, problem: str = ""):
        self.problem, self.asked = problem, []

    def device_problem(self, index: int) -> str:
        self.asked.append(index)
        return self.problem


@pytest.mark.parametrize("has_torch", [False, True])
@pytest.mark.parametrize("problem", ["", "it is built for compute capability 8.0 and newer, this GPU has 7.5"])
def test_reasons_of_the_device(monkeypatch, has_torch, problem):
    monkeypatch.setattr(cuda_rows, "_cuda", OneGPU(problem))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_torch)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    reason = wk.backends.why_not("cuda", "cuda")
    if problem:
        assert reason == problem
    else:
        assert reason == (None if has_torch else "this torch has no CUDA; install a CUDA build of torch")
    if has_torch:
        assert cuda_rows._cuda.asked == [3]
        wk.backends.why_not("cuda", "cuda:1")
        assert cuda_rows._cuda.asked == [3, 1]
        monkeypatch.setattr(torch.version, "hip", "6.2")
        assert "AMD" in wk.backends.why_not("cuda", "cuda")


def test_kernels_run_on_torchs_stream_of_the_tensors_device(monkeypatch):
    """The extension gets the device and stream of the tensor, with that device current around the call."""
    current, queues = [], []

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            current.append(self.device)

        def __exit__(self, *_):
            current.pop()

    class Stream:
        cuda_stream = 1234

    class Extension(OneGPU):
        def Queue(self, device, stream):
            queues.append((device, stream, list(current)))
            return "queue"

    class Tensor:
        device = torch.device("cuda:2")

    monkeypatch.setattr(cuda_rows, "_cuda", Extension())
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    with cuda_rows._queue_of(Tensor()) as queue:
        assert queue == "queue" and current == [torch.device("cuda:2")]
    assert queues == [(2, 1234, [torch.device("cuda:2")])] and current == []
