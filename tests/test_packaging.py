"""What an installation contains: one version, extras with what commands need, errors that name missing extras."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import windkern
from windkern import _extras

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()
# Modules whose distribution has a different name.
DISTRIBUTIONS = {"yaml": "pyyaml"}
# They come with a required package: safetensors with transformers, pyarrow with datasets.
WITH_ANOTHER = {"safetensors", "pyarrow"}
WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

import importlib.util
sys.meta_path.insert(0, Missing())
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in {missing!r} else found(name, package)
"""
TRAINING = ("transformers", "accelerate", "peft", "datasets", "yaml", "packaging", "anyio", "matplotlib", "triton")


def without_training(code: str) -> subprocess.CompletedProcess:
    script = WITHOUT.format(missing=TRAINING) + code
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)


def requirements(extra: str) -> set[str]:
    """Return the names that an extra of pyproject.toml requires, nested extras included, in lower case."""
    listed = re.search(rf"^{extra} = \[(.*?)\](?:  #.*)?$", PROJECT, re.DOTALL | re.MULTILINE)[1]
    names = set()
    for inner, name in re.findall(r'"(?:windkern\[([\w,]+)\]|([\w-]+))[^"]*"', listed):
        names |= {name.lower()} if name else set().union(*(requirements(each) for each in inner.split(",")))
    return names


@pytest.mark.parametrize("extra", _extras.EXTRAS)
def test_an_advised_extra_brings_the_modules(extra):
    modules = {DISTRIBUTIONS.get(name, name).lower() for name in _extras.EXTRAS[extra] - WITH_ANOTHER}
    assert modules <= requirements(extra)
    assert {"transformers", "trl"} <= requirements("all")


@pytest.mark.parametrize(
    ("missing", "command"),
    [
        (["matplotlib"], '"windkern[plot]"'),
        (["yaml", "matplotlib"], '"windkern[train]"'),
        (["gguf", "transformers"], '"windkern[demo]"'),
        (["trl", "peft", "deepspeed"], '"windkern[plot,train,demo,trl]" deepspeed'),
        (["deepspeed"], "deepspeed"),
    ],
)
def test_the_smallest_extra_is_advised(missing, command):
    assert _extras.install_command(*missing) == f"python -m pip install {command}"


def test_without_the_trainer_every_other_name_is_there():
    done = without_training("from windkern import *\nfused_loss, naive, tabular, sharding, hf\nimport windkern as wk")
    assert done.returncode == 0, done.stderr
    done = without_training("import inspect, windkern; inspect.getmembers(windkern); windkern.WindTrainer")
    told = 'ImportError: windkern.WindTrainer needs {}; run: python -m pip install "windkern[train]"'
    assert done.stderr.splitlines()[-1] in [told.format(name) for name in TRAINING], done.stderr


def test_the_package_lists_its_names_and_no_others():
    code = "import windkern as wk; assert set(wk.__all__) <= set(dir(wk)); print(*(n for n in dir(wk) if n[0] != '_'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert sorted(done.stdout.split()) == sorted(windkern.__all__), done.stderr


@pytest.mark.parametrize("command", [["doctor", "--json"], ["losses"], ["losses", "--json"], ["--version"]])
def test_commands_that_need_no_extra_run_without(command):
    done = without_training(f"from windkern.commands.cli import main\nsys.exit(main({command}))")
    assert done.returncode == 0, done.stderr


def test_the_version_is_written_once():
    assert re.search(r'^dynamic = \["version"', PROJECT, re.MULTILINE)
    assert not re.search(r'^version = "', PROJECT, re.MULTILINE)
    assert re.fullmatch(r"\d+\.\d+\.\d+(rc\d+|\.dev\d+)?", windkern.__version__)
    assert f"version: {windkern.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_nothing_for_a_gpu_is_required():
    required = re.search(r"^dependencies = \[(.*?)^\]", PROJECT, re.DOTALL | re.MULTILINE)[1]
    assert set(re.findall(r'^  "([\w-]+)', required, re.MULTILINE)) == {"torch", "numpy", "rich"}


def test_no_two_files_of_the_package_are_equal():
    """check-wheel-contents refuses such a wheel: one of the two may have been copied by mistake."""
    files = [path for path in Path(windkern.__file__).parent.rglob("*") if path.suffix in (".py", ".pyi", ".yaml")]
    found: dict[bytes, list[str]] = {}
    for path in files:
        found.setdefault(path.read_bytes(), []).append(path.name)
    assert len(files) > 200 and [names for names in found.values() if len(names) > 1] == []


def test_types_reach_users():
    assert (ROOT / "windkern" / "py.typed").exists() and '"py.typed"' in PROJECT


@pytest.mark.skipif(sys.platform != "linux", reason="needs the wheel of a Linux machine")
def test_the_smoke_test_wants_an_installed_wheel():
    """Planted fault: run on a checkout, it fails at its first check."""
    code = "import runpy, sys; sys.argv = ['x']; runpy.run_path('tests/wheel_smoke.py', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, '.'); {code}"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert "not from an installed wheel" in done.stderr, done.stderr
