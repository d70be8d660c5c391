"""Losses over (B, N) log-probs: plain differentiable torch, one small file each, listed in `LOSSES`.

To add one: write `losses/<name>.py`, add an entry here, add a row to `tests/loss_cases.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from windkern.losses._groups import check_prefs
from windkern.losses.dpo import LINKS, dpo
from windkern.losses.module import WindLoss
from windkern.losses.sppo import sppo
from windkern.losses.wind import OBJECTIVES, wind

__all__ = ["LINKS", "LOSSES", "OBJECTIVES", "Loss", "WindLoss", "check_prefs", "dpo", "sppo", "wind"]


@dataclass(frozen=True)
class Loss:
    """What there is to know about a loss before reading its file."""

    name: str
    function: Callable[..., Tensor]
    formula: str  # ASCII, of one group
    inputs: tuple[str, ...]  # tensors, in the order of the signature; "a | b" where either serves
    source: str
    separable: bool  # treats groups apart, so it works inside fused_loss
    when: str


LOSSES = {
    loss.name: loss
    for loss in (
        Loss(
            name="wind",
            function=wind,
            formula="mean_i (d_i - mean d)^2, d_i = l_i - a o_i - b r_i - c w_i (objective='square')",
            inputs=("logps", "old_logps", "ref_logps", "prefs | win_rates", "log_z"),
            source="WIND (arXiv 2410.20727), docs/theory.md eq. (1.31) to (1.44)",
            separable=True,
            when="several sampled responses per prompt, judged in pairs or by win rate, with a pull to the reference",
        ),
        Loss(
            name="sppo",
            function=sppo,
            formula="mean_i (l_i - o_i - eta (w_i - 1/2))^2",
            inputs=("logps", "old_logps", "prefs | win_rates"),
            source="SPPO (arXiv 2405.00675)",
            separable=True,
            when="as wind without a reference, or to compare with published SPPO runs",
        ),
        Loss(
            name="dpo",
            function=dpo,
            formula="-log sigma(beta h), h = (l_w - r_w) - (l_l - r_l) (link='sigmoid')",
            inputs=("logps", "ref_logps"),
            source="DPO (arXiv 2305.18290); IPO and hinge as links",
            separable=True,
            when="fixed pairs of a chosen and a rejected response, nothing sampled",
        ),
    )
}
