"""What wk.tabular accepts, refuses and returns."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
import torch
from tabular_cases import rock_paper_scissors

import windkern as wk
from windkern.tabular import FITS, METHODS, Game, Solution, best_of_n, fit, games, solve
from windkern.tabular.sampled import draw
from windkern.tabular.solvers import measure

REF, REWARDS = [[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]], [[1.0, 0.0, 2.0], [0.0, 0.0, 1.0]]
CYCLE = rock_paper_scissors(3).expand(2, 3, 3)


def game(beta: float = 0.1, **changes: object) -> Game:
    return Game(REF, beta, **({"rewards": REWARDS, "link": "step"} | changes))


def cyclic(beta: float = 0.1) -> Game:
    return Game(REF, beta, prefs=CYCLE)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Game([[0.5, 0.4]], 0.1, rewards=[[0, 1]]), ValueError, "ref must sum to 1 .* got a sum of 0.9"),
        (lambda: Game([[1.5, -0.5]], 0.1, rewards=[[0, 1]]), ValueError, "ref must hold probabilities, got -0.5"),
        (lambda: Game([[1.0, 0.0]], 0.1, rewards=[[0, 1]]), ValueError, "ref must be positive everywhere"),
        (lambda: Game([0.5, 0.5], 0.1, rewards=[[0, 1]]), ValueError, r"ref must have shape \(X, Y\), got \(2,\)"),
        (lambda: Game(np.ones((0, 3)), 0.1, rewards=np.ones((0, 3))), ValueError, "at least one context"),
        (lambda: Game([[math.nan, 1.0]], 0.1, rewards=[[0, 1]]), ValueError, "ref must hold finite numbers"),
        (lambda: Game("half", 0.1, rewards=REWARDS), TypeError, "ref must be a torch or numpy array .* got str"),
        (lambda: Game(REF, 0.1), ValueError, "exactly one of rewards and prefs, got neither"),
        (lambda: Game(REF, 0.1, REWARDS, CYCLE), ValueError, "exactly one of rewards and prefs, got both"),
        (lambda: game(rewards=[[0.0, 1.0]]), ValueError, r"rewards must have shape \(2, 3\), got \(1, 2\)"),
        (lambda: Game(REF, 0.1, prefs=CYCLE[0]), ValueError, r"prefs must have shape \(2, 3, 3\), got \(3, 3\)"),
        (lambda: Game(REF, 0.1, prefs=3 * CYCLE), ValueError, r"prefs must lie in \[0, 1\]"),
        (lambda: Game(REF, 0.1, prefs=0.5 * CYCLE), ValueError, "must be 1 .*off by up to 0.5; .*symmetric"),
        (lambda: game(-0.1), ValueError, "beta must be at least 0, got -0.1"),
        (lambda: game(math.inf), ValueError, "beta must be a finite number"),
        (lambda: game(link="steps"), ValueError, "link must be one of 'step', 'bradley_terry', .* did you mean 'step'"),
        (lambda: game(0.0).equilibrium(), ValueError, "beta must be greater than 0 for an equilibrium"),
        (lambda: game().win_rate([[0.5, 0.5]]), ValueError, r"policy must have shape \(2, 3\)"),
        (lambda: game().exploitability([[1, 1, 1], [1, 0, 0]]), ValueError, "policy must sum to 1"),
        (lambda: solve(game(), "winds"), ValueError, "method must be one of 'wind', .* did you mean 'wind'"),
        (lambda: solve(game(), "wind", n=2), TypeError, "method='wind' takes 'eta', got 'n'"),
        (lambda: solve(game(), "ipo", n=2), TypeError, "method='ipo' takes no options, got 'n'"),
        (lambda: solve(game(), eta=0.0), ValueError, "eta must be greater than 0, got 0.0"),
        (lambda: solve(game(), "sppo", eta=-1.0), ValueError, "eta must be greater than 0"),
        (lambda: solve(game(), iterations=-1), ValueError, "iterations must be at least 0, got -1"),
        (lambda: solve(game(), iterations=2.5), TypeError, "iterations must be an integer, got float"),
        (lambda: solve(game(), tol=-1.0), ValueError, "tol must be at least 0"),
        (lambda: solve(game(), policy0=[[1, 0, 0], [1, 0, 0]]), ValueError, "policy0 must be positive everywhere"),
        (lambda: solve(game(0.0), "ipo"), ValueError, "beta must be greater than 0 for method='ipo'"),
        (lambda: solve(cyclic(), "best_of_n"), ValueError, "method='best_of_n' ranks by rewards"),
        (lambda: solve(game(), "best_of_n", n=0), ValueError, "n must be at least 1, got 0"),
        (lambda: solve(game(), "iterative_bond", n=1), ValueError, "n must be at least 2, got 1"),
        (lambda: solve(game(), "iterative_bond", alpha1=0.0), ValueError, "alpha1 must be greater than 0"),
        (lambda: solve(game(), "iterative_bond", alpha2=-1.0), ValueError, "alpha2 must be at least 0"),
        (lambda: solve(game(), "iterative_bond", alpha2=0.5), ValueError, r"alpha1 \+ alpha2 must be at most 1"),
        (
            lambda: solve(game(), "iterative_bond", alpha1=0.5, alpha2=0.4),
            ValueError,
            r"alpha2 / \(\(n - 1\) \* alpha1\) must be at least 1 \(or alpha2 = 0\), got 0.8",
        ),
        (lambda: solve(game(), "iterative_bond", n=4, alpha1=0.3, alpha2=0.7), ValueError, "got 0.777778"),
        (lambda: solve(game(), "jbond", mix=1.5), ValueError, "mix and rate must be at most 1"),
        (lambda: solve(game(), "jbond", rate=0.0), ValueError, "rate must be greater than 0"),
        (lambda: solve(game(), "jbond", learning_rate=0.0), ValueError, "learning_rate must be greater than 0"),
        (lambda: solve(game(), "jbond", gamma=-1.0), ValueError, "gamma must be at least 0"),
        (lambda: fit(game(), "squared"), ValueError, "objective must be one of 'square', .* did you mean 'square'"),
        (lambda: fit(game(), groups=0), ValueError, "groups must be at least 1"),
        (lambda: fit(game(), responses=1), ValueError, "responses must be at least 2, got 1"),
        (lambda: fit(game(), steps=0), ValueError, "steps must be at least 1"),
        (lambda: fit(game(), seed=-1), ValueError, "seed must be at least 0"),
        (lambda: fit(game(), verdicts="firm"), ValueError, "verdicts must be one of 'hard', 'soft', got 'firm'"),
        (lambda: fit(game(), log_z="zero"), ValueError, "log_z must be one of 'free', 'exact', 'half', got 'zero'"),
        (lambda: fit(game(), eta=0.0), ValueError, "eta must be greater than 0"),
        (lambda: fit(game(), "jbond"), ValueError, "responses must be 3 for objective='jbond'"),
        (lambda: fit(game(), "iterative_bond", alpha1=0.5, alpha2=0.1), ValueError, "must be at least 1"),
        (lambda: best_of_n(REF, REWARDS, 0), ValueError, "n must be at least 1"),
        (lambda: best_of_n(REF, [[1.0, 2.0, 3.0]], 2), ValueError, r"rewards must have shape \(2, 3\)"),
    ],
)
def test_mistakes_name_the_argument(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert re.search(r"\n", str(caught.value)) is None


def test_an_equilibrium_out_of_reach_says_so(monkeypatch):
    monkeypatch.setattr(games, "MAX_STEPS", 10)
    with pytest.raises(RuntimeError, match=r"no equilibrium after 10 steps at beta=0\.1; take a larger beta"):
        game().equilibrium()


def test_a_low_pull_is_fine_where_everybody_wins_sometimes():
    soft = game(link="bradley_terry")
    solution = solve(soft, "iterative_bond", alpha1=0.5, alpha2=0.1)
    assert solution.converged
    want = (soft.log_ref + soft.win_rate(solution.policy).log() / 0.2).softmax(-1)
    torch.testing.assert_close(solution.policy, want, rtol=1e-9, atol=0)


def test_repeated_best_of_2_stays_finite():
    """Log-probs of the worst response double each time; 1500 doublings exceed the range of float64."""
    logs = next(itertools.islice(METHODS["iterative_bond"].policies(game(), game().log_ref), 1500, None))
    assert logs.isfinite().all() and (logs.exp()[:, 2] == 1).all()
    assert all(np.isfinite(value) for value in measure(game(), logs).values())


def test_torch_and_numpy_are_the_same_and_everything_is_float64():
    one = Game(torch.tensor(REF), 0.1, rewards=torch.tensor(REWARDS))
    two = Game(np.array(REF), 0.1, rewards=np.array(REWARDS))
    torch.testing.assert_close(one.equilibrium(), two.equilibrium(), rtol=1e-6, atol=1e-9)
    for value in (one.win_rate(REF), one.best_response(REF), one.exploitability(REF), solve(one).policy):
        assert value.dtype == torch.float64
    assert one.shape == (2, 3) and one.exploitability(REF).shape == (2,)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_policies_and_a_full_trace(method):
    solution = solve(game(link="bradley_terry"), method, iterations=5, tol=0)
    assert isinstance(solution, Solution)
    torch.testing.assert_close(solution.policy.sum(-1), torch.ones(2, dtype=torch.float64))
    assert set(solution.trace) == {"kl", "exploitability", "reward", "kl_ref", "win_vs_ref"}
    assert all(values.shape == (solution.iterations + 1,) for values in solution.trace.values())
    assert solution.iterations == (1 if method == "best_of_n" else 5)
    assert METHODS[method].formula and METHODS[method].source
    assert solution.trace["win_vs_ref"][-1] > 0.5 and not solution.converged
    assert solution.trace["kl_ref"][0] == 0 and solution.trace["win_vs_ref"][0] == pytest.approx(0.5)


@pytest.mark.parametrize("objective", [*FITS, "jbond"])
def test_fits_repeat_with_their_seed_and_run_on_a_cycle(objective):
    options = {"groups": 4, "iterations": 3, "responses": 3}
    runs = [fit(cyclic(), objective, seed=seed, **options) for seed in (7, 7, 8)]
    assert torch.equal(runs[0].policy, runs[1].policy) and not torch.equal(runs[0].policy, runs[2].policy)
    torch.testing.assert_close(runs[0].policy.sum(-1), torch.ones(2, dtype=torch.float64))
    assert runs[0].trace["samples"].tolist() == [0, 12, 24, 36] and "reward" not in runs[0].trace


def test_trace_leaves_out_what_a_game_does_not_have():
    assert "kl" not in solve(game(0.0), "sppo", iterations=2).trace
    assert "reward" not in solve(cyclic(), iterations=2).trace
    assert solve(game(), iterations=0).iterations == 0


def test_hard_verdicts_average_to_the_preferences():
    soft = game(link="bradley_terry")
    batch = draw(soft, soft.log_ref, 4000, 3, "hard", torch.Generator().manual_seed(0))
    assert ((batch.prefs == 0) | (batch.prefs == 0.5) | (batch.prefs == 1)).all()
    wk.losses.check_prefs(batch.prefs)
    drawn = batch.responses.view(2, 4000, 3)
    for x in range(2):
        first, second, won = (
            drawn[x, :, 0],
            drawn[x, :, 1],
            batch.prefs.view(2, 4000, 3, 3)[x, :, 0, 1],
        )
        for i in range(3):
            for j in range(3):
                chosen = won[(first == i) & (second == j)]
                assert chosen.mean().item() == pytest.approx(soft.prefs[x, i, j].item(), abs=3.5 / len(chosen) ** 0.5)


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_sampled_jbond_follows_its_expected_gradient(gamma):
    soft = game(link="bradley_terry")
    options = {"learning_rate": 0.2, "gamma": gamma}
    exact = solve(soft, "jbond", iterations=60, tol=0, **options).policy
    torch.testing.assert_close(fit(soft, "jbond", 4000, 3, 60, **options).policy, exact, rtol=0, atol=0.01)


def test_jbond_steps_along_the_gradient_of_its_objective():
    """(1.51) against autograd, once the anchor lags behind."""
    soft, mix, gamma, rate, size = game(link="bradley_terry"), 0.3, 0.7, 0.1, 0.5
    scores, anchor = soft.log_ref, soft.log_ref
    for _ in range(4):
        leaf, old = scores.clone().requires_grad_(), anchor.softmax(-1)
        logs = leaf.log_softmax(-1)
        gap = logs - old.log()
        rewards = (-math.log(16) * (1 - soft.win_rate(old)).square() - gap).detach()
        forward = -(2 * old * soft.win_rate(old) * logs).sum()
        backward = -(logs.exp() * rewards).sum()
        ((1 - mix) * forward + mix * backward + gamma * (logs.exp() * gap).sum()).backward()
        anchor = (1 - rate) * anchor + rate * scores
        scores = scores - size * leaf.grad
    options = {"mix": mix, "gamma": gamma, "rate": rate, "learning_rate": size}
    policy = solve(soft, "jbond", iterations=4, tol=0, **options).policy
    torch.testing.assert_close(policy, scores.softmax(-1), rtol=1e-12, atol=1e-14)


def test_sampled_bond_and_sppo_follow_their_updates():
    soft = game(link="bradley_terry")
    sppo = solve(soft, "sppo", eta=0.4, iterations=5, tol=0).policy
    torch.testing.assert_close(fit(soft, "sppo", 20000, 4, 5, eta=0.4).policy, sppo, rtol=0, atol=0.01)
    weights = {"alpha1": 0.3, "alpha2": 0.3}
    bond = solve(soft, "iterative_bond", iterations=5, tol=0, **weights).policy
    options = {"verdicts": "soft", **weights}
    torch.testing.assert_close(fit(soft, "iterative_bond", 2000, 24, 5, **options).policy, bond, rtol=0, atol=0.02)


@pytest.mark.parametrize("objective", ["square", "square_point"])
def test_responses_that_were_not_drawn_stay_and_the_drawn_keep_their_level(objective):
    """Centred losses keep the mean log-ratio of the draws at that of the others; free scores are raised to match."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(2, 30, generator=generator, dtype=torch.float64)
    ref = torch.randn(2, 30, generator=generator, dtype=torch.float64).softmax(-1)
    wide = Game(ref, 0.3, rewards=rewards)
    start = torch.randn(2, 30, generator=generator, dtype=torch.float64).softmax(-1)
    options = {"groups": 5, "iterations": 1, "policy0": start, "steps": 60, "seed": 3}
    ratio = (fit(wide, objective, **options).policy / start).log()
    drawn = draw(wide, start.log(), 5, 4, "hard", torch.Generator().manual_seed(3)).responses
    others = torch.ones_like(ratio, dtype=torch.bool).scatter(1, drawn, False)
    for x in range(2):
        still = ratio[x, others[x]]
        assert len(still) > 5
        torch.testing.assert_close(still, still[:1].expand_as(still), rtol=0, atol=1e-12)
        torch.testing.assert_close(ratio[x, drawn[x]].mean(), still[0], rtol=0, atol=1e-6)
    pulled = fit(wide, objective, start="update", **options).policy
    a = 1 / (1 + 0.4 * 0.3)
    base = (pulled / (start**a * wide.ref ** (1 - a))).log()
    for x in range(2):
        torch.testing.assert_close(base[x, drawn[x]].mean(), base[x, others[x]][0], rtol=0, atol=1e-6)
