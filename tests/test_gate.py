"""The gate: `make lint` finds everything that Python 3.10 lacks, and .ci/run ends with the tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def run(command: list[str], **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.mark.skipif(not (BIN / "vermin").exists(), reason="needs vermin")
@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("import hashlib\n\nhashlib.file_digest(open('a', 'rb'), 'md5')\n", "'hashlib.file_digest' member"),
        ("import tomllib\n\nids = ids.long()\n", "'tomllib' module"),  # next to a name that looks like Python 2's long
        ("import shutil\n\nshutil.rmtree('a', onexc=None)\n", "shutil.rmtree(onexc)"),
    ],
)
def test_a_newer_standard_library_is_seen(tmp_path, code, name):
    (tmp_path / "planted.py").write_text(code)
    done = run([str(BIN / "vermin"), "--config-file", str(ROOT / "vermin.ini"), str(tmp_path)])
    assert done.returncode == 1 and name in done.stdout, done.stdout


@pytest.mark.skipif(not (BIN / "ruff").exists(), reason="needs ruff")
@pytest.mark.parametrize(
    "code", ["print(a[*b])\n", "print(f'{a['b']}')\n", "type A = int\n", "try:\n    a\nexcept* B: a\n"]
)
def test_newer_syntax_is_seen(tmp_path, code):
    (tmp_path / "planted.py").write_text(code)
    done = run([str(BIN / "ruff"), "check", "--no-cache", "--config", str(ROOT / "pyproject.toml"), str(tmp_path)])
    assert done.returncode == 1 and "on Python 3.10" in done.stdout, done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("script", "passes"),
    [
        ("exit 0", True),
        ("echo 3.11; exit 1", False),
        ("echo File with incompatible versions", False),  # a file was left out, though the exit code is 0
        ("exit 1", False),
    ],
)
def test_lint_reads_every_folder_and_fails_on_any_word(tmp_path, script, passes):
    for name, body in (("ruff", "exit 0"), ("vermin", f'echo "$@" > {tmp_path}/arguments; {script}')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "stamp").touch()
    done = run(["make", "lint", f"BIN={tmp_path}", f"STAMP={tmp_path}/stamp"], cwd=ROOT)
    assert (done.returncode == 0) is passes, done.stdout + done.stderr
    given = (tmp_path / "arguments").read_text().split()
    code = {path.relative_to(ROOT).parts[0] for path in ROOT.glob("[a-z]*/*.py")} | {"setup.py"}
    assert code - {"build", "out"} <= set(given)


def test_ci_lints_and_then_tests_and_wants_the_extension_from_both(tmp_path):
    make = tmp_path / "make"
    make.write_text(f"#!/bin/sh\necho $1 $WINDKERN_REQUIRE_CPP >> {tmp_path}/called\ntest $1 != lint\n")
    make.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert run(["bash", str(ROOT / ".ci" / "run")], env=environment).returncode != 0
    assert (tmp_path / "called").read_text().split("\n")[:-1] == ["lint 1"]
    make.write_text(make.read_text().replace("test $1 != lint", "true"))
    assert run(["bash", str(ROOT / ".ci" / "run")], env=environment).returncode == 0
    assert (tmp_path / "called").read_text().split("\n")[1:-1] == ["lint 1", "test 1"]
