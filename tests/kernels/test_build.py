"""setup.py: the extensions that it builds or deliberately leaves out, and its messages if a build fails."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("setuptools")
# A fake compiler: every input must be a file and every folder must exist; it writes its arguments into every output.
COMPILER = """#!{python}
import os, sys
arguments = sys.argv[1:]
if "--list-gpu-arch" in arguments:
    print("compute_80")
    sys.exit()
if "--version" in arguments:
    print("Cuda compilation tools, release " + os.environ.get("FAKE_NVCC", "13.0") + ", V13.0.88")
    sys.exit()
valued = ("-o", "-MF", "-isystem", "-gencode", "-Xcompiler", "-Xlinker", "--cudart", "--threads")
skipped = {{i + 1 for i, each in enumerate(arguments) if each in valued}}
inputs = [each for i, each in enumerate(arguments) if not each.startswith("-") and i not in skipped]
folders = [arguments[i + 1] for i, each in enumerate(arguments) if each == "-isystem"]
assert inputs and all(map(os.path.isfile, inputs)) and all(map(os.path.isdir, folders)), arguments
for i, each in enumerate(arguments):
    if each in ("-o", "-MF"):
        with open(arguments[i + 1], "w") as output:
            output.write("" if each == "-MF" else repr(arguments))
"""


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of the sources of an installation, without build outputs, at a path that needs quoting."""
    root = tmp_path / "sp ace $ü"
    root.mkdir()
    for path in ROOT.iterdir():
        if path.is_dir() and path.name in ("csrc", "windkern", "tests", "docs", "examples", "benchmarks"):
            shutil.copytree(path, root / path.name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "results"))
        elif (
            path.is_file()
            and path.suffix in (".py", ".toml", ".md", ".in", ".cff", ".yml", "")
            and not path.name.startswith(".")
        ):
            shutil.copy(path, root)
    return root


@pytest.fixture
def compiler(tree) -> Path:
    path = tree / "bin" / "nvcc"
    path.parent.mkdir()
    path.write_text(COMPILER.format(python=sys.executable))
    path.chmod(0o755)
    return path


def setup(tree: Path, *command: str, **variables: str) -> subprocess.CompletedProcess:
    ours = ("CXX", "CUDA_HOME", "CUDA_PATH", "WINDKERN_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment |= {"WINDKERN_BUILD_CUDA": "0"} | variables
    full = [sys.executable, "setup.py", "-q", *command]
    return subprocess.run(full, cwd=tree, env=environment, capture_output=True, text=True)


def test_a_failed_cpp_build_ends_the_installation_and_says_how_to_do_without(tree):
    done = setup(tree, "build_ext", "--inplace", CXX="false")
    assert done.returncode != 0
    assert "windkern._cpp was not built" in done.stderr.splitlines()[-3]
    assert "C++17 compiler" in done.stderr.splitlines()[-2]
    assert "WINDKERN_BUILD_CPP=0 installs windkern without it" in done.stderr.splitlines()[-1]


def test_a_failed_cuda_build_ends_the_installation_and_says_how_to_do_without(tree, compiler):
    compiler.write_text("#!/bin/sh\nexit 1\n")
    switches = {"WINDKERN_BUILD_CPP": "0", "CUDA_HOME": str(compiler.parents[1]), "WINDKERN_BUILD_CUDA": ""}
    done = setup(tree, "build_ext", "--inplace", **switches)
    assert done.returncode != 0 and "windkern._cuda was not built" in done.stderr
    assert "WINDKERN_BUILD_CUDA=0 installs windkern without it" in done.stderr.splitlines()[-1]
    done = setup(tree, "build_ext", "--inplace", **switches | {"CUDA_HOME": str(tree / "none")})
    assert done.returncode == 0  # no nvcc, and none was requested
    done = setup(tree, "build_ext", "--inplace", **switches | {"CUDA_HOME": "none", "WINDKERN_BUILD_CUDA": "1"})
    assert done.returncode != 0 and "nvcc is not on PATH; set CUDA_HOME" in done.stderr


def test_it_can_be_left_out_on_purpose(tree):
    """The wheel is then tagged for every machine."""
    done = setup(tree, "bdist_wheel", CXX="false", WINDKERN_BUILD_CPP="0")
    assert done.returncode == 0, done.stderr
    (wheel,) = (tree / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WINDKERN_BUILD_CPP": "0", "WINDKERN_REQUIRE_CPP": "1"}, "leaves out what WINDKERN_REQUIRE_CPP=1 requires"),
        ({"WINDKERN_BUILD_CPP": "no"}, "WINDKERN_BUILD_CPP must be 0 or 1, got 'no'"),
        ({"WINDKERN_BUILD_CUDA": "12"}, "WINDKERN_BUILD_CUDA must be 0 or 1, got '12'"),
    ],
)
def test_switches_that_make_no_sense(tree, variables, words):
    done = setup(tree, "--version", **variables)
    assert done.returncode != 0 and words in done.stderr


def test_paths_are_quoted(tree, compiler):
    """Sources, objects, includes, nvcc and outputs lie in a folder with a space, a dollar sign and an umlaut."""
    switches = {"CXX": f"'{compiler}'", "CUDA_HOME": str(compiler.parents[1]), "WINDKERN_BUILD_CUDA": "1"}
    (tree / "headers").mkdir()
    (tree / "pybind11.py").write_text(f"def get_include():\n    return {str(tree / 'headers')!r}\n")  # found first
    done = setup(tree, "build_ext", "--inplace", "--build-temp", str(tree / "t mp"), **switches)
    assert done.returncode == 0, done.stdout + done.stderr
    made = {path.name for path in (tree / "t mp" / "ninja_cuda").iterdir()}
    assert "cuda_score_tiles.o" in made and "cuda_no_tiles.o" not in made
    assert {path.name.split(".")[0] for path in (tree / "windkern").glob("*.so")} == {"_cpp", "_cuda"}


def test_an_nvcc_that_lacks_instructions_of_hopper_builds_the_rest(tree, compiler):
    switches = {"WINDKERN_BUILD_CPP": "0", "CUDA_HOME": str(compiler.parents[1]), "WINDKERN_BUILD_CUDA": "1"}
    given = {"CXX": f"'{compiler}'", "FAKE_NVCC": "12.4", **switches}
    done = setup(tree, "build_ext", "--inplace", "--build-temp", str(tree / "old"), **given)
    assert done.returncode == 0, done.stdout + done.stderr
    made = {path.name for path in (tree / "old" / "ninja_cuda").iterdir()}
    assert "cuda_no_tiles.o" in made and "cuda_score_tiles.o" not in made


def test_tiles_are_compiled_for_hopper_alone(tree, compiler):
    """Whatever else is built for, and nothing else is: the instructions are of one generation."""
    switches = {"WINDKERN_BUILD_CPP": "0", "CUDA_HOME": str(compiler.parents[1]), "WINDKERN_BUILD_CUDA": "1"}
    done = setup(tree, "build_ext", "--inplace", "--build-temp", str(tree / "temp"), CXX=f"'{compiler}'", **switches)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {}
    for path in (tree / "temp").rglob("cuda_*.o"):
        arguments = ast.literal_eval(path.read_text())
        found[path.stem] = [arguments[i + 1] for i, each in enumerate(arguments) if each == "-gencode"]
    of_hopper = {f"cuda_{path.stem}" for path in (tree / "csrc" / "cuda").glob("*_tiles.cu")}
    assert len(of_hopper) == 2 and of_hopper < found.keys()
    for name in found.keys() - {"cuda_binding"}:
        ours = ["arch=compute_90a,code=sm_90a"] if name in of_hopper else None
        assert found[name] == (ours or ["arch=compute_80,code=sm_80", "arch=compute_80,code=compute_80"]), name


def test_an_sdist_holds_every_source_whoever_makes_it(tree):
    """Even without nvcc it has the CUDA sources, and tests with their helpers, but no build outputs."""
    (tree / "windkern" / "_cpp.so").touch()
    done = setup(tree, "sdist", "--formats=gztar")
    assert done.returncode == 0, done.stderr
    (archive,) = (tree / "dist").iterdir()
    with tarfile.open(archive) as opened:
        names = {name.split("/", 1)[1] for name in opened.getnames() if "/" in name}
        (told,) = (name for name in opened.getnames() if name.count("/") == 1 and name.endswith("/PKG-INFO"))
        about = opened.extractfile(told).read().decode()
    links = re.findall(r"\]\(([^)]+)\)", about)
    assert len(links) > 10 and all(link.startswith("https://") for link in links)  # a package index has no other files
    for folder in ("csrc", "windkern", "tests", "docs", "examples", "benchmarks"):
        wanted = {str(path.relative_to(tree)) for path in (tree / folder).rglob("*") if path.is_file()}
        assert wanted - names == ({"windkern/_cpp.so"} if folder == "windkern" else set())
    assert {"AGENTS.md", "CITATION.cff", "mkdocs.yml"} <= names
    assert {"CHANGELOG.md", "Makefile", "README.md", "LICENSE", "pyproject.toml", "setup.py"} <= names
