"""Relations of the losses: one residual with different constants, limits of each other, hazards, fused_loss."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import CASE, CASES, normal
from loss_checks import WON, assert_same, generator, quick, seeds, value_and_gradient
from loss_references import B_, BETA, ETA, A, C
from torch import Tensor

import windkern as wk
from windkern import losses
from windkern.losses.bond import baseline
from windkern.losses.grpo import tamed_exp
from windkern.losses.orpo import log_odds

DOUBLE = torch.float64

# One residual (docs/theory.md, section 10): gradients are (2/K) (d_i - mean d), d = l - a o - b r - c u ---------------

CONVERSIONS = {  # row: a, b, c, the factor of c, whether the loss is a mean over pairs
    "wind-square": (A, B_, C, "V", False),
    "wind-square_pair": (A, B_, C, "V", True),
    "inpo-prefs": (1 - 0.5 / 2.5, 0.5 / 2.5, 1 / 2.5, "V", True),
    "inpo-won": (1 - 0.5 / 2.5, 0.5 / 2.5, 1 / 2.5, "won", True),
    "dpo-ipo": (0.0, 1.0, 1 / 0.3, "won", True),
    "rebel-rewards": (1.0, 0.0, ETA, "rewards", True),
    "trajectory_balance-group": (0.0, 1.0, 1 / BETA, "rewards", False),
}


@pytest.mark.parametrize("row", CONVERSIONS)
@quick(15)
@given(seed=seeds, K=st.integers(2, 6))
def test_one_residual_serves_them_all(row, seed, K):
    a, b, c, utility, pairs = CONVERSIONS[row]
    inputs = CASE[row].make(3, K, seed)
    _, gradient = value_and_gradient(CASE[row], inputs)
    K = gradient.shape[1]
    u = {
        "V": lambda: inputs["prefs"].mean(-1),
        "won": lambda: WON.mean(-1),
        "rewards": lambda: inputs["rewards"],
    }[utility]()
    d = inputs["logps"] - a * inputs.get("old_logps", 0) - b * inputs.get("ref_logps", 0) - c * u
    factor = 2 * K / (K - 1) if pairs else 1  # (1.36)
    assert_same(gradient, factor * 2 / K * (d - d.mean(-1, keepdim=True)), 1e-9)


@pytest.mark.parametrize("row", ["sppo-prefs", "sppo-win_rates", "wind-square_point-log_z", "trajectory_balance-log_z"])
def test_point_forms_are_the_residual_with_a_constant(row):
    inputs = CASE[row].make(3, 5)
    _, gradient = value_and_gradient(CASE[row], inputs)
    steps = {"wind": (A, B_, C), "sppo": (1.0, 0.0, ETA), "trajectory_balance": (0.0, 1.0, 1 / BETA)}
    a, b, c = steps[row.split("-")[0]]
    s = inputs["logps"] - a * inputs.get("old_logps", 0) - b * inputs.get("ref_logps", 0)
    if row.startswith("wind"):
        u = (inputs["prefs"].sum(-1) - 0.5) / 4  # U
    else:
        u = inputs.get("win_rates", inputs["prefs"].mean(-1) if "prefs" in inputs else inputs.get("rewards"))
    log_z = inputs["log_z"][:, None] if "log_z" in inputs else ETA / 2
    assert_same(gradient, 2 / 5 * (s + log_z - c * u))


def test_inpo_is_ipo_at_both_ends():
    inputs = CASE["inpo-won"].make(4)
    iterative = losses.dpo(inputs["logps"], inputs["old_logps"], beta=0.7, link="ipo")
    assert_same(losses.inpo(**inputs, eta=0.7, tau=0.0), iterative)
    response = losses.dpo(inputs["logps"], inputs["ref_logps"], beta=0.7, link="ipo")
    assert_same(losses.inpo(**inputs, eta=0.7, tau=0.7), response)


@pytest.mark.parametrize("case", [case for case in CASES if "prefs" in case.make()], ids=str)
def test_swapping_two_responses_and_their_label_swaps_the_gradient(case):
    inputs = case.make(4, 2)
    swapped = {name: tensor if tensor.dim() == 1 else tensor.flip(1) for name, tensor in inputs.items()}
    swapped["prefs"] = 1 - inputs["prefs"]
    (value, gradient), (got, got_gradient) = (value_and_gradient(case, each) for each in (inputs, swapped))
    assert_same(got, value)
    assert_same(got_gradient, gradient.flip(1))


def test_trajectory_balance_on_policy_is_the_gradient_of_the_reverse_kl():
    g = generator(0)
    logits, ref, rewards = (normal(4, generator=g) for _ in range(3))
    ref = ref.log_softmax(-1)
    logits.requires_grad_()
    rows = torch.cartesian_prod(*[torch.arange(4)] * 3)  # every group of three draws
    logps = logits.log_softmax(-1)
    chance = logps.detach()[rows].sum(-1).exp()
    group = losses.trajectory_balance(logps[rows], ref[rows], rewards[rows], beta=0.7, reduction="none")
    (got,) = torch.autograd.grad((chance * group).sum(), logits, retain_graph=True)
    target = (ref + rewards / 0.7).log_softmax(-1)
    (want,) = torch.autograd.grad((logps.exp() * (logps - target)).sum(), logits)
    assert_same(got, 2 * want * (3 - 1) / 3)  # the group's own mean as a baseline costs 1/K


# Limits and doubles ---------------------------------------------------------------------------------------------------


def pairs(groups: int = 5, seed: int = 0) -> dict[str, Tensor]:
    return CASE["dpo-sigmoid"].make(groups, seed=seed)


ONE_HOT = torch.tensor([[1e3, 0.0]], dtype=DOUBLE).expand(5, 2)


def test_two_responses_and_a_sharp_target_are_dpo():
    inputs = pairs()
    want = losses.dpo(**inputs, beta=0.5, reduction="none")
    assert_same(losses.infonca(**inputs, rewards=ONE_HOT, beta=0.5, reduction="none"), want)
    assert_same(losses.listwise_dpo(**inputs, rewards=ONE_HOT, beta=0.5, reduction="none"), want)
    spin = losses.spin(inputs["logps"], inputs["ref_logps"], beta=0.5, reduction="none")
    assert_same(spin, want)
    assert_same(losses.nca(**inputs, rewards=ONE_HOT, beta=0.5), losses.nca(**inputs, beta=0.5))
    odds = torch.tensor([[math.log(0.9), math.log(0.1)]], dtype=DOUBLE).expand(5, 2)
    assert_same(losses.exo(**inputs, rewards=odds, beta=0.5), losses.exo(**inputs, label_smoothing=0.1, beta=0.5))


def test_exo_without_smoothing_would_be_infinite():
    inputs = pairs()
    values = [losses.exo(**inputs, beta=0.5, label_smoothing=eps).item() for eps in (1e-2, 1e-20, 1e-200)]
    assert values[2] - values[1] == pytest.approx(10 * (values[1] - values[0]), rel=1e-2)  # grows like -log eps
    with pytest.raises(ValueError, match="label_smoothing must be greater than 0"):
        losses.exo(**inputs, beta=0.5, label_smoothing=0.0)


def test_robust_dpo_is_unbiased_under_flipped_labels():
    inputs, eps = pairs(), 0.2
    flipped = {name: tensor.flip(1) for name, tensor in inputs.items()}

    def robust(given: dict[str, Tensor]) -> Tensor:
        return losses.dpo(**given, beta=0.5, link="robust", label_smoothing=eps, reduction="none")

    mixed = (1 - eps) * robust(inputs) + eps * robust(flipped)
    assert_same(mixed, losses.dpo(**inputs, beta=0.5, reduction="none"))


def test_sppo_with_verdicts_is_the_hard_form():
    inputs = pairs()
    chosen, rejected = (inputs["logps"] - inputs["ref_logps"]).unbind(-1)
    hard = (chosen - 0.5 / 0.1) ** 2 + (rejected + 0.5 / 0.1) ** 2
    won = torch.tensor([[1.0, 0.0]], dtype=DOUBLE).expand(5, 2)
    got = losses.sppo(inputs["logps"], inputs["ref_logps"], win_rates=won, eta=1 / 0.1, reduction="none")
    assert_same(2 * got, hard)


def test_apo_zero_is_kto_with_the_reference_point_at_zero():
    inputs = pairs()
    good = torch.tensor([[True, False]]).expand(5, 2)
    kto = losses.kto(**inputs, desirable=good, kl_gaps=torch.zeros(1, dtype=DOUBLE), beta=0.5)
    assert_same(2 * kto, losses.apo(**inputs, beta=0.5))


def test_aot_of_a_batch_in_order_is_dpo_with_smoothing():
    inputs = pairs()
    order = torch.arange(5, dtype=DOUBLE)
    inputs["logps"] = torch.stack([order, -2 * order], 1)
    inputs["ref_logps"] = torch.stack([order - 9, -order], 1)
    want = losses.dpo(**inputs, beta=0.5, label_smoothing=0.1, reduction="none")
    assert_same(losses.aot(**inputs, beta=0.5, label_smoothing=0.1, reduction="none"), want)


def test_nca_holds_the_chosen_response_and_bco_never_stops():
    for d, sign in ((0.0, -1), (math.log(2) / 0.5, 0), (5.0, 1)):
        logps = torch.tensor([[d, -1.0]], dtype=DOUBLE)
        _, gradient = value_and_gradient(CASE["nca-pair"], {"logps": logps, "ref_logps": torch.zeros_like(logps)})
        assert gradient[0, 0].sign() == sign if sign else abs(gradient[0, 0]) < 1e-12
        _, gradient = value_and_gradient(CASE["dpo-bco"], {"logps": logps, "ref_logps": torch.zeros_like(logps)})
        assert gradient[0, 0] < 0 < gradient[0, 1]


@pytest.mark.parametrize("name", ["exo", "infonca"])
def test_both_kls_are_satisfied_by_the_same_policy(name):
    ref, rewards = normal(3, 4, generator=generator(1)), normal(3, 4, generator=generator(2))
    function = {"exo": losses.exo, "infonca": losses.infonca}[name]
    logps = (ref + rewards / 0.7 / 0.5 + 0.3).requires_grad_()
    (gradient,) = torch.autograd.grad(function(logps, ref, rewards, beta=0.5, alpha=0.7), logps)
    assert_same(gradient, torch.zeros_like(gradient))


def test_plackett_luce_is_a_distribution_over_rankings():
    logps = normal(1, 4, generator=generator(3)).expand(24, 4)
    ranks = torch.tensor(list(itertools.permutations(range(4))), dtype=DOUBLE)
    values = losses.listwise_dpo(logps, torch.zeros_like(logps), ranks, beta=0.5, reduction="none")
    assert_same((-values).exp().sum(), torch.ones((), dtype=DOUBLE))


# Best-of-n ------------------------------------------------------------------------------------------------------------


def test_best_of_n_fine_tuning_lands_on_the_best_of_n_policy():
    anchor, rewards = normal(5, generator=generator(4)).log_softmax(-1), torch.tensor([0.0, 1, 1, 2, 5], dtype=DOUBLE)
    rows = torch.cartesian_prod(*[torch.arange(5)] * 3)
    chance = anchor[rows].sum(-1).exp()
    below = torch.stack([anchor.exp()[rewards < r].sum() for r in rewards])
    upto = torch.stack([anchor.exp()[rewards <= r].sum() for r in rewards])
    best = anchor.exp() * (upto**3 - below**3) / (upto - below)  # ties broken evenly
    logits = best.log().requires_grad_()
    loss = (chance * losses.bon_sft(logits.log_softmax(-1)[rows], rewards[rows], reduction="none")).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert_same(gradient, torch.zeros_like(gradient), 1e-12)


def bond_gradient(policy: Tensor, anchor: Tensor, rewards: Tensor, **options: float) -> Tensor:
    """Return the expected gradient in the policy's logits, over all combinations of one policy and two anchor draws."""
    rows = torch.cartesian_prod(*[torch.arange(len(policy))] * 3)
    chance = (policy[rows[:, 0]] + anchor[rows[:, 1]] + anchor[rows[:, 2]]).exp()
    logits = policy.clone().requires_grad_()
    values = losses.bond(logits.log_softmax(-1)[rows], anchor[rows], rewards[rows], reduction="none", **options)
    return torch.autograd.grad((chance * values).sum(), logits)[0]


def test_forward_bond_lands_on_best_of_two():
    g = generator(5)
    anchor, rewards = normal(5, generator=g).log_softmax(-1), torch.tensor([0.0, 3, 1, 1, 2], dtype=DOUBLE)
    better = (rewards[:, None] > rewards).double() + (rewards[:, None] == rewards).double() / 2
    best = (2 * anchor.exp() * (better @ anchor.exp())).log()  # (1.9)
    assert_same(bond_gradient(best, anchor, rewards, beta=0.0, gamma=0.0), torch.zeros(5, dtype=DOUBLE), 1e-12)


def test_backward_bond_is_the_policy_gradient_and_gamma_attracts():
    g = generator(6)
    policy, anchor = (normal(5, generator=g).log_softmax(-1) for _ in range(2))
    rewards = normal(5, generator=g)
    worse = torch.stack([anchor.exp()[rewards > r].sum() for r in rewards])  # chance that one anchor sample is better
    expected = -math.log(16) * worse**2  # of r_J, no ties
    logits = policy.clone().requires_grad_()
    logps = logits.log_softmax(-1)
    payoff = (logps.exp() * (expected - logps + anchor)).sum()
    (want,) = torch.autograd.grad(-payoff, logits, retain_graph=True)
    assert_same(bond_gradient(policy, anchor, rewards, beta=1.0, gamma=0.0), want)
    (pull,) = torch.autograd.grad((logps.exp() * (logps - anchor)).sum(), logits)
    assert_same(bond_gradient(policy, anchor, rewards, beta=1.0, gamma=0.3) - want, 0.3 * pull)


@pytest.mark.parametrize(
    ("rewards", "punished"),
    [
        ((0, 1, 2), True),
        ((0, 0, 2), False),
        ((0, 2, 0), False),
        ((1, 0, 2), False),
        ((0, 0, 0), False),
        ((0, 1, 1), True),
    ],
)
def test_bond_punishes_what_is_worse_than_both_and_a_tie_is_not(rewards, punished):
    logps = torch.tensor([[-3.0, -5.0, -7.0]], dtype=DOUBLE)
    inputs = {"logps": logps, "anchor_logps": logps, "rewards": torch.tensor([rewards], dtype=DOUBLE)}
    _, gradient = value_and_gradient(CASE["bond-ties"], inputs)
    share = 0.5 if rewards[1] == rewards[2] else float(rewards[1] > rewards[2])
    want = [0.5 * math.log(16) if punished else 0.0, -0.5 * share, -0.5 * (1 - share)]
    assert_same(gradient, torch.tensor([want], dtype=DOUBLE))


def test_the_baseline_of_bond_is_over_the_triples_that_count():
    g = generator(7)
    rewards, old, anchor = (normal(4, 3, generator=g) for _ in range(3))
    where = torch.ones(4, 3, dtype=torch.bool)
    where[1, 2] = where[3, 0] = False  # neither triple is whole
    spoilt = old.clone()
    spoilt[1], spoilt[3] = torch.nan, torch.inf
    kept = torch.tensor([0, 2])
    want = baseline(rewards[kept], old[kept], anchor[kept])[0]
    assert_same(baseline(rewards, spoilt, anchor, where), want.expand(4))
    assert_same(baseline(rewards, old, anchor, torch.zeros_like(where)), torch.zeros(4, dtype=DOUBLE))
    assert_same(baseline(rewards, old, anchor, torch.ones_like(where)), baseline(rewards, old, anchor))


# Hazards --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", [-700.0, -50.0, -1.0, -math.log(2), -1e-3, -1e-6, -1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
def test_log_odds_keep_their_digits(x, dtype):
    got = log_odds(torch.tensor(x, dtype=dtype)).item()
    exact = -math.log(math.expm1(-x)) if x > -600 else x
    assert got == pytest.approx(exact, rel=4 * torch.finfo(dtype).eps, abs=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
@pytest.mark.parametrize("means", [(0.0, -1.0), (-1.0, 0.0), (1e-7, 1e-7), (-1e-38, -1e-30), (-1e4, -1e-6)], ids=str)
def test_orpo_is_finite_up_to_certainty(means, dtype):
    logps = torch.tensor([means], dtype=dtype, requires_grad=True)
    loss = losses.orpo(logps, torch.ones(1, 2))
    loss.backward()
    assert loss.isfinite() and logps.grad.isfinite().all()


def test_no_gradient_flows_through_the_reference_point_of_kto():
    inputs = CASE["kto-batch"].make(4)
    inputs["logps"] += 2  # so that the mean gap is positive
    gaps = (inputs["logps"] - inputs["ref_logps"]).flatten()
    own = value_and_gradient(CASE["kto-batch"], inputs)
    given = value_and_gradient(CASE["kto-kl_gaps"], {**inputs, "kl_gaps": gaps})
    for got, want in zip(own, given, strict=True):
        assert_same(got, want)
    inputs["logps"] -= 9  # the mean is negative, and counts as 0
    own = value_and_gradient(CASE["kto-batch"], inputs)
    for got, want in zip(own, value_and_gradient(CASE["kto-kl_gaps"], {**inputs, "kl_gaps": 0 * gaps}), strict=True):
        assert torch.equal(got, want)
    negative = value_and_gradient(CASE["kto-kl_gaps"], {**inputs, "kl_gaps": -gaps.abs()})
    at_zero = value_and_gradient(CASE["kto-kl_gaps"], {**inputs, "kl_gaps": 0 * gaps})
    assert torch.equal(negative[0], at_zero[0]) and torch.equal(negative[1], at_zero[1])


def test_kto_takes_single_responses():
    case = CASE["kto-kl_gaps"]
    inputs = case.make(6, 4)
    value, gradient = value_and_gradient(case, inputs)
    flat = {name: v if name == "kl_gaps" else v.reshape(24, 1) for name, v in inputs.items()}
    got, got_gradient = value_and_gradient(case, flat)
    assert_same(got.view(6, 4).mean(-1), value)
    assert_same(got_gradient.view(6, 4) / 4, gradient)


@pytest.mark.parametrize("x", [-1e4, -1.0, 0.0, 19.9, 20.1, 30.0, 1e4])
def test_tamed_exp_is_exp_and_then_its_tangent(x):
    value = torch.tensor(x, dtype=torch.float32, requires_grad=True)
    tamed_exp(value).backward()
    slope = math.exp(min(x, 20.0))
    assert tamed_exp(value).item() == pytest.approx(slope * (1 + max(x - 20.0, 0.0)), rel=1e-5)
    assert value.grad.item() == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("gap", [-1e4, -200.0, 90.0, 1e4])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_grpo_is_finite_and_pushes_back_however_far_a_token_has_gone(gap, advantage):
    old = torch.full((1, 2, 2), -2.0)
    logps = (old + gap).requires_grad_()
    advantages = torch.full((1, 2), advantage)
    loss = losses.grpo(logps, old, advantages=advantages)
    (gradient,) = torch.autograd.grad(loss, logps)
    assert loss.isfinite() and gradient.isfinite().all()
    assert (gradient > 0).all() if gap > 0 > advantage else (gradient == 0).all()  # else clipped, or underflown
    loss = losses.grpo(logps, old, old, advantages=advantages * 0, beta=0.1)
    (gradient,) = torch.autograd.grad(loss, logps)
    assert loss.isfinite() and (gradient * gap > 0).all()


def test_grpo_starts_as_reinforce_and_stops_where_it_is_clipped():
    old = normal(2, 3, 4, generator=generator(7)).abs().neg()
    advantages = normal(2, 3, generator=generator(8))
    case = CASE["grpo-none"]
    _, gradient = value_and_gradient(case, {"logps": old, "old_logps": old, "advantages": advantages})
    assert_same(gradient, -advantages[:, :, None].expand_as(old) / 3)
    for shift, sign in ((math.log(1.4), 1), (math.log(0.7), -1)):
        _, gradient = value_and_gradient(case, {"logps": old + shift, "old_logps": old, "advantages": advantages})
        stopped = (advantages * sign > 0)[:, :, None].expand_as(old)
        assert torch.equal(gradient == 0, stopped)


def test_grpo_takes_what_token_logps_gives():
    hidden, weight = torch.randn(2, 3, 5, 8, requires_grad=True), torch.randn(31, 8)
    targets = torch.randint(0, 31, (2, 3, 5))
    targets[:, :, 3:] = -100
    logps = wk.token_logps(hidden, weight, targets).logps
    rewards = torch.randn(2, 3)
    losses.grpo(logps, logps.detach(), rewards=rewards, where=targets != -100).backward()
    assert torch.equal(hidden.grad[:, :, 3:], torch.zeros(2, 3, 2, 8)) and (hidden.grad[:, :, :3] != 0).any()
    single = losses.grpo(logps[:, :1], logps[:, :1].detach(), rewards=rewards[:, :1])
    assert single.item() == 0  # a single response is not a group, so its advantage is 0


@pytest.mark.parametrize("case", [case for case in CASES if case.loss == "grpo"], ids=str)
def test_masked_tokens_change_nothing_bit_by_bit(case):
    inputs = case.make(3)
    where = torch.rand(inputs["logps"].shape, generator=generator(9)) < 0.7
    moved = {name: torch.where(where, value, -99.0) if value.dim() == 3 else value for name, value in inputs.items()}
    for got, want in zip(
        value_and_gradient(case, moved, where=where), value_and_gradient(case, inputs, where=where), strict=True
    ):
        assert torch.equal(got, want)


# Inside fused_loss ----------------------------------------------------------------------------------------------------


def head(case, groups: int = 5) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    inputs = case.make(groups, 3)
    del inputs["logps"]
    N, g = case.responses or 3, generator(10)
    hidden, weight = normal(groups, N, 4, 6, generator=g), normal(37, 6, generator=g)
    targets = torch.randint(0, 37, (groups, N, 4), generator=g)
    targets[torch.rand(targets.shape, generator=g) < 0.2] = -100
    return inputs, hidden.requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.parametrize("case", [case for case in CASES if not case.coupled and not case.per_token], ids=str)
@pytest.mark.parametrize("budget", [0, None], ids=["chunk by chunk", "at once"])
def test_fused_loss_equals_the_loss_by_hand(case, budget):
    inputs, hidden, weight, targets = head(case)
    closed = {name: inputs.pop(name) for name in ("kl_gaps",) if name in inputs}  # spans the batch, not one per group
    inputs["where"] = torch.ones(targets.shape[:2], dtype=torch.bool)
    inputs["where"][1, 0] = False

    def loss_fn(logps: Tensor, **constants: Tensor) -> Tensor:
        return case({"logps": logps, **constants, **closed}, reduction="none")

    fused = wk.fused_loss(loss_fn, hidden, weight, targets, per_group=inputs, memory_budget=budget)
    by_hand = loss_fn(wk.sequence_logps(hidden, weight, targets), **inputs).mean()
    assert_same(fused, by_hand)
    for got, want in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in (fused, by_hand)), strict=True):
        assert_same(got, want)
