"""The experiment of `windkern bandit`: every method on the same games, with their means and standard errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from rich.table import Table

from windkern._figures import plain_table
from windkern.commands import bandit_picture as picture
from windkern.commands.bandit_settings import BanditSettings
from windkern.losses import OBJECTIVES
from windkern.tabular.games import Game
from windkern.tabular.sampled import fit
from windkern.tabular.solvers import Solution, measure, solve

METRICS = ("reward", "win_vs_ref", "kl", "exploitability", "kl_ref")
RIVALS = ("iterative_bond", "jbond", "sppo")
POINTS = 160  # of a curve that are kept; J-BOND takes many small steps
TARGET = 0.1  # of the exploitability of ref: how many responses a method needs to get there


Run = Callable[[Game, int], Solution]  # (game, seed) -> solution


def exact_runs(settings: BanditSettings) -> dict[str, Run]:
    """Return the methods with exact expectations."""
    options = {
        "wind": {"eta": settings.eta},
        "iterative_bond": settings.mixing,
        "jbond": {},
        "sppo": {"eta": settings.eta},
    }

    def runner(method: str, own: Mapping[str, Any]) -> Run:
        return lambda game, seed: solve(game, method, iterations=settings.exact_iterations, tol=0, **own)

    return {method: runner(method, own) for method, own in options.items()}


def sampled_runs(settings: BanditSettings) -> dict[str, Run]:
    """Return the methods that sample, each with the same number of responses in total."""
    usual = {
        "groups": settings.groups,
        "responses": settings.group_size,
        "iterations": settings.num_iterations,
        "eta": settings.eta,
    }
    jbond = {
        "groups": settings.jbond_groups,
        "responses": 3,
        "iterations": max(1, settings.samples * settings.num_iterations // (3 * settings.jbond_groups)),
        "learning_rate": settings.jbond_learning_rate,
    }
    options = dict.fromkeys(OBJECTIVES, usual)
    options |= {"iterative_bond": usual | settings.mixing, "jbond": jbond, "sppo": usual}

    def runner(objective: str, own: Mapping[str, Any]) -> Run:
        return lambda game, seed: fit(game, objective, seed=seed, **own)

    return {objective: runner(objective, own) for objective, own in options.items()}


def summary(solutions: list[Solution]) -> dict[str, object]:
    """Return mean and standard error over the seeds of every metric, at up to POINTS iterations."""
    count = min(solution.iterations for solution in solutions)
    # Half of the points even in the logarithm, half even: either axis looks smooth.
    even = np.linspace(0, count, POINTS // 2)
    chosen = np.unique(np.concatenate([even, np.geomspace(1, max(count, 1), POINTS // 2)]).round().astype(int))
    chosen = chosen[chosen <= count]
    result: dict[str, object] = {"iterations": chosen.tolist()}
    if "samples" in solutions[0].trace:
        result["samples"] = solutions[0].trace["samples"][chosen].tolist()
    for metric in METRICS:
        mean, error = mean_and_error([solution.trace[metric][chosen] for solution in solutions])
        result[metric] = {"mean": mean.tolist(), "se": error.tolist()}
    seconds, error = mean_and_error([np.array(solution.seconds) for solution in solutions])
    result["seconds"] = {"mean": float(seconds), "se": float(error)}
    return result


def mean_and_error(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard error of the mean over the rows."""
    stacked = np.stack(rows)
    return stacked.mean(0), stacked.std(0, ddof=1) / math.sqrt(len(rows))


def responses_to_target(curve: dict[str, Any], start: float) -> float | None:
    """Return the responses drawn in a context until the mean exploitability is below TARGET times that of ref."""
    below = np.array(curve["exploitability"]["mean"]) < TARGET * start
    return curve["samples"][int(below.argmax())] if below.any() else None


def experiment(settings: BanditSettings, begin: Callable[[int, str], None] = lambda game, name: None) -> dict[str, Any]:
    """Run every method on every game; `begin` gets the game, from 1, and the name of each run before it starts."""
    exact, sampled = exact_runs(settings), sampled_runs(settings)
    found: dict[str, dict[str, list[Solution]]] = {
        "exact": {name: [] for name in exact},
        "sampled": {name: [] for name in sampled},
    }
    equilibria: dict[str, list[np.ndarray]] = {metric: [] for metric in METRICS}
    for seed in range(settings.seeds):
        game = settings.game(seed)
        for metric, value in measure(game, game.equilibrium().log()).items():
            equilibria[metric].append(np.array(value))
        for part, runs in (("exact", exact), ("sampled", sampled)):
            for name, run in runs.items():
                begin(seed + 1, f"{part} {name}")
                found[part][name].append(run(game, seed))
    result: dict[str, Any] = {
        part: {name: summary(solutions) for name, solutions in methods.items()} for part, methods in found.items()
    }
    result["equilibrium"] = {
        metric: dict(zip(("mean", "se"), map(float, mean_and_error(rows)), strict=True))
        for metric, rows in equilibria.items()
    }
    for curve in result["sampled"].values():
        curve["responses_to_target"] = responses_to_target(curve, curve["exploitability"]["mean"][0])
    return result


def final_table(result: dict[str, Any]) -> Table:
    """Return a table with one row per method: its last metrics and its costs."""
    table = plain_table()
    table.add_column("")
    headers = (
        "reward",
        "win rate vs ref",
        "KL to ref",
        "KL to equilibrium",
        "exploitability",
        "responses *",
        "seconds",
    )
    for header in headers:
        table.add_column(header, justify="right")

    def cell(curve: dict[str, Any], metric: str, digits: int) -> str:
        mean, error = curve[metric]["mean"][-1], curve[metric]["se"][-1]
        return f"{mean:.{digits}f} ± {error:.{digits}f}"

    shown = (("reward", 2), ("win_vs_ref", 3), ("kl_ref", 2), ("kl", 3), ("exploitability", 4))
    centre = result["equilibrium"]
    ends = [f"{centre[metric]['mean']:.{digits}f} ± {centre[metric]['se']:.{digits}f}" for metric, digits in shown[:3]]
    table.add_row("equilibrium", *ends, "0", "0", "", "", style="bold", end_section=True)
    for part in ("exact", "sampled"):
        for position, (name, curve) in enumerate(result[part].items()):
            needed = curve.get("responses_to_target")
            needed = "" if part == "exact" else "never" if needed is None else f"{needed:.0f}"
            table.add_row(
                f"{part}: {picture.LABELS[name]}",
                *(cell(curve, metric, digits) for metric, digits in shown),
                needed,
                f"{curve['seconds']['mean']:.2f}",
                end_section=position == len(result[part]) - 1,
            )
    return table
