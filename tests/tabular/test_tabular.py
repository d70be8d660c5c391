"""The reference games to the printed digits: equilibria, iteration counts, curves of every exact method."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from tabular_cases import drawn, near_cyclic_game, reference_game, rock_paper_scissors

from windkern.tabular import METHODS, Game, best_of_n, solve
from windkern.tabular.solvers import measure

# Each row: link, beta, reward, win rate against ref, KL to ref at the equilibrium; exploitability of ref; iterations to
# a KL of 1e-6 with eta = beta and 4 beta; bound and worst ratio of successive KLs at 4 beta, down to a KL of 1e-9.
EQUILIBRIA = [
    ("step", 0.05, 2.289935, 0.991280, 5.127082, 0.349534, 2294, 576, 0.990099, 0.981344),
    ("step", 0.1, 1.755895, 0.905582, 2.670984, 0.269318, 750, 194, 0.961538, 0.943965),
    ("step", 0.5, 0.462297, 0.656347, 0.161202, 0.080630, 28, 10, 0.5, 0.286192),
    ("bradley_terry", 0.05, 2.099438, 0.855055, 3.133752, 0.212016, 2858, 718, 0.990099, 0.980297),
    ("bradley_terry", 0.1, 1.470234, 0.765088, 1.360016, 0.137465, 714, 182, 0.961538, 0.926791),
    ("bradley_terry", 0.5, 0.277547, 0.564178, 0.064389, 0.032094, 25, 9, 0.5, 0.253934),
]
DIGITS = 5.1e-7  # half a unit of the sixth decimal


def iterations_to(trace: dict[str, np.ndarray], level: float = 1e-6) -> int:
    """Return the first iteration with a KL to the equilibrium below the level."""
    assert trace["kl"][-1] < level
    return int((trace["kl"] < level).argmax())


def crosses_at(game: Game, eta: float, count: int, method: str = "wind", level: float = 1e-6) -> bool:
    """Return whether the KL to the equilibrium first falls below the level at `count`; fast, with few metrics."""
    last = itertools.islice(METHODS[method].policies(game, game.log_ref, eta=eta), count - 2, count)
    before, after = (measure(game, logs)["kl"] for logs in last)
    return after < level <= before


def is_printed(values: list[float], printed: list[float], digits: int = 4) -> bool:
    return all(abs(value - want) <= 0.51 * 10**-digits for value, want in zip(values, printed, strict=True))


def row(trace: dict[str, np.ndarray], t: int) -> list[float]:
    return [trace[name][t] for name in ("reward", "kl_ref", "win_vs_ref")]


@pytest.mark.parametrize(
    ("link", "beta", "reward", "win", "kl_ref", "expl", "slow", "fast", "bound", "worst"), EQUILIBRIA
)
def test_equilibrium_and_convergence(link, beta, reward, win, kl_ref, expl, slow, fast, bound, worst):
    game = reference_game(link, beta)
    assert row({k: [v] for k, v in measure(game, game.equilibrium().log()).items()}, 0) == pytest.approx(
        [reward, kl_ref, win], abs=DIGITS
    )
    assert game.exploitability(game.ref).mean().item() == pytest.approx(expl, abs=DIGITS)
    trace = solve(game, eta=4 * beta, iterations=2 * fast, tol=0).trace
    assert iterations_to(trace) == fast
    ratios = trace["kl"][1:] / trace["kl"][:-1]
    ratios = ratios[trace["kl"][1:] > 1e-9]  # smaller KLs are mostly rounding
    assert 1 / (1 + 4 * beta**2) == pytest.approx(bound, abs=DIGITS)
    assert ratios.max() == pytest.approx(worst, abs=DIGITS)
    assert crosses_at(game, beta, slow)


def test_the_reference_and_the_best_response_of_cb1():
    ref, rewards = drawn()
    assert (ref * rewards).sum(-1).mean() == pytest.approx(-0.071631, abs=DIGITS)
    assert rewards.max(-1).mean() == pytest.approx(2.315325, abs=DIGITS)


def test_curve_of_wind():
    trace = solve(reference_game(), eta=0.4, iterations=200, tol=0).trace
    assert trace["kl"][[0, 1, 10]] == pytest.approx([2.671, 2.521, 1.491], abs=5e-4)
    assert trace["kl"][50] == pytest.approx(0.06659, abs=5e-6)
    assert trace["exploitability"][[0, 10]] == pytest.approx([0.2693, 0.1668], abs=5e-5)
    assert trace["exploitability"][50] == pytest.approx(0.01534, abs=5e-6)


# Method, options, {iteration: (reward, KL to ref, win rate against ref)} on CB-1, beta = 0.1.
CURVES = {
    "sppo": (
        "sppo",
        {"eta": 0.4},
        {
            1: (0.0375, 0.0066, 0.5332),
            10: (0.9621, 0.6151, 0.7936),
            50: (2.3108, 5.1557, 0.9963),
            100: (2.3153, 5.2485, 0.9965),
        },
    ),
    "wind": (
        "wind",
        {"eta": 0.4},
        {
            1: (0.0333, 0.0061, 0.5319),
            10: (0.7902, 0.4227, 0.7489),
            50: (1.8586, 2.7716, 0.9311),
            200: (1.7562, 2.6721, 0.9057),
        },
    ),
    "iterated best of 2": (
        "iterative_bond",
        {},
        {
            1: (0.4753, 0.1927, 0.6665),
            2: (0.9256, 0.6355, 0.7996),
            3: (1.2913, 1.2015, 0.8882),
            5: (1.8246, 2.4697, 0.9680),
        },
    ),
    "mixing, beta 2": ("iterative_bond", {"alpha1": 0.25, "alpha2": 0.5}, {60: (0.4634, 0.1831, 0.6630)}),
    "mixing, beta 1.25": ("iterative_bond", {"alpha1": 0.4, "alpha2": 0.5}, {150: (1.0089, 0.7442, 0.8217)}),
    "J-BOND": (
        "jbond",
        {},
        {100: (0.6179, 0.3754, 0.7089), 500: (1.8665, 3.4117, 0.9672), 2000: (1.9692, 4.0938, 0.9809)},
    ),
}


@pytest.mark.parametrize("name", CURVES)
def test_curve_of_a_rival(name):
    method, options, rows = CURVES[name]
    game = reference_game()
    policies = METHODS[method].policies(game, game.log_ref, **options)
    for t, logs in enumerate(itertools.islice(policies, max(rows)), start=1):
        if t in rows:
            metrics = measure(game, logs)
            found = [metrics[metric] for metric in ("reward", "kl_ref", "win_vs_ref")]
            assert is_printed(found, list(rows[t])), (t, found)


@pytest.mark.parametrize("rounds", [1, 2, 3, 5])
def test_best_of_2_again_and_again_is_best_of_a_power_of_2(rounds):
    game = reference_game()
    once = solve(game, "best_of_n", n=2**rounds)
    again = solve(game, "iterative_bond", iterations=rounds, tol=0)
    torch.testing.assert_close(again.policy, once.policy, rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(once.policy, best_of_n(*drawn(), 2**rounds), rtol=1e-12, atol=0)
    assert once.iterations == 1


# CB-2: cycles and large steps


@pytest.mark.parametrize("size", [3, 51])
@pytest.mark.parametrize(("multiple", "converges"), [(4, True), (16, True), (30, False)])
def test_cycles_bear_steps_up_to_about_twenty_beta(size, multiple, converges):
    beta = 0.05
    uniform = np.full((1, size), 1 / size)
    tilt = 1e-3 * np.random.default_rng(0).standard_normal((1, size))
    start = np.exp(tilt) / np.exp(tilt).sum()
    game = Game(uniform, beta, prefs=rock_paper_scissors(size)[None])
    torch.testing.assert_close(game.equilibrium(), torch.tensor(uniform))
    trace = solve(game, eta=multiple * beta, iterations=6000, tol=1e-9, policy0=start).trace
    assert (trace["kl"][-1] < 1e-12) == converges
    assert converges or trace["kl"][-1] > 1e-2


@pytest.mark.parametrize(
    ("method", "eta", "count"),
    [
        ("wind", 0.05, 2230),
        ("wind", 0.2, 617),
        ("wind", 0.5, 390),
        ("pu", 1.0, 106),
        ("omwu", 1 / 1.95, 207),
    ],
)
def test_iterations_on_a_nearly_cyclic_game(method, eta, count):
    assert crosses_at(near_cyclic_game(), eta, count, method)


def test_twenty_beta_crawls_on_a_nearly_cyclic_game():
    assert crosses_at(near_cyclic_game(), 1.0, 6918)


@pytest.mark.parametrize("eta", [2.0, 4.0, 100.0])
def test_large_steps_never_settle_on_a_nearly_cyclic_game(eta):
    trace = solve(near_cyclic_game(), eta=eta, iterations=800).trace
    assert trace["kl"][400:].min() > 0.1


@pytest.mark.parametrize(
    ("method", "eta", "count"), [("wind", 4.0, 34), ("wind", 100.0, 7), ("pu", 1.0, 118), ("omwu", 1 / 1.95, 227)]
)
def test_large_steps_are_welcome_where_preferences_are_transitive(method, eta, count):
    assert crosses_at(reference_game(beta=0.05), eta, count, method)


def test_every_method_has_a_row():
    """A new method belongs in CURVES; those named here have separate tests, `ipo` in test_tabular_theory.py."""
    assert {method for method, _, _ in CURVES.values()} | {"pu", "omwu", "best_of_n", "ipo"} == set(METHODS)
