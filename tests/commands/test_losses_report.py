"""`windkern losses`: the table, the details, and the pictures."""

import inspect
import json

import matplotlib.image
import pytest
import torch

from windkern.commands.cli import build_parser, main
from windkern.commands.losses_report import POINTS, curves
from windkern.losses import LOSSES


def test_table_shows_every_loss(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["losses"]) == 0
    shown = capsys.readouterr().out
    for loss in LOSSES.values():
        (line,) = [line for line in shown.splitlines() if line.split()[:1] == [loss.name]]
        assert loss.formula.split()[0] in line and (" yes " if loss.separable else " no ") in line
    assert "separable" in shown


def test_json_is_what_programs_read(capsys):
    assert main(["losses", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in table] == list(LOSSES)
    assert main(["losses", "dpo", "--json"]) == 0
    (dpo,) = [entry for entry in table if entry["name"] == "dpo"]
    assert json.loads(capsys.readouterr().out) == dpo
    assert dpo["shape"] == ["B", 2] and "hinge" in dpo["variants"]["link"] and "beta" in dpo["signature"]


@pytest.mark.parametrize("name", ["wind", "apo", "kto", "bond", "grpo"])
def test_details_come_with_a_picture(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["losses", name]) == 0
    shown = capsys.readouterr().out
    assert LOSSES[name].source in shown and "Formula:" in shown and f"picture: losses/{name}.png" in shown
    picture = matplotlib.image.imread(tmp_path / "losses" / f"{name}.png")
    assert picture.shape[0] > 400 and picture.shape[1] > 1000 and picture.std() > 0.05


def test_picture_goes_where_it_is_told(capsys, tmp_path):
    path = tmp_path / "new" / "spin.png"
    assert main(["losses", "spin", "--json", "--output", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["picture"] == str(path) and path.exists()


def test_mistakes_are_named(capsys):
    assert main(["losses", "dop"]) == 2
    assert "NAME must be one of 'wind'" in (said := capsys.readouterr().err) and "did you mean 'dpo'?" in said
    assert main(["losses", "--output", "x.png"]) == 2
    assert "name it: windkern losses NAME" in capsys.readouterr().err
    assert build_parser().parse_args(["losses"]).name is None


@pytest.mark.parametrize("name", LOSSES)
def test_curves_are_of_the_loss_and_slopes_are_theirs(name):
    loss = LOSSES[name]
    required = [
        argument.name
        for argument in inspect.signature(loss.function).parameters.values()
        if argument.default is inspect.Parameter.empty and argument.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    assert set(required) <= set(loss.settings)
    found = curves(loss)
    assert found and len({curve.label for curve in found}) == len(found)
    flat = 0
    for curve in found:
        values, slopes = (torch.tensor(series, dtype=torch.float64) for series in (curve.values, curve.slopes))
        assert len(values) == POINTS and values.isfinite().all()
        step = curve.moves[1] - curve.moves[0]
        rough = (values[2:] - values[:-2]) / (2 * step)
        off = (rough - slopes[1:-1]).abs() > 0.02 * (1 + slopes[1:-1].abs())
        assert off.sum() <= 6, curve.label  # kinks, and the bump of discopop
        flat += bool((slopes.abs() < 1e-12).all())
    assert flat < len(found)
    assert curves(loss)[0].moves[POINTS // 2] == pytest.approx(0, abs=1e-6)
