"""Every Triton kernel compiled ahead of time for every chip: no spills, within shared memory, tensor cores used."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """In a process of its own: this one may be running Triton's interpreter."""
    path = tmp_path_factory.mktemp("aot") / "aot.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.aot", "--json", str(path), "--processes", "2"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert path.exists(), done.stderr[-3000:]
    return json.loads(path.read_text())["rows"]


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_every_kernel_compiles_without_spills(rows, target):
    mine = [row for row in rows if row["target"] == target]
    assert len({row["name"].split("[")[0] for row in mine}) == 12
    assert [(row["name"], row["problem"]) for row in mine if row["problem"]] == []
    assert all(row["stack"] == 0 and row["registers"] > 0 for row in mine)


def test_instructions_of_the_chip_are_there(rows):
    found = {(row["name"], row["target"]): row["instructions"] for row in rows}
    assert found["tile_kernel[plain,tma]", "sm_90"]["HGMMA"] > 0
    assert found["tile_kernel[plain,tma]", "sm_90"]["UTMALDG"] > 0
    assert found["tile_kernel[plain]", "sm_80"]["HMMA"] > 0
    assert found["tile_kernel[plain]", "sm_100"]["UTCHMMA"] > 0
    assert found["forward_rows[2048,plain]", "sm_90"]["LDG.E.128"] > 0
