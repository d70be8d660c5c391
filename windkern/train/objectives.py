"""What a loss of `windkern.losses` needs of sampled and judged groups, and what it is given."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from windkern.losses import LOSSES, OBJECTIVES, Loss, check_prefs
from windkern.train.config import WindConfig, required_settings
from windkern.train.judges.judge import Verdict

# Losses that only look at the order of the rewards, so that win rates serve where a judge has no rewards.
ORDER_ONLY = ("bon_sft", "bond", "listwise_dpo")
_SQUARED = ("square", "square_pair", "square_point")


class Chosen(NamedTuple):
    """Which responses of some groups are fitted, and to what."""

    places: Tensor  # (B, K) int64, places among the group's responses
    constants: dict[str, Tensor]  # (B, K) or (B, K, K), for the loss by name


@dataclass(frozen=True)
class Objective:
    """A loss with its settings, ready for `windkern.fused_loss`."""

    loss: Loss
    function: Callable[..., Tensor]  # function(logps (b, K), **constants) -> (b,)
    scale: float  # that the loss is multiplied by
    group: str  # "all", "pair" (best and worst), "demonstration" (and a sample) or "anchor" (and a sample)
    target: str | None  # "prefs", "win_rates", "rewards" or None
    logps: tuple[str, ...]  # of "old_logps", "ref_logps", "anchor_logps"
    takes_lengths: bool
    fit_responses: int | None
    drop_truncated: bool

    @property
    def judged(self) -> bool:
        """Whether a judge is needed at all."""
        return self.target is not None or self.group == "pair"

    def choose(self, verdict: Verdict | None, truncated: Tensor, lengths: Tensor) -> Chosen:
        """Which of the N responses to fit, and to what.

        Args:
            verdict: of B groups, None where nothing was judged.
            truncated: (B, N) bool.
            lengths: (B, N) tokens of each response.

        Raises:
            ValueError: the loss needs rewards and the judge has none, or preferences are not symmetric.
        """
        groups, responses = truncated.shape
        constants: dict[str, Tensor] = {}
        keep = ~truncated if self.drop_truncated else torch.ones_like(truncated)
        places = torch.arange(responses).expand(groups, -1)
        if verdict is not None:
            check_prefs(verdict.prefs)
            win_rates = verdict.prefs.mean(-1)  # the own comparison counts 1/2
        if self.group == "pair":
            # Reason: what is dropped must be neither best nor worst; ties go to the earlier response, which is random.
            order = torch.where(keep, win_rates, -1.0)
            worst = torch.where(keep, win_rates, 2.0).argmin(-1)
            places = torch.stack([order.argmax(-1), worst], 1)
            tied = win_rates.gather(1, places).diff(dim=1).squeeze(1) == 0
            keep[tied] = False  # a pair without a winner teaches nothing
        elif self.fit_responses is not None:
            order = win_rates.argsort(dim=-1, stable=True)
            low = self.fit_responses // 2
            places = torch.cat([order[:, :low], order[:, low - self.fit_responses :]], 1)
        if self.target == "prefs":
            constants["prefs"] = verdict.prefs
        elif self.target == "win_rates":
            constants["win_rates"] = win_rates.gather(1, places)
        elif self.target == "rewards":
            constants["rewards"] = self._rewards(verdict, win_rates)
        if self.takes_lengths:
            constants["lengths"] = lengths.gather(1, places)
        if self.drop_truncated or self.group == "pair":
            constants["where"] = keep.gather(1, places)
        return Chosen(places, constants)

    def _rewards(self, verdict: Verdict, win_rates: Tensor) -> Tensor:
        if verdict.rewards is not None:
            return verdict.rewards
        if self.loss.name not in ORDER_ONLY:
            raise ValueError(
                f"loss={self.loss.name!r} needs rewards, and this judge only compares; take a judge with rewards, "
                "or loss='wind'"
            )
        return win_rates


def make_objective(config: WindConfig) -> Objective:
    """Return the objective that a configuration names.

    Raises:
        ValueError: `eta`, `beta` or a key of `loss_settings` is no argument of the loss; the message says which
            arguments there are.

    Example:
        >>> config = WindConfig(output_dir="run", loss="dpo", report_to="none")
        >>> objective = make_objective(config)
        >>> objective.group, objective.logps, objective.judged
        ('pair', ('ref_logps',), True)
    """
    loss = LOSSES[config.loss]
    known = inspect.signature(loss.function).parameters
    tensors = {name.rstrip("?") for entry in loss.inputs for name in entry.split(" | ")} | {"where", "reduction"}
    settable = [name for name in known if name not in tensors]
    given = {"eta": config.eta, "beta": config.beta, **(config.loss_settings or {})}
    given = {
        name: value
        for name, value in {**required_settings(loss.name), **given}.items()
        if value is not None or name in (config.loss_settings or {})
    }
    if loss.name == "wind":
        given["objective"] = config.objective
    if unknown := sorted(set(given) - set(settable)):
        raise ValueError(f"loss={loss.name!r} has no argument {', '.join(unknown)}; it has {', '.join(settable)}")
    group = {"spin": "demonstration", "bond": "anchor"}.get(loss.name, "pair" if loss.shape == ("B", 2) else "all")
    scale = 1.0
    # Reason: divided by c^2 a squared loss is an error of win rates, and a learning rate suits any step size.
    if loss.name == "wind" and config.objective in _SQUARED:
        scale = 1 / config.step_scale**2
    elif loss.name == "sppo":
        scale = 1 / config.eta**2
    return Objective(
        loss=loss,
        function=functools.partial(loss.function, **given, reduction="none"),
        scale=scale,
        group=group,
        target=_target(loss, config),
        logps=tuple(name for name in ("old_logps", "ref_logps", "anchor_logps") if name in known),
        takes_lengths="lengths" in loss.inputs,
        fit_responses=config.fit_responses,
        drop_truncated=config.truncated == "drop",
    )


def _target(loss: Loss, config: WindConfig) -> str | None:
    names: Sequence[str] = [name for entry in loss.inputs for name in entry.split(" | ")]
    # Reason: w is the win rate against all that the policy says; the losses would take the mean over those they fit.
    against_all = loss.name in ("wind", "sppo") and OBJECTIVES[config.objective].statistic == "V"
    if config.fit_responses is not None or (against_all and config.truncated == "drop"):
        return "win_rates"
    if loss.name == "wind" and OBJECTIVES[config.objective].statistic == "pairs":
        return "prefs"
    for name in ("prefs", "prefs?", "rewards", "rewards?"):
        if name in names:
            return name.rstrip("?")
    return None
