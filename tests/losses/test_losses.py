"""Losses over (B, N) log-probs. Tests that can be generated run over the rows of loss_cases.CASES."""

from __future__ import annotations

import doctest
import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import CASE, CASES, ONE_OF_EACH, STEP, every_case, having, normal, random_prefs
from loss_checks import (
    WON,
    assert_matches_reference,
    assert_same,
    generator,
    in_single,
    of_groups,
    partial_mask,
    poison,
    quick,
    seeds,
    value_and_gradient,
)
from loss_references import B_, A, C
from tolerances import LOSS_OPERATIONS, assert_same_but_for_rounding

import windkern.losses as losses
from windkern.losses import LINKS, LOSSES, OBJECTIVES, VARIANTS, WindLoss, check_prefs, dpo, sppo, wind
from windkern.losses import _groups as groups
from windkern.losses.grpo import AVERAGES

# The tables -----------------------------------------------------------------------------------------------------------


def test_every_loss_objective_and_link_has_a_row():
    assert {case.loss for case in CASES} == set(LOSSES)
    assert {case.options["objective"] for case in CASES if case.loss == "wind"} == set(OBJECTIVES)
    assert {case.options.get("link", "sigmoid") for case in CASES if case.loss == "dpo"} == set(LINKS)
    assert {case.options.get("variant", "zero") for case in CASES if case.loss == "apo"} == set(VARIANTS)
    assert {case.options.get("average", "sequence") for case in CASES if case.loss == "grpo"} == set(AVERAGES)


@pytest.mark.parametrize("name", LOSSES)
def test_table_entry_describes_the_function(name):
    loss = LOSSES[name]
    assert loss.name == name and getattr(losses, name) is loss.function
    for text in (loss.formula, loss.source, loss.when):
        assert text and text.isascii() and "\n" not in text
    arguments = list(inspect.signature(loss.function).parameters)
    listed = [argument.strip(" ?") for entry in loss.inputs for argument in entry.split("|")]
    assert listed == [argument for argument in arguments if argument in listed]
    assert arguments[0] == "logps" and {"where", "reduction"} <= set(arguments)
    assert all(len(line) <= 96 for line in (loss.formula, loss.source)) and len(loss.when) <= 120
    alone = [case for case in CASES if case.loss == name and not case.coupled and not case.per_token]
    assert loss.separable == (len(alone) == sum(case.loss == name for case in CASES))
    assert f"({', '.join(map(str, loss.shape))})" in loss.function.__doc__
    if loss.variants is not None:
        argument, names = loss.variants
        assert inspect.signature(loss.function).parameters[argument].default in names


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


# A detached gradient is not that of the value; the reference above freezes the detached terms.
@pytest.mark.parametrize("case", [case for case in CASES if "detached" not in case.properties], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(case, masked):
    inputs = case.make(4)
    logps = inputs.pop("logps").requires_grad_()
    where = partial_mask(case, 4) if masked else None
    torch.autograd.gradcheck(lambda x: case({"logps": x, **inputs}, where=where, reduction="none"), logps)
    torch.autograd.gradgradcheck(lambda x: case({"logps": x, **inputs}, where=where), logps)


@every_case
def test_reductions_and_dtypes(case):
    inputs = case.make(5)
    where = partial_mask(case)
    values = case(inputs, where=where, reduction="none")
    assert values.shape == (5,) and values.dtype == torch.float64
    assert_same(case(inputs, where=where, reduction="sum"), values.sum())
    assert_same(case(inputs, where=where, reduction="mean"), values.sum() / 5)  # masked groups count
    assert_same(case(inputs, where=where), values.sum() / 5)
    single = case(in_single(inputs), where=where, reduction="none")
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
@pytest.mark.parametrize("kept", [0, 1])
def test_groups_that_are_off_give_zero_and_no_nan(case, kept):
    inputs = case.make(3)
    where = torch.zeros(inputs["logps"].shape, dtype=torch.bool)
    where[:, : min(kept, case.least - 1)] = True
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
def test_groups_are_treated_apart_unless_it_says_otherwise(case):
    inputs = case.make(9)
    where = partial_mask(case, 9)
    values, gradient = value_and_gradient(case, inputs, where=where)
    parts = []
    for rows in (slice(0, 5), slice(5, 9)):  # as in fused_loss
        parts.append(value_and_gradient(case, of_groups(inputs, rows), where=where[rows]))
    got, got_gradient = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    if case.coupled:
        assert (got - values).abs().max() > 1e-3
    else:
        assert_same_but_for_rounding(got, values, LOSS_OPERATIONS, inputs["logps"])
        assert_same_but_for_rounding(got_gradient, gradient, LOSS_OPERATIONS, inputs["logps"])


@pytest.mark.parametrize("name", LOSSES)
def test_traces_without_a_graph_break(name):
    case = ONE_OF_EACH[name]
    inputs = case.make(5)
    where = partial_mask(case)
    torch.compiler.reset()  # otherwise constants of the previous row become symbols, which math.isfinite does not take
    compiled = torch.compile(lambda **tensors: case(tensors, where=where), backend="eager", fullgraph=True)
    assert_same(compiled(**inputs), case(inputs, where=where))


# Closed forms on tiny inputs ------------------------------------------------------------------------------------------

ONE = torch.ones(1, 2, dtype=torch.float64)


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
    assert of("kl") == pytest.approx(0, abs=1e-14)  # p = 1/2 +- 0.2 / 0.8 = w
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
            moved = inputs["logps"].clone()
            moved[0] += 1
            assert (case({**inputs, "logps": moved}) - case(inputs)).abs() > 1e-5, case


@every_case
@quick(10)
@given(seed=seeds, responses=st.integers(2, 6))
def test_order_of_prompts_and_of_responses_does_not_matter(case, seed, responses):
    inputs = case.make(4, responses, seed)
    value, gradient = value_and_gradient(case, inputs)
    prompts = torch.randperm(4, generator=generator(seed))
    got = value_and_gradient(case, of_groups(inputs, prompts))
    assert_same_but_for_rounding(got[0], value[prompts], LOSS_OPERATIONS, inputs["logps"])
    assert_same_but_for_rounding(got[1], gradient[prompts], LOSS_OPERATIONS, inputs["logps"])
    if "permutes" in case.properties:
        order = torch.randperm(gradient.shape[1], generator=generator(seed))
        moved = {name: tensor if tensor.dim() == 1 else tensor[:, order] for name, tensor in inputs.items()}
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


@pytest.mark.parametrize("case", [case for case in CASES if case.bound is not None], ids=str)
@quick(10)
@given(seed=seeds)
def test_gradient_is_bounded_however_far_the_policy_has_gone(case, seed):
    inputs = case.make(6, seed=seed)
    inputs["logps"] = inputs["logps"] + 100 * normal(*inputs["logps"].shape, generator=generator(seed))
    _, gradient = value_and_gradient(case, inputs)
    assert gradient.abs().max() <= case.bound * (1 + 1e-12)


def test_square_gradients_grow_with_the_gap():
    logps = 100 * normal(4, 2, generator=generator(0))
    _, gradient = value_and_gradient(CASE["dpo-ipo"], {"logps": logps, "ref_logps": torch.zeros_like(logps)})
    assert_same(gradient[:, 0], 2 * (logps[:, 0] - logps[:, 1] - 1 / 0.6), 1e-9)


@every_case
@quick(10)
@given(seed=seeds, scale=st.sampled_from([1e2, 1e4]))
def test_finite_in_float32_for_gaps_up_to_ten_thousand_nats(case, seed, scale):
    inputs = in_single(case.make(3, seed=seed))
    inputs["logps"] = inputs["logps"] * scale
    value, gradient = value_and_gradient(case, inputs)
    assert value.isfinite().all() and gradient.isfinite().all()
