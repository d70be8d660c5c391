"""Builds windkern._cpp with ninja, each file with its own flags. The package installs without it where it cannot be
built: `windkern.backends.why_not("cpp", "cpu")` then says so."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
COMMON = "-O3 -std=c++17 -fPIC -fvisibility=hidden -fopenmp -fno-math-errno -Wall -Wextra -Wno-psabi"
# Never -march=native: the CPU that runs a wheel is not the one that built it. dispatch.cpp chooses at run time.
X86_FLAGS = {
    "cpu/kernels_avx2.cpp": "-mavx2 -mfma -mf16c",
    "cpu/kernels_avx512.cpp": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c "
    "-mprefer-vector-width=512",
    "cpu/products_avx512bf16.cpp": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mavx2 -mfma",
}
SOURCES = ["binding.cpp", "cpu/dispatch.cpp", "cpu/products_avx512bf16.cpp"]
SOURCES += [f"cpu/kernels_{name}.cpp" for name in ("portable", "avx2", "avx512")]


def ninja_file(output: Path) -> str:
    import pybind11

    includes = f"-isystem {sysconfig.get_path('include')} -isystem {pybind11.get_include()}"
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    lines = [
        f"cxx = {os.environ.get('CXX', 'g++')}",
        f"common = {COMMON} {includes} {os.environ.get('WINDKERN_CXXFLAGS', '')}",
        "rule compile\n  command = $cxx $common $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = $cxx -shared -fopenmp {os.environ.get('WINDKERN_LDFLAGS', '')} $in -o $out",
    ]
    objects = []
    for source in SOURCES:
        objects.append(source.replace("/", "_").replace(".cpp", ".o"))
        flags = X86_FLAGS.get(source, "") if is_x86 else ""
        lines.append(f"build {objects[-1]}: compile {ROOT / 'csrc' / source}\n  flags = {flags}")
    lines.append(f"build {output}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def ninja_command() -> list[str]:
    try:
        import ninja

        return [os.path.join(ninja.BIN_DIR, "ninja")]
    except ImportError:
        return ["ninja"]


class BuildWithNinja(build_ext):
    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve() / "ninja"
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "build.ninja").write_text(ninja_file(output))
            subprocess.run([*ninja_command(), "-C", str(folder)], check=True)
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            if os.environ.get("WINDKERN_REQUIRE_CPP") == "1":
                raise
            print(f"windkern: the C++ back end was not built ({error}); the torch one still works", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]

    def copy_extensions_to_source(self) -> None:
        """Editable installs: what could not be built is not copied."""
        built = os.path.join(self.build_lib, self.get_ext_filename(self.extensions[0].name))
        if os.path.exists(built):
            super().copy_extensions_to_source()


setup(
    ext_modules=[Extension("windkern._cpp", [f"csrc/{source}" for source in SOURCES])],
    cmdclass={"build_ext": BuildWithNinja},
)
