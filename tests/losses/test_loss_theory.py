"""The theory of the losses: statistics, the extended logarithm, identities, the minimiser."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import CASE, STEP, normal, random_prefs
from loss_checks import WON, assert_same, generator, partial_mask, quick, seeds, value_and_gradient
from loss_references import B_, BETA, ETA, A, C
from torch import Tensor

from windkern.losses import WindLoss, check_prefs, dpo, inpo, rebel, sppo, trajectory_balance, wind
from windkern.losses import _groups as groups

# Statistics -----------------------------------------------------------------------------------------------------------


@quick(50)
@given(seed=seeds, N=st.integers(2, 8), hard=st.booleans(), drop=st.booleans())
def test_win_rate_identities(seed, N, hard, drop):
    prefs = random_prefs(3, N, generator(seed), hard)
    where = torch.ones(3, N, dtype=torch.bool)
    where[1:, 0] = not (drop and N > 2)
    K = where.sum(-1, keepdim=True)
    v, u = groups.v_win_rates(prefs, where), groups.u_win_rates(prefs, where)
    assert_same(v[0], prefs[0].mean(-1))
    kept = where.double()
    assert_same(torch.where(where, u, 0.0), torch.where(where, (K * v - 0.5) / (K - 1), 0.0))  # (1.32)
    for rates in (v, u):
        assert_same((rates * kept).sum(-1) / K[:, 0], torch.full((3,), 0.5, dtype=torch.float64))  # (1.33)


def test_square_is_half_the_mean_over_all_pairs_and_shares_its_gradient_with_square_pair():
    case, pair = CASE["wind-square"], CASE["wind-square_pair"]
    inputs = case.make(3, 5)
    value, gradient = value_and_gradient(case, inputs)
    s = inputs["logps"] - A * inputs["old_logps"] - B_ * inputs["ref_logps"]
    d = s - C * inputs["prefs"].mean(-1)
    assert_same(value, (d[:, :, None] - d[:, None, :]).square().mean((1, 2)) / 2)  # (1.36)
    _, pair_gradient = value_and_gradient(pair, inputs)
    assert_same(pair_gradient * 5 * 4, 2 * 5**2 * gradient)  # sum over pairs = 2 K^2 of square (1.36)
    assert_same(gradient, 2 / 5 * (d - d.mean(-1, keepdim=True)))  # the mean may be a constant (1.37)
    for _, g in (value_and_gradient(case, inputs), value_and_gradient(pair, inputs)):
        assert_same(g.sum(-1), torch.zeros(3, dtype=torch.float64))  # (1.38)


def test_a_duplicate_with_even_odds_keeps_the_mean_win_rate_at_one_half():
    prefs = random_prefs(2, 4, generator(5))
    again = [0, 1, 2, 3, 0]
    larger = prefs[:, again][:, :, again]
    assert_same(larger[:, 0, 4], torch.full((2,), 0.5, dtype=torch.float64))
    check_prefs(larger)
    rates = groups.v_win_rates(larger, torch.ones(2, 5, dtype=torch.bool))
    assert_same(rates.mean(-1), torch.full((2,), 0.5, dtype=torch.float64))


def test_nce_is_the_point_wise_kl_with_u_statistics():
    case = CASE["wind-nce"]
    inputs = case.make(3, 5)
    rates = groups.u_win_rates(inputs["prefs"], torch.ones(3, 5, dtype=torch.bool))
    p = (inputs["logps"] - A * inputs["old_logps"] - B_ * inputs["ref_logps"] + C / 2) / C
    cross = -rates * groups.extended_log(p) - (1 - rates) * groups.extended_log(1 - p)
    assert_same(case(inputs, reduction="none"), cross.mean(-1))


# The extended logarithm -----------------------------------------------------------------------------------------------

DELTA = groups.DELTA


def log_derivatives(p: float) -> list[float]:
    x = torch.tensor(p, dtype=torch.float64, requires_grad=True)
    value = groups.extended_log(x)
    (first,) = torch.autograd.grad(value, x, create_graph=True)
    (second,) = torch.autograd.grad(first, x)
    return [value.item(), first.item(), second.item()]


@pytest.mark.parametrize("p", [DELTA, 0.1, 0.5, 0.9, 1 - DELTA])
def test_extended_log_is_the_log_inside(p):
    assert log_derivatives(p) == pytest.approx([math.log(p), 1 / p, -1 / p**2], rel=1e-14)


@pytest.mark.parametrize("end", [DELTA, 1 - DELTA])
def test_extended_log_joins_with_slope_and_curvature(end):
    left, right = log_derivatives(end - 1e-9), log_derivatives(end + 1e-9)
    assert left == pytest.approx(right, rel=1e-6)


@pytest.mark.parametrize(("end", "p"), [(DELTA, 0.0), (DELTA, -3.0), (1 - DELTA, 1.0), (1 - DELTA, 40.0)])
def test_extended_log_is_the_taylor_polynomial_outside(end, p):
    x = (p - end) / end
    assert log_derivatives(p) == pytest.approx([math.log(end) + x - x**2 / 2, (1 - x) / end, -1 / end**2], rel=1e-13)


@pytest.mark.parametrize("w", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("p", [-1e4, -1.0, 0.0, 1.0, 2.0, 1e4])
def test_gradient_pushes_an_implied_win_rate_back(w, p):
    x = torch.tensor(p, dtype=torch.float32, requires_grad=True)
    loss = -w * groups.extended_log(x) - (1 - w) * groups.extended_log(1 - x)
    (slope,) = torch.autograd.grad(loss, x)
    assert loss.isfinite() and slope.isfinite()
    if w in (0.0, 1.0) and p in (
        0.0,
        1.0,
    ):  # a certain label: only its log is left, with its minimum at |p - w| = 1 - 2 DELTA
        assert slope * (0.5 - w) > 0
    else:
        assert slope * (p - w) > 0


# Identities with published losses -------------------------------------------------------------------------------------

ALMOST_INFINITE = 1e9  # eta: the step forgets pi_t, so a = 0, b = 1, c = 1 / beta


def test_sppo_is_square_point_without_reference():
    inputs = CASE["sppo-prefs"].make(3, 5)
    rates = groups.v_win_rates(inputs.pop("prefs"), torch.ones(3, 5, dtype=torch.bool))
    inputs["ref_logps"] = torch.zeros(3, 5, dtype=torch.float64)  # beta = 0 never reads it
    point = wind(**inputs, win_rates=rates, eta=ETA, beta=0.0, objective="square_point")
    assert_same(point, sppo(inputs["logps"], inputs["old_logps"], win_rates=rates, eta=ETA))


def test_sppo_code_pair_is_two_responses_of_the_group():
    inputs = CASE["sppo-win_rates"].make(3, 2)
    (chosen, rejected), rates = (inputs["logps"] - inputs["old_logps"]).unbind(-1), inputs["win_rates"]
    beta = 1 / ETA
    published = 0.5 * ((chosen - (rates[:, 0] - 0.5) / beta) ** 2 + (rejected - (rates[:, 1] - 0.5) / beta) ** 2)
    assert_same(sppo(**inputs, eta=ETA, reduction="none"), published)


@pytest.mark.parametrize(("eta", "beta"), [(ETA, BETA), (ETA, 0.0), (ALMOST_INFINITE, BETA)])
def test_inpo_is_square_pair_under_the_conversion(eta, beta):
    inputs = CASE["inpo-won"].make(4)
    published = inpo(**inputs, eta=1 / eta + beta, tau=beta, reduction="none")
    got = wind(**inputs, prefs=WON.expand(4, 2, 2), eta=eta, beta=beta, objective="square_pair", reduction="none")
    assert_same(got, published, 1e-6 if eta == ALMOST_INFINITE else 1e-12)


def test_ipo_is_square_pair_at_both_ends():
    inputs = CASE["inpo-won"].make(4)
    inputs["prefs"] = WON.expand(4, 2, 2)
    iterative = wind(**inputs, eta=ETA, beta=0.0, objective="square_pair")  # the reference is pi_t
    assert_same(iterative, dpo(inputs["logps"], inputs["old_logps"], beta=1 / ETA, link="ipo"))
    response = wind(**inputs, eta=ALMOST_INFINITE, beta=BETA, objective="square_pair")
    assert_same(response, dpo(inputs["logps"], inputs["ref_logps"], beta=BETA, link="ipo"), 1e-6)


@pytest.mark.parametrize("K", [2, 5])
def test_rebel_and_trajectory_balance_are_square_with_a_reward_as_utility(K):
    inputs = CASE["wind-square-win_rates"].make(3, K)
    logps, old, ref, rewards = (inputs[name] for name in ("logps", "old_logps", "ref_logps", "win_rates"))
    square = wind(logps, old, ref, win_rates=rewards, eta=ETA, beta=0.0)
    assert_same(2 * K / (K - 1) * square, rebel(logps, old, rewards, eta=ETA))
    square = wind(logps, old, ref, win_rates=rewards, eta=ALMOST_INFINITE, beta=BETA)
    assert_same(square, trajectory_balance(logps, ref, rewards, beta=BETA), 1e-6)


def test_module_is_the_function():
    inputs = CASE["wind-kl"].make(5)
    where = partial_mask(CASE["wind-kl"])
    module = WindLoss(eta=ETA, beta=BETA, objective="kl", reduction="sum")
    assert torch.equal(module(**inputs, where=where), CASE["wind-kl"](inputs, where=where, reduction="sum"))
    assert repr(module) == f"WindLoss(eta={ETA}, beta={BETA}, objective='kl', reduction='sum')"
    log_z = torch.zeros(5, dtype=torch.float64)
    point = WindLoss(eta=ETA, beta=BETA, objective="square_point")
    assert torch.equal(
        point(**inputs, log_z=log_z), wind(**inputs, log_z=log_z, objective="square_point", eta=ETA, beta=BETA)
    )
    assert not list(module.parameters()) and not module.state_dict()


# The minimiser (docs/theory.md, eq. (1.39)): an exact game, every group weighted by its probability -------------------


class Bandit:
    """Eight actions and one step of the exact update from pi_t. Preferences are cyclic and in [0.1, 0.9]."""

    def __init__(self, *, uniform: bool):
        g = generator(0)
        self.ref = (1.2 * normal(8, generator=g)).log_softmax(-1)
        self.old = ((0.0 if uniform else 1.2) * normal(8, generator=g)).log_softmax(-1)
        scores, noise = normal(8, generator=g), normal(8, 8, generator=g)
        self.prefs = 0.5 + 0.4 * (scores[:, None] - scores + 0.7 * (noise - noise.T)).tanh()
        self.rates = self.prefs @ self.old.exp()
        self.base = A * self.old + B_ * self.ref
        self.log_z = (self.base + C * self.rates).logsumexp(-1)
        self.exact = self.base + C * self.rates - self.log_z

    def fit(self, objective: str, drawn: int | None, given: str = "prefs", log_z: Tensor | None = None) -> Tensor:
        """Return the log-probs of the minimiser of the expected loss.

        A group has `drawn` independent draws from pi_t (all tuples, weighted), or for None the eight actions
        themselves, an exact sample of a uniform pi_t.
        """
        rows = torch.arange(8)[None] if drawn is None else torch.cartesian_prod(*[torch.arange(8)] * drawn)
        chances = self.old[rows].sum(-1).exp() if drawn else torch.ones(1, dtype=torch.float64)
        prefs = self.prefs[rows[:, :, None], rows[:, None, :]]
        every = torch.ones(rows.shape, dtype=torch.bool)
        constants = {
            "prefs": {"prefs": prefs},
            "exact rates": {"win_rates": self.rates[rows]},
            "u": {"win_rates": groups.u_win_rates(prefs, every)},
            "v": {"win_rates": groups.v_win_rates(prefs, every)},
        }[given]
        constants |= {} if log_z is None else {"log_z": log_z.expand(len(rows))}
        logits = self.old.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [logits], max_iter=400, tolerance_grad=1e-13, tolerance_change=1e-18, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            logps = logits.log_softmax(-1)[rows]
            fixed = {"objective": objective, "reduction": "none", **STEP, **constants}
            loss = (chances * wind(logps, self.old[rows], self.ref[rows], **fixed)).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return logits.detach().log_softmax(-1)

    def miss(self, *args, **kwargs) -> float:
        return (self.fit(*args, **kwargs) - self.exact).abs().max().item()


EVEN, SKEWED = Bandit(uniform=True), Bandit(uniform=False)


@pytest.mark.parametrize("objective", ["square", "square_pair", "nce_ratio", "kl"])
def test_minimiser_over_the_whole_action_set_is_the_exact_update(objective):
    assert EVEN.miss(objective, None) < 1e-6


@pytest.mark.parametrize("drawn", [2, 3])
@pytest.mark.parametrize(
    ("objective", "given"),
    [
        ("square", "prefs"),
        ("square_pair", "prefs"),
        *itertools.product(["square", "kl", "nce_ratio"], ["exact rates"]),
    ],
)
def test_minimiser_over_draws_from_any_policy_is_the_exact_update(objective, given, drawn):
    assert SKEWED.miss(objective, drawn, given) < 1e-6


@pytest.mark.parametrize("objective", ["kl", "nce_ratio"])
def test_v_statistics_bias_the_nonlinear_objectives_a_little(objective):
    assert 1e-4 < SKEWED.miss(objective, 2) < 0.05 and 1e-4 < SKEWED.miss(objective, 3) < 0.05


@pytest.mark.parametrize("objective", ["square_point", "nce"])
def test_point_forms_need_the_exact_partition_function(objective):
    assert SKEWED.miss(objective, 2, log_z=SKEWED.log_z) < 1e-6
    assert SKEWED.miss(objective, 2) > 0.1  # c/2 leaves out log sum pi_t^a pi_ref^b
    corrected = SKEWED.base.logsumexp(-1) + C / 2
    assert SKEWED.miss(objective, 2, log_z=corrected) < 0.02


@pytest.mark.parametrize("drawn", [2, 3])
def test_statistics_must_match_the_centring(drawn):
    overshoot = SKEWED.fit("square", drawn, "u") - SKEWED.base - drawn / (drawn - 1) * C * SKEWED.rates
    assert_same(overshoot, overshoot.mean().expand(8), 1e-6)  # centred with U: the step grows by K / (K - 1)
    shrunk = ((drawn - 1) * SKEWED.rates + 0.5) / drawn  # point by point with V: w is pulled towards 1/2
    target = SKEWED.base + C * shrunk
    got = SKEWED.fit("square_point", drawn, "v", log_z=target.logsumexp(-1))
    assert_same(got, target - target.logsumexp(-1), 1e-6)


def test_gradient_at_pi_t_is_that_of_the_regularised_game():
    logits = EVEN.old.clone().requires_grad_()
    logps = logits.log_softmax(-1)
    loss = wind(logps[None], EVEN.old[None], EVEN.ref[None], EVEN.prefs[None], **STEP)
    payoff = logps.exp() @ EVEN.rates - BETA * (logps.exp() * (logps - EVEN.ref)).sum()
    (got,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (want,) = torch.autograd.grad(-2 * C * payoff, logits)
    assert_same(got, want)  # (1.46)
