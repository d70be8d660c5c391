"""The replay buffer: what it keeps, how it draws, and that trajectory balance learns from it."""

from __future__ import annotations

import doctest
import itertools
import math
from collections import Counter

import pytest
import torch

from windkern.losses import trajectory_balance
from windkern.train import replay as module
from windkern.train.replay import ReplayBuffer, Replayed


def test_the_examples_run():
    assert not doctest.testmod(module).failed


def make(capacity: int = 100, on_policy: float = 0.0, inverse_temperature: float = 0.0, seed: int = 0) -> ReplayBuffer:
    return ReplayBuffer(capacity, on_policy_prob=on_policy, inverse_temperature=inverse_temperature, seed=seed)


def entry(prompt: int, token: int, iteration: int = 1, reward: float = 0.0) -> Replayed:
    constants = (("rewards", reward), ("ref_logps", -1.0))
    return Replayed(prompt, (token, 99), reward, constants, False, f"text {token}", iteration)


def contents(buffer: ReplayBuffer, iteration: int, size: int) -> set[Replayed]:
    """Return the contents of a full group of a buffer with a single prompt."""
    (group,) = buffer.draw(iteration, 1, size)
    return set(group)


# What is kept


def test_a_repeated_response_replaces_the_older_one():
    buffer = make()
    buffer.add([entry(0, 1), entry(0, 2), entry(1, 1)])
    buffer.add([entry(0, 1, iteration=2, reward=5.0)])
    assert len(buffer) == 3  # the same tokens under another prompt are another response
    assert contents(buffer, 2, 2) == {entry(0, 1, 2, 5.0), entry(0, 2)}


def test_the_newest_stay():
    buffer = make(capacity=3)
    buffer.add([entry(0, token) for token in range(3)])
    buffer.add([entry(0, 0, iteration=2)])  # response 0 becomes the newest
    buffer.add([entry(0, 7, iteration=2), entry(5, 7, iteration=2)])
    assert len(buffer) == 4
    assert contents(buffer, 2, 3) == {entry(0, 2), entry(0, 0, 2), entry(0, 7, 2)}


# How groups are drawn


def test_groups_are_distinct_responses_to_one_prompt():
    buffer = make(on_policy=0.5, inverse_temperature=1.0)
    for iteration in (1, 2):
        buffer.add([entry(prompt, 10 * prompt + token, iteration) for prompt in range(4) for token in range(5)])
    groups = buffer.draw(2, 60, 3)
    assert len(groups) == 60 and {len(group) for group in groups} == {3}
    for group in groups:
        assert len({each.prompt for each in group}) == 1 and len({each.tokens for each in group}) == 3
    assert {group[0].prompt for group in groups} == {0, 1, 2, 3}


def test_on_policy_groups_are_of_the_newest_iteration():
    buffer = make(on_policy=1.0, inverse_temperature=50.0)
    buffer.add([entry(prompt, token, 1, reward=9.0) for prompt in range(6) for token in range(4)])
    buffer.add([entry(prompt, 10 + token, 2, reward=token) for prompt in (1, 3, 4) for token in range(4)])
    buffer.add([entry(5, 10, 2)])  # too few for a group
    groups = buffer.draw(2, 7, 4)
    assert {each.iteration for group in groups for each in group} == {2}  # whole groups: all four of them
    prompts = [group[0].prompt for group in groups]
    assert sorted(prompts[:3]) == sorted(prompts[3:6]) == [1, 3, 4]  # each once before any repeats
    firsts = Counter(each.tokens for group in buffer.draw(2, 2000, 2) for each in group)
    assert all(abs(count - 1000) < 100 for count in firsts.values())  # uniform, whatever the rewards


def test_the_share_of_on_policy_groups():
    buffer = make(on_policy=0.7)
    buffer.add([entry(0, token, 1) for token in range(3)])
    buffer.add([entry(1, token, 2) for token in range(3)])
    share = sum(group[0].prompt == 1 for group in buffer.draw(2, 4000, 3)) / 4000
    assert share == pytest.approx(0.7 + 0.3 / 2, abs=0.025)


def test_without_new_responses_the_old_ones_serve():
    buffer = make(on_policy=1.0)
    buffer.add([entry(0, token, 1) for token in range(3)])
    assert buffer.draw(4, 1, 3)[0][0].iteration == 1


def test_high_rewards_are_drawn_by_softmax_without_replacement():
    rewards = (0.0, 1.0, 2.5, -1.0)
    buffer = make(inverse_temperature=0.8)
    buffer.add([entry(0, token, reward=reward) for token, reward in enumerate(rewards)])
    weight = [math.exp(0.8 * reward) for reward in rewards]
    found = Counter(tuple(each.tokens[0] for each in group) for group in buffer.draw(1, 20_000, 2))
    for first, second in itertools.permutations(range(4), 2):
        chance = weight[first] / sum(weight) * weight[second] / (sum(weight) - weight[first])
        assert found[first, second] / 20_000 == pytest.approx(chance, abs=4 * math.sqrt(chance / 20_000)), (
            first,
            second,
        )


def test_draws_depend_on_seed_iteration_and_contents_alone():
    def filled(seed: int = 0) -> ReplayBuffer:
        buffer = make(capacity=6, on_policy=0.5, inverse_temperature=1.0, seed=seed)
        for iteration in (1, 2, 3):
            buffer.add([entry(k % 5, k * iteration % 17, iteration, k / 10) for k in range(30)])
        return buffer

    buffer = filled()
    before = buffer.draw(3, 8, 3)
    torch.rand(5)
    assert buffer.draw(3, 8, 3) == before == filled().draw(3, 8, 3)
    assert before != buffer.draw(4, 8, 3) and before != filled(seed=1).draw(3, 8, 3)


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"capacity": 1}, "capacity must be at least 2, got 1"),
        ({"on_policy": 1.5}, "on_policy_prob must be at most 1, got 1.5"),
        ({"on_policy": -0.1}, "on_policy_prob must be at least 0"),
        ({"inverse_temperature": math.inf}, "inverse_temperature must be a finite number"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_bad_entries_are_named_and_none_is_taken_in():
    buffer = make()
    buffer.add([entry(0, 1, 2)])
    for bad, error, message in [
        (entry(3, 1, 2, math.nan), ValueError, "score must be finite, got nan for prompt 3"),
        (entry(0, 1, 2)._replace(constants=(("ref_logps", -math.inf),)), ValueError, "ref_logps must be finite"),
        (entry(0, 1, 2)._replace(tokens=[1]), TypeError, "tokens must be a tuple of integers, got list"),
        (entry(0, 1, 1), ValueError, "order of their iterations, got 1 after 2"),
    ]:
        with pytest.raises(error, match=message):
            buffer.add([entry(0, 5, 2), bad])
    assert len(buffer) == 1


def test_impossible_draws_are_refused():
    buffer = make()
    with pytest.raises(ValueError, match="size must be at most 0"):
        buffer.draw(1, 1, 2)
    buffer.add([entry(0, token, 3) for token in range(3)])
    with pytest.raises(ValueError, match="size must be at most 3, the most responses kept for a prompt, got 4"):
        buffer.draw(3, 1, 4)
    with pytest.raises(ValueError, match="iteration must be at least 3, the newest in the buffer, got 2"):
        buffer.draw(2, 1, 2)


# What it is for


def test_trajectory_balance_reaches_the_tilted_reference_from_replay():
    """The minimiser is pi_ref exp(R / beta) / Z for any sampling policy, here none of the trained ones."""
    generator = torch.Generator().manual_seed(2)
    ref = torch.randn(2, 6, generator=generator, dtype=torch.float64).log_softmax(-1)
    rewards = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    beta, buffer = 0.7, make(on_policy=0.3, inverse_temperature=1.5)
    buffer.add(
        Replayed(x, (y,), float(rewards[x, y]), (("ref_logps", float(ref[x, y])),), False, "", 1)
        for x in range(2)
        for y in range(6)
    )
    theta = torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=1.5)
    for step in range(1, 1501):
        groups = buffer.draw(step, 4, 3)
        prompts = torch.tensor([[each.prompt for each in group] for group in groups])
        places = torch.tensor([[each.tokens[0] for each in group] for group in groups])
        old = torch.tensor(
            [[dict(each.constants)["ref_logps"] for each in group] for group in groups], dtype=torch.float64
        )
        scores = torch.tensor([[each.score for each in group] for group in groups], dtype=torch.float64)
        loss = trajectory_balance(theta.log_softmax(-1)[prompts, places], old, scores, beta=beta)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    target = (ref + rewards / beta).log_softmax(-1)
    torch.testing.assert_close(theta.detach().log_softmax(-1), target, rtol=0, atol=1e-5)
