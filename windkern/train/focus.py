"""Choose the prompts of an iteration: all in turn, or those furthest from their equilibrium."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from windkern._checks import check_choice, check_count, check_number
from windkern.losses._groups import (
    check_frozen_logps,
    check_logps,
    choose_target,
    fill,
    group_variance,
    kept_responses,
    residual,
)
from windkern.train.seeds import stream

MODES = ("uniform", "hardest")


def exploitability(
    logps: Tensor, ref_logps: Tensor, win_rates: Tensor, beta: float, *, where: Tensor | None = None
) -> Tensor:
    """Estimate how much the best response to the policy gains at each prompt, from a group of its own samples.

    Formula: (beta/2) Var_i(X_i) with X_i = l_i - r_i - w_i / beta, the variance over the group (sum / N).

    Reason: up to its log Z, X is log(pi / BR), so the exploitability beta KL(pi || BR) is beta E_pi[X]; and from
    E_pi[exp(-X)] = 1 follows E_pi[X] = Var(X)/2 up to the third cumulant. The variance drops log Z, which is unknown.

    Over all responses it is exact where X is normally distributed, right to second order near the equilibrium, and 0
    there and only there. A group of N sees (N-1)/N of the variance, and its win rates have noise of their own.

    Args:
        logps: (B, N) float32 or float64, log-probs under the policy that sampled the responses, nats, summed over
            tokens.
        ref_logps: (B, N), dtype of `logps`, under the frozen reference.
        win_rates: (B, N) in [0, 1], of each response against the policy: mean over the group, itself counted 1/2.
        beta: weight of the KL to the reference in the game, positive.
        where: (B, N) bool, responses that take part, None for all. A group with fewer than two left gets 0.

    Returns:
        (B,), dtype of `logps`, in win rates, without a gradient.

    Raises:
        TypeError: an argument is not a tensor, a tensor is not float32 or float64, or `where` is not bool.
        ValueError: a shape or device does not fit, `win_rates` leave [0, 1], or `beta` is not positive.

    Source:
        docs/theory.md, eq. (1.22a).

    Example:
        >>> logps = torch.tensor([[-9.0, -11.0], [-9.0, -11.0]])
        >>> exploitability(logps, logps, torch.tensor([[0.75, 0.25], [0.5, 0.5]]), beta=0.5)
        tensor([0.0625, 0.0000])
    """
    check_logps(logps)
    logps = logps.detach()
    ref_logps = check_frozen_logps("ref_logps", ref_logps, logps)
    check_number("beta", beta, above=0)
    where = kept_responses(where, logps)
    win_rates = choose_target(logps, None, win_rates, "V", where, "exploitability")
    ref_logps = fill(ref_logps, where)
    x = residual(fill(logps, where), ref_logps, ref_logps, b=1.0) - win_rates / beta
    return beta / 2 * group_variance(x, where)


class Chosen(NamedTuple):
    """The prompts of an iteration."""

    places: tuple[int, ...]  # k of them, in the list of training prompts
    uniform: tuple[bool, ...]  # whether each was drawn blindly; only those measure the policy without bias


class PromptFocus:
    """Chooses training prompts, iteration by iteration.

    "uniform" goes through the shuffled prompts and reshuffles them after each pass: iteration i takes positions (i-1)k
    to ik - 1 of that endless list. "hardest" draws ceil(uniform_share * k) prompts in this way and fills up with those
    whose exploitability was largest when last estimated. A prompt that was never estimated counts as infinitely hard,
    so every prompt is explored first. Ties are broken in an order that is reshuffled every iteration.

    No prompt comes twice in an iteration unless k exceeds their number. Where an iteration spans two shuffles, a repeat
    is swapped with a later prompt of the new shuffle.

    Choices depend on the seed, the number of the iteration and the estimates given to `update`. A new object that gets
    the updates of the earlier iterations in order therefore chooses as the old one would have.

    Each prompt has its own equilibrium, which does not depend on how often the prompt is visited; focus decides where
    labels and gradients go. With one model for all prompts it acts as a weight on them, so keep a uniform share: it
    refreshes stale estimates, and its win rates are those of the prompt distribution.

    Args:
        count: number of training prompts.
        mode: "uniform" or "hardest".
        uniform_share: share of an iteration's prompts that are drawn in turn, in [0, 1]; "uniform" ignores it.
        seed: seed of the shuffles.

    Raises:
        TypeError, ValueError: `count`, `mode` or `uniform_share` is out of range.

    Source:
        Escaping Collapse (arXiv 2502.08924): labels spent on what the model still gets wrong.

    Example:
        >>> focus = PromptFocus(4, mode="hardest", uniform_share=0.25, seed=0)
        >>> focus.update([0, 1, 2, 3], [0.1, 0.4, 0.0, 0.2])
        >>> chosen = focus.choose(iteration=2, k=3)  # one drawn blindly, then the two hardest that are left
        >>> chosen
        Chosen(places=(0, 1, 3), uniform=(True, False, False))
    """

    def __init__(self, count: int, *, mode: str, uniform_share: float, seed: int):
        self.count = check_count("count", count, least=1)
        self.mode = check_choice("mode", mode, MODES)
        self.uniform_share = check_number("uniform_share", uniform_share, least=0)
        if uniform_share > 1:
            raise ValueError(f"uniform_share must be at most 1, got {uniform_share!r}")
        self.seed = check_count("seed", seed)
        self._values = [math.inf] * count
        self._visits: Counter[int] = Counter()
        self._shuffles: dict[int, list[list[int]]] = {}  # by k: the order of each pass, as far as needed

    def choose(self, iteration: int, k: int) -> Chosen:
        """Return the prompts of an iteration; those drawn in turn come first.

        Args:
            iteration: counted from 1.
            k: number of prompts, the same in every iteration of a run: positions are counted in multiples of it.

        Raises:
            TypeError, ValueError: `iteration` or `k` is not a whole number of at least 1.
        """
        check_count("iteration", iteration, least=1)
        check_count("k", k, least=1)
        # Hazard: 0.07 * 100 is 7.000000000000001. Remedy: a share is rounded up only if it is off by more than that.
        blind = k if self.mode == "uniform" else math.ceil(self.uniform_share * k - 1e-9)
        places = self._in_turn(iteration, blind)
        if blind < k:
            tied = _shuffled(self.count, self.seed, "focus", iteration)
            ranked = sorted(tied, key=self._values.__getitem__, reverse=True)  # stable: equals stay shuffled
            taken = set(places)
            places += [place for place in ranked if place not in taken]
            while len(places) < k:
                places += ranked
        return Chosen(tuple(places[:k]), (True,) * blind + (False,) * (k - blind))

    def update(self, places: Sequence[int], values: Iterable[float] | Tensor) -> None:
        """Record the exploitability of some prompts. Where a prompt comes twice, its last value counts.

        Args:
            places: places in the list of training prompts.
            values: one finite number for each, e.g. from `exploitability`.

        Raises:
            ValueError: the lengths differ, a place is out of range or a value is not finite; then nothing is recorded.
        """
        places = [int(place) for place in places]
        values = [float(value) for value in values]
        if len(places) != len(values):
            raise ValueError(f"values must hold one number for each place, got {len(values)} for {len(places)}")
        for place, value in zip(places, values, strict=True):
            if not 0 <= place < self.count:
                raise ValueError(f"places must lie in 0 ... {self.count - 1}, got {place}")
            if not math.isfinite(value):
                raise ValueError(f"values must be finite, got {value} for prompt {place}")
        for place, value in zip(places, values, strict=True):
            self._values[place] = value
        self._visits.update(places)

    def entropy(self) -> float:
        """Return the entropy, over the prompts, of the visits that `update` has counted, in nats.

        Its exponential is the effective number of prompts that share the labels: the entropy is log(count) after whole
        passes through all prompts, falls as labels concentrate, and is 0 before the first update.

        Reason: the weights of one iteration say nothing; its k prompts get 1/k each in either mode.
        """
        total = self._visits.total()
        return sum(n / total * math.log(total / n) for n in self._visits.values())

    def _in_turn(self, iteration: int, k: int) -> list[int]:
        """Return positions (iteration-1)k to iteration*k - 1 of the shuffles laid end to end."""
        chosen = []
        for position in range((iteration - 1) * k, iteration * k):
            epoch, place = divmod(position, self.count)
            chosen.append(self._order(epoch, k)[place])
        return chosen

    def _order(self, epoch: int, k: int) -> list[int]:
        orders = self._shuffles.setdefault(k, [])
        while len(orders) <= epoch:
            order = _shuffled(self.count, self.seed, "prompts", len(orders))
            shared = len(orders) * self.count % k  # prompts of this iteration that come from the previous shuffle
            if shared and k <= self.count:
                before, head = set(orders[-1][-shared:]), k - shared
                later = (place for place in range(head, self.count) if order[place] not in before)
                for place in range(head):
                    if order[place] in before:
                        other = next(later)
                        order[place], order[other] = order[other], order[place]
            orders.append(order)
        return orders[epoch]


def _shuffled(count: int, seed: int, *labels: str | int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(stream(seed, *labels))).tolist()
