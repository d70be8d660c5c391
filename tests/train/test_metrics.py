"""The metrics of a run, computed by hand."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tiny_model import goodness
from trainer_cases import HELDOUT, make_config, make_trainer

from windkern.train.loss_plan import plan_loss
from windkern.train.metrics import step_metrics


def numbers(logps, constants, config) -> dict[str, float]:
    return {name: float(value) for name, value in step_metrics(logps, constants, plan_loss(config)).items()}


def test_a_step_says_how_far_it_is_from_the_target(tmp_path):
    config = make_config(tmp_path, eta=2.0, beta=0.25)  # a = 2/3, b = 1/3, c = 4/3
    old, ref = torch.tensor([[-5.0, -7.0]]), torch.tensor([[-6.0, -6.0]])
    win_rates = torch.tensor([[0.7, 0.3]])
    exact = 2 / 3 * old + 1 / 3 * ref + 4 / 3 * win_rates
    found = numbers(exact, {"old_logps": old, "ref_logps": ref, "win_rates": win_rates}, config)
    assert found["residual"] == pytest.approx(0.0, abs=1e-6) and found["outside"] == 0
    assert found["implied_win_rate_max"] == pytest.approx(0.7, abs=1e-6)
    assert found["kl_old"] == pytest.approx(float((old - exact).mean()))
    assert found["kl_ref"] == pytest.approx(float((exact - ref).mean()))
    # One response a third of a nat above its target: s - mean s is off by 1/6, in units of c by 1/8.
    moved = exact + torch.tensor([[1 / 3, 0.0]])
    again = numbers(moved, {"old_logps": old, "ref_logps": ref, "win_rates": win_rates}, config)
    assert again["residual"] == pytest.approx(1 / 8, rel=1e-5)
    assert again["implied_win_rate_max"] == pytest.approx(0.825, rel=1e-5)
    prefs = torch.tensor([[[0.5, 0.9], [0.1, 0.5]]])  # the same win rates
    by_prefs = numbers(moved, {"old_logps": old, "ref_logps": ref, "prefs": prefs}, config)
    assert by_prefs == pytest.approx(again, rel=1e-5)


def test_responses_that_are_left_out_do_not_count(tmp_path):
    config = make_config(tmp_path, eta=2.0, beta=0.25)
    old, ref, logps = torch.tensor([[-5.0, -7.0]]), torch.tensor([[-6.0, -6.0]]), torch.tensor([[-4.5, -7.5]])
    constants = {"old_logps": old, "ref_logps": ref, "win_rates": torch.tensor([[0.7, 0.3]])}
    want = numbers(logps, constants, config)
    fill = {"old_logps": -99.0, "ref_logps": -99.0, "win_rates": 0.5}
    more = {name: torch.cat([value, torch.full((1, 1), fill[name])], 1) for name, value in constants.items()}
    more["where"] = torch.tensor([[True, True, False]])
    assert numbers(torch.cat([logps, torch.full((1, 1), -1.0)], 1), more, config) == pytest.approx(want, rel=1e-5)
    more["where"] = torch.zeros(1, 3, dtype=torch.bool)  # all dropped: the names stay, for the other processes
    assert numbers(torch.cat([logps, torch.full((1, 1), -1.0)], 1), more, config).keys() == want.keys()


def test_the_kl_of_a_moved_policy_is_positive(tmp_path):
    trainer = make_trainer(
        tmp_path, heldout=HELDOUT, num_iterations=1, steps_per_iteration=4, eval_strategy="epoch", eval_responses=32
    )
    trainer.train()
    (record,) = trainer.history
    assert record.kl > 2 * record.kl_se > 0


def test_measurements_are_of_uniformly_drawn_prompts(tmp_path):
    def reward(prompts, responses):
        scores = goodness(prompts, responses)
        return [score if "bus" in prompt else 0.0 for prompt, score in zip(prompts, scores, strict=True)]

    trainer = make_trainer(tmp_path, reward=reward, focus="hardest", focus_uniform_share=0.5, num_iterations=6)
    for iteration in range(1, 7):
        found = trainer.outer.begin(iteration, inside=False)
        assert len(found.measured) == 2 and len(found.groups) == 4
        chosen = trainer.outer.focus.choose(iteration + 1, 4)
        assert sum(chosen.uniform) == 2
