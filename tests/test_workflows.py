"""Workflows run only targets of the Makefile, and the issue forms ask for what a report needs."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def commands(text: str) -> list[str]:
    jobs = yaml.safe_load(text)["jobs"].values()
    return [step["run"] for job in jobs for step in job["steps"] if "run" in step]


def strange(text: str) -> list[str]:
    """Return the commands that are not `make TARGET` with a target of the Makefile."""
    return [each for each in commands(text) if not (each.split()[0] == "make" and set(each.split()[1:]) <= TARGETS)]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_make(path):
    assert not strange(path.read_text())


def test_the_check_sees_another_command_and_an_unknown_target():
    text = "jobs: {a: {steps: [{run: make lint}, {run: pip install x}, {run: make nothing}, {uses: b}]}}"
    assert strange(text) == ["pip install x", "make nothing"]


GIVEN = {"ARGS", "SERVE"}  # on the command line of make
OPTIONAL = {"TORCH_INDEX"}  # unset where pip finds torch by itself


def undefined(*command: str) -> set[str]:
    """Variables that the recipes of targets use and nobody sets."""
    told = ["make", "--dry-run", "--always-make", "--warn-undefined-variables", *command]
    said = subprocess.run(told, cwd=ROOT, capture_output=True, text=True).stderr
    return set(re.findall(r"undefined variable '(\w+)'", said)) - GIVEN - OPTIONAL


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_recipes_use_variables_that_are_set(tmp_path):
    assert undefined(*TARGETS) == set()
    (tmp_path / "planted.mk").write_text("all:\n\techo $(LIBRARIES)\n")
    assert undefined("-f", str(tmp_path / "planted.mk")) == {"LIBRARIES"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_ends_in_time_and_may_do_little(path):
    content = yaml.safe_load(path.read_text())
    assert content["permissions"]["contents"] == "read"
    assert all(0 < job["timeout-minutes"] <= 90 for job in content["jobs"].values())


def test_every_gate_is_run_by_some_workflow():
    run = {target for path in WORKFLOWS for each in commands(path.read_text()) for target in each.split()[1:]}
    gates = {"lint", "types", "docs", "test", "test-lowest", "test-newest", "test-all", "wheel", "pure", "gpu"}
    assert gates <= run


@pytest.mark.parametrize("name", ["bug", "slow"])
def test_a_report_brings_the_doctor(name):
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    required = [field for field in form["body"] if field.get("validations", {}).get("required")]
    assert any("windkern doctor --json" in field["attributes"]["label"] for field in required)


def test_help_lists_every_target():
    listed = set(re.findall(r"^## ([\w-]+)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert listed == TARGETS - {"help"}
