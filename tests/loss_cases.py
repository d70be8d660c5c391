"""THE table of loss rows: every test that can be generated runs over CASES.

Each row has a reference in plain Python floats, for one group at a time with masked responses already dropped. It
shares no code with windkern, so value, mask and gradient (by central differences) of a loss are all compared with it
(`loss_checks.assert_matches_reference`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import loss_references as plain
import pytest
import torch
from loss_references import B_, BETA, ETA, C
from torch import Tensor

from windkern.losses import LOSSES

LOG_Z = 0.21
STEP = {"eta": ETA, "beta": BETA}
Inputs = Callable[[int, int, torch.Generator], dict[str, Tensor]]  # (B, N, generator) -> logps and constants


@dataclass(frozen=True)
class Case:
    """One way to call a loss.

    `properties`: "shift" (adding a constant to a group changes nothing, gradients sum to 0), "permutes" (responses can
    be reordered), "quadratic" (the gradient is linear in the log-probs), "detached" (the gradient is not that of the
    value).
    """

    loss: str
    label: str
    inputs: Inputs
    reference: Callable  # group -> value; if coupled, (groups, groups at the start) -> values
    options: dict = field(default_factory=dict)
    properties: frozenset[str] = frozenset()
    responses: int | None = None  # if the loss takes only this many
    least: int = 2  # responses below which a group is off
    coupled: bool = False  # groups are not independent
    bound: float | None = None  # no gradient is larger

    def __str__(self) -> str:
        return f"{self.loss}-{self.label}"

    @property
    def per_token(self) -> bool:
        return LOSSES[self.loss].shape == ("B", "N", "T")

    def make(self, groups: int = 3, responses: int | None = None, seed: int = 0) -> dict[str, Tensor]:
        return self.inputs(groups, self.responses or responses or 4, torch.Generator().manual_seed(seed))

    def __call__(self, inputs: dict[str, Tensor], **options: object) -> Tensor:
        return LOSSES[self.loss].function(**inputs, **{**self.options, **options})


# Inputs ---------------------------------------------------------------------------------------------------------------


def normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def uniform(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def random_prefs(B: int, N: int, generator: torch.Generator, hard: bool = False) -> Tensor:
    """Return random preferences, also cyclic ones; hard ones are 0 or 1 off the diagonal."""
    upper = uniform(B, N, N, generator=generator)
    upper = upper.round() if hard else 0.1 + 0.8 * upper
    prefs = torch.where(torch.ones(N, N).triu(1).bool(), upper, 1 - upper.mT)
    return torch.where(torch.eye(N).bool(), 0.5, prefs)


CONSTANTS: dict[str, Inputs] = {
    "prefs": random_prefs,
    "hard_prefs": lambda B, N, g: random_prefs(B, N, g, hard=True),
    "win_rates": lambda B, N, g: uniform(B, N, generator=g),
    "log_z": lambda B, N, g: LOG_Z + 0.1 * normal(B, generator=g),
    "rewards": lambda B, N, g: normal(B, N, generator=g),
    "tied_rewards": lambda B, N, g: torch.randint(0, 2, (B, N), generator=g).double(),
    "advantages": lambda B, N, g: normal(B, N, generator=g),
    "baseline": lambda B, N, g: normal(B, generator=g),
    "lengths": lambda B, N, g: torch.randint(5, 20, (B, N), generator=g),
    "desirable": lambda B, N, g: torch.rand(B, N, generator=g) < 0.5,
    "kl_gaps": lambda B, N, g: 0.5 + normal(7, generator=g),
}


def drawn(*names: str, tokens: int | None = None, far: float = 0.25) -> Inputs:
    """Return log-probs of sequences near -40 nats, or of tokens near -2, `far` from the old policy's, and constants."""

    def inputs(B: int, N: int, generator: torch.Generator) -> dict[str, Tensor]:
        shape = (B, N) if tokens is None else (B, N, tokens)
        old = (
            3 * normal(*shape, generator=generator) - 40
            if tokens is None
            else -4 * uniform(*shape, generator=generator)
        )
        ref = old + 0.7 * normal(*shape, generator=generator)
        logps = old + far * normal(*shape, generator=generator)
        policies = {"old_logps": old, "anchor_logps": old, "ref_logps": ref}
        made = {"logps": logps} | {name: policies[name] for name in names if name in policies}
        for name in names:
            if name not in policies:
                made[name.removeprefix("hard_").removeprefix("tied_")] = CONSTANTS[name](B, N, generator)
        return made

    return inputs


# The table ------------------------------------------------------------------------------------------------------------

CENTRED = frozenset({"shift", "permutes"})
SQUARE = CENTRED | {"quadratic"}
POINT = frozenset({"permutes", "quadratic"})
PERMUTES = frozenset({"permutes"})
SHIFT = frozenset({"shift"})
NONE: frozenset[str] = frozenset()


def wind_row(label: str, names: str, reference: Callable, properties: frozenset, objective: str) -> Case:
    inputs = drawn("old_logps", "ref_logps", *names.split())
    return Case("wind", label, inputs, reference, {**STEP, "objective": objective}, properties)


def pair_row(loss: str, label: str, reference: Callable, properties: frozenset, bound: float | None = None, **options):
    constants = [name for name in LOSSES[loss].inputs[1:] if not name.endswith("?")]
    return Case(loss, label, drawn(*constants), reference, options, properties, responses=2, bound=bound)


def grpo_row(label: str, names: str, reference: Callable, **options: object) -> Case:
    inputs = drawn("old_logps", *names.split(), tokens=3)
    return Case("grpo", label, inputs, reference, {"clip_high": 0.3, **options}, PERMUTES, least=1)


INPO = drawn("old_logps", "ref_logps", "prefs")
WON = drawn("old_logps", "ref_logps")
INPO_STEP = {"eta": 2.5, "tau": 0.5}
REWARDED = drawn("ref_logps", "rewards")
TIED = drawn("ref_logps", "tied_rewards")
SOFT = {"beta": 0.5, "alpha": 0.7}
KTO = {"beta": 0.5, "desirable_weight": 0.8, "undesirable_weight": 1.3}

CASES = [
    wind_row("square", "prefs", plain.square, SQUARE, "square"),
    wind_row("square-hard", "hard_prefs", plain.square, SQUARE, "square"),
    wind_row("square-win_rates", "win_rates", plain.square, SQUARE, "square"),
    wind_row("square_pair", "prefs", lambda g: plain.pair_square(g, B_, C), SQUARE, "square_pair"),
    wind_row("square_point", "prefs", plain.square_point, POINT, "square_point"),  # c/2 for log Z
    wind_row("square_point-log_z", "prefs log_z", plain.square_point, POINT, "square_point"),
    wind_row("square_point-win_rates", "win_rates log_z", plain.square_point, POINT, "square_point"),
    wind_row("kl", "prefs", plain.kl, CENTRED, "kl"),
    wind_row("kl-win_rates", "win_rates", plain.kl, CENTRED, "kl"),  # their mean is not 1/2
    wind_row("nce", "prefs", plain.nce, PERMUTES, "nce"),
    wind_row("nce-hard", "hard_prefs log_z", plain.nce, PERMUTES, "nce"),
    wind_row("nce_ratio", "prefs", plain.nce_ratio, CENTRED, "nce_ratio"),
    wind_row("nce_ratio-win_rates", "win_rates", plain.nce_ratio, CENTRED, "nce_ratio"),
    Case("sppo", "prefs", drawn("old_logps", "prefs"), plain.sppo, {"eta": ETA}, POINT),
    Case("sppo", "win_rates", drawn("old_logps", "win_rates"), plain.sppo, {"eta": ETA}, POINT),
    Case("inpo", "prefs", INPO, lambda g: plain.pair_square(g, 0.2, 0.4), INPO_STEP, SQUARE),
    Case("inpo", "won", WON, lambda g: plain.pair_square(g, 0.2, 0.4), INPO_STEP, SHIFT | {"quadratic"}, 2),
    Case("rebel", "rewards", drawn("old_logps", "rewards"), plain.rebel, {"eta": ETA}, SQUARE),
    Case("trajectory_balance", "group", REWARDED, plain.balance, {"beta": BETA}, SQUARE),
    Case("trajectory_balance", "log_z", drawn("ref_logps", "rewards", "log_z"), plain.balance, {"beta": BETA}, POINT),
    Case(
        "bond",
        "baseline",
        drawn("anchor_logps", "rewards", "baseline"),
        lambda g: plain.bond(g, 0.6, 0.2),
        {"beta": 0.6, "gamma": 0.2},
        frozenset({"quadratic"}),
        responses=3,
        least=3,
    ),
    Case(
        "bond",
        "ties",
        drawn("anchor_logps", "tied_rewards"),
        lambda g: plain.bond(g, 0.5, 0.1),
        properties=frozenset({"quadratic"}),
        responses=3,
        least=3,
    ),
    Case("bon_sft", "rewards", drawn("rewards"), plain.bon_sft, {}, POINT, bound=1.0),
    Case("bon_sft", "ties", drawn("tied_rewards"), plain.bon_sft, {}, POINT, bound=1.0),
    pair_row("dpo", "sigmoid", lambda g: plain.smoothed(2 * plain.margin(g)), SHIFT, 2.0, beta=2.0),
    pair_row(
        "dpo",
        "smoothed",
        lambda g: plain.smoothed(0.5 * plain.margin(g), 0.1),
        SHIFT,
        0.5,
        beta=0.5,
        label_smoothing=0.1,
    ),
    pair_row(
        "dpo",
        "robust",
        lambda g: (0.9 * plain.smoothed(0.5 * plain.margin(g)) - 0.1 * plain.smoothed(-0.5 * plain.margin(g))) / 0.8,
        SHIFT,
        0.5 * 0.9 / 0.8,
        beta=0.5,
        label_smoothing=0.1,
        link="robust",
    ),
    pair_row("dpo", "ipo", lambda g: (plain.margin(g) - 1 / 0.6) ** 2, SHIFT | {"quadratic"}, beta=0.3, link="ipo"),
    pair_row("dpo", "hinge", lambda g: max(0.0, 1 - 0.4 * plain.margin(g)), SHIFT, 0.4, beta=0.4, link="hinge"),
    pair_row("dpo", "bco", plain.bco, NONE, 0.5, beta=0.5, link="bco"),
    pair_row("dpo", "discopop", plain.discopop, SHIFT, beta=0.1, link="discopop"),
    pair_row("spin", "pair", lambda g: plain.smoothed(0.5 * plain.margin(g, "old_logps")), SHIFT, 0.5, beta=0.5),
    Case("exo", "rewards", REWARDED, plain.exo, SOFT, CENTRED),
    Case("exo", "pair", drawn("ref_logps"), plain.exo, {"beta": 0.5, "label_smoothing": 0.1}, SHIFT, responses=2),
    Case("infonca", "rewards", REWARDED, plain.infonca, SOFT, CENTRED, bound=0.5),
    Case("nca", "rewards", REWARDED, plain.nca, SOFT, PERMUTES, bound=0.5),
    Case("nca", "pair", drawn("ref_logps"), plain.nca, {"beta": 0.5}, NONE, responses=2, bound=0.5),
    Case("listwise_dpo", "rewards", REWARDED, plain.plackett_luce, {"beta": 0.5}, CENTRED),
    Case("listwise_dpo", "ties", TIED, plain.breslow, {"beta": 0.5}, CENTRED),
    pair_row("simpo", "pair", plain.simpo, NONE, 2 / 5, beta=2.0, gamma=0.6),
    pair_row("simpo", "smoothed", lambda g: plain.simpo(g, 0.1), NONE, 2 / 5, beta=2.0, gamma=0.6, label_smoothing=0.1),
    pair_row("orpo", "pair", plain.orpo, NONE, beta=0.4),
    pair_row("cpo", "pair", plain.cpo, NONE, 0.5 + 0.7 / 5, beta=0.5, alpha=0.7, label_smoothing=0.1),
    Case(
        "kto",
        "batch",
        drawn("ref_logps", "desirable"),
        plain.kto,
        KTO,
        frozenset({"permutes", "detached"}),
        least=1,
        coupled=True,
        bound=0.5 * 1.3 / 4,
    ),
    Case(
        "kto",
        "kl_gaps",
        drawn("ref_logps", "desirable", "kl_gaps"),
        lambda g: plain.kto_values(g, max(0.0, plain.mean(g["kl_gaps"]))),
        KTO,
        PERMUTES,
        least=1,
        bound=0.5 * 1.3 / 4,
    ),
    pair_row("apo", "zero", plain.apo_zero, NONE, 0.5 / 4, beta=0.5),
    pair_row("apo", "down", plain.apo_down, NONE, 0.5 / 4, beta=0.5, variant="down"),
    *(
        Case(
            "aot",
            "paired" if paired else "unpaired",
            drawn("ref_logps", far=3.0),
            lambda groups, start, paired=paired: plain.aot(groups, start, paired),
            {"beta": 0.5, "paired": paired, "label_smoothing": 0.1},
            SHIFT if paired else NONE,
            responses=2,
            coupled=True,
            bound=0.5,
        )
        for paired in (True, False)
    ),
    grpo_row("rewards", "rewards", plain.grpo),
    grpo_row("advantages", "ref_logps advantages", lambda g: plain.grpo(g, beta=0.3), beta=0.3),
    grpo_row("group", "rewards", lambda g: plain.grpo(g, "group", scale=False), average="group", scale_rewards=False),
    grpo_row("none", "advantages", lambda g: plain.grpo(g, "none"), average="none"),
]

every_case = pytest.mark.parametrize("case", CASES, ids=str)
CASE = {str(case): case for case in CASES}
ONE_OF_EACH = {case.loss: case for case in reversed(CASES)}  # the first row of each loss


def having(name: str):
    return pytest.mark.parametrize("case", [case for case in CASES if name in case.properties], ids=str)
