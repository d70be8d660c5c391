"""Builds windkern._cpp and, where there is an nvcc, windkern._cuda with ninja, each file with its own flags.

A build that fails ends the installation and says how to install without that extension. Reason: pip hides what a build
that succeeds has printed, so whoever went on would not learn that a back end is missing.

WINDKERN_BUILD_CPP=0 leaves the C++ extension out; WINDKERN_REQUIRE_CPP=1 forbids that. WINDKERN_BUILD_CUDA=0 leaves the
CUDA extension out, 1 builds it; without it nvcc on PATH (or in CUDA_HOME/bin) decides. WINDKERN_CUDA_ARCHS="90" builds
for fewer GPUs. CXX, WINDKERN_CXXFLAGS and WINDKERN_LDFLAGS, and nvcc's own NVCC_APPEND_FLAGS, are honoured.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
COMMON = "-O3 -std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -Wall -Wextra -Wno-psabi"
# Never -march=native: the CPU that runs a wheel is not the one that built it. dispatch.cpp chooses at run time.
AVX2 = "-mavx2 -mfma"
AVX512 = f"-mavx512f -mavx512bw -mavx512vl -mavx512dq {AVX2}"
X86_FLAGS = {
    "cpu/kernels_avx2.cpp": f"{AVX2} -mf16c",
    "cpu/kernels_avx512.cpp": f"{AVX512} -mf16c -mprefer-vector-width=512",
    "cpu/products_avx512bf16.cpp": f"{AVX512} -mavx512bf16",
    "cpu/products_amx.cpp": f"{AVX512} -mavx512bf16 -mamx-tile -mamx-bf16",
}
CPP_SOURCES = ["binding.cpp", "cpu/dispatch.cpp", "cpu/openmp.cpp"]
CPP_SOURCES += [f"cpu/products_{name}.cpp" for name in ("amx", "avx512bf16")]
CPP_SOURCES += [f"cpu/kernels_{name}.cpp" for name in ("portable", "avx2", "avx512")]
# Machine code for each, and PTX of the newest for GPUs to come.
CUDA_ARCHS = ("80", "90", "100")
NVCC_FLAGS = "-O3 -std=c++17 --threads 2 -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra"
# With instructions of one generation of GPUs, for which alone they are compiled; the last is for an older nvcc.
HOPPER_SOURCES, NO_HOPPER_SOURCES = ["cuda/exps_tiles.cu", "cuda/score_tiles.cu"], ["cuda/no_tiles.cpp"]
HOPPER_NVCC = (12, 5)
# In order of how long they take to compile.
CUDA_SOURCES = [
    *(f"cuda/{n}.cu" for n in ("backward", "forward_unit", "pairs", "forward_kept", "forward_exps", "forward")),
    "cuda/exps.cu",
    "cuda/hidden.cu",
    "cuda/finish.cu",
    "cuda/scored.cu",
    "cuda/segments.cu",
    "cuda/device.cpp",
]
CUDA_BINDING = "cuda/binding.cpp"
ALL_CUDA_SOURCES = [*HOPPER_SOURCES, *NO_HOPPER_SOURCES, *CUDA_SOURCES, CUDA_BINDING]


# Apple's clang takes the pragmas of OpenMP this way, and wants the header of `brew install libomp` (WINDKERN_CXXFLAGS).
# What Python and OpenMP export is left to what the process has loaded by then: torch brings the only libomp.
MACOS = sys.platform == "darwin"
OPENMP = "-Xpreprocessor -fopenmp" if MACOS else "-fopenmp"
LINK = "-shared -undefined dynamic_lookup" if MACOS else "-shared -fopenmp"


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)


def switch(variable: str) -> str:
    """0, 1, or nothing where the variable is not set."""
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{variable} must be 0 or 1, got {value!r}")
    return value


def wants_cpp() -> bool:
    wanted, required = switch("WINDKERN_BUILD_CPP") != "0", switch("WINDKERN_REQUIRE_CPP") == "1"
    if required and not wanted:
        raise SystemExit("WINDKERN_BUILD_CPP=0 leaves out what WINDKERN_REQUIRE_CPP=1 requires; unset one of them")
    return wanted


def wants_cuda() -> bool:
    wanted = switch("WINDKERN_BUILD_CUDA")
    return wanted == "1" or (wanted == "" and find_nvcc() is not None)


def gencode(nvcc: str) -> str:
    """Flags for every GPU of the table that this nvcc knows."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    chosen = os.environ.get("WINDKERN_CUDA_ARCHS", "").replace(",", " ").split() or CUDA_ARCHS
    archs = [arch for arch in chosen if f"compute_{arch}" in listed]
    if not archs:
        raise OSError(f"{nvcc} compiles for none of {', '.join(chosen)}")
    newest = archs[-1]
    machine = [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return " ".join([*machine, f"-gencode arch=compute_{newest},code=compute_{newest}"])


def cuda_sources(nvcc: str) -> list[str]:
    """All that this nvcc compiles, those that take longest first."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", text)
    is_new = release is None or tuple(map(int, release.groups())) >= HOPPER_NVCC
    return [*(HOPPER_SOURCES if is_new else NO_HOPPER_SOURCES), *CUDA_SOURCES]


def in_path(path: Path) -> str:
    """As ninja reads a path: $, spaces and colons escaped."""
    return re.sub(r"[$ :]", r"$\g<0>", str(path))


def in_command(argument: str) -> str:
    """One argument of a command of ninja, which hands it to a shell."""
    return shlex.quote(argument).replace("$", "$$")


def from_environment(variable: str, default: str = "") -> str:
    """Part of a command, as the shell is to read it."""
    return os.environ.get(variable, default).replace("$", "$$")


def object_of(source: str) -> str:
    return source.replace("/", "_").rsplit(".", 1)[0] + ".o"


def pybind11_include() -> str:
    """Of the package, or the copy torch brings along, for machines without a network."""
    try:
        import pybind11

        return pybind11.get_include()
    except ImportError:
        torch = importlib.util.find_spec("torch")
        folder = None if torch is None else Path(torch.origin).parent / "include"
        if folder is None or not (folder / "pybind11").is_dir():
            raise
        return str(folder)


def common_rules() -> list[str]:
    includes = " ".join(f"-isystem {in_command(at)}" for at in (sysconfig.get_path("include"), pybind11_include()))
    return [
        f"cxx = {from_environment('CXX', 'g++')}",
        f"common = {COMMON} {includes} {from_environment('WINDKERN_CXXFLAGS')}",
        f"ldflags = {from_environment('WINDKERN_LDFLAGS')}",
        "rule compile\n  command = $cxx $common $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc",
    ]


def cpp_ninja(output: Path) -> str:
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    lines = [*common_rules(), f"rule link\n  command = $cxx {LINK} $ldflags $in -o $out"]
    for source in CPP_SOURCES:
        flags = X86_FLAGS.get(source, "") if is_x86 else ""
        lines.append(f"build {object_of(source)}: compile {in_path(CSRC / source)}\n  flags = {OPENMP} {flags}")
    lines.append(f"build {in_path(output)}: link {' '.join(map(object_of, CPP_SOURCES))}")
    return "\n".join(lines) + "\n"


def cuda_ninja(output: Path) -> str:
    nvcc = find_nvcc()
    if nvcc is None:
        raise OSError("nvcc is not on PATH; set CUDA_HOME")
    # The runtime is linked in, and hidden: the extension imports without a driver and never meets torch's runtime.
    lines = [
        *common_rules(),
        f"nvcc = {in_command(nvcc)}",
        f"gencode = {gencode(nvcc)}",
        f"rule cuda\n  command = $nvcc {NVCC_FLAGS} $gencode -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc",
        "rule link\n  command = $nvcc -shared --cudart static -Xlinker --exclude-libs,ALL $in -o $out",
    ]
    sources = cuda_sources(nvcc)
    for source in sources:
        only = "\n  gencode = -gencode arch=compute_90a,code=sm_90a" if source in HOPPER_SOURCES else ""
        lines.append(f"build {object_of(source)}: cuda {in_path(CSRC / source)}{only}")
    lines.append(f"build {object_of(CUDA_BINDING)}: compile {in_path(CSRC / CUDA_BINDING)}")
    lines.append(f"build {in_path(output)}: link {' '.join(map(object_of, [*sources, CUDA_BINDING]))}")
    return "\n".join(lines) + "\n"


EXTENSIONS = {"windkern._cpp": cpp_ninja, "windkern._cuda": cuda_ninja}
# What is wrong most often, and how to do without.
ADVICE = {
    "windkern._cpp": "The C++ extension needs a C++17 compiler with OpenMP: g++, or the one that CXX names.\n"
    "WINDKERN_BUILD_CPP=0 installs windkern without it; a CPU then runs the slower back end 'torch'.",
    "windkern._cuda": "The CUDA extension needs nvcc and a host compiler that nvcc accepts.\n"
    "WINDKERN_BUILD_CUDA=0 installs windkern without it; a GPU then runs the back end 'triton'.",
}


def ninja_command() -> list[str]:
    try:
        import ninja

        return [os.path.join(ninja.BIN_DIR, "ninja")]
    except ImportError:
        return ["ninja"]


class BuildWithNinja(build_ext):
    def run(self) -> None:
        names = ", ".join(ext.name for ext in self.extensions)
        print(
            f"windkern: building {names}" + ("" if wants_cuda() else "; no nvcc, or CUDA not wanted"), file=sys.stderr
        )
        super().run()

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve() / f"ninja{ext.name.removeprefix('windkern.')}"
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "build.ninja").write_bytes(os.fsencode(EXTENSIONS[ext.name](output)))
            subprocess.run([*ninja_command(), "-C", str(folder)], check=True)
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            raise CompileError(f"{ext.name} was not built: {error}\n{ADVICE[ext.name]}") from error


def description() -> str:
    """README.md with links that an index of packages can follow, which has no other file of the repository."""
    home = "https://github.com/windkern/windkern"
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"(!\[[^\]]*\]\()(?!https?:)", rf"\1{home}/raw/main/", text)
    return re.sub(r"(?<!!)(\[[^\]]*\]\()(?!https?:|#)", rf"\1{home}/blob/main/", text)


def extension(name: str, sources: list[str]) -> Extension:
    headers = sorted(str(path.relative_to(ROOT)) for path in CSRC.rglob("*.h"))
    return Extension(name, [f"csrc/{source}" for source in sources], depends=headers)


setup(
    long_description=description(),
    long_description_content_type="text/markdown",
    ext_modules=[
        *([extension("windkern._cpp", CPP_SOURCES)] if wants_cpp() else []),
        *([extension("windkern._cuda", ALL_CUDA_SOURCES)] if wants_cuda() else []),
    ],
    cmdclass={"build_ext": BuildWithNinja},
)
