"""The benchmark of heads sharded over processes, and its table."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from distributed_tools import launch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import readme

pytestmark = pytest.mark.slow
MODES = ("scoring", "frozen", "trained")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("sharded")
    (rows, _) = launch("benchmark", folder, module="sharding_session")
    return folder, rows


def test_every_provider_is_measured_beside_the_same_work_alone(results):
    _, rows = results
    found = {(row["cut"], row["provider"], row["mode"]) for row in rows if row["status"] == "ok"}
    ours = {("tensor", "vocab_parallel"), ("tensor", "loss_parallel"), ("data", "streamed"), ("data", "gathered")}
    assert {(*provider, mode) for provider in ours for mode in MODES} <= found
    for row in rows:
        if row["status"] != "ok":
            assert row["provider"] == "liger tp, eager" and row["reason"]
            continue
        assert row["num_samples"] == 2 and row["times_alone"] > 0
        assert (row["times_alone"] == 1) or not row["alone"]
        assert row["alone"] or row["errors"]["logps"] < 1e-5
        assert (row["bound_bytes"] is not None) == (row["provider"] in ("vocab_parallel", "streamed"))


def test_the_page_gets_its_table(results, tmp_path):
    folder, rows = results
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench:sharded -->\n<!-- /bench:sharded -->\nafter\n")
    arguments = ["--page", str(page), "--results", str(folder)]
    assert readme.main([*arguments, "--check"]) == 1
    assert readme.main(arguments) == 0 and readme.main([*arguments, "--check"]) == 0
    text = page.read_text()
    (row,) = [row for row in rows if (row["provider"], row["mode"]) == ("streamed", "trained")]
    assert f"| {row['times_alone']:.2f}x, " in next(
        line for line in text.splitlines() if line.startswith("| streamed |")
    )
    assert text.startswith("before") and text.endswith("after\n")
