"""Decide what a loss of `windkern.losses` gets from sampled and judged groups."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from windkern.losses import Loss, check_prefs
from windkern.train.config import WindConfig
from windkern.train.groups import Group, verdict_of
from windkern.train.judges.judge import Verdict


@dataclass(frozen=True)
class LossPlan:
    """A loss with its arguments, ready for `windkern.fused_loss`, and what it takes from each group.

    Attributes:
        loss: entry of the table of losses.
        arguments: arguments of the loss except its tensors.
        function: function(logps (b, K), **constants) -> (b,).
        scale: factor of the loss.
        group: "all", "pair", "demonstration" or "anchor", see `windkern.losses.Group`.
        target: "prefs", "win_rates" or "rewards", None where the loss uses no verdict.
        logps: frozen log-probs that it takes: "old_logps", "ref_logps", "anchor_logps".
        scored: frozen log-probs that an iteration computes.
        fit_responses: number of responses to fit, those with the highest and lowest win rates; None for all.
        mask_truncated: whether responses without an end token are left out.
    """

    loss: Loss
    arguments: dict[str, object]
    function: Callable[..., Tensor]
    scale: float
    group: str
    target: str | None
    logps: tuple[str, ...]
    scored: frozenset[str]
    fit_responses: int | None
    mask_truncated: bool

    @property
    def judged(self) -> bool:
        """Whether the loss needs a judge."""
        return self.target is not None or self.group == "pair"

    @property
    def pull(self) -> float:
        """Weight of the KL to the reference in the game whose equilibrium the loss seeks, 0 for none."""
        return self.loss.pull(self.arguments)

    @property
    def takes_lengths(self) -> bool:
        return "lengths" in self.loss.names

    def fitted(self, groups: Sequence[Group]) -> list[Group]:
        """Return groups of the responses to fit, with the constants that follow from the verdict. Log-probs come later.

        Raises:
            ValueError: the loss needs rewards and the judge has none, or preferences are not symmetric.
        """
        truncated = torch.tensor([group.truncated for group in groups])
        lengths = torch.tensor([[len(tokens) for tokens in group.completions] for group in groups])
        places, constants = self._choose(verdict_of(groups), truncated, lengths)
        return [
            group.of(places[k].tolist(), {name: value[k] for name, value in constants.items()})
            for k, group in enumerate(groups)
        ]

    def _choose(self, verdict: Verdict | None, truncated: Tensor, lengths: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the (B, K) places of the responses to fit, and the loss's constants (B, K) or (B, K, K) by name."""
        groups, responses = truncated.shape
        constants: dict[str, Tensor] = {}
        keep = ~truncated if self.mask_truncated else torch.ones_like(truncated)
        places = torch.arange(responses).expand(groups, -1)
        if verdict is not None:
            check_prefs(verdict.prefs)
            win_rates = verdict.prefs.mean(-1)  # a response's comparison with itself counts 1/2
        if self.group == "pair":
            # Reason: a dropped one must be neither best nor worst; ties go to the earlier response, which is random.
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
            constants["prefs"] = cast(Verdict, verdict).prefs
        elif self.target == "win_rates":
            constants["win_rates"] = win_rates.gather(1, places)
        elif self.target == "rewards":
            constants["rewards"] = self._rewards(cast(Verdict, verdict), win_rates)
        if self.takes_lengths:
            constants["lengths"] = lengths.gather(1, places)
        if self.mask_truncated or self.group == "pair":
            constants["where"] = keep.gather(1, places)
        return places, constants

    def _rewards(self, verdict: Verdict, win_rates: Tensor) -> Tensor:
        if verdict.rewards is not None:
            return verdict.rewards
        if not self.loss.order_only:
            raise ValueError(
                f"loss={self.loss.name!r} needs rewards, and this judge only compares; use a judge with rewards, "
                "or a loss over preferences (`windkern losses`)"
            )
        return win_rates

    def with_logps(self, groups: Sequence[Group], scored: dict[str, list[list[float]]]) -> list[Group]:
        """Return the groups with the frozen log-probs that the loss takes, and the constant that spans all groups."""
        groups = [
            group.having(**{name: torch.tensor(scored[name][k]) for name in self.logps})
            for k, group in enumerate(groups)
        ]
        if self.loss.across is None:
            return groups
        known = {name: torch.tensor(rows) for name, rows in scored.items()}
        known |= {name: torch.stack([group.constants[name] for group in groups]) for name in groups[0].constants}
        wanted = inspect.signature(self.loss.across).parameters
        shared = self.loss.across(**{name: known[name] for name in wanted if name in known})
        return [group.having(**{self.loss.across_name: shared[k]}) for k, group in enumerate(groups)]


def plan_loss(config: WindConfig) -> LossPlan:
    """Return the plan for the loss that a configuration names.

    Example:
        >>> plan = plan_loss(WindConfig(output_dir="run", loss="dpo", report_to="none"))
        >>> plan.group, plan.logps, plan.judged
        ('pair', ('ref_logps',), True)
    """
    loss, arguments = config.entry, config.loss_arguments
    logps = tuple(name for name in ("old_logps", "ref_logps", "anchor_logps") if name in loss.names)
    across = () if loss.across is None else inspect.signature(loss.across).parameters
    return LossPlan(
        loss=loss,
        arguments=arguments,
        function=functools.partial(loss.function, **arguments, reduction="none"),
        scale=loss.scale(arguments),
        group=loss.group.kind,
        target=_target(loss, arguments, config),
        logps=logps,
        scored=frozenset([*logps, *(name for name in across if name.endswith("_logps"))]),
        fit_responses=config.fit_responses,
        mask_truncated=config.mask_truncated_completions,
    )


def _target(loss: Loss, arguments: dict[str, object], config: WindConfig) -> str | None:
    # Reason: w is the win rate against all sampled responses; the losses would take the mean over those they fit.
    if config.fit_responses is not None or (loss.against_all(arguments) and config.mask_truncated_completions):
        return "win_rates"
    return loss.target(alone=config.replay)


def not_finite(plan: LossPlan, learning_rate: float, step: int, loss: float) -> FloatingPointError:
    """Return the error for an infinite or NaN loss; it names the likely causes."""
    numbers = ", ".join(f"{name}={value!r}" for name, value in plan.arguments.items())
    if step == 1:  # no weight has moved
        return FloatingPointError(
            f"the loss of step 1 is {loss}, before any weight has moved: the arguments of the loss ({numbers}) or the "
            "judge's rewards are too large for it"
        )
    return FloatingPointError(
        f"the loss of step {step} is {loss}; lower learning_rate={learning_rate!r}, or the arguments of the loss "
        f"({numbers})"
    )
