"""Fit WIND and its rivals to samples of a game, like a trainer, with a softmax policy over the responses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from windkern._checks import check_choice, check_count, check_number
from windkern.losses import OBJECTIVES, sppo, wind
from windkern.losses._groups import centred, group_mean, residual, step_coefficients, v_win_rates
from windkern.tabular.games import Array, Game, normalised
from windkern.tabular.solvers import LOG_FLOOR, Solution, check_jbond, check_mixing, run, start_logs

VERDICTS = ("hard", "soft")
LOG_ZS = ("free", "exact", "half")
STARTS = ("update", "policy")


class Batch(NamedTuple):
    """The draws of one iteration from pi_t, with contexts and groups flattened: B = X * groups."""

    responses: Tensor  # (X, groups * K) int64
    old_logps: Tensor  # (B, K)
    ref_logps: Tensor  # (B, K)
    prefs: Tensor  # (B, K, K)


@dataclass(frozen=True)
class Settings:
    """The checked arguments of `fit`."""

    eta: float
    log_z: str
    start: str
    steps: int
    groups: int
    responses: int
    verdicts: str
    n: int
    alpha1: float
    alpha2: float
    mix: float
    gamma: float
    rate: float
    learning_rate: float


def draw(game: Game, logs: Tensor, groups: int, responses: int, verdicts: str, generator: torch.Generator) -> Batch:
    """Draw `groups` groups of `responses` responses in every context, and their verdicts."""
    drawn = torch.multinomial(logs.exp(), groups * responses, replacement=True, generator=generator)
    grouped = drawn.view(logs.shape[0], groups, responses)
    context = torch.arange(logs.shape[0], device=logs.device)[:, None, None, None]
    prefs = game.prefs[context, grouped[..., :, None], grouped[..., None, :]].flatten(0, 1)  # (B, K, K)
    if verdicts == "hard":
        # One coin for each pair: the upper triangle decides, the lower mirrors it; a tie stays 1/2.
        coin = torch.rand(prefs.shape, generator=generator, dtype=prefs.dtype, device=prefs.device)
        above = torch.ones(responses, responses, dtype=prefs.dtype, device=prefs.device).triu(1)
        won = torch.where(prefs == 0.5, 0.5, (coin < prefs).to(prefs.dtype)) * above
        prefs = won + (above.mT - won.mT) + 0.5 * torch.eye(responses, dtype=prefs.dtype, device=prefs.device)
    rows = (-1, responses)
    return Batch(drawn, logs.gather(1, drawn).view(rows), game.log_ref.gather(1, drawn).view(rows), prefs)


class Fit(NamedTuple):
    """The start of an objective, and the loss that it minimises."""

    pull: Callable[[Game, Settings], float]  # b: share of ref in the step; pi_t has 1 - b
    loss: Callable[[Game, Settings, Batch, Tensor, Tensor], Tensor]  # ..., log Z (B,), logps (B, K) -> (B,)
    free: bool  # whether the loss uses log Z, so that scores can be fitted before normalisation


def _wind_pull(game: Game, settings: Settings) -> float:
    return step_coefficients(settings.eta, game.beta)[1]


def _wind_fit(objective: str) -> Fit:
    uses_log_z = OBJECTIVES[objective].uses_log_z

    def loss(game: Game, settings: Settings, batch: Batch, log_z: Tensor, logps: Tensor) -> Tensor:
        return wind(
            logps,
            batch.old_logps,
            batch.ref_logps,
            batch.prefs,
            eta=settings.eta,
            beta=game.beta,
            objective=objective,
            log_z=log_z if uses_log_z else None,
            reduction="none",
        )

    return Fit(_wind_pull, loss, uses_log_z)


def _sppo_loss(game: Game, settings: Settings, batch: Batch, log_z: Tensor, logps: Tensor) -> Tensor:
    # The V-statistic counts the comparison with itself, which shrinks a point-wise step by (K - 1)/K: drop it, (1.32).
    size = settings.responses
    rates = (size * v_win_rates(batch.prefs, torch.ones_like(logps, dtype=torch.bool)) - 0.5) / (size - 1)
    return sppo(logps, batch.old_logps, win_rates=rates, eta=settings.eta, reduction="none")


def _bond_loss(game: Game, settings: Settings, batch: Batch, log_z: Tensor, logps: Tensor) -> Tensor:
    # The centred square loss with log w for w. The comparison with itself keeps w >= 1/(2K), as BOND floors quantiles.
    where = torch.ones_like(logps, dtype=torch.bool)
    utility = settings.alpha1 * (settings.n - 1) * v_win_rates(batch.prefs, where).log()
    miss = residual(logps, batch.old_logps, batch.ref_logps, settings.alpha2) - utility
    return group_mean(centred(miss, where).square(), where)


FITS = {
    **{objective: _wind_fit(objective) for objective in OBJECTIVES},
    "sppo": Fit(lambda game, settings: 0.0, _sppo_loss, False),
    "iterative_bond": Fit(lambda game, settings: settings.alpha2, _bond_loss, False),
}


def _log_z(game: Game, logs: Tensor, settings: Settings) -> Tensor:
    """Return log Z (X,): exact (1.34), SPPO's constant c/2, or 0 for scores that include it."""
    a, b, c = step_coefficients(settings.eta, game.beta)
    if settings.log_z == "exact":
        return (a * logs + b * game.log_ref + c * game._wins(logs.exp())).logsumexp(-1)
    return logs.new_full(logs.shape[:1], c / 2 if settings.log_z == "half" else 0.0)


def _regressions(
    game: Game, logs: Tensor, settings: Settings, chosen: Fit, generator: torch.Generator
) -> Iterator[Tensor]:
    """In every iteration, draw from pi_t and fit pi_{t+1}."""
    b, size = chosen.pull(game, settings), settings.responses
    free = chosen.free and settings.log_z == "free"
    while True:
        batch = draw(game, logs, settings.groups, size, settings.verdicts, generator)
        log_z = _log_z(game, logs, settings).repeat_interleave(settings.groups) if chosen.free else logs.new_zeros(0)
        unknown = (1 - b) * logs + b * game.log_ref  # the update if every win rate were 1/2
        start = logs if settings.start == "policy" else unknown
        if free:
            # Free scores have a level: shift those of responses not drawn as the fit shifts the others on average.
            lift = step_coefficients(settings.eta, game.beta)[2] / 2
            start = start + lift + (unknown - start).gather(1, batch.responses).mean(-1, keepdim=True)
        # Hazard: the loss is steep in responses drawn often, flat in others. Remedy: scale by 1/sqrt(count) (Jacobi).
        drawn = torch.zeros_like(logs).scatter_add_(
            1, batch.responses, torch.ones_like(batch.responses, dtype=logs.dtype)
        )
        scale = drawn.clamp(min=1).rsqrt()
        shift = torch.zeros_like(logs, requires_grad=True)
        optimiser = torch.optim.LBFGS(
            [shift], max_iter=settings.steps, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
        )

        def closure(
            start: Tensor = start,
            scale: Tensor = scale,
            shift: Tensor = shift,
            batch: Any = batch,
            log_z: Tensor = log_z,
        ) -> Tensor:
            scores = start + scale * shift
            logps = (scores if free else normalised(scores)).gather(1, batch.responses).view(-1, size)
            loss = chosen.loss(game, settings, batch, log_z, logps).sum() * (size / 2)
            (shift.grad,) = torch.autograd.grad(loss, shift)
            return loss

        optimiser.step(closure)
        logs = normalised(start + scale * shift.detach()).clamp(min=LOG_FLOOR)
        yield logs


def _jbond(game: Game, logs: Tensor, settings: Settings, generator: torch.Generator) -> Iterator[Tensor]:
    """In every iteration, take one stochastic gradient step on fresh draws, one of the policy and two of the anchor."""
    scores, anchor, groups, defeats = logs, logs, settings.groups, game.defeats
    context = torch.arange(logs.shape[0], device=logs.device)[:, None]
    while True:
        now, before = normalised(scores), normalised(anchor)
        own = torch.multinomial(now.exp(), groups, replacement=True, generator=generator)
        pair = torch.multinomial(before.exp(), 2 * groups, replacement=True, generator=generator).view(-1, groups, 2)

        def happens(chances: Tensor, first: Tensor, second: Tensor) -> Tensor:
            chance = chances[context, first, second]
            return torch.rand(chance.shape, generator=generator, dtype=chance.dtype, device=chance.device) < chance

        one, two = pair.unbind(-1)
        best = torch.where(happens(game.prefs, one, two), one, two)
        lost = happens(defeats, own, one) & happens(defeats, own, two)
        ratio = (now - before).gather(1, own)
        utility = -math.log(16) * lost - ratio
        utility = utility - utility.mean(-1, keepdim=True)  # baseline
        # dL/dl of the drawn responses; through the softmax, the gradient of the scores is weight - policy * sum.
        weight = torch.zeros_like(scores)
        weight.scatter_add_(1, best, torch.full_like(ratio, -(1 - settings.mix) / groups))
        weight.scatter_add_(1, own, (settings.gamma * ratio - settings.mix * utility) / groups)
        anchor = (1 - settings.rate) * anchor + settings.rate * scores
        scores = scores - settings.learning_rate * (weight - now.exp() * weight.sum(-1, keepdim=True))
        yield normalised(scores)


def fit(
    game: Game,
    objective: str = "square",
    groups: int = 200,
    responses: int = 4,
    iterations: int = 50,
    eta: float = 0.4,
    seed: int = 0,
    *,
    verdicts: str = "hard",
    log_z: str = "free",
    start: str = "policy",
    steps: int = 10,
    policy0: Array | None = None,
    n: int = 2,
    alpha1: float = 1.0,
    alpha2: float = 0.0,
    mix: float = 0.5,
    gamma: float = 0.0,
    rate: float = 0.02,
    learning_rate: float = 1.0,
) -> Solution:
    """Solve a game from samples, as a trainer runs WIND, with `wk.losses.wind` on a table of log-probs.

    Every iteration draws `groups` groups of `responses` responses from pi_t in each context, judges all pairs of a
    group, and minimises the loss over the softmax policy. A response that was not drawn is not in the loss: its score
    stays at the start of the fit.

    Args:
        game: contexts, reference, beta and preferences. Only draws, verdicts and log-probs are used, unless
            log_z="exact".
        objective: one of `wk.losses.OBJECTIVES`; or a rival on the same draws: "sppo" (`wk.losses.sppo`),
            "iterative_bond" (the centred square loss with log w); or "jbond" (one stochastic gradient step per
            iteration, 3 * `groups` draws; `responses` must be 3).
        groups: groups drawn in each context and iteration.
        responses: K of a group, at least 2.
        iterations: outer iterations.
        eta: step size, positive; without effect on "iterative_bond" and "jbond".
        seed: of the draws.
        verdicts: "hard" (0/1, one draw for each pair) or "soft" (the preference itself).
        log_z: for "square_point" and "nce": "free" fits unnormalised scores, which absorb log Z; "exact" computes it
            from the game; "half" is the constant c/2, biased once pi_t has left `ref`.
        start: of each fit: "policy" is pi_t, as in training; "update" is the step with every win rate at 1/2, which
            pulls responses that were not drawn back to `ref`, although no sample says how bad they are.
        steps: L-BFGS iterations of a fit; 10 come close to the minimum.
        policy0: (X, Y) positive start; None for `game.ref`.
        n, alpha1, alpha2: of "iterative_bond", as in `solve`.
        mix, gamma, rate, learning_rate: of "jbond", as in `solve`.

    Returns:
        The `Solution`; its trace also has "samples", the responses drawn so far in each context.

    Raises:
        TypeError: a count is not an integer, or `policy0` is not an array.
        ValueError: a name is unknown, a number is out of range, `policy0` does not hold positive probabilities, or
            `responses` is not 3 for "jbond".

    Source:
        docs/theory.md, sections 6 to 9 and 12.

    Example:
        >>> game = Game([[0.25, 0.25, 0.25, 0.25]], beta=0.5, rewards=[[0.0, 1.0, 2.0, 3.0]])
        >>> bool((fit(game, iterations=20).policy - game.equilibrium()).abs().max() < 0.05)
        True
    """
    check_choice("objective", objective, [*FITS, "jbond"])
    check_choice("verdicts", verdicts, VERDICTS)
    check_choice("log_z", log_z, LOG_ZS)
    check_choice("start", start, STARTS)
    check_number("eta", eta, above=0)
    for name, value, least in (
        ("groups", groups, 1),
        ("responses", responses, 2),
        ("iterations", iterations, 0),
        ("steps", steps, 1),
        ("seed", seed, 0),
    ):
        check_count(name, value, least=least)
    settings = Settings(
        eta, log_z, start, steps, groups, responses, verdicts, n, alpha1, alpha2, mix, gamma, rate, learning_rate
    )
    first = start_logs(game, policy0)
    generator = torch.Generator(device=first.device).manual_seed(seed)
    if objective == "jbond":
        check_jbond(mix, gamma, rate, learning_rate)
        if responses != 3:
            raise ValueError(
                f"responses must be 3 for objective='jbond' (one draw, two of the anchor), got {responses}"
            )
        policies = _jbond(game, first, settings, generator)
    else:
        if objective == "iterative_bond":
            check_mixing(game, n, alpha1, alpha2)
        policies = _regressions(game, first, settings, FITS[objective], generator)
    solution = run(game, policies, first, iterations, tol=-1.0)
    solution.trace["samples"] = np.arange(solution.iterations + 1) * float(groups * responses)
    return solution
