"""`windkern bandit`: WIND, iterative BOND, J-BOND and SPPO on the same contextual bandits, exact and sampled."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from windkern._checks import check_choice, check_count, check_number
from windkern.commands import bandit_picture as picture
from windkern.display import Display, clock
from windkern.losses import OBJECTIVES
from windkern.tabular.games import LINKS, Game
from windkern.tabular.sampled import fit
from windkern.tabular.solvers import Solution, measure, solve

METRICS = ("reward", "win_vs_ref", "kl", "exploitability", "kl_ref")
RIVALS = ("iterative_bond", "jbond", "sppo")
POINTS = 160  # of a curve that are kept; J-BOND takes many small steps
TARGET = 0.1  # of the exploitability of ref: how many responses a method needs to get there


@dataclass(frozen=True)
class BanditSettings:
    """The experiment; defaults are chosen for two cores and two minutes."""

    seeds: int = 5
    contexts: int = 10
    responses: int = 100
    link: str = "bradley_terry"
    beta: float = 0.1
    eta: float = 0.4  # 4 beta: the largest step with a guarantee for any preferences
    exact_iterations: int = 1000
    iterations: int = 120
    groups: int = 32  # of an iteration, in each context
    group_size: int = 4
    jbond_groups: int = 8  # small batches and many steps suit it best
    jbond_learning_rate: float = 4.0  # the best of 1 and 4, with anchor rates 0.02 and 0.1

    def __post_init__(self) -> None:
        pairs = ("seeds", "responses", "group_size")
        for name in (*pairs, "contexts", "exact_iterations", "iterations", "groups", "jbond_groups"):
            least = 2 if name in pairs else 1
            object.__setattr__(self, name, check_count(name, getattr(self, name), least=least))
        check_choice("link", self.link, LINKS)
        for name in ("beta", "eta", "jbond_learning_rate"):
            check_number(name, getattr(self, name), above=0)

    @property
    def samples(self) -> int:
        """Responses drawn in an iteration, in each context."""
        return self.groups * self.group_size

    @property
    def bond_beta(self) -> float:
        """Pull of iterative BOND: 2 beta makes its game nearest to WIND's; certain verdicts need more than 1."""
        return 2 * self.beta if self.link == "bradley_terry" else max(2 * self.beta, 1.25)

    @property
    def mixing(self) -> dict[str, float]:
        """Iterative BOND's weights: the pull of a WIND step, so that to first order both take the same step."""
        alpha2 = self.eta * self.beta / (1 + self.eta * self.beta)
        return {"alpha1": alpha2 / self.bond_beta, "alpha2": alpha2}

    def game(self, seed: int) -> Game:
        """Standard normal rewards and reference logits."""
        generator = np.random.default_rng(seed)
        rewards = generator.standard_normal((self.contexts, self.responses))
        logits = torch.from_numpy(generator.standard_normal((self.contexts, self.responses)))
        return Game(logits.softmax(-1), self.beta, rewards=rewards, link=self.link)


Run = Callable[[Game, int], Solution]  # (game, seed) -> solution


def exact_runs(settings: BanditSettings) -> dict[str, Run]:
    """The methods with exact expectations."""
    options = {
        "wind": {"eta": settings.eta},
        "iterative_bond": settings.mixing,
        "jbond": {},
        "sppo": {"eta": settings.eta},
    }

    def runner(method: str, own: Mapping[str, float]) -> Run:
        return lambda game, seed: solve(game, method, iterations=settings.exact_iterations, tol=0, **own)

    return {method: runner(method, own) for method, own in options.items()}


def sampled_runs(settings: BanditSettings) -> dict[str, Run]:
    """The methods from samples: the same number of responses in all."""
    usual = {
        "groups": settings.groups,
        "responses": settings.group_size,
        "iterations": settings.iterations,
        "eta": settings.eta,
    }
    jbond = {
        "groups": settings.jbond_groups,
        "responses": 3,
        "iterations": max(1, settings.samples * settings.iterations // (3 * settings.jbond_groups)),
        "learning_rate": settings.jbond_learning_rate,
    }
    options = dict.fromkeys(OBJECTIVES, usual)
    options |= {"iterative_bond": usual | settings.mixing, "jbond": jbond, "sppo": usual}

    def runner(objective: str, own: Mapping[str, float]) -> Run:
        return lambda game, seed: fit(game, objective, seed=seed, **own)

    return {objective: runner(objective, own) for objective, own in options.items()}


def summary(solutions: list[Solution]) -> dict[str, object]:
    """Mean and standard error over the seeds of every metric, at up to POINTS iterations."""
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
    """Mean and standard error of the mean over the rows."""
    stacked = np.stack(rows)
    return stacked.mean(0), stacked.std(0, ddof=1) / math.sqrt(len(rows))


def responses_to_target(curve: dict[str, object], start: float) -> float | None:
    """Responses drawn in a context until the mean exploitability is first below TARGET times that of ref."""
    below = np.array(curve["exploitability"]["mean"]) < TARGET * start
    return curve["samples"][int(below.argmax())] if below.any() else None


def experiment(
    settings: BanditSettings, begin: Callable[[int, str], None] = lambda game, name: None
) -> dict[str, object]:
    """Every method on every game; `begin` is told the game, from 1, and the name of each run before it starts."""
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
    result: dict[str, object] = {
        part: {name: summary(solutions) for name, solutions in methods.items()} for part, methods in found.items()
    }
    result["equilibrium"] = {
        metric: dict(zip(("mean", "se"), map(float, mean_and_error(rows)), strict=True))
        for metric, rows in equilibria.items()
    }
    for curve in result["sampled"].values():
        curve["responses_to_target"] = responses_to_target(curve, curve["exploitability"]["mean"][0])
    return result


def final_table(result: dict[str, object]) -> Table:
    """One row a method: where it ended, what it took."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
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

    def cell(curve: dict[str, object], metric: str, digits: int) -> str:
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


def settings_from(arguments: argparse.Namespace) -> BanditSettings:
    """The defaults with what the command line changes."""
    names = [field.name for field in dataclasses.fields(BanditSettings)]
    given = {name: getattr(arguments, name, None) for name in names}
    return BanditSettings(**{name: value for name, value in given.items() if value is not None})


def run(arguments: argparse.Namespace, display: Display | None = None) -> int:
    """Run the experiment, write picture and JSON, print the table; returns 0."""
    settings = settings_from(arguments)
    output: Path = arguments.output_dir
    output.mkdir(parents=True, exist_ok=True)
    runs = [f"exact {name}" for name in exact_runs(settings)] + [f"sampled {name}" for name in sampled_runs(settings)]
    began = time.perf_counter()
    with display or Display() as display:
        display.plan("game", settings.seeds, each={(name, ""): 1.0 for name in runs})
        display.print(
            f"{settings.seeds} games of {settings.contexts} contexts x {settings.responses} responses, link "
            f"{settings.link}, beta {settings.beta:g}, eta {settings.eta:g}; sampled: {settings.iterations} iterations "
            f"of {settings.groups} groups of {settings.group_size} in each context",
        )
        result = experiment(settings, display.phase)
    seconds = time.perf_counter() - began
    numbers, drawing = output / "bandit.json", output / "bandit.png"
    content = {"kind": "bandit", "settings": dataclasses.asdict(settings), "seconds": seconds, **result}
    numbers.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    picture.draw(drawing, content)
    display.print(rich=final_table(result))
    display.print("means ± standard errors over the games, at the last iteration; seconds a game")
    display.print(f"* drawn in each context until the exploitability is first below {TARGET:g} of the reference's")
    where = f"picture {os.path.relpath(drawing)}, numbers {os.path.relpath(numbers)}"
    display.print(f"{clock(display.elapsed)} in all; {where}")
    return 0
