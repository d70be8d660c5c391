"""Losses over (B, N) log-probs. What can be generated runs over the rows of loss_cases.CASES."""

from __future__ import annotations

import doctest
import inspect
import itertools
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import (
    B_,
    BETA,
    CASES,
    ETA,
    A,
    C,
    assert_matches_reference,
    normal,
    partial_mask,
    poison,
    random_prefs,
)
from torch import Tensor

import windkern.losses as losses
from windkern.losses import LINKS, LOSSES, OBJECTIVES, WindLoss, check_prefs, dpo, sppo, wind
from windkern.losses import _groups as groups

every_case = pytest.mark.parametrize("case", CASES, ids=str)
CASE = {str(case): case for case in CASES}
STEP = {"eta": ETA, "beta": BETA}
seeds = st.integers(0, 2**31)


def having(name: str):
    return pytest.mark.parametrize("case", [case for case in CASES if name in case.properties], ids=str)


def quick(examples: int = 25):
    return settings(max_examples=examples, deadline=None, database=None, derandomize=True)


def value_and_gradient(case, inputs: dict[str, Tensor], **options) -> tuple[Tensor, Tensor]:
    logps = inputs["logps"].clone().requires_grad_()
    values = case({**inputs, "logps": logps}, reduction="none", **options)
    return values.detach(), torch.autograd.grad(values.sum(), logps)[0]


def assert_same(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The tables -----------------------------------------------------------------------------------------------------------


def test_every_loss_objective_and_link_has_a_row():
    assert {case.loss for case in CASES} == set(LOSSES)
    assert {case.options["objective"] for case in CASES if case.loss == "wind"} == set(OBJECTIVES)
    assert {case.options.get("link", "sigmoid") for case in CASES if case.loss == "dpo"} == set(LINKS)


@pytest.mark.parametrize("name", LOSSES)
def test_table_entry_describes_the_function(name):
    loss = LOSSES[name]
    assert loss.name == name and getattr(losses, name) is loss.function
    for text in (loss.formula, loss.source, loss.when):
        assert text and text.isascii() and "\n" not in text
    arguments = list(inspect.signature(loss.function).parameters)
    listed = [argument.strip() for entry in loss.inputs for argument in entry.split("|")]
    assert listed == [argument for argument in arguments if argument in listed]
    assert {"where", "reduction"} <= set(arguments)


@pytest.mark.parametrize("thing", [*(loss.function for loss in LOSSES.values()), WindLoss, check_prefs])
def test_docstring_is_complete_and_its_example_runs(thing):
    text = thing.__doc__
    wanted = ["Formula:", "Args:", "Raises:", "Example:"]
    wanted += [] if thing is check_prefs else ["Source:"]
    wanted += ["Returns:"] if thing in [loss.function for loss in LOSSES.values()] else []
    assert all(section in text for section in wanted)
    (example,) = doctest.DocTestFinder(recurse=False).find(thing, globs={})
    result = doctest.DocTestRunner(optionflags=doctest.REPORT_NDIFF).run(example)
    assert result.attempted >= 2 and result.failed == 0


# Values and gradients -------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("responses", [2, 3, 5])
@pytest.mark.parametrize("junk", [math.nan, -math.inf, math.inf], ids=str)
def test_matches_plain_python_on_what_the_mask_leaves(case, responses, junk):
    assert_matches_reference(LOSSES[case.loss].function, case, junk=junk, responses=responses)


@every_case
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(case, masked):
    inputs = case.make(4)
    logps = inputs.pop("logps").requires_grad_()
    where = partial_mask(*logps.shape) if masked else None
    torch.autograd.gradcheck(lambda x: case({"logps": x, **inputs}, where=where, reduction="none"), logps)
    torch.autograd.gradgradcheck(lambda x: case({"logps": x, **inputs}, where=where), logps)


@every_case
def test_reductions_and_dtypes(case):
    inputs = case.make(5)
    where = partial_mask(*inputs["logps"].shape)
    values = case(inputs, where=where, reduction="none")
    assert values.shape == (5,) and values.dtype == torch.float64
    assert_same(case(inputs, where=where, reduction="sum"), values.sum())
    assert_same(case(inputs, where=where, reduction="mean"), values.sum() / 5)  # masked groups count
    assert_same(case(inputs, where=where), values.sum() / 5)
    single = case({name: value.float() for name, value in inputs.items()}, where=where, reduction="none")
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), values, rtol=1e-3, atol=1e-4)  # log-probs of -40 nats, eps 2e-6


def test_constants_of_the_other_precision_are_converted_but_log_probs_are_not():
    case = CASE["wind-square"]
    inputs = case.make()
    mixed = {**inputs, "prefs": inputs["prefs"].float()}
    torch.testing.assert_close(case(mixed), case(inputs), rtol=1e-6, atol=1e-6)
    with pytest.raises(TypeError, match=r"old_logps is torch\.float32 but logps is torch\.float64"):
        case({**inputs, "old_logps": inputs["old_logps"].float()})


@every_case
@pytest.mark.parametrize("groups_kept", [0, 1])
def test_groups_that_are_off_give_zero_and_no_nan(case, groups_kept):
    inputs = case.make(3)
    where = torch.zeros(inputs["logps"].shape, dtype=torch.bool)
    where[:, :groups_kept] = True
    value, gradient = value_and_gradient(case, poison(inputs, where, math.nan), where=where)
    assert torch.equal(value, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("shape", [(0, 3), (3, 1), (3, 0)], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_group_or_no_rival_is_zero(objective, shape):
    logps = torch.zeros(shape, requires_grad=True)
    prefs = torch.full((*shape, shape[1]), 0.5)
    loss = wind(logps, logps.detach(), logps.detach(), prefs, objective=objective, **STEP)
    loss.backward()
    assert loss.item() == 0 and torch.equal(logps.grad, torch.zeros(shape))


@every_case
def test_groups_are_treated_apart(case):
    assert LOSSES[case.loss].separable
    inputs = case.make(5)
    where = partial_mask(*inputs["logps"].shape)
    values, gradient = value_and_gradient(case, inputs, where=where)
    for rows in (slice(0, 2), slice(2, 5)):  # what fused_loss does
        chunk = {name: value[rows] for name, value in inputs.items()}
        chunk_values, chunk_gradient = value_and_gradient(case, chunk, where=where[rows])
        assert torch.equal(chunk_values, values[rows]) and torch.equal(chunk_gradient, gradient[rows])


@pytest.mark.parametrize("name", ["wind-square", "wind-nce", "sppo-prefs", "dpo-sigmoid"])
def test_traces_without_a_graph_break(name):
    case = CASE[name]
    inputs = case.make(5)
    where = partial_mask(*inputs["logps"].shape)
    torch.compiler.reset()  # else the constants of the row before become symbols, which math.isfinite cannot take
    compiled = torch.compile(lambda **tensors: case(tensors, where=where), backend="eager", fullgraph=True)
    assert_same(compiled(**inputs), case(inputs, where=where))


# Closed forms on tiny inputs ------------------------------------------------------------------------------------------

ONE = torch.ones(1, 2, dtype=torch.float64)
WON = torch.tensor([[[0.5, 1.0], [0.0, 0.5]]], dtype=torch.float64)


def test_closed_forms_of_wind():
    logps = torch.tensor([[0.3, -0.1]], dtype=torch.float64)
    step = {"eta": 1.0, "beta": 0.25}  # a = 0.8, b = 0.2, c = 0.8
    zero = torch.zeros_like(logps)

    def of(objective, **options):
        return wind(logps, zero, zero, WON, objective=objective, **step, **options).item()

    assert of("square_pair") == pytest.approx((0.4 - 0.4) ** 2, abs=1e-15)
    assert of("square") == pytest.approx((0.2 - 0.8 * 0.25) ** 2, abs=1e-15)  # w = 3/4, 1/4
    assert of("square_point") == pytest.approx(((0.3 + 0.4 - 0.8) ** 2 + (-0.1 + 0.4) ** 2) / 2)  # w = 1, 0
    assert of("square_point", log_z=torch.tensor([0.1], dtype=torch.float64)) == pytest.approx((0.4**2 + 0) / 2)
    assert of("kl") == pytest.approx(0, abs=1e-15)  # p = 1/2 +- 0.2 / 0.8 = w
    assert of("nce") == pytest.approx((-math.log(0.7 / 0.8) - math.log(1 - 0.3 / 0.8)) / 2)
    tilt, gap = math.exp(0.4), math.exp(0.4)  # both ratios of the first to the second
    assert of("nce_ratio") == pytest.approx((tilt * math.log1p(1 / gap) + math.log1p(gap)) / (1 + tilt))


def test_closed_forms_of_sppo_and_dpo():
    logps = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    zero = torch.zeros_like(logps)
    assert sppo(logps, zero, WON, eta=2.0).item() == pytest.approx((1 - 2 / 4) ** 2)
    assert sppo(logps, zero, win_rates=ONE / 2, eta=2.0).item() == pytest.approx(1)
    assert dpo(logps, zero, beta=0.5).item() == pytest.approx(math.log1p(math.exp(-1)))
    assert dpo(zero, zero).item() == pytest.approx(math.log(2))
    assert dpo(logps, zero, beta=0.5, label_smoothing=0.25).item() == pytest.approx(math.log1p(math.exp(-1)) + 0.25)
    assert dpo(logps, zero, beta=0.5, link="ipo").item() == pytest.approx((2 - 1) ** 2)
    assert dpo(logps, zero, beta=0.3, link="hinge").item() == pytest.approx(0.4)
    assert dpo(logps, zero, beta=0.6, link="hinge").item() == 0


# Properties -----------------------------------------------------------------------------------------------------------


@having("shift")
@quick(12)
@given(seed=seeds, responses=st.integers(2, 6), shift=st.floats(-1e3, 1e3))
def test_shift_of_a_group_changes_nothing_and_gradients_sum_to_zero(case, seed, responses, shift):
    inputs = case.make(3, responses, seed)
    value, gradient = value_and_gradient(case, inputs)
    moved = {**inputs, "logps": inputs["logps"] + shift}
    for got, want in zip(value_and_gradient(case, moved), (value, gradient), strict=True):
        assert_same(got, want, 1e-8)
    assert_same(gradient.sum(-1), torch.zeros_like(value), 1e-9)


def test_point_forms_do_move_with_a_shift():
    for case in CASES:
        if "shift" not in case.properties:
            inputs = case.make()
            assert (case({**inputs, "logps": inputs["logps"] + 1}) - case(inputs)).abs() > 1e-2, case


@every_case
@quick(10)
@given(seed=seeds, responses=st.integers(2, 6))
def test_order_of_prompts_and_of_responses_does_not_matter(case, seed, responses):
    inputs = case.make(4, responses, seed)
    value, gradient = value_and_gradient(case, inputs)
    prompts = torch.randperm(4, generator=generator(seed))
    got = value_and_gradient(case, {name: tensor[prompts] for name, tensor in inputs.items()})
    assert torch.equal(got[0], value[prompts]) and torch.equal(got[1], gradient[prompts])
    if "permutes" in case.properties:
        order = torch.randperm(gradient.shape[1], generator=generator(seed))
        moved = {name: tensor if name == "log_z" else tensor[:, order] for name, tensor in inputs.items()}
        if "prefs" in moved:
            moved["prefs"] = moved["prefs"][:, :, order]
        got = value_and_gradient(case, moved)
        assert_same(got[0], value)
        assert_same(got[1], gradient[:, order])


@having("quadratic")
@quick(10)
@given(seed=seeds)
def test_gradient_is_linear_in_the_log_probs(case, seed):
    inputs = case.make(3, seed=seed)
    direction = normal(*inputs["logps"].shape, generator=generator(seed))

    def gradient(factor):
        return value_and_gradient(case, {**inputs, "logps": inputs["logps"] + factor * direction})[1]

    assert_same(gradient(3.0) - gradient(0.0), 3 * (gradient(1.0) - gradient(0.0)), 1e-9)


@pytest.mark.parametrize("objective", ["square", "square_pair", "square_point"])
def test_value_grows_with_the_square_of_the_residual(objective):
    g = generator(0)
    old, ref, off = (normal(3, 4, generator=g) for _ in range(3))
    scores = 0.1 * normal(3, 4, generator=g)
    prefs = 0.5 + scores[:, :, None] - scores[:, None, :]  # additive, so that pairs can be fitted exactly
    rates = groups.v_win_rates(prefs, torch.ones(3, 4, dtype=torch.bool))
    exact = A * old + B_ * ref + C * rates - 0.1
    kwargs = (
        {"prefs": prefs} if objective != "square_point" else {"win_rates": rates, "log_z": ONE[:, 0].repeat(3) / 10}
    )

    def value(factor):
        return wind(exact + factor * off, old, ref, objective=objective, reduction="none", **STEP, **kwargs)

    assert_same(value(0.0), torch.zeros(3, dtype=torch.float64))
    assert_same(value(2.5), 2.5**2 * value(1.0), 1e-9)


def test_start_of_the_inner_loop_is_reinforce_with_baseline_one_half():
    old = normal(3, 5, generator=generator(1))
    ref = normal(3, 5, generator=generator(3))
    prefs = random_prefs(3, 5, generator(2))
    rates = prefs.mean(-1)
    case = CASE["wind-square"]
    _, gradient = value_and_gradient(case, {"logps": old, "old_logps": old, "ref_logps": old, "prefs": prefs})
    assert_same(gradient, -2 * C / 5 * (rates - 0.5))
    _, gradient = value_and_gradient(case, {"logps": old, "old_logps": old, "ref_logps": ref, "prefs": prefs})
    pull = B_ * (old - ref)
    assert_same(gradient, 2 / 5 * (pull - pull.mean(-1, keepdim=True) - C * (rates - 0.5)))


def test_swapping_a_pair_and_its_label_swaps_the_gradient():
    case = CASE["wind-square_pair"]
    inputs = case.make(4, 2)
    swapped = {name: tensor.flip(1) for name, tensor in inputs.items()}
    swapped["prefs"] = 1 - inputs["prefs"]
    (value, gradient), (got, got_gradient) = (value_and_gradient(case, each) for each in (inputs, swapped))
    assert_same(got, value)
    assert_same(got_gradient, gradient.flip(1))
    assert_same(gradient.sum(-1), torch.zeros(4, dtype=torch.float64))


@quick()
@given(seed=seeds)
def test_dpo_gradient_is_bounded_by_beta_and_square_gradients_are_not(seed):
    logps = 100 * normal(4, 2, generator=generator(seed))
    _, gradient = value_and_gradient(CASE["dpo-sigmoid"], {"logps": logps, "ref_logps": torch.zeros_like(logps)})
    assert gradient.abs().max() <= 2.0  # beta of the row
    _, gradient = value_and_gradient(CASE["dpo-ipo"], {"logps": logps, "ref_logps": torch.zeros_like(logps)})
    assert_same(gradient[:, 0], 2 * (logps[:, 0] - logps[:, 1] - 1 / 0.6), 1e-9)


@every_case
@quick(10)
@given(seed=seeds, scale=st.sampled_from([1e2, 1e4]))
def test_finite_in_float32_for_gaps_up_to_ten_thousand_nats(case, seed, scale):
    inputs = {name: value.float() for name, value in case.make(3, seed=seed).items()}
    inputs["logps"] = inputs["logps"] * scale
    value, gradient = value_and_gradient(case, inputs)
    assert value.isfinite().all() and gradient.isfinite().all()


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
    ):  # a certain label: its log alone is left, and rests at |p - w| = 1 - 2 DELTA
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
    inputs = CASE["wind-square_pair"].make(4, 2)
    inputs["prefs"] = WON.expand(4, 2, 2)
    eta_inpo, tau = 1 / eta + beta, beta
    mixed = tau / eta_inpo * inputs["ref_logps"] + (1 - tau / eta_inpo) * inputs["old_logps"]
    margin = (inputs["logps"] - mixed) @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    published = (margin - 1 / (2 * eta_inpo)) ** 2
    got = wind(**inputs, eta=eta, beta=beta, objective="square_pair", reduction="none")
    assert_same(got, published, 1e-6 if eta == ALMOST_INFINITE else 1e-12)


def test_ipo_is_square_pair_at_both_ends():
    inputs = CASE["wind-square_pair"].make(4, 2)
    inputs["prefs"] = WON.expand(4, 2, 2)
    iterative = wind(**inputs, eta=ETA, beta=0.0, objective="square_pair")  # the reference is pi_t
    assert_same(iterative, dpo(inputs["logps"], inputs["old_logps"], beta=1 / ETA, link="ipo"))
    response = wind(**inputs, eta=ALMOST_INFINITE, beta=BETA, objective="square_pair")
    assert_same(response, dpo(inputs["logps"], inputs["ref_logps"], beta=BETA, link="ipo"), 1e-6)


def test_rebel_and_trajectory_balance_are_square_with_a_reward_as_utility():
    inputs = CASE["wind-square-win_rates"].make(3, 2)
    l, o, r, reward = (inputs[name] for name in ("logps", "old_logps", "ref_logps", "win_rates"))
    rebel = ((l - o)[:, 0] - (l - o)[:, 1] - ETA * (reward[:, 0] - reward[:, 1])) ** 2
    assert_same(4 * wind(l, o, r, win_rates=reward, eta=ETA, beta=0.0, reduction="none"), rebel)

    inputs = CASE["wind-square-win_rates"].make(3, 5)
    l, o, r, reward = (inputs[name] for name in ("logps", "old_logps", "ref_logps", "win_rates"))
    log_z = (r - l + reward / BETA).mean(-1, keepdim=True)
    balance = (log_z + l - r - reward / BETA).square().mean(-1)
    got = wind(l, o, r, win_rates=reward, eta=ALMOST_INFINITE, beta=BETA, reduction="none")
    assert_same(got, balance, 1e-6)


def test_module_is_the_function():
    inputs = CASE["wind-kl"].make(5)
    where = partial_mask(5, 4)
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
    """Eight actions, one step of the exact update from pi_t. Preferences are cyclic and stay in [0.1, 0.9]."""

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
        """Log-probs of the minimiser of the expected loss.

        A group is `drawn` independent draws from pi_t (all tuples, weighted), or for None the eight actions
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


# Planted faults: the comparison must be able to fail ------------------------------------------------------------------


def with_rates(statistic):
    def broken(f, logps, prefs, where, **rest):
        return f(logps, win_rates=statistic(prefs, where), where=where, **rest)

    return broken


FAULTS = {
    "U for V, square": ("wind-square", with_rates(groups.u_win_rates)),
    "U for V, kl": ("wind-kl", with_rates(groups.u_win_rates)),
    "U for V, sppo": ("sppo-prefs", with_rates(groups.u_win_rates)),
    "V for U": ("wind-square_point-log_z", with_rates(groups.v_win_rates)),
    "mask dropped": ("wind-square", lambda f, logps, where, **k: f(logps, where=None, **k)),
    "mask dropped in a ratio": ("wind-nce_ratio", lambda f, logps, where, **k: f(logps, where=None, **k)),
    "mask of a pair dropped": ("dpo-sigmoid", lambda f, logps, where, **k: f(logps, where=None, **k)),
    "masked responses counted": ("wind-square", lambda f, logps, where, **k: f(logps, where=where, **k) * 0.75),
    "sign of the gradient": ("wind-square", lambda f, logps, **k: 2 * f(logps, **k).detach() - f(logps, **k)),
    "no gradient": ("wind-square", lambda f, logps, **k: f(logps.detach(), **k) + 0 * logps.sum()),
    "winner and loser swapped": ("wind-nce", lambda f, logps, prefs, **k: f(logps, prefs=prefs.mT, **k)),
    "policies swapped": (
        "wind-square",
        lambda f, logps, old_logps, ref_logps, **k: f(logps, old_logps=ref_logps, ref_logps=old_logps, **k),
    ),
    "reference forgotten": ("wind-nce_ratio", lambda f, logps, beta, **k: f(logps, beta=0.0, **k)),
    "eta for c": ("wind-square_pair", lambda f, logps, eta, **k: f(logps, eta=eta * (1 + ETA * BETA), **k)),
    "sign of log Z": ("wind-square_point-log_z", lambda f, logps, log_z, **k: f(logps, log_z=-log_z, **k)),
    "log Z forgotten": ("wind-nce-hard", lambda f, logps, log_z, **k: f(logps, log_z=0 * log_z, **k)),
    "log Z estimated": ("wind-nce-hard", lambda f, logps, log_z, **k: f(logps, **k)),
    "mean over groups left": (
        "wind-square",
        lambda f, logps, reduction, **k: f(logps, reduction=reduction, **k) * (5 / 3 if reduction == "mean" else 1),
    ),
    "chosen and rejected swapped": ("dpo-ipo", lambda f, logps, **k: f(-logps, **k)),
    "smoothing forgotten": ("dpo-smoothed", lambda f, logps, label_smoothing, **k: f(logps, **k)),
    "mean token": ("sppo-win_rates", lambda f, logps, **k: f(logps / 2, **k)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught(fault):
    name, broken = FAULTS[fault]
    case = CASE[name]
    function = LOSSES[case.loss].function
    assert_matches_reference(function, case, junk=0.5)
    with pytest.raises(AssertionError, match="not close"):
        assert_matches_reference(lambda logps, **k: broken(function, logps, **k), case, junk=0.5)


@pytest.mark.parametrize("name", ["wind-kl", "wind-nce"])
def test_clamping_instead_of_extending_is_caught(name, monkeypatch):
    module = sys.modules["windkern.losses.wind"]
    monkeypatch.setattr(module, "extended_log", lambda p: p.clamp(DELTA, 1 - DELTA).log())
    with pytest.raises(AssertionError, match="not close"):
        assert_matches_reference(wind, CASE[name])


# Errors: every Raises line --------------------------------------------------------------------------------------------

VALID = {
    "wind": {**CASE["wind-square"].make(2), **STEP},
    "sppo": {**CASE["sppo-prefs"].make(2), "eta": ETA},
    "dpo": CASE["dpo-sigmoid"].make(2),
}
WHOLE = torch.ones(2, 4, dtype=torch.bool)
RATES = torch.full((2, 4), 0.5, dtype=torch.float64)
LOG_Z = torch.zeros(2, dtype=torch.float64)
TENSORS = [
    *(("wind", name) for name in ("logps", "old_logps", "ref_logps", "prefs", "win_rates", "log_z")),
    *(("sppo", name) for name in ("logps", "old_logps", "prefs", "win_rates")),
    *(("dpo", name) for name in ("logps", "ref_logps")),
]


def call(loss: str, **changes) -> Tensor:
    arguments = {**VALID[loss], **changes}
    if "win_rates" in changes:
        arguments["prefs"] = changes.get("prefs")
    if "log_z" in changes:
        arguments.setdefault("objective", "square_point")
    return LOSSES[loss].function(**arguments)


@pytest.mark.parametrize(("loss", "name"), TENSORS)
def test_tensor_errors_name_the_argument(loss, name):
    value = {"win_rates": RATES, "log_z": LOG_Z, **VALID[loss]}[name]
    call(loss, **{name: value})
    for bad, error, message in [
        (value.tolist(), TypeError, "must be a torch.Tensor, got list"),
        (
            value.bfloat16(),
            TypeError,
            "must be float32 or float64, got torch.bfloat16, .* multiples of 2;",
        ),
        (value.half(), TypeError, "must be float32 or float64, got torch.float16, which rounds"),
        (value.long(), TypeError, "must be float32 or float64, got torch.int64"),
        (value[..., None], ValueError, "must have shape"),
        (value[:1] if name != "logps" else value[0], ValueError, "must have shape"),
    ]:
        with pytest.raises(error, match=f"^{name} {message}"):
            call(loss, **{name: bad})
    if name != "logps":
        with pytest.raises(ValueError, match=f"{name} is a constant of the loss but requires grad"):
            call(loss, **{name: value.clone().requires_grad_()})
        with pytest.raises(ValueError, match=f"{name} is on meta but logps is on cpu"):
            call(loss, **{name: value.to("meta")})
    if name.endswith("_logps"):
        with pytest.raises(TypeError, match=f"{name} is torch.float32 but logps is torch.float64"):
            call(loss, **{name: value.float()})


HALF = torch.full((2, 4, 4), 0.5, dtype=torch.float64)
TILTED = torch.where(torch.eye(4).bool(), 0.5, HALF + 0.01)
SETTINGS = [
    ("wind", {"where": WHOLE.double()}, TypeError, "where must be torch.bool, got torch.float64"),
    ("wind", {"where": WHOLE[:1]}, ValueError, r"where must have shape \(2, 4\), got \(1, 4\)"),
    ("wind", {"where": WHOLE.to("meta")}, ValueError, "where is on meta"),
    ("wind", {"where": [True]}, TypeError, "where must be a torch.Tensor"),
    ("wind", {"prefs": None}, ValueError, "exactly one of prefs and win_rates, got neither"),
    ("wind", {"win_rates": RATES, "prefs": HALF}, ValueError, "exactly one of prefs and win_rates, got both"),
    *(
        ("wind", {"win_rates": RATES, "objective": name}, ValueError, f"win_rates cannot serve objective='{name}'")
        for name in ("square_pair", "nce")
    ),
    *(
        ("wind", {"log_z": LOG_Z, "objective": name}, ValueError, f"log_z cannot serve objective='{name}'")
        for name in ("square", "square_pair", "kl", "nce_ratio")
    ),
    *(("wind", {"eta": bad}, ValueError, "eta must be greater than 0") for bad in (0, -1.0)),
    *(("wind", {"eta": bad}, ValueError, "eta must be a finite number") for bad in (math.nan, math.inf, "1", True)),
    ("wind", {"beta": -0.1}, ValueError, "beta must be at least 0"),
    ("wind", {"objective": "squares"}, ValueError, "objective must be one of .* did you mean 'square'"),
    ("wind", {"reduction": "batchmean"}, ValueError, "reduction must be one of 'mean', 'sum', 'none'"),
    ("wind", {"prefs": 3 * HALF}, ValueError, r"prefs must lie in \[0, 1\]"),
    ("wind", {"prefs": HALF * math.nan}, ValueError, r"prefs must lie in \[0, 1\] and hold no NaN"),
    ("wind", {"prefs": TILTED}, ValueError, r"must be 1 \(1/2 on the diagonal\), off by up to 0.02"),
    ("wind", {"prefs": HALF - 0.1 * torch.eye(4)}, ValueError, "must be 1 .* off by up to 0.2"),
    ("wind", {"win_rates": RATES + 1}, ValueError, r"win_rates must lie in \[0, 1\]"),
    ("wind", {"win_rates": RATES * math.nan}, ValueError, "win_rates must lie in .* no NaN"),
    ("sppo", {"where": WHOLE.long()}, TypeError, "where must be torch.bool"),
    ("sppo", {"prefs": None}, ValueError, "got neither"),
    ("sppo", {"win_rates": RATES, "prefs": HALF}, ValueError, "got both"),
    ("sppo", {"eta": 0.0}, ValueError, "eta must be greater than 0"),
    ("sppo", {"reduction": "avg"}, ValueError, "reduction must be one of"),
    ("sppo", {"prefs": TILTED}, ValueError, "off by up to 0.02"),
    ("sppo", {"win_rates": -RATES}, ValueError, "win_rates must lie in"),
    ("dpo", {"where": WHOLE[:, :2].byte()}, TypeError, "where must be torch.bool"),
    ("dpo", {"logps": RATES, "ref_logps": RATES}, ValueError, r"logps must have shape \(B, 2\), got \(2, 4\)"),
    ("dpo", {"beta": 0.0}, ValueError, "beta must be greater than 0"),
    ("dpo", {"link": "sigmoidal"}, ValueError, "link must be one of .* did you mean 'sigmoid'"),
    ("dpo", {"label_smoothing": 0.5}, ValueError, "label_smoothing must be below 0.5"),
    ("dpo", {"label_smoothing": -0.1}, ValueError, "label_smoothing must be at least 0"),
    *(
        ("dpo", {"label_smoothing": 0.1, "link": link}, ValueError, f"label_smoothing has no meaning for link='{link}'")
        for link in ("ipo", "hinge")
    ),
    ("dpo", {"reduction": "avg"}, ValueError, "reduction must be one of"),
]


@pytest.mark.parametrize(("loss", "changes", "error", "message"), SETTINGS)
def test_setting_errors(loss, changes, error, message):
    with pytest.raises(error, match=message):
        call(loss, **changes)


@pytest.mark.parametrize("bad", [{"eta": 0}, {"beta": -1}, {"objective": "mse"}, {"reduction": "avg"}], ids=str)
def test_module_refuses_bad_settings_when_it_is_made(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
        WindLoss(**{**STEP, **bad})


def test_check_prefs_looks_only_where_it_should():
    where = torch.tensor([[True, True, False], [True, False, False]])
    prefs = torch.full((2, 3, 3), 0.5)
    prefs[0, 2] = math.nan
    prefs[1] = 7.0
    check_prefs(prefs, where)
    with pytest.raises(ValueError, match="no NaN"):
        check_prefs(prefs)
    with pytest.raises(ValueError, match=r"prefs must have shape \(B, N, N\)"):
        check_prefs(prefs[:, :2])
    with pytest.raises(ValueError, match="where must have shape"):
        check_prefs(prefs, where[:, :2])
    with pytest.raises(TypeError, match=r"where must be torch\.bool"):
        check_prefs(prefs, where.long())
    with pytest.raises(TypeError, match="prefs must be float32 or float64"):
        check_prefs(prefs.half())


def test_values_are_read_on_a_cpu_only():
    inputs = {name: value.to("meta") for name, value in CASE["wind-square"].make().items()}  # reading one would raise
    assert wind(**inputs, **STEP).device.type == "meta"
