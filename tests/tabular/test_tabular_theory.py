"""What docs/theory.md proves about the game and its solvers, as properties of random games, also cyclic ones."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tabular_cases import games, near_cyclic_game, policies, reference_game
from torch import Tensor

import windkern as wk
from windkern.tabular import Game, best_of_n, fit, solve
from windkern.tabular.games import kl

seeds = st.integers(0, 2**31)


def quick(examples: int):
    return settings(max_examples=examples)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    return kl(p.log(), q.log())


def next_policy(game: Game, policy: Tensor, method: str = "wind", **options: float) -> Tensor:
    return solve(game, method, iterations=1, tol=0, policy0=policy, **options).policy


def payoff(game: Game, first: Tensor, second: Tensor) -> Tensor:
    """Return P(first > second), (X,)."""
    return torch.einsum("xi,xij,xj->x", first, game.prefs, second)


# The game: fixed point, best response, exploitability


@quick(60)
@given(games(), seeds)
def test_the_equilibrium_is_a_fixed_point_and_nothing_beats_it(game, seed):
    solution = game.equilibrium()
    shifted = game.log_ref + game.win_rate(solution) / game.beta
    torch.testing.assert_close(solution, shifted.softmax(-1), rtol=1e-10, atol=1e-12)  # (1.18)
    assert game.exploitability(solution).abs().max() < 1e-10
    value = 0.5 - game.beta * divergence(solution, game.ref)
    for rival in policies(game, seed, 3):
        gain = payoff(game, rival, solution) - game.beta * divergence(rival, game.ref)
        assert (gain <= value + 1e-10).all()


@quick(60)
@given(games(), seeds)
def test_exploitability_is_the_gain_of_the_best_response(game, seed):
    (policy,) = policies(game, seed)
    reply, expl = game.best_response(policy), game.exploitability(policy)
    torch.testing.assert_close(payoff(game, policy, policy), torch.full_like(expl, 0.5), rtol=1e-14, atol=1e-15)

    def gain(mu: Tensor) -> Tensor:
        return payoff(game, mu, policy) - game.beta * divergence(mu, game.ref)

    torch.testing.assert_close(expl, gain(reply) - gain(policy), rtol=1e-11, atol=1e-12)  # (1.20)
    torch.testing.assert_close(expl, game.beta * divergence(policy, reply), rtol=1e-11, atol=1e-12)
    for rival in policies(game, seed + 1, 3):
        assert (gain(rival) <= gain(reply) + 1e-12).all()

    def utility(mu: Tensor, nu: Tensor) -> Tensor:
        return payoff(game, mu, nu) - game.beta * (divergence(mu, game.ref) - divergence(nu, game.ref))

    gap = utility(reply, policy) - utility(policy, reply)  # of the profile (policy, policy), both best replies
    torch.testing.assert_close(gap, 2 * expl, rtol=1e-10, atol=1e-12)  # (1.21)


@quick(60)
@given(games(), seeds)
def test_exploitability_lies_between_its_bounds(game, seed):
    solution = game.equilibrium()
    # A policy near the solution and one far from it.
    (far,) = policies(game, seed)
    near = (solution.log() + 0.05 * far.log()).softmax(-1)
    for policy in (near, far):
        expl, gap = game.exploitability(policy), divergence(policy, solution)
        distance = (policy - solution).abs().sum(-1)
        assert (game.beta * gap <= expl + 1e-12).all()  # (1.22)
        assert (expl <= game.beta * gap + distance.square() / (8 * game.beta) + 1e-12).all()
        assert (expl <= game.beta * gap + divergence(solution, policy) / (4 * game.beta) + 1e-12).all()


# The update


@quick(60)
@given(games(), seeds, st.floats(0.1, 10.0))
def test_the_identity_behind_the_theorem(game, seed, eta):
    solution, (policy,) = game.equilibrium(), policies(game, seed)
    new = next_policy(game, policy, eta=eta)
    skew = torch.einsum("xi,xij,xj->x", new - policy, game.prefs - 0.5, new - solution)
    left = (1 + eta * game.beta) * divergence(solution, new)
    right = divergence(solution, policy) - divergence(new, policy) - eta * game.beta * divergence(new, solution)
    torch.testing.assert_close(left, right + eta * skew, rtol=1e-10, atol=1e-11)  # (1.27)


@quick(50)
@given(games(betas=(0.05, 0.5)), seeds, st.sampled_from([0.25, 1.0, 4.0]))
def test_every_step_up_to_four_beta_contracts(game, seed, multiple):
    """(1.26), per context, from any start and for any preferences."""
    eta = multiple * game.beta
    solution, (policy,) = game.equilibrium(), policies(game, seed)
    first = distance = divergence(solution, policy)
    for t in range(1, 41):
        policy = next_policy(game, policy, eta=eta)
        before, distance = distance, divergence(solution, policy)
        assert (distance <= before / (1 + eta * game.beta) + 1e-13).all()
        assert (distance <= first * (1 + eta * game.beta) ** -t + 1e-12).all()


@quick(30)
@given(games(), seeds, st.sampled_from(["pu", "omwu"]))
def test_look_ahead_contracts_at_the_rate_of_its_step(game, seed, method):
    """KL(pi* || pi_t) <= (1 - e beta)^t KL_0 with e = eta/(1 + eta beta), at the largest steps covered by the proof."""
    beta = game.beta
    eta = 1.0 if method == "pu" else min(1 / (1 + beta), 1 / (2 - beta) if beta < 2 else math.inf)
    (start,) = policies(game, seed)
    trace = solve(game, method, eta=eta, iterations=60, tol=0, policy0=start).trace["kl"]
    rate = 1 / (1 + eta * beta)
    assert (trace <= trace[0] * rate ** np.arange(len(trace)) + 1e-12).all()


@quick(30)
@given(games(), seeds)
def test_limits_of_the_step(game, seed):
    (policy,) = policies(game, seed)
    without_pull = Game(game.ref, 0.0, prefs=game.prefs)
    eta = 0.7
    torch.testing.assert_close(
        next_policy(without_pull, policy, eta=eta), next_policy(game, policy, "sppo", eta=eta), rtol=1e-14, atol=0
    )
    reply = game.best_response(policy)
    torch.testing.assert_close(next_policy(game, policy, eta=1e12), reply, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(next_policy(game, policy, "ipo"), reply, rtol=1e-12, atol=1e-15)


@quick(40)
@given(games(("random", "certain", "cycle")), seeds)
def test_adding_a_constant_to_the_logits_changes_nothing(game, seed):
    """The step needs log-probs only up to a constant per context, since shifted scores are the same policy."""
    (policy,) = policies(game, seed)
    a, b, c = (1 / (1 + 0.4 * game.beta), 0.4 * game.beta / (1 + 0.4 * game.beta), 0.4 / (1 + 0.4 * game.beta))
    scores = a * (policy.log() + 3.7) + b * (game.log_ref - 11.0) + c * game.win_rate(policy)
    torch.testing.assert_close(next_policy(game, policy, eta=0.4), scores.softmax(-1), rtol=1e-12, atol=1e-15)


@quick(30)
@given(games(("bradley_terry", "step")), st.floats(-5, 5))
def test_adding_a_constant_to_the_rewards_changes_nothing(game, shift):
    moved = Game(game.ref, game.beta, rewards=game.rewards + shift, link=game.link)
    torch.testing.assert_close(moved.equilibrium(), game.equilibrium(), rtol=1e-9, atol=1e-11)


def test_large_and_small_beta():
    ref, rewards = reference_game().ref, reference_game().rewards
    torch.testing.assert_close(Game(ref, 1e6, rewards=rewards).equilibrium(), ref, rtol=2e-6, atol=0)
    beta = 1e-2
    game = near_cyclic_game(beta)
    against = game.win_rate(game.equilibrium()).max(-1).values  # the strongest rivals are pure
    assert (against <= 0.5 + beta * math.log(1 / game.ref.min().item())).all()
    # Without any pull, the gain of a best response is its win rate minus one half.
    plain = Game(ref, 0.0, rewards=rewards, link="step")
    torch.testing.assert_close(plain.exploitability(ref), plain.win_rate(ref).max(-1).values - 0.5)
    assert (plain.best_response(ref).max(-1).values == 1).all()


# Best of n


@quick(60)
@given(games(("bradley_terry",)), st.integers(1, 6), st.booleans())
def test_best_of_n_law(game, n, ties):
    """Compares with the sum over all draws, with and without ties."""
    rewards = game.rewards.round() if ties else game.rewards
    size = min(game.shape[1], 4)
    ref = game.ref[:1, :size] / game.ref[:1, :size].sum(-1, keepdim=True)
    rewards = rewards[:1, :size]
    n = min(n, 4)
    law = torch.zeros(size, dtype=torch.float64)
    for draws in itertools.product(range(size), repeat=n):
        drawn = rewards[0, list(draws)]
        best = [y for y, value in zip(draws, drawn, strict=True) if value == drawn.max()]
        for y in best:
            law[y] += ref[0, list(draws)].prod() / len(best)
    torch.testing.assert_close(best_of_n(ref, rewards, n)[0], law, rtol=1e-12, atol=1e-15)


@quick(60)
@given(games(("step",)), seeds, st.integers(2, 5), st.integers(2, 5), st.booleans())
def test_best_of_n_identities(game, seed, n, m, ties):
    (policy,) = policies(game, seed)
    rewards = game.rewards.round() if ties else game.rewards
    game = Game(game.ref, game.beta, rewards=rewards, link="step")
    twice = best_of_n(policy, rewards, 2)
    torch.testing.assert_close(twice, 2 * policy * game.win_rate(policy), rtol=1e-12, atol=1e-15)  # (1.9)
    law = best_of_n(policy, rewards, n)
    torch.testing.assert_close(law.sum(-1), torch.ones_like(law[:, 0]), rtol=1e-14, atol=0)
    rates = game.win_rate(policy)
    at_most = rates + 0.5 * (policy[:, None, :] * (rewards[:, :, None] == rewards[:, None, :])).sum(-1)
    below = 2 * rates - at_most
    ratio = law / policy  # (1.8)
    assert (n * rates ** (n - 1) <= ratio * (1 + 1e-10) + 1e-12).all()
    assert (ratio <= n * (at_most ** (n - 1) + below.clamp(min=0) ** (n - 1)) / 2 * (1 + 1e-10) + 1e-12).all()
    if not ties:
        torch.testing.assert_close(best_of_n(law, rewards, m), best_of_n(policy, rewards, n * m), rtol=1e-9, atol=1e-13)
        best = rewards.argmax(-1, keepdim=True)
        many = best_of_n(policy, rewards, 1000).gather(-1, best)
        torch.testing.assert_close(many, 1 - (1 - policy.gather(-1, best)) ** 1000, rtol=1e-10, atol=0)


def test_best_of_n_keeps_tiny_probabilities():
    """A response too rare to change a cumulative sum still gets n times its share at the top, without any NaN."""
    ref = np.array([[0.5, 1e-30, 0.5]])
    law = best_of_n(ref, [[0.0, 1.0, 2.0]], 3)
    torch.testing.assert_close(law[0, 1].item(), 1e-30 * 3 * 0.25, rtol=1e-9, atol=0)
    assert best_of_n(ref, [[0.0, 1.0, 2.0]], 5000).isfinite().all()


# Iterative best-of-n and the log-win-rate game


def log_win_rate_equilibrium(game: Game, beta: float) -> Tensor:
    """Return the limit of iterative best-of-2 with alpha2 / alpha1 = beta."""
    alpha1 = 0.8 / (1 + beta)
    solution = solve(game, "iterative_bond", iterations=20000, tol=1e-15, alpha1=alpha1, alpha2=beta * alpha1)
    assert solution.converged
    return solution.policy


@pytest.mark.parametrize("beta", [1.5, 2.0])
def test_mixed_best_of_2_goes_to_the_log_win_rate_game(beta):
    game = reference_game(beta=0.5)
    policy = log_win_rate_equilibrium(game, beta)
    want = (game.log_ref + game.win_rate(policy).log() / beta).softmax(-1)
    torch.testing.assert_close(policy, want, rtol=1e-9, atol=1e-13)  # (1.14)


def test_its_limit_is_best_of_n_of_the_reference():
    """n = beta / (beta - 1) for a continuum of responses; the error falls like 1 / responses."""
    errors = {}
    for size in (100, 1000):
        generator = torch.Generator().manual_seed(0)
        ref = torch.randn(1, size, generator=generator, dtype=torch.float64).softmax(-1)
        game = Game(ref, 1.0, rewards=torch.arange(size, dtype=torch.float64)[None], link="step")
        limit = log_win_rate_equilibrium(game, 1.5)
        errors[size] = (limit.cumsum(-1) - ref.cumsum(-1) ** 3).abs().max().item()
    assert errors[100] < 0.02 and errors[1000] < 0.15 * errors[100]


@pytest.mark.parametrize("beta", [0.2, 0.5, 2.0])
def test_wind_with_half_the_beta_approximates_iterative_best_of_n(beta):
    base = reference_game("bradley_terry")
    limit = log_win_rate_equilibrium(base, beta)

    def distance(of_wind: float) -> float:
        game = Game(base.ref, of_wind, rewards=base.rewards, link="bradley_terry")
        return 0.5 * (game.equilibrium() - limit).abs().sum(-1).mean().item()

    assert distance(beta / 2) < 0.6 * distance(beta)


# Sampled


# Groups, responses, KL to the equilibrium after 50, 100, 150 iterations on CB-1: beta 0.1, eta 0.4, mean of five seeds.
# The fit is the point-wise square loss on free scores; responses that were not drawn have a win rate of 1/2.
SAMPLED = [
    (50, 2, (0.609, 0.260, 0.234)),
    (100, 4, (0.145, 0.075, 0.074)),
    (50, 8, (0.141,)),
    (200, 2, (0.153,)),
    (800, 2, (0.078,)),
]


@pytest.mark.parametrize(("groups", "responses", "printed"), SAMPLED)
def test_sampled_wind_settles_where_it_should(groups, responses, printed):
    game = reference_game()
    iterations = 50 * len(printed)
    trace = fit(game, "square_point", groups, responses, iterations, seed=1, start="update").trace
    assert trace["kl"][50::50] == pytest.approx(printed, rel=0.15)
    assert trace["samples"][-1] == iterations * groups * responses


@pytest.mark.parametrize("objective", wk.losses.OBJECTIVES)
def test_every_objective_fits_the_exact_update(objective):
    """One iteration from a policy far from the reference, on 1600 groups with exact verdicts between 0.27 and 0.73."""
    generator = torch.Generator().manual_seed(3)
    rewards = torch.rand(4, 8, generator=generator, dtype=torch.float64)
    ref = torch.randn(4, 8, generator=generator, dtype=torch.float64).softmax(-1)
    game = Game(ref, 0.3, rewards=rewards, link="bradley_terry")
    (start,) = policies(game, 5)
    start = (0.5 * start.log()).softmax(-1)
    exact = solve(game, eta=0.8, iterations=1, policy0=start).policy
    options = {"groups": 1600, "iterations": 1, "eta": 0.8, "policy0": start, "verdicts": "soft", "steps": 40}
    miss = divergence(exact, fit(game, objective, **options).policy).mean().item()
    moved = divergence(exact, (start.log() / 1.24 + 0.24 / 1.24 * game.log_ref).softmax(-1)).mean().item()
    assert miss < 0.01 * moved
    if wk.losses.OBJECTIVES[objective].uses_log_z:
        assert divergence(exact, fit(game, objective, log_z="exact", **options).policy).mean() < 0.01 * moved
        assert divergence(exact, fit(game, objective, log_z="half", **options).policy).mean() > 0.1 * moved
