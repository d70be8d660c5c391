"""THE table of loss rows: every test of test_losses.py that can be generated runs over CASES.

Each row has a reference: plain Python floats, one group at a time, masked responses already dropped. It shares no code
with windkern, so value, mask and gradient (by central differences) of a loss are all judged against it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from windkern.losses import LOSSES

ETA, BETA = 0.8, 0.3
A, B_, C = 1 / (1 + ETA * BETA), ETA * BETA / (1 + ETA * BETA), ETA / (1 + ETA * BETA)
LOG_Z = 0.21
Group = dict[str, list]


@dataclass(frozen=True)
class Case:
    """One way to call a loss.

    `properties`: "shift" (adding a constant to a group changes nothing, gradients sum to 0), "permutes" (responses may
    be reordered), "quadratic" (the gradient is linear in the log-probs).
    """

    loss: str
    label: str
    inputs: Callable[[int, int, torch.Generator], dict[str, Tensor]]  # (B, N, generator) -> logps and constants
    reference: Callable[[Group], float]
    options: dict = field(default_factory=dict)
    properties: frozenset[str] = frozenset()
    responses: int = 4

    def __str__(self) -> str:
        return f"{self.loss}-{self.label}"

    def make(self, groups: int = 3, responses: int | None = None, seed: int = 0) -> dict[str, Tensor]:
        if responses is None or self.responses == 2:
            responses = self.responses
        return self.inputs(groups, responses, torch.Generator().manual_seed(seed))

    def __call__(self, inputs: dict[str, Tensor], **options: object) -> Tensor:
        return LOSSES[self.loss].function(**inputs, **{**self.options, **options})


def normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def random_prefs(B: int, N: int, generator: torch.Generator, hard: bool = False) -> Tensor:
    """Any preferences, cyclic ones included; hard ones are 0 or 1 off the diagonal."""
    upper = torch.rand(B, N, N, generator=generator, dtype=torch.float64)
    upper = upper.round() if hard else 0.1 + 0.8 * upper
    prefs = torch.where(torch.ones(N, N).triu(1).bool(), upper, 1 - upper.mT)
    return torch.where(torch.eye(N).bool(), 0.5, prefs)


def policies(B: int, N: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Sequence log-probs near -40 nats; the policy is far enough from pi_t that some implied win rates leave (0, 1)."""
    old = -40 + 3 * normal(B, N, generator=generator)
    ref = old + 0.7 * normal(B, N, generator=generator)
    return {"logps": old + 0.25 * normal(B, N, generator=generator), "old_logps": old, "ref_logps": ref}


def judged(*names: str, hard: bool = False) -> Callable[[int, int, torch.Generator], dict[str, Tensor]]:
    """Inputs with the three policies and the constants named."""

    def inputs(B: int, N: int, generator: torch.Generator) -> dict[str, Tensor]:
        made = policies(B, N, generator)
        if "prefs" in names:
            made["prefs"] = random_prefs(B, N, generator, hard)
        if "win_rates" in names:
            made["win_rates"] = torch.rand(B, N, generator=generator, dtype=torch.float64)
        if "log_z" in names:
            made["log_z"] = LOG_Z + 0.1 * normal(B, generator=generator)
        return made

    return inputs


def without(name: str, inputs: Callable) -> Callable[[int, int, torch.Generator], dict[str, Tensor]]:
    return lambda B, N, generator: {k: v for k, v in inputs(B, N, generator).items() if k != name}


# References -----------------------------------------------------------------------------------------------------------


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def v_rates(g: Group) -> list[float]:
    return g.get("win_rates") or [mean(row) for row in g["prefs"]]


def u_rates(g: Group) -> list[float]:
    return g.get("win_rates") or [(sum(row) - 0.5) / (len(row) - 1) for row in g["prefs"]]


def s_of(g: Group) -> list[float]:
    return [
        logp - A * old - B_ * ref for logp, old, ref in zip(g["logps"], g["old_logps"], g["ref_logps"], strict=True)
    ]


def log_taylor(p: float, delta: float = 0.02) -> float:
    for end, outside in ((delta, p < delta), (1 - delta, p > 1 - delta)):
        if outside:
            return math.log(end) + (p - end) / end - (p - end) ** 2 / (2 * end**2)
    return math.log(p)


def ordered_pairs(g: Group) -> list[tuple[int, int]]:
    n = len(g["logps"])
    return [(i, j) for i in range(n) for j in range(n) if i != j]


def square(g: Group) -> float:
    d = [s - C * w for s, w in zip(s_of(g), v_rates(g), strict=True)]
    return mean([(x - mean(d)) ** 2 for x in d])


def square_pair(g: Group) -> float:
    s = s_of(g)
    return mean([(s[i] - s[j] - C * (g["prefs"][i][j] - 0.5)) ** 2 for i, j in ordered_pairs(g)])


def square_point(g: Group) -> float:
    log_z = g.get("log_z", C / 2)
    return mean([(s + log_z - C * w) ** 2 for s, w in zip(s_of(g), u_rates(g), strict=True)])


def kl(g: Group) -> float:
    s, rates, total = s_of(g), v_rates(g), []
    for x, w in zip(s, rates, strict=True):
        p = mean(rates) + (x - mean(s)) / C
        total.append(w * (math.log(w) - log_taylor(p)) + (1 - w) * (math.log(1 - w) - log_taylor(1 - p)))
    return mean(total)


def nce(g: Group) -> float:
    p = [(s + g.get("log_z", C / 2)) / C for s in s_of(g)]
    return mean([g["prefs"][i][j] * (-log_taylor(p[i]) - log_taylor(1 - p[j])) for i, j in ordered_pairs(g)])


def log_softmax(x: list[float]) -> list[float]:
    total = math.log(sum(math.exp(v - max(x)) for v in x)) + max(x)
    return [v - total for v in x]


def nce_ratio(g: Group) -> float:
    rows = zip(g["logps"], g["old_logps"], g["ref_logps"], v_rates(g), strict=True)
    gaps, tilts = zip(*[(logp - old, B_ * (ref - old) + C * w) for logp, old, ref, w in rows], strict=True)
    return -sum(math.exp(t) * q for t, q in zip(log_softmax(list(tilts)), log_softmax(list(gaps)), strict=True))


def sppo(g: Group) -> float:
    rows = zip(g["logps"], g["old_logps"], v_rates(g), strict=True)
    return mean([(logp - old - ETA * (w - 0.5)) ** 2 for logp, old, w in rows])


def margin(g: Group) -> float:
    (chosen, rejected), (ref_chosen, ref_rejected) = g["logps"], g["ref_logps"]
    return (chosen - ref_chosen) - (rejected - ref_rejected)


def log_sigma(x: float) -> float:
    return -math.log(1 + math.exp(-x))


# The table ------------------------------------------------------------------------------------------------------------

CENTRED = frozenset({"shift", "permutes"})
SQUARE = CENTRED | {"quadratic"}
POINT = frozenset({"permutes", "quadratic"})
STEP = {"eta": ETA, "beta": BETA}


def wind_row(label: str, inputs: Callable, reference: Callable, properties: frozenset, objective: str) -> Case:
    return Case("wind", label, inputs, reference, {**STEP, "objective": objective}, properties)


def dpo_row(label: str, reference: Callable, properties: frozenset, **options: object) -> Case:
    return Case("dpo", label, without("old_logps", judged()), reference, options, properties, responses=2)


CASES = [
    wind_row("square", judged("prefs"), square, SQUARE, "square"),
    wind_row("square-hard", judged("prefs", hard=True), square, SQUARE, "square"),
    wind_row("square-win_rates", judged("win_rates"), square, SQUARE, "square"),
    wind_row("square_pair", judged("prefs"), square_pair, SQUARE, "square_pair"),
    wind_row("square_point", judged("prefs"), square_point, POINT, "square_point"),  # c/2 for log Z
    wind_row("square_point-log_z", judged("prefs", "log_z"), square_point, POINT, "square_point"),
    wind_row("square_point-win_rates", judged("win_rates", "log_z"), square_point, POINT, "square_point"),
    wind_row("kl", judged("prefs"), kl, CENTRED, "kl"),
    wind_row("kl-win_rates", judged("win_rates"), kl, CENTRED, "kl"),  # their mean is not 1/2
    wind_row("nce", judged("prefs"), nce, frozenset({"permutes"}), "nce"),
    wind_row("nce-hard", judged("prefs", "log_z", hard=True), nce, frozenset({"permutes"}), "nce"),
    wind_row("nce_ratio", judged("prefs"), nce_ratio, CENTRED, "nce_ratio"),
    wind_row("nce_ratio-win_rates", judged("win_rates"), nce_ratio, CENTRED, "nce_ratio"),
    Case("sppo", "prefs", without("ref_logps", judged("prefs")), sppo, {"eta": ETA}, POINT),
    Case("sppo", "win_rates", without("ref_logps", judged("win_rates")), sppo, {"eta": ETA}, POINT),
    dpo_row("sigmoid", lambda g: -log_sigma(2 * margin(g)), frozenset({"shift"}), beta=2.0),
    dpo_row(
        "smoothed",
        lambda g: -0.9 * log_sigma(0.5 * margin(g)) - 0.1 * log_sigma(-0.5 * margin(g)),
        frozenset({"shift"}),
        beta=0.5,
        label_smoothing=0.1,
    ),
    dpo_row("ipo", lambda g: (margin(g) - 1 / 0.6) ** 2, frozenset({"shift", "quadratic"}), beta=0.3, link="ipo"),
    dpo_row("hinge", lambda g: max(0.0, 1 - 0.4 * margin(g)), frozenset({"shift"}), beta=0.4, link="hinge"),
]


# The comparison that a loss has to pass and a planted fault must not --------------------------------------------------


def partial_mask(groups: int, responses: int) -> Tensor:
    """Row 0 is empty, row 1 has a single response, row 2 is whole, the others miss one or none."""
    where = torch.ones(groups, responses, dtype=torch.bool)
    where[0] = False
    where[1, 1:] = False
    if responses > 2:
        where[3:, 1] = False
    return where


def poison(inputs: dict[str, Tensor], where: Tensor, junk: float) -> dict[str, Tensor]:
    """`junk` wherever a response is masked: the losses may not read it."""
    pairs = where[:, :, None] & where[:, None, :]
    masks = {"prefs": pairs, "log_z": where.sum(-1) >= 2}
    return {name: torch.where(masks.get(name, where), value, junk) for name, value in inputs.items()}


def reference_values(case: Case, inputs: dict[str, Tensor], where: Tensor) -> list[float]:
    """Per group, computed on what is left after dropping masked responses; 0 for fewer than two."""
    values = []
    for b, keep in enumerate(where):
        if keep.sum() < 2:
            values.append(0.0)
            continue
        group = {}
        for name, value in inputs.items():
            kept = value[b] if name == "log_z" else value[b][keep]
            group[name] = (kept[:, keep] if name == "prefs" else kept).tolist()
        values.append(case.reference(group))
    return values


def reference_gradient(case: Case, inputs: dict[str, Tensor], where: Tensor, step: float = 1e-5) -> Tensor:
    """Central differences of the sum over groups; responses of different groups are moved together."""
    gradient = torch.zeros_like(inputs["logps"])
    for i in range(gradient.shape[1]):
        ends = []
        for sign in (1, -1):
            moved = {**inputs, "logps": inputs["logps"].clone()}
            moved["logps"][:, i] += sign * step
            ends.append(torch.tensor(reference_values(case, moved, where), dtype=torch.float64))
        gradient[:, i] = (ends[0] - ends[1]) / (2 * step)
    return torch.where(where, gradient, 0.0)


def assert_matches_reference(
    function: Callable[..., Tensor], case: Case, *, junk: float = math.nan, responses: int | None = None, seed: int = 0
) -> None:
    """Values per group, mean, and gradients of `function` against the reference, on a masked batch with junk."""
    inputs = case.make(5, responses, seed)
    where = partial_mask(*inputs["logps"].shape)
    expected = torch.tensor(reference_values(case, inputs, where), dtype=torch.float64)
    slope = reference_gradient(case, inputs, where)

    dirty = poison(inputs, where, junk)
    logps = dirty.pop("logps").requires_grad_()
    values = function(logps, **dirty, **case.options, where=where, reduction="none")
    (gradient,) = torch.autograd.grad(values.sum(), logps)
    torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, slope, rtol=1e-7, atol=1e-7)
    average = function(logps, **dirty, **case.options, where=where, reduction="mean")
    torch.testing.assert_close(average, expected.sum() / 5, rtol=1e-10, atol=1e-12)


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


# One group of two responses, the first of which won.
WON = torch.tensor([[[0.5, 1.0], [0.0, 0.5]]], dtype=torch.float64)
