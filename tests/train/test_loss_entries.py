"""The trainer gives a loss what its entry requests, and uses nothing else of the loss."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from trainer_cases import make_config, make_trainer, weights_of

from windkern.losses import LOSSES, Loss


def towards_win_rates(logps, old_logps, win_rates, *, where=None, reduction="mean"):
    """(l - o - w)^2, and no other form of a verdict."""
    value = (logps - old_logps - win_rates).square().mean(-1)
    return value if reduction == "none" else value.mean()


def entry_of(function, *inputs, **options) -> Loss:
    return Loss("made_here", function, "", ("logps", *inputs), "", separable=True, when="", **options)


def test_a_loss_that_takes_win_rates_alone_is_given_them(tmp_path, monkeypatch):
    monkeypatch.setitem(LOSSES, "made_here", entry_of(towards_win_rates, "old_logps", "win_rates"))
    trainer = make_trainer(tmp_path, loss="made_here", num_iterations=1)
    before = weights_of(trainer)
    trainer.train()
    groups = trainer.iterations.current
    for group, rollout in zip(groups.fitted, groups.groups, strict=True):
        torch.testing.assert_close(group.constants["win_rates"], torch.tensor(rollout.prefs).mean(-1))
    assert any(not torch.equal(before[name], value) for name, value in weights_of(trainer).items())


def test_replay_gives_a_loss_what_its_entry_asks_for(tmp_path, monkeypatch):
    def from_anywhere(logps, old_logps, win_rates, lengths, *, where=None, reduction="mean"):
        return towards_win_rates(logps / lengths, old_logps / lengths, win_rates, reduction=reduction)

    entry = entry_of(from_anywhere, "old_logps", "win_rates", "lengths", any_policy=True)
    monkeypatch.setitem(LOSSES, "made_here", entry)
    trainer = make_trainer(
        tmp_path, loss="made_here", replay=True, replay_on_policy_prob=0.0, num_generations=3, reference="model"
    )
    trainer.train()
    known = {}
    for number in (1, 2):
        for group in trainer.outer.recall(number).groups:
            rates = torch.tensor(group.prefs).mean(-1)
            known |= {(group.place, tokens): rate for tokens, rate in zip(group.completions, rates, strict=True)}
    fitted = trainer.iterations.current.fitted
    assert {name for group in fitted for name in group.constants} == {"old_logps", "win_rates", "lengths"}
    for group in fitted:
        assert group.constants["lengths"].tolist() == [len(tokens) for tokens in group.completions]
        rates = [known[group.place, tokens] for tokens in group.completions]
        torch.testing.assert_close(group.constants["win_rates"], torch.stack(rates))


def test_only_losses_whose_constants_belong_to_one_response_are_replayed(monkeypatch, tmp_path):
    pairs = entry_of(lambda logps, prefs, *, where=None, reduction="mean": logps.sum(-1), "prefs", any_policy=True)
    monkeypatch.setitem(LOSSES, "made_here", pairs)
    for name in ("made_here", "wind"):
        with pytest.raises(ValueError, match=r"replay=True needs .* \(trajectory_balance\), got loss='" + name):
            make_config(tmp_path, loss=name, replay=True)


def test_truncated_responses_do_not_count_in_the_baseline(tmp_path):
    changes = {"loss": "bond", "num_generations": 3, "max_completion_length": 24, "steps_per_iteration": 4}
    trainer = make_trainer(tmp_path, mask_truncated_completions=True, **changes)
    trainer.policy.follow(0.02)
    groups = trainer.outer.begin(1, inside=False).fitted
    whole = [group for group in groups if bool(group.constants["where"].all())]
    assert 0 < len(whole) < len(groups)
    better = [bool((group.constants["rewards"][0] < group.constants["rewards"][1:]).all()) for group in whole]
    want = sum(-math.log(16) * each for each in better) / len(whole)  # the anchor is still the policy
    for group in groups:
        torch.testing.assert_close(float(group.constants["baseline"]), want, rtol=0, atol=1e-5)
