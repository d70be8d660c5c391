"""`windkern bandit` end to end in a reduced form: its output and files, and its errors."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest

for package in ("rich", "matplotlib"):
    pytest.importorskip(package)

from windkern.commands.bandit_experiment import METRICS, RIVALS, TARGET, responses_to_target, summary  # noqa: E402
from windkern.commands.bandit_picture import COLOURS, LABELS  # noqa: E402
from windkern.commands.bandit_settings import BanditSettings  # noqa: E402
from windkern.commands.cli import main  # noqa: E402
from windkern.losses import OBJECTIVES  # noqa: E402
from windkern.tabular import METHODS, solve  # noqa: E402

SIZES = ("--seeds", "2", "--contexts", "3", "--responses", "12", "--num-iterations", "25", "--exact-iterations", "200")
OUTPUTS = ("bandit.json", "bandit.png")


def command(output: Path, *more: str) -> list[str]:
    return ["bandit", "--output-dir", str(output), *SIZES, "--eta", "1.0", *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict, str]:
    """A small run: its folder, its numbers and its output."""
    output = tmp_path_factory.mktemp("run") / "bandit"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "160")
        patch.setattr(sys, "stdout", io.StringIO())
        assert main(command(output)) == 0
        printed = sys.stdout.getvalue()
    return output, json.loads((output / "bandit.json").read_text()), printed


def test_everything_is_written_and_shown(finished):
    output, content, printed = finished
    assert sorted(path.name for path in output.iterdir()) == sorted(OUTPUTS)
    assert (output / "bandit.png").read_bytes().startswith(b"\x89PNG")
    assert content["settings"]["seeds"] == 2 and content["settings"]["eta"] == 1.0 and content["seconds"] > 0
    for part in ("exact: SPPO", "sampled: J-BOND", "sampled: WIND, nce_ratio", "equilibrium", "bandit.png", "±"):
        assert part in printed


def test_curves_are_complete(finished):
    _, content, _ = finished
    assert list(content["exact"]) == ["wind", "iterative_bond", "jbond", "sppo"]
    assert list(content["sampled"]) == [*OBJECTIVES, *RIVALS]
    for part in ("exact", "sampled"):
        for name, curve in content[part].items():
            points = len(curve["iterations"])
            assert curve["iterations"] == sorted(set(curve["iterations"])) and curve["iterations"][0] == 0
            for metric in METRICS:
                mean, error = np.array(curve[metric]["mean"]), np.array(curve[metric]["se"])
                assert mean.shape == error.shape == (points,) and np.isfinite(mean).all() and (error >= 0).all(), name
            assert curve["seconds"]["mean"] > 0
    for curve in content["sampled"].values():
        assert len(curve["samples"]) == len(curve["iterations"])


def test_samplers_draw_the_same_number_of_responses(finished):
    settings = BanditSettings(**finished[1]["settings"])
    ends = {name: curve["samples"][-1] for name, curve in finished[1]["sampled"].items()}
    wanted = settings.samples * settings.num_iterations
    assert ends.pop("jbond") == pytest.approx(wanted, abs=3 * settings.jbond_groups)
    assert set(ends.values()) == {wanted}


def test_wind_settles_at_the_equilibrium_and_the_others_elsewhere(finished):
    _, content, _ = finished
    ends = {name: curve["kl"]["mean"][-1] for name, curve in content["exact"].items()}
    assert ends.pop("wind") < 1e-10 and min(ends.values()) > 1e-2
    for metric in ("reward", "win_vs_ref", "kl_ref"):
        centre = content["equilibrium"][metric]["mean"]
        assert content["exact"]["wind"][metric]["mean"][-1] == pytest.approx(centre, abs=1e-5)
    assert content["equilibrium"]["exploitability"]["mean"] < 1e-10
    for objective in OBJECTIVES:
        curve = content["sampled"][objective]["kl"]["mean"]
        assert curve[-1] < 0.5 * curve[0], objective


def test_summary_is_mean_and_standard_error():
    game = BanditSettings(contexts=2, responses=4).game
    solutions = [solve(game(seed), iterations=3, tol=0) for seed in range(3)]
    curve = summary(solutions)
    assert curve["iterations"] == [0, 1, 2, 3]
    last = [solution.trace["reward"][-1] for solution in solutions]
    assert curve["reward"]["mean"][-1] == pytest.approx(np.mean(last))
    assert curve["reward"]["se"][-1] == pytest.approx(np.std(last, ddof=1) / 3**0.5)


def test_responses_to_target_is_the_first_crossing():
    curve = {"samples": [0, 8, 16, 24], "exploitability": {"mean": [1.0, 0.99 * TARGET, 0.5, 0.0]}}
    assert responses_to_target(curve, 1.0) == 8
    assert responses_to_target(curve, 0.1) == 24
    assert responses_to_target({"samples": [0, 8], "exploitability": {"mean": [1.0, 0.9]}}, 1.0) is None


def test_both_links_get_mixing_weights_that_have_a_limit():
    for link, beta, wanted in (("bradley_terry", 0.1, 0.2), ("step", 0.1, 1.25), ("step", 1.0, 2.0)):
        weights = BanditSettings(link=link, beta=beta).mixing
        assert weights["alpha2"] / weights["alpha1"] == pytest.approx(wanted)
        assert weights["alpha2"] == pytest.approx(0.4 * beta / (1 + 0.4 * beta))


def test_every_method_has_its_own_colour_and_name():
    drawn = [*OBJECTIVES, *RIVALS]
    assert set(LABELS) == set(COLOURS) == {"wind", *drawn}
    assert len({COLOURS[name] for name in drawn}) == len({LABELS[name] for name in drawn}) == len(drawn)
    assert COLOURS["wind"] == COLOURS["square"] and set(RIVALS) < set(METHODS)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--seeds", "1"), "seeds must be at least 2, got 1"),
        (("--link", "steps"), "link must be one of 'step', 'bradley_terry', got 'steps'; did you mean 'step'?"),
        (("--beta", "0"), "beta must be greater than 0, got 0.0"),
        (("--eta", "-1"), "eta must be greater than 0, got -1.0"),
        (("--num-iterations", "0"), "iterations must be at least 1, got 0"),
        (("--group-size", "1"), "group_size must be at least 2, got 1"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, more, message):
    assert main(command(tmp_path / "bandit", *more)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("windkern: error: ")
    assert not (tmp_path / "bandit").exists()


def test_the_command_line_explains_itself(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["bandit", "--help"])
    assert "--exact-iterations" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["bandit", "--seeds", "many"])
    assert "invalid int value: 'many'" in capsys.readouterr().err
