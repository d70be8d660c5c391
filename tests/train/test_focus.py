"""Exploitability of a group, and the choice of prompts: turns, hardness, ties, rebuilding, and the gain of focus."""

from __future__ import annotations

import doctest
import math

import pytest
import torch

from windkern.tabular import Game, solve
from windkern.train import focus as module
from windkern.train.focus import PromptFocus, exploitability
from windkern.train.seeds import stream


def test_the_examples_run():
    assert not doctest.testmod(module, extraglobs={"torch": torch}).failed


# Exploitability


def game(beta: float = 0.2) -> Game:
    generator = torch.Generator().manual_seed(5)
    rewards = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    ref = torch.randn(3, 7, generator=generator, dtype=torch.float64).softmax(-1)
    return Game(ref, beta, rewards=rewards, link="bradley_terry")


def sampled(played: Game, policy: torch.Tensor, draws: int) -> torch.Tensor:
    """Return the estimate from a group of `draws` samples, (3,), with true win rates."""
    places = torch.multinomial(policy, draws, replacement=True, generator=torch.Generator().manual_seed(0))
    logps, refs = policy.log(), played.ref.log()
    gathered = [value.gather(-1, places) for value in (logps, refs, played.win_rate(policy))]
    return exploitability(*gathered, beta=0.2)


def test_it_is_the_exploitability_to_second_order():
    played = game()
    equilibrium = solve(played, method="wind", eta=0.4).policy
    assert sampled(played, equilibrium, 50).abs().max() < 1e-12
    tilt = torch.randn(3, 7, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    errors = []
    for size in (0.2, 0.1):
        policy = (equilibrium.log() + size * tilt).softmax(-1)
        true = played.exploitability(policy)
        torch.testing.assert_close(sampled(played, policy, 200_000), true, rtol=0.15 * size / 0.2, atol=0)
        # Over all responses, weighted by the policy, the error is of third order: an eighth at half the distance.
        x = policy.log() - played.ref.log() - played.win_rate(policy) / 0.2
        mean = (policy * x).sum(-1, keepdim=True)
        errors.append((0.1 * (policy * (x - mean).square()).sum(-1) - true).abs().max())
    assert errors[1] < errors[0] / 5


def test_masked_responses_and_broken_groups_do_not_count():
    logps = torch.tensor([[-9.0, -11.0, math.nan], [-9.0, math.nan, math.nan]], requires_grad=True)
    wins = torch.tensor([[0.75, 0.25, math.nan], [0.5, math.nan, math.nan]])
    where = torch.tensor([[True, True, False], [True, False, False]])
    value = exploitability(logps, logps.detach() - 1, wins, 0.5, where=where)
    assert value.tolist() == [0.0625, 0.0] and not value.requires_grad


def test_exploitability_refuses_bad_input():
    logps, wins = torch.zeros(2, 3), torch.full((2, 3), 0.5)
    with pytest.raises(ValueError, match="beta must be greater than 0, got 0"):
        exploitability(logps, logps, wins, 0)
    with pytest.raises(ValueError, match="win_rates must lie in"):
        exploitability(logps, logps, wins + 1, 0.1)
    with pytest.raises(TypeError, match="logps must be float32 or float64"):
        exploitability(logps.bfloat16(), logps, wins, 0.1)


# Turns


def make(count: int, mode: str = "uniform", share: float = 0.0, seed: int = 3) -> PromptFocus:
    return PromptFocus(count, mode=mode, uniform_share=share, seed=seed)


def test_uniform_goes_through_the_shuffles():
    """Prompts follow permutations end to end, each seeded by ("prompts", epoch)."""
    orders = [
        torch.randperm(12, generator=torch.Generator().manual_seed(stream(3, "prompts", epoch))).tolist()
        for epoch in range(3)
    ]
    focus = make(12)
    chosen = [focus.choose(iteration, 4) for iteration in range(1, 10)]
    assert [place for each in chosen for place in each.places] == [place for order in orders for place in order]
    assert all(each.uniform == (True,) * 4 for each in chosen)
    assert make(12).choose(5, 4) == chosen[4]  # whatever choices came before
    assert make(12, seed=4).choose(5, 4) != chosen[4]


@pytest.mark.parametrize(("count", "k"), [(7, 5), (5, 4), (10, 3), (6, 6), (1, 1)])
def test_no_prompt_comes_twice_and_each_comes_once_a_time_through(count, k):
    focus = make(count)
    chosen = [focus.choose(iteration, k).places for iteration in range(1, 10 * count + 1)]
    assert all(len(set(places)) == k for places in chosen)
    flat = sum(chosen, ())
    for first in range(0, len(flat), count):
        assert sorted(flat[first : first + count]) == list(range(count))
    assert make(count).choose(3 * count, k).places == chosen[3 * count - 1]  # late first call


@pytest.mark.parametrize("mode", module.MODES)
def test_more_than_there_are_come_evenly(mode):
    places = make(3, mode, 0.5).choose(1, 7).places
    assert len(places) == 7 and {places.count(place) for place in range(3)} <= {2, 3}


# Hardness


def test_the_hardest_come_beside_a_uniform_share():
    focus = make(10, "hardest", share=0.3)
    focus.update(range(10), torch.arange(10.0))
    for iteration in range(1, 6):
        chosen = focus.choose(iteration, 5)
        assert chosen.uniform == (True, True, False, False, False)  # ceil(1.5)
        assert chosen.places[:2] == make(10).choose(iteration, 2).places
        assert list(chosen.places[2:]) == [k for k in range(9, -1, -1) if k not in chosen.places[:2]][:3]
    focus.update([9, 0], [-1.0, 50.0])
    assert focus.choose(1, 5).places[2] == 0 and 9 not in focus.choose(1, 5).places[2:]


def test_a_share_is_not_rounded_up_by_its_own_rounding():
    assert sum(make(200, "hardest", share=0.07).choose(1, 100).uniform) == 7  # 0.07 * 100 > 7


def test_all_are_explored_before_any_comes_again():
    focus = make(20, "hardest")
    seen = []
    for iteration in range(1, 5):
        places = focus.choose(iteration, 5).places
        focus.update(places, [100.0] * 5)
        seen += places
    assert sorted(seen) == list(range(20)) and seen != sorted(seen)


def test_ties_are_broken_by_a_shuffle():
    focus = make(30, "hardest")
    focus.update(range(30), [0.25] * 30)
    chosen = [focus.choose(iteration, 3).places for iteration in range(1, 41)]
    assert len(set(sum(chosen, ()))) > 25  # by index there would be 3
    assert chosen[0] == focus.choose(1, 3).places


def test_a_rebuilt_object_chooses_the_same():
    def hardness(place: int, iteration: int) -> float:
        return stream(1, place, iteration) / 2**56

    focus, log = make(25, "hardest", share=0.25), []
    for iteration in range(1, 8):
        places = focus.choose(iteration, 4).places
        log.append((places, [hardness(place, iteration) for place in places]))
        focus.update(*log[-1])
    rebuilt = make(25, "hardest", share=0.25)
    for update in log:
        rebuilt.update(*update)
    assert [rebuilt.choose(i, 4) for i in range(8, 15)] == [focus.choose(i, 4) for i in range(8, 15)]
    assert rebuilt.entropy() == focus.entropy()


def test_entropy_counts_the_prompts_that_share_the_labels():
    focus = make(8)
    assert focus.entropy() == 0
    focus.update(range(8), [0.0] * 8)
    assert focus.entropy() == pytest.approx(math.log(8))
    for _ in range(50):
        focus.update([2, 5], [1.0, 1.0])
    assert 2 < math.exp(focus.entropy()) < 3


def test_bad_input_is_named_and_changes_nothing():
    focus = make(3, "hardest")
    focus.update([0, 1, 2], [3.0, 2.0, 1.0])
    for places, values, message in [
        ([1], [1.0, 2.0], "one number for each place, got 2 for 1"),
        ([1, 3], [9.0, 1.0], r"places must lie in 0 \.\.\. 2, got 3"),
        ([1, 2], [9.0, math.nan], "values must be finite, got nan for prompt 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            focus.update(places, values)
    assert focus.choose(1, 3).places == (0, 1, 2)
    with pytest.raises(ValueError, match="did you mean 'hardest'"):
        make(3, "hardes")
    with pytest.raises(ValueError, match=r"uniform_share must be at most 1, got 1.5"):
        make(3, share=1.5)
    with pytest.raises(ValueError, match="iteration must be at least 1"):
        focus.choose(0, 2)


# Escaping Collapse


@pytest.mark.parametrize("informed", [True, False], ids=["filtered", "own estimates"])
def test_focus_makes_a_label_budget_go_further(informed):
    """Labels correct with probability 0.2, for a tenth of 5000 prompts per iteration, 70 % of them wrong at the start.

    Recursion: aimed at wrong answers, e falls by 0.2/10 per iteration while it is above 1/10, then by a fifth of
    itself; spread evenly, by a fifth per pass. "filtered" finds all wrong answers for free; otherwise a prompt is known
    to be right or wrong only as of its last turn, so the first ten iterations explore.
    """
    count, budget, chance = 5000, 500, 0.2
    errors = {}
    for mode in module.MODES:
        generator = torch.Generator().manual_seed(stream(0, "labels"))
        wrong = torch.rand(count, generator=generator) < 0.7
        focus, curve = make(count, mode), [0.0]
        for iteration in range(1, 41):
            if informed:
                focus.update(range(count), wrong.double())
            places = torch.tensor(focus.choose(iteration, budget).places)
            wrong[places] &= torch.rand(budget, generator=generator) >= chance
            if not informed:
                focus.update(places.tolist(), wrong[places].double())
            curve.append(float(wrong.double().mean()))
        errors[mode] = curve
    assert errors["uniform"][20] == pytest.approx(0.7 * 0.8**2, abs=0.02)
    assert errors["uniform"][40] == pytest.approx(0.7 * 0.8**4, abs=0.02)
    if informed:
        assert errors["hardest"][20] == pytest.approx(0.7 - 20 * 0.02, abs=0.025)
        assert errors["hardest"][40] == pytest.approx(0.1 * 0.8**10, abs=0.01)
    else:
        assert errors["hardest"][20] == pytest.approx(0.7 * 0.8 - 10 * 0.02, abs=0.025)
        assert errors["hardest"][40] < errors["uniform"][40] / 3
