"""Triton kernels compiled ahead of time for every chip: no spills, within shared memory, tensor cores used.

The default suite compiles the product kernel, whose tiles and instructions differ most between chips, for two chips;
`make test-all` and `make aot-all` compile all kernels for all chips.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
CHIPS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")


def compiled(folder: Path, *targets: str, kernels: str = "*") -> list[dict]:
    """Compile in another process, because this one may be running Triton's interpreter."""
    path = folder / "aot.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.aot", "--json", str(path), "--processes", "1"]
    command += ["--targets", ",".join(targets), "--kernels", kernels]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert path.exists(), done.stderr[-3000:]
    return json.loads(path.read_text())["rows"]


def assert_without_problems(rows: list[dict]) -> None:
    assert [(row["name"], row["target"], row["problem"]) for row in rows if row["problem"]] == []
    assert all(row["stack"] == 0 and row["registers"] > 0 for row in rows)


def instructions(rows: list[dict]) -> dict[tuple[str, str], dict[str, int]]:
    return {(row["name"], row["target"]): row["instructions"] for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("target", CHIPS)
def test_every_kernel_compiles_without_spills(tmp_path, target):
    rows = compiled(tmp_path, target)
    assert len({row["name"].split("[")[0] for row in rows}) == 15
    assert_without_problems(rows)
    if target == "sm_90":
        found = instructions(rows)
        assert found["forward_rows[2048,plain]", "sm_90"]["LDG.E.128"] > 0


TENSOR_CORES = {
    "sm_80": [("plain", "HMMA")],
    "sm_90": [("plain,tma", "HGMMA"), ("plain,tma", "UTMALDG")],
    "sm_100": [("plain", "UTCHMMA")],
    "sm_120": [("plain,tma", "UTMALDG")],
    "gfx942": [("plain", "v_mfma")],
}


@pytest.mark.parametrize("chips", [("sm_80", "sm_90"), pytest.param(CHIPS, marks=pytest.mark.slow)])
def test_the_product_kernel_uses_the_tensor_cores(tmp_path, chips):
    rows = compiled(tmp_path, *chips, kernels="tile_kernel")
    assert {row["target"] for row in rows} == set(chips)
    assert_without_problems(rows)
    found = instructions(rows)
    for chip in chips:
        for variant, instruction in TENSOR_CORES.get(chip, []):
            assert found[f"tile_kernel[{variant}]", chip][instruction] > 0
