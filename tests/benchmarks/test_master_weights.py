"""The benchmark of master weights: every choice is measured, and only plain bfloat16 loses small steps."""

import importlib.util
import json

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import master_weights, weight_error


@pytest.fixture
def without_peers(monkeypatch):
    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("optimi", "torchao") else original(name)
    )


@pytest.mark.slow
def test_every_choice_is_measured(without_peers, tmp_path, capsys):
    out = tmp_path / "x.json"
    sizes = ("--steps", "7", "--rates", "1e-6", "--vocab", "64", "--hidden", "16", "--out", str(out))
    assert master_weights.main(list(sizes)) == 0
    rows = {row["choice"]: row for row in json.loads(out.read_text())["rows"]}
    assert len(rows) == 4 and "optimi is not installed" in capsys.readouterr().out
    for row in rows.values():
        assert 0 < row["kl"] < 2 * row["first_loss"] and row["median_s"] > 0
    ours, plain = rows["bfloat16, MasterAdamW"], rows["bfloat16, torch's AdamW"]
    assert ours["weights_bytes"] == plain["weights_bytes"] == 2 and rows[master_weights.EXACT]["weights_bytes"] == 4
    assert 12 <= ours["state_bytes"] < 12.1 and 4 <= plain["state_bytes"] < 4.1
    assert ours["kl_kept"] < plain["kl_kept"]  # the copies change where a bfloat16 weight cannot


def test_second_moments_in_bfloat16_do_not_fall(without_peers):
    rows = {row["choice"]: row for row in weight_error.run_falling([1e-5], steps=1500)}
    ours, plain = rows["bfloat16, MasterAdamW"], rows["bfloat16, torch's AdamW"]
    assert ours["moved"] == pytest.approx([1, 1, 1], rel=1e-3) and ours["second"] == pytest.approx([1, 1, 1], rel=1e-3)
    assert plain["second"][-1] > 2 > plain["second"][0] and abs(plain["moved"][-1]) < 0.01


@pytest.mark.slow
def test_errors_of_the_weights_are_relative_to_float32(without_peers, tmp_path):
    out = tmp_path / "x.json"
    sizes = ("--steps", "4", "8", "--rates", "1e-6", "--vocab", "64", "--hidden", "16", "--out", str(out))
    assert weight_error.main(list(sizes)) == 0
    rows = {(row["choice"], row["steps"]): row for row in json.loads(out.read_text())["rows"]}
    assert len(rows) == 2 * 5
    for steps in (4, 8):
        assert rows[master_weights.EXACT, steps]["error"] == rows[master_weights.EXACT, steps]["error_kept"] == 0
        rounded, ours = rows[weight_error.ROUNDED, steps], rows["bfloat16, MasterAdamW", steps]
        assert rounded["error"] > 0 == rounded["error_kept"]
        # Plain bfloat16 weights do not change, so their error is the whole distance.
        assert ours["error_kept"] < 0.9 < rows["bfloat16, torch's AdamW", steps]["error_kept"] < 1.2


def test_the_target_is_near_the_start():
    start, target = master_weights.make_models(64, 16)
    pairs = zip(start.parameters(), target.parameters(), strict=True)
    changes = [(ours - theirs).std().item() / ours.std().item() for ours, theirs in pairs if ours.dim() > 1]
    assert all(abs(change / master_weights.CHANGE - 1) < 0.2 for change in changes)
    assert all(torch.equal(value, value.bfloat16().float()) for value in start.parameters())
