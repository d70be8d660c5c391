"""An entry of the table of losses: the formula, inputs and source of a loss, and what a trainer must know."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

PAIR = ("B", 2)
Arguments = Mapping[str, Any]  # keyword arguments of a loss by name, besides its tensors


def _never(arguments: Arguments) -> bool:
    return False


def _one(arguments: Arguments) -> float:
    return 1.0


def _zero(arguments: Arguments) -> float:
    return 0.0


@dataclass(frozen=True)
class Group:
    """The responses to a prompt that a trainer fits together.

    Attributes:
        kind: "all" (samples of the policy), "pair" (the best and the worst of them), "demonstration" (a given answer,
            then a sample) or "anchor" (a sample of the policy, then samples of the moving average of its weights).
        sampled: responses sampled per prompt if the loss fixes the number; None leaves it to the run.
    """

    kind: str
    sampled: int | None = None


@dataclass(frozen=True)
class Loss:
    """A loss: its function, what it computes, and what a trainer must give it."""

    name: str
    function: Callable[..., Tensor]
    formula: str  # ASCII, of one group
    inputs: tuple[str, ...]  # tensors, in the order of the signature; "a | b" for alternatives, "a?" if optional
    source: str
    separable: bool  # treats groups independently, so it works inside fused_loss and can be trained
    when: str
    shape: tuple[str | int, ...] = ("B", "N")  # of logps
    settings: dict[str, object] = field(default_factory=dict)  # arguments for its picture; numbers without default
    span: float = 6.0  # nats that its picture shows on both sides
    variants: tuple[str, tuple[str, ...]] | None = None  # an argument and the names it takes
    # For trainers:
    fitted: Group | None = None  # None: "pair" if the shape has two columns, else "all"
    order_only: bool = False  # depends only on the order of the rewards, so win rates can replace them
    any_policy: bool = False  # correct for responses of any policy, so earlier ones can be replayed
    against_all: Callable[[Arguments], bool] = _never  # whether the target is the win rate against all samples
    scale: Callable[[Arguments], float] = _one  # factor with which one learning rate suits any step size
    pull: Callable[[Arguments], float] = _zero  # KL weight of the game whose equilibrium the loss seeks; 0: none
    metrics: Callable[..., dict[str, Tensor]] | None = None  # (logps, win_rates, where, *, arguments, **frozen logps)
    across: Callable[..., Tensor] | None = None  # from (G, K) tensors of an iteration, also `where`, to (G,) constants
    across_name: str = ""  # name of that constant

    @property
    def group(self) -> Group:
        """The responses that a trainer fits together."""
        return self.fitted or Group("pair" if self.shape == PAIR else "all")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its tensors, each of the alternatives included."""
        return tuple(name.strip(" ?") for entry in self.inputs for name in entry.split("|"))

    def target(self, *, alone: bool = False) -> str | None:
        """Return the form in which it takes verdicts of a judge: "prefs", "rewards" or "win_rates"; else None.

        Args:
            alone: whether the form must be one number per response, not one per pair.

        Example:
            >>> from windkern.losses import LOSSES
            >>> LOSSES["wind"].target(), LOSSES["wind"].target(alone=True), LOSSES["dpo"].target()
            ('prefs', 'win_rates', None)
        """
        forms = ("rewards", "win_rates") if alone else ("prefs", "rewards", "win_rates")
        return next((form for form in forms if form in self.names), None)

    @property
    def replayable(self) -> bool:
        """Whether responses of earlier iterations can be fitted in new groups, with their old constants."""
        return self.any_policy and self.across is None and self.target(alone=True) is not None

    @property
    def keywords(self) -> tuple[str, ...]:
        """Names of the arguments that are settings: all except tensors and `reduction`."""
        tensors = {*self.names, "where", "reduction"}
        return tuple(name for name in inspect.signature(self.function).parameters if name not in tensors)

    @property
    def required(self) -> dict[str, object]:
        """The settings without a default in the signature, with the values of `settings`."""
        known = inspect.signature(self.function).parameters
        return {name: self.settings[name] for name in self.keywords if known[name].default is inspect.Parameter.empty}

    def arguments(self, given: Arguments | None = None) -> dict[str, object]:
        """Return all settings: those given, else those of `required`, else the defaults of the signature.

        A separable loss is tried on a small group, so that a value it refuses raises here.

        Raises:
            ValueError, TypeError: a name is not a setting, or the loss refuses a value.

        Example:
            >>> from windkern.losses import LOSSES
            >>> LOSSES["inpo"].arguments({"tau": 0.1})
            {'eta': 0.25, 'tau': 0.1}
        """
        if unknown := sorted(set(given or ()) - set(self.keywords)):
            raise ValueError(
                f"loss={self.name!r} has no argument {', '.join(unknown)}; it has {', '.join(self.keywords)}"
            )
        known = inspect.signature(self.function).parameters
        defaults = {name: known[name].default for name in self.keywords}
        found = {**defaults, **self.required, **(given or {})}
        if self.separable:
            self._try(found)
        return found

    def _try(self, arguments: Arguments) -> None:
        width = self.shape[1] if isinstance(self.shape[1], int) else 2
        given: dict[str, Tensor] = {}
        for entry in self.inputs[1:]:
            name = entry.split("|")[0].strip(" ?")
            if name == "prefs":
                given[name] = torch.full((1, width, width), 0.5)
            elif name == "lengths":
                given[name] = torch.ones(1, width, dtype=torch.int64)
            elif name == "rewards" or not entry.endswith("?"):
                given[name] = torch.zeros(1, width)
        self.function(torch.full((1, width), -1.0), **given, **arguments)
