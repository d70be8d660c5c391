"""The benchmark of master weights: every choice is measured, and only plain bfloat16 loses small steps."""

import importlib.util
import json

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import master_weights


@pytest.fixture
def without_peers(monkeypatch):
    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("optimi", "torchao") else original(name)
    )


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
    assert ours["kl_kept"] < plain["kl_kept"]  # the copies move where a bfloat16 weight cannot


def test_the_target_is_near_the_start():
    start, target = master_weights.make_models(64, 16)
    pairs = zip(start.parameters(), target.parameters(), strict=True)
    changes = [(ours - theirs).std().item() / ours.std().item() for ours, theirs in pairs if ours.dim() > 1]
    assert all(abs(change / master_weights.CHANGE - 1) < 0.2 for change in changes)
    assert all(torch.equal(value, value.bfloat16().float()) for value in start.parameters())
