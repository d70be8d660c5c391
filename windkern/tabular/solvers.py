"""Exact solvers of games, each a generator of policies, in the table `METHODS`."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from windkern._checks import check_choice, check_count, check_number
from windkern.losses._groups import step_coefficients
from windkern.tabular.games import Array, Game, as_policy, best_of_n_logs, kl, normalised

# Hazard: repeated best-of-n squares the chance of the worst response, so its log overflows after a thousand rounds.
# Remedy: a floor far below the smallest probability float64 can hold (log 5e-324 is -745).
LOG_FLOOR = -1e6


@dataclass(frozen=True)
class Solution:
    """A policy, and the trace of the iterations that led to it.

    `trace` maps a metric to its mean over the contexts after 0, 1, 2, ... iterations, as float64 numpy arrays:
    "kl" (KL(pi* || pi_t), absent for beta = 0), "exploitability", "reward" (absent without rewards), "kl_ref"
    (KL(pi_t || ref)), "win_vs_ref" (P(pi_t > ref)) and, from `fit`, "samples" (responses drawn so far in a context).
    `seconds` is the time of the iterations, without the metrics.
    """

    policy: Tensor  # (X, Y)
    trace: dict[str, np.ndarray]  # each (iterations + 1,)
    iterations: int
    converged: bool  # whether the policy stopped moving before the iterations ran out
    seconds: float


def measure(game: Game, logs: Tensor) -> dict[str, float]:
    """Return the metrics of a `Solution` for one policy given by log-probs."""
    policy = logs.exp()
    metrics = {
        "exploitability": game._exploitability(logs, game._wins(policy)),
        "kl_ref": kl(logs, game.log_ref),
        "win_vs_ref": (policy * game.wins_of_ref).sum(-1),
    }
    if game.beta > 0:
        metrics["kl"] = kl(game._equilibrium_logs(), logs)
    if game.rewards is not None:
        metrics["reward"] = (policy * game.rewards).sum(-1)
    return {name: value.mean().item() for name, value in metrics.items()}


def run(game: Game, policies: Iterator[Tensor], start: Tensor, iterations: int, tol: float) -> Solution:
    """Take up to `iterations` policies (log-probs) from the generator and measure each; stop at convergence."""
    logs, records, seconds, converged = start, [measure(game, start)], 0.0, False
    for _ in range(iterations):
        began = time.perf_counter()
        new = next(policies, None)
        seconds += time.perf_counter() - began
        if new is None:
            break
        moved = (new.exp() - logs.exp()).abs().sum(-1).max().item()
        logs = new
        records.append(measure(game, logs))
        if moved <= tol:
            converged = True
            break
    trace = {name: np.array([record[name] for record in records]) for name in sorted(records[0])}
    return Solution(logs.exp(), trace, len(records) - 1, converged, seconds)


# Each solver takes the game, pi_0 as log-probs and its own options, and yields pi_1, pi_2, ... as log-probs.


def _wind(game: Game, logs: Tensor, *, eta: float) -> Iterator[Tensor]:
    a, b, c = step_coefficients(eta, game.beta)
    while True:
        logs = normalised(a * logs + b * game.log_ref + c * game._wins(logs.exp()))
        yield logs


def _pu(game: Game, logs: Tensor, *, eta: float) -> Iterator[Tensor]:
    a, b, c = step_coefficients(eta, game.beta)
    while True:
        middle = normalised(a * logs + b * game.log_ref + c * game._wins(logs.exp()))
        logs = normalised(a * logs + b * game.log_ref + c * game._wins(middle.exp()))
        yield logs


def _omwu(game: Game, logs: Tensor, *, eta: float) -> Iterator[Tensor]:
    a, b, c = step_coefficients(eta, game.beta)
    wins = game._wins(logs.exp())  # of the previous middle point
    while True:
        middle = normalised(a * logs + b * game.log_ref + c * wins)
        wins = game._wins(middle.exp())
        logs = normalised(a * logs + b * game.log_ref + c * wins)
        yield logs


def _sppo(game: Game, logs: Tensor, *, eta: float) -> Iterator[Tensor]:
    check_number("eta", eta, above=0)
    while True:
        logs = normalised(logs + eta * game._wins(logs.exp()))
        yield logs


def _ipo(game: Game, logs: Tensor) -> Iterator[Tensor]:
    if game.beta == 0:
        raise ValueError("beta must be greater than 0 for method='ipo', whose step is exp(win rate / beta)")
    while True:
        logs = game._best_response_logs(game._wins(logs.exp()))
        yield logs


def _best_of_n_or_product(game: Game, logs: Tensor, n: int) -> Tensor:
    """Return best-of-n by reward if the verdicts are certain, else pi W^(n-1), which is exact for n = 2, (1.9)."""
    if game.rewards is not None and game.link == "step":
        return best_of_n_logs(logs, game.rewards, n)
    wins = game._wins(logs.exp()).clamp(min=torch.finfo(logs.dtype).tiny)
    return normalised(logs + (n - 1) * wins.log())


def check_mixing(game: Game, n: int, alpha1: float, alpha2: float) -> None:
    """Raise for options of iterative best-of-n that are out of range, or that lead to a collapse."""
    check_count("n", n, least=2)
    check_number("alpha1", alpha1, above=0)
    check_number("alpha2", alpha2, least=0)
    if alpha1 + alpha2 > 1:
        raise ValueError(f"alpha1 + alpha2 must be at most 1, got {alpha1:g} + {alpha2:g}")
    effective = alpha2 / ((n - 1) * alpha1)
    if game.certain and 0 < effective < 1:
        raise ValueError(
            f"alpha2 / ((n - 1) * alpha1) must be at least 1 (or alpha2 = 0), got {effective:g}: if some response "
            "never wins, log win rates have no lower bound, and the pull to the reference cannot balance them"
        )


def _iterative_bond(
    game: Game, logs: Tensor, *, n: int = 2, alpha1: float = 1.0, alpha2: float = 0.0
) -> Iterator[Tensor]:
    check_mixing(game, n, alpha1, alpha2)
    while True:
        best = _best_of_n_or_product(game, logs, n)
        logs = normalised(alpha1 * best + alpha2 * game.log_ref + (1 - alpha1 - alpha2) * logs).clamp(min=LOG_FLOOR)
        yield logs


def _best_of_n(game: Game, logs: Tensor, *, n: int = 2) -> Iterator[Tensor]:
    check_count("n", n, least=1)
    if game.rewards is None:
        raise ValueError("method='best_of_n' ranks by rewards, but this game has only prefs")
    yield best_of_n_logs(logs, game.rewards, n)


def check_jbond(mix: float, gamma: float, rate: float, learning_rate: float) -> None:
    check_number("mix", mix, least=0)
    check_number("gamma", gamma, least=0)
    check_number("rate", rate, above=0)
    check_number("learning_rate", learning_rate, above=0)
    if mix > 1 or rate > 1:
        raise ValueError(f"mix and rate must be at most 1, got mix={mix:g}, rate={rate:g}")


def _jbond(
    game: Game, logs: Tensor, *, mix: float = 0.5, gamma: float = 0.0, rate: float = 0.02, learning_rate: float = 1.0
) -> Iterator[Tensor]:
    check_jbond(mix, gamma, rate, learning_rate)
    scores, anchor, defeats = logs, logs, game.defeats
    while True:
        now, before = normalised(scores), normalised(anchor)
        policy, old = now.exp(), before.exp()
        lost_to_both = (defeats @ old.unsqueeze(-1)).squeeze(-1).square()
        utility = -math.log(16) * lost_to_both - (now - before)
        forward = policy - 2 * old * game._wins(old)  # -E grad log pi(best of two)
        backward = -policy * (utility - (policy * utility).sum(-1, keepdim=True))
        drift = policy * ((now - before) - kl(now, before)[:, None])  # grad KL(pi || anchor)
        anchor = (1 - rate) * anchor + rate * scores
        scores = scores - learning_rate * ((1 - mix) * forward + mix * backward + gamma * drift)
        yield normalised(scores)


@dataclass(frozen=True)
class Method:
    """A method, with its formula and source."""

    policies: Callable[..., Iterator[Tensor]]
    formula: str
    source: str

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        parameters = inspect.signature(self.policies).parameters
        return {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}


METHODS = {
    "wind": Method(
        _wind, "pi_t^a ref^b exp(c w_t), a = 1/(1 + eta beta), b = 1 - a, c = eta a", "arXiv 2410.20727, (1.24)"
    ),
    "pu": Method(_pu, "as wind with the win rates of a look-ahead step", "predictive update, S. Cen, thesis (2024)"),
    "omwu": Method(
        _omwu,
        "as pu with the win rates of the last look-ahead for the next",
        "optimistic weights, S. Cen, thesis (2024)",
    ),
    "iterative_bond": Method(
        _iterative_bond,
        "BoN_n(pi_t)^alpha1 ref^alpha2 pi_t^(1 - alpha1 - alpha2)",
        "iterated best-of-n distillation, arXiv 2407.14622, (1.12)",
    ),
    "jbond": Method(
        _jbond,
        "expected gradient steps on (1 - mix) KL(BoN_2(anchor) || pi) + mix KL(pi || BoN_2(anchor)), moving anchor",
        "J-BOND, arXiv 2407.14622, (1.51)",
    ),
    "sppo": Method(_sppo, "pi_t exp(eta w_t)", "arXiv 2405.00675, (1.24) with beta = 0"),
    "ipo": Method(_ipo, "ref exp(w_t / beta)", "arXiv 2310.12036 online, (1.24) with eta -> infinity"),
    "best_of_n": Method(_best_of_n, "best of n draws of pi_0, once", "(1.6)"),
}


def _options(name: str, method: Method, given: Mapping[str, object], eta: float) -> dict[str, object]:
    own = method.options
    for option in given:
        if option not in own:
            able = ", ".join(repr(known) for known in own) or "no options"
            raise TypeError(f"method={name!r} takes {able}, got {option!r}")
    return {**given, "eta": eta} if "eta" in own else dict(given)


def solve(
    game: Game,
    method: str = "wind",
    eta: float = 0.4,
    iterations: int = 2000,
    tol: float = 1e-12,
    policy0: Array | None = None,
    **options: float,
) -> Solution:
    """Solve a game, or follow another method on it, with exact expectations.

    Formula, with w_t(y) = P(y > pi_t), each up to normalisation:

    ============== =============================================== =================================================
    method         pi_{t+1}                                        options
    ============== =============================================== =================================================
    wind           pi_t^a ref^b exp(c w_t), a = 1/(1 + eta beta),  eta up to 4 beta converges for any preferences
                   b = 1 - a, c = eta a
    pu             the same with the win rates of a look-ahead     eta up to 1: linear at rate a for any beta
    omwu           the same, look-ahead from the last look-ahead   eta up to min(1/(1 + beta), 1/(2 - beta)), as pu
    sppo           pi_t exp(eta w_t)                               eta; independent of the game's beta
    ipo            ref exp(w_t / beta)                             none: a best response each time
    iterative_bond BoN_n(pi_t)^alpha1 ref^alpha2                   n = 2, alpha1 = 1, alpha2 = 0
                   pi_t^(1 - alpha1 - alpha2)
    jbond          a gradient step on the Jeffreys divergence to   mix = 0.5, gamma = 0, rate = 0.02 (of the anchor),
                   best-of-2 of an anchor that follows             learning_rate = 1 (of the logits)
    best_of_n      best of n of pi_0, one iteration                n = 2
    ============== =============================================== =================================================

    BoN_n is the exact distribution (1.6) for rewards with link "step", else pi_t w_t^(n-1), exact for n = 2.
    `iterative_bond` converges to the equilibrium of the log-win-rate game with beta = alpha2 / ((n - 1) alpha1), which
    is close to that of the win-rate game with half this beta. With 0 < beta < 1 it collapses if some response never
    wins, so that combination raises. `jbond` and `sppo` have no pull to `ref`. In `jbond`, policy and anchor move at
    the same time.

    Args:
        game: the game to solve.
        method: a name from the table, a key of `METHODS`.
        eta: step size, positive; without effect on the methods that do not list it.
        iterations: at most this many.
        tol: stop when no context's policy moves by more than this in one iteration (1-norm).
        policy0: (X, Y) positive start; None for `game.ref`.
        **options: those of the method.

    Returns:
        The `Solution`: policy, trace of the metrics, iterations.

    Raises:
        TypeError: the method does not take an option, or an argument is not an array or an integer.
        ValueError: the method is unknown; an option is out of range; `policy0` does not hold positive probabilities; or
            the method needs rewards or beta > 0, and the game has none.

    Source:
        docs/theory.md, sections 4, 5 and 12.

    Example:
        >>> game = Game([[0.5, 0.3, 0.2]], beta=0.1, prefs=[[[0.5, 1, 0], [0, 0.5, 1], [1, 0, 0.5]]])
        >>> solution = solve(game, eta=0.4)
        >>> bool(abs(solution.policy - game.equilibrium()).max() < 1e-10), solution.converged
        (True, True)
    """
    chosen = METHODS[check_choice("method", method, METHODS)]
    check_count("iterations", iterations, least=0)
    check_number("tol", tol, least=0)
    start = start_logs(game, policy0)
    return run(game, chosen.policies(game, start, **_options(method, chosen, options, eta)), start, iterations, tol)


def start_logs(game: Game, policy0: Array | None) -> Tensor:
    if policy0 is None:
        return game.log_ref
    return as_policy("policy0", policy0, game.shape, positive=True).to(game.ref.device).log()
