"""Planted faults are caught by the comparison that the losses pass, and errors name the bad input."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from loss_cases import CASE, CONSTANTS, ONE_OF_EACH, STEP
from loss_checks import assert_matches_reference, assert_same, generator
from loss_references import BETA, ETA
from torch import Tensor

from windkern.losses import LOSSES, WindLoss, check_prefs, wind
from windkern.losses import _groups as groups

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
    "tie given to one": (
        "bond-ties",
        lambda f, logps, rewards, **k: f(logps, rewards=rewards - torch.arange(3) / 9, **k),
    ),
    "ties broken by index": (
        "listwise_dpo-ties",
        lambda f, logps, rewards, **k: f(logps, rewards=rewards - torch.arange(rewards.shape[1]) / 99, **k),
    ),
    "best of what is masked": ("bon_sft-rewards", lambda f, logps, where, **k: f(logps, where=None, **k)),
    "anchor repels": ("bond-baseline", lambda f, logps, gamma, beta, **k: f(logps, beta=beta, gamma=0.0, **k)),
    "the other KL": ("exo-rewards", lambda f, logps, **k: LOSSES["infonca"].function(logps, **k)),
    "opponent and policy mixed": ("inpo-prefs", lambda f, logps, tau, eta, **k: f(logps, tau=eta - tau, eta=eta, **k)),
    "reward of the wrong size": ("rebel-rewards", lambda f, logps, eta, **k: f(logps, eta=2 * eta, **k)),
    "sums for means": ("simpo-pair", lambda f, logps, lengths, **k: f(logps, lengths=torch.ones_like(lengths), **k)),
    "odds forgotten": ("orpo-pair", lambda f, logps, lengths, beta, **k: f(logps, lengths=lengths, beta=1e-9, **k)),
    "weights swapped": (
        "kto-kl_gaps",
        lambda f, logps, desirable_weight, undesirable_weight, **k: f(
            logps, desirable_weight=undesirable_weight, undesirable_weight=desirable_weight, **k
        ),
    ),
    "reference point forgotten": (
        "kto-batch",
        lambda f, logps, **k: f(logps, kl_gaps=torch.zeros(1, dtype=torch.float64), **k),
    ),
    "not sorted": ("aot-paired", lambda f, logps, paired, **k: LOSSES["dpo"].function(logps, **k)),
    "clip on one side": ("grpo-rewards", lambda f, logps, clip_high, **k: f(logps, **k)),
    "tokens counted alike": ("grpo-rewards", lambda f, logps, **k: f(logps, average="group", **k)),
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
    monkeypatch.setattr(module, "extended_log", lambda p: p.clamp(groups.DELTA, 1 - groups.DELTA).log())
    with pytest.raises(AssertionError, match="not close"):
        assert_matches_reference(wind, CASE[name])


# Errors: every Raises line --------------------------------------------------------------------------------------------


def valid(loss: str) -> dict[str, object]:
    case = ONE_OF_EACH[loss]
    return {**case.make(2), **case.options}


WHOLE = torch.ones(2, 4, dtype=torch.bool)
RATES = torch.full((2, 4), 0.5, dtype=torch.float64)
LOG_Z = torch.zeros(2, dtype=torch.float64)
TYPED = ("lengths", "desirable")  # not floats
TENSORS = [
    (name, argument.strip(" ?"))
    for name, loss in LOSSES.items()
    for entry in loss.inputs
    for argument in entry.split("|")
    if argument.strip(" ?") not in TYPED
]


def call(loss: str, **changes) -> Tensor:
    """Call the first row of a loss with some arguments changed, and with others that the change requires."""
    arguments = {**valid(loss), **changes}
    for given, other in (("win_rates", "prefs"), ("advantages", "rewards")):
        if given in changes:
            arguments[other] = changes.get(other)
    if "log_z" in changes and loss == "wind":
        arguments.setdefault("objective", "square_point")
        arguments["objective"] = changes.get("objective", "square_point")
    if "ref_logps" in changes and loss == "grpo":
        arguments["beta"] = 0.1
    return LOSSES[loss].function(**arguments)


@pytest.mark.parametrize(("loss", "name"), TENSORS)
def test_tensor_errors_name_the_argument(loss, name):
    made = valid(loss)
    shape = made["logps"].shape
    value = (
        made[name]
        if name in made
        else made["logps"]
        if name == "ref_logps"
        else CONSTANTS[name](*shape[:2], generator(0))
    )
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
        (value[:1] if name not in ("logps", "kl_gaps") else value[0], ValueError, "must have shape"),
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


@pytest.mark.parametrize("loss", LOSSES)
def test_masks_and_reductions_are_checked_by_every_loss(loss):
    whole = torch.ones(ONE_OF_EACH[loss].make(2)["logps"].shape, dtype=torch.bool)
    assert torch.equal(call(loss, where=whole), call(loss))
    for bad, error, message in [
        (whole.long(), TypeError, "where must be torch.bool, got torch.int64"),
        (whole[:1], ValueError, "where must have shape"),
        (whole.to("meta"), ValueError, "where is on meta"),
        ([True], TypeError, "where must be a torch.Tensor"),
    ]:
        with pytest.raises(error, match=message):
            call(loss, where=bad)
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum', 'none', got 'avg'"):
        call(loss, reduction="avg")


@pytest.mark.parametrize("loss", [name for name, loss in LOSSES.items() if "rewards" in "".join(loss.inputs)])
def test_rewards_must_be_finite_where_they_count(loss):
    made = valid(loss)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="rewards must be finite for every response that is not masked"):
            call(loss, rewards=torch.full_like(made["rewards"], bad))


@pytest.mark.parametrize("loss", [name for name, loss in LOSSES.items() if "lengths" in loss.inputs])
def test_lengths_are_counts(loss):
    lengths = valid(loss)["lengths"]
    assert_same(call(loss, lengths=lengths.float()), call(loss, lengths=lengths))
    for bad, error, message in [
        (lengths.tolist(), TypeError, "must be a torch.Tensor"),
        (lengths > 0, TypeError, "must be integers or floats, got torch.bool"),
        (lengths[:, :1], ValueError, "must have shape"),
        (lengths * 0, ValueError, "must be at least 1 .* mask empty ones with where"),
        (lengths * math.nan, ValueError, "must be at least 1"),
        (lengths.to("meta"), ValueError, "is on meta"),
        (lengths.float().requires_grad_(), ValueError, "is a constant of the loss but requires grad"),
    ]:
        with pytest.raises(error, match=f"lengths {message}"):
            call(loss, lengths=bad)


def numbers(loss: str, *bad: tuple[str, float, str]) -> list[tuple]:
    return [(loss, {name: value}, ValueError, f"{name} must be {message}") for name, value, message in bad]


HALF = torch.full((2, 4, 4), 0.5, dtype=torch.float64)
TILTED = torch.where(torch.eye(4).bool(), 0.5, HALF + 0.01)
SETTINGS = [
    ("wind", {"prefs": None}, ValueError, "exactly one of prefs and win_rates, got neither"),
    ("wind", {"win_rates": RATES, "prefs": HALF}, ValueError, "exactly one of prefs and win_rates, got both"),
    *(
        (
            "wind",
            {"win_rates": RATES, "objective": name},
            ValueError,
            f"win_rates cannot be used for objective='{name}'",
        )
        for name in ("square_pair", "nce")
    ),
    *(
        ("wind", {"log_z": LOG_Z, "objective": name}, ValueError, f"log_z cannot be used for objective='{name}'")
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
    ("sppo", {"prefs": None}, ValueError, "got neither"),
    ("sppo", {"win_rates": RATES, "prefs": HALF}, ValueError, "got both"),
    ("sppo", {"eta": 0.0}, ValueError, "eta must be greater than 0"),
    ("sppo", {"prefs": TILTED}, ValueError, "off by up to 0.02"),
    ("sppo", {"win_rates": -RATES}, ValueError, "win_rates must lie in"),
    ("dpo", {"logps": RATES, "ref_logps": RATES}, ValueError, r"logps must have shape \(B, 2\), got \(2, 4\)"),
    ("dpo", {"beta": 0.0}, ValueError, "beta must be greater than 0"),
    ("dpo", {"link": "sigmoidal"}, ValueError, "link must be one of .* did you mean 'sigmoid'"),
    ("dpo", {"label_smoothing": 0.5}, ValueError, "label_smoothing must be below 0.5"),
    ("dpo", {"label_smoothing": -0.1}, ValueError, "label_smoothing must be at least 0"),
    *(
        ("dpo", {"label_smoothing": 0.1, "link": link}, ValueError, f"label_smoothing has no meaning for link='{link}'")
        for link in ("ipo", "hinge", "bco", "discopop")
    ),
    *numbers("inpo", ("eta", 0.0, "greater than 0"), ("tau", -0.1, "at least 0"), ("tau", 2.6, "at most eta = 2.5")),
    ("inpo", {"prefs": None}, ValueError, "prefs may be left out for pairs only, got 4 responses"),
    ("inpo", {"prefs": TILTED}, ValueError, "off by up to 0.02"),
    *numbers("rebel", ("eta", 0.0, "greater than 0")),
    *numbers("trajectory_balance", ("beta", 0.0, "greater than 0")),
    *numbers("bond", ("beta", -0.1, "at least 0"), ("beta", 1.1, "at most 1"), ("gamma", -0.1, "at least 0")),
    ("bond", {"logps": RATES}, ValueError, r"logps must have shape \(B, 3\), got \(2, 4\)"),
    *numbers("spin", ("beta", 0.0, "greater than 0")),
    *numbers("exo", ("beta", 0.0, "greater than 0"), ("alpha", 0.0, "greater than 0")),
    ("exo", {"rewards": None}, ValueError, "give exactly one of rewards and label_smoothing, got neither"),
    ("exo", {"label_smoothing": 0.1}, ValueError, "give exactly one of rewards and label_smoothing, got both"),
    ("exo", {"rewards": None, "label_smoothing": 0.1}, ValueError, "label_smoothing is for pairs, got 4 responses"),
    *(
        ("exo", {"rewards": None, "label_smoothing": bad}, ValueError, f"label_smoothing must be {message}")
        for bad, message in ((0.0, "greater than 0"), (0, "greater than 0"), (0.5, "below 0.5"))
    ),
    *numbers("infonca", ("beta", 0.0, "greater than 0"), ("alpha", 0.0, "greater than 0")),
    *numbers("nca", ("beta", 0.0, "greater than 0"), ("alpha", 0.0, "greater than 0")),
    ("nca", {"rewards": None}, ValueError, "rewards may be left out for pairs only, got 4 responses"),
    *numbers("listwise_dpo", ("beta", 0.0, "greater than 0")),
    *numbers(
        "simpo", ("beta", 0.0, "greater than 0"), ("gamma", math.inf, "a finite"), ("label_smoothing", 0.5, "below")
    ),
    *numbers("orpo", ("beta", 0.0, "greater than 0")),
    *numbers("cpo", ("beta", 0.0, "greater than 0"), ("alpha", -1.0, "at least"), ("label_smoothing", 0.5, "below")),
    *numbers("kto", ("beta", 0.0, "greater than 0"), ("desirable_weight", -1.0, "at least 0")),
    *numbers("kto", ("undesirable_weight", -1.0, "at least 0")),
    ("kto", {"desirable": RATES}, TypeError, "desirable must be torch.bool, got torch.float64"),
    ("kto", {"desirable": [True]}, TypeError, "desirable must be a torch.Tensor"),
    ("kto", {"desirable": WHOLE[:1]}, ValueError, r"desirable must have shape \(2, 4\)"),
    ("kto", {"desirable": WHOLE.to("meta")}, ValueError, "desirable is on meta"),
    ("kto", {"kl_gaps": LOG_Z[:0]}, ValueError, "kl_gaps must hold at least one"),
    *numbers("apo", ("beta", 0.0, "greater than 0"), ("variant", "up", "one of 'zero', 'down'")),
    *numbers("aot", ("beta", 0.0, "greater than 0"), ("label_smoothing", 0.5, "below 0.5")),
    *numbers("grpo", ("clip", 0.0, "greater than 0"), ("clip", 1.0, "below 1"), ("clip_high", 0.0, "greater than 0")),
    *numbers("grpo", ("beta", -1.0, "at least 0"), ("average", "token", "one of 'sequence', 'group', 'none'")),
    ("grpo", {"scale_rewards": "none"}, TypeError, "scale_rewards must be True or False, got str 'none'"),
    ("aot", {"paired": "no"}, TypeError, "paired must be True or False, got str 'no'"),
    ("grpo", {"beta": 0.1}, ValueError, "ref_logps and beta > 0 go together, got beta = 0.1"),
    ("grpo", {"rewards": None}, ValueError, "exactly one of rewards and advantages, got neither"),
    ("grpo", {"advantages": RATES, "rewards": RATES}, ValueError, "exactly one of rewards and advantages, got both"),
    ("grpo", {"advantages": RATES * math.nan}, ValueError, "advantages must be finite"),
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
