"""Games over small response sets, whose quantities are computed exactly, without sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from windkern._checks import check_choice, check_count, check_number, check_shape, shape_of

LINKS = ("step", "bradley_terry")
SUM_TOLERANCE = 1e-6  # of probabilities over the responses; a float32 softmax misses 1 by 1e-7
SYMMETRY_TOLERANCE = 1e-6
MAX_STEPS = 200_000  # to the equilibrium, which takes about 35 / beta

Array = Tensor | np.ndarray | Sequence


def as_matrix(name: str, value: Array, shape: Sequence[int | str] = ("X", "Y")) -> Tensor:
    """Return finite numbers as a float64 tensor of the given shape."""
    try:
        tensor = torch.as_tensor(value).detach().to(torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a torch or numpy array of numbers, got {type(value).__name__}") from error
    check_shape(name, tensor, shape)
    if not tensor.isfinite().all():
        raise ValueError(f"{name} must hold finite numbers, got NaN or infinity")
    return tensor


def as_policy(name: str, value: Array, shape: Sequence[int | str] = ("X", "Y"), *, positive: bool = False) -> Tensor:
    """Return probabilities of the responses (X, Y), whose rows sum to one, normalised to the last digit."""
    policy = as_matrix(name, value, shape)
    if policy.numel() == 0:
        raise ValueError(f"{name} must have at least one context and one response, got shape {shape_of(policy)}")
    if policy.min() < 0:
        raise ValueError(f"{name} must hold probabilities, got {policy.min().item():.6g}")
    total = policy.sum(-1, keepdim=True)
    if (total - 1).abs().max() > SUM_TOLERANCE:
        worst = total[(total - 1).abs().argmax(0)].item()
        raise ValueError(f"{name} must sum to 1 over the responses of every context, got a sum of {worst:.6g}")
    if positive and policy.min() == 0:
        raise ValueError(f"{name} must be positive everywhere: leave out responses with probability 0")
    return policy / total


def normalised(scores: Tensor) -> Tensor:
    """Return the log-probs of the policy with these scores (unnormalised log-probs)."""
    return scores.log_softmax(-1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p || q) of each context from log-probs (X, Y) -> (X,).

    Hazard: where p is 0, its log is -inf, and 0 * -inf is NaN. Remedy: select before the product.
    """
    gap = torch.where(p > -torch.inf, p - q, 0.0)
    return (p.exp() * gap).sum(-1).clamp(min=0)


def best_of_n_logs(logs: Tensor, rewards: Tensor, n: int) -> Tensor:
    """Return the log of the best-of-n distribution of a policy given by log-probs, eq. (1.6).

    log[(F<=^n - F<^n)/(F<= - F<)] + log pi, with F<=(y) = chance of a reward up to that of y, F< of a smaller one.
    All terms stay in logs, because F^n underflows long before its log does.
    """
    order = rewards.argsort(-1)
    ranked, sorted_logs = rewards.gather(-1, order), logs.gather(-1, order)
    up_to = sorted_logs.logcumsumexp(-1)
    up_to = up_to - up_to[:, -1:]  # exactly 1 at the top
    last = torch.searchsorted(ranked, ranked, right=True) - 1  # of the responses tied with each
    first = torch.searchsorted(ranked, ranked)
    at_most = up_to.gather(-1, last)
    padded = torch.nn.functional.pad(up_to, (1, 0), value=-torch.inf)  # padded[k] = log chance of the k lowest
    below = padded.gather(-1, first)
    # log(F<=^n - F<^n) = n log F<= + log(1 - (F< / F<=)^n), and likewise with n = 1 for the denominator.
    # Hazard: a response with a chance below 1e-16 leaves F< = F<=, and 0/0. Remedy: take the limit, which is n.
    ratio = below - at_most
    spread = torch.log(torch.expm1(n * ratio) / torch.expm1(ratio))
    spread = torch.where(ratio < 0, spread, math.log(n))
    law = sorted_logs + (n - 1) * at_most + spread
    return normalised(torch.empty_like(law).scatter_(-1, order, law))


def best_of_n(ref: Array, rewards: Array, n: int) -> Tensor:
    """Return the distribution of the best of n independent draws from `ref`, with ties broken evenly.

    Formula: ref(y) (F<=(y)^n - F<(y)^n)/(F<=(y) - F<(y)), F<=(y) being the chance under `ref` of a reward of at most
    r(y), F<(y) of a smaller one.

    Args:
        ref: (X, Y) positive probabilities; each row sums to one.
        rewards: (X, Y), any finite numbers.
        n: number of draws, at least 1.

    Returns:
        (X, Y) float64 probabilities.

    Raises:
        TypeError: an argument is not an array of numbers, or `n` is not an integer.
        ValueError: `ref` does not hold positive probabilities, `rewards` has another shape or infinities, or `n` < 1.

    Source:
        docs/theory.md, eq. (1.6).

    Example:
        >>> best_of_n([[0.5, 0.25, 0.25]], [[0.0, 1.0, 1.0]], 2)
        tensor([[0.2500, 0.3750, 0.3750]], dtype=torch.float64)
    """
    ref = as_policy("ref", ref, positive=True)
    rewards = as_matrix("rewards", rewards, shape_of(ref))
    return best_of_n_logs(ref.log(), rewards, check_count("n", n, least=1)).exp()


class Game:
    """The win-rate game of WIND on X contexts with Y responses each, solved exactly.

    Formula: P_x(y > y') comes from `prefs`, or from `rewards` by `link`: "step" is 1, 1/2 for a tie, 0; "bradley_terry"
    is sigma(r(y) - r(y')). The solution is pi* = argmax_pi P(pi > pi*) - beta KL(pi || ref). Contexts are separate
    games; preferences may be cyclic.

    Args:
        ref: (X, Y) positive probabilities of the reference; each row sums to one.
        beta: weight of the KL to the reference, not negative. With 0 the solution may not be unique, so methods that
            need it raise.
        rewards: (X, Y). Either this or `prefs`.
        prefs: (X, Y, Y) in [0, 1], prefs[x, i, j] the chance that i beats j, `prefs + prefs.mT = 1`.
        link: from rewards to preferences; without effect on `prefs`.

    All tensors are float64, on the device of `ref`. The arrays can be torch or numpy.

    Raises:
        TypeError: an argument is not an array of numbers.
        ValueError: both or neither of `rewards` and `prefs` are given; a shape is wrong; `ref` does not hold positive
            probabilities that sum to one; `prefs` are outside [0, 1] or asymmetric by more than 1e-6; `beta` < 0; or
            `link` is unknown.

    Memory:
        The X * Y * Y preferences.

    Source:
        docs/theory.md, eq. (1.1) to (1.22).

    Example:
        >>> game = Game([[0.5, 0.5]], beta=0.5, rewards=[[1.0, 0.0]], link="step")
        >>> game.equilibrium()
        tensor([[0.7311, 0.2689]], dtype=torch.float64)
        >>> game.exploitability([[0.5, 0.5]])
        tensor([0.0601], dtype=torch.float64)
    """

    def __init__(
        self,
        ref: Array,
        beta: float,
        rewards: Array | None = None,
        prefs: Array | None = None,
        link: str = "bradley_terry",
    ):
        self.ref = as_policy("ref", ref, positive=True)
        self.beta = float(check_number("beta", beta, least=0))
        self.link = check_choice("link", link, LINKS)
        if (rewards is None) == (prefs is None):
            raise ValueError(f"give exactly one of rewards and prefs, got {'neither' if prefs is None else 'both'}")
        contexts, responses = self.ref.shape
        self.rewards: Tensor | None = None
        if prefs is not None:
            self.prefs = as_matrix("prefs", prefs, (contexts, responses, responses)).to(self.ref.device)
            _check_prefs(self.prefs)
        elif rewards is not None:
            self.rewards = as_matrix("rewards", rewards, (contexts, responses)).to(self.ref.device)
            gaps = self.rewards[:, :, None] - self.rewards[:, None, :]
            self.prefs = (gaps.sign() + 1) / 2 if link == "step" else gaps.sigmoid()
        self.log_ref = self.ref.log()
        self.wins_of_ref = self._wins(self.ref)  # P(y > ref), (X, Y)
        self._equilibrium: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(contexts, responses)."""
        return self.ref.shape[0], self.ref.shape[1]

    @property
    def certain(self) -> bool:
        """Whether some response never beats another, so that the log of a win rate has no lower bound."""
        return bool((self.prefs == 0).any())

    @property
    def defeats(self) -> Tensor:
        """Chance (X, Y, Y) that the second beats the first; if all verdicts are certain, a tie does not count."""
        verdicts_are_certain = (2 * self.prefs == (2 * self.prefs).round()).all()
        return (self.prefs == 0).to(self.prefs.dtype) if verdicts_are_certain else 1 - self.prefs

    def policy(self, policy: Array) -> Tensor:
        """Check a policy (X, Y) and return it as float64 probabilities."""
        return as_policy("policy", policy, self.shape).to(self.ref.device)

    def win_rate(self, policy: Array) -> Tensor:
        """Return P(y > policy) of every response, (X, Y), eq. (1.4)."""
        return self._wins(self.policy(policy))

    def best_response(self, policy: Array) -> Tensor:
        """Return argmax_mu P(mu > policy) - beta KL(mu || ref), (X, Y), eq. (1.19); for beta = 0, `ref` on the best."""
        return self._best_response_logs(self._wins(self.policy(policy))).exp()

    def exploitability(self, policy: Array) -> Tensor:
        """Return the gain (X,) of the best response over the policy, zero only at the equilibrium, eq. (1.20)."""
        policy = self.policy(policy)
        return self._exploitability(policy.log(), self._wins(policy))

    def equilibrium(self) -> Tensor:
        """Return the solution pi* (X, Y), eq. (1.18), by extragradient steps (PU) until convergence; cached.

        Raises:
            ValueError: beta is 0, where the solution may not be unique.
            RuntimeError: it takes more than 200000 steps (beta below about 2e-4).
        """
        return self._equilibrium_logs().exp()

    def _equilibrium_logs(self) -> Tensor:
        if self._equilibrium is None:
            self._equilibrium = self._solve()
        return self._equilibrium

    def _wins(self, policy: Tensor) -> Tensor:
        return (self.prefs @ policy.unsqueeze(-1)).squeeze(-1)  # (X, Y)

    def _best_response_logs(self, wins: Tensor) -> Tensor:
        if self.beta > 0:
            return normalised(self.log_ref + wins / self.beta)
        best = wins >= wins.max(-1, keepdim=True).values
        return normalised(torch.where(best, self.log_ref, -torch.inf))

    def _exploitability(self, logs: Tensor, wins: Tensor) -> Tensor:
        if self.beta > 0:
            return self.beta * kl(logs, self._best_response_logs(wins))
        return wins.max(-1).values - 0.5

    def _solve(self) -> Tensor:
        if self.beta == 0:
            raise ValueError("beta must be greater than 0 for an equilibrium, which may not be unique without the KL")
        # Scores are relative to ref, which keeps their size at 1 / beta. The step is PU's largest, (1.49).
        step = 1 / (1 + self.beta)
        keep = 1 - step * self.beta
        tilt = torch.zeros_like(self.log_ref)
        for _ in range(MAX_STEPS):
            middle = keep * tilt + step * (self._wins((self.log_ref + tilt).softmax(-1)) - 0.5)
            moved = keep * tilt + step * (self._wins((self.log_ref + middle).softmax(-1)) - 0.5)
            change = (moved - tilt).abs().max()
            tilt = moved
            if change <= 4 * torch.finfo(tilt.dtype).eps * max(1.0, float(tilt.abs().max())):
                return normalised(self.log_ref + tilt)
        raise RuntimeError(f"no equilibrium after {MAX_STEPS} steps at beta={self.beta:g}; take a larger beta")


def _check_prefs(prefs: Tensor) -> None:
    if prefs.min() < 0 or prefs.max() > 1:
        raise ValueError("prefs must lie in [0, 1] (pass probabilities, not scores)")
    miss = (prefs + prefs.mT - 1).abs().max().item()
    if miss > SYMMETRY_TOLERANCE:
        raise ValueError(
            f"prefs[x, i, j] + prefs[x, j, i] must be 1 (1/2 on the diagonal), off by up to {miss:.3g}; "
            "(prefs + 1 - prefs.mT) / 2 makes them symmetric"
        )
