"""Planted faults are caught by the comparison the losses pass, and bad input is named."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from loss_cases import CASE, STEP
from loss_checks import assert_matches_reference
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
