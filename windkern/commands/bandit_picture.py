"""Draw the picture of `windkern bandit` from its numbers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from windkern._figures import picture

# One colour for each method, in every panel; `square` is the WIND of the method panels.
COLOURS = {
    "wind": "#0b3d91",
    "square": "#0b3d91",
    "iterative_bond": "#d9480f",
    "jbond": "#2e8b57",
    "sppo": "#b0307a",
    "square_pair": "#4aa3df",
    "square_point": "#5b2a9d",
    "kl": "#8c6d1f",
    "nce": "#111111",
    "nce_ratio": "#3aa6a0",
}
LABELS = {
    "wind": "WIND",
    "square": "WIND, square",
    "square_pair": "WIND, square_pair",
    "square_point": "WIND, square_point",
    "kl": "WIND, kl",
    "nce": "WIND, nce",
    "nce_ratio": "WIND, nce_ratio",
    "iterative_bond": "iterative BOND",
    "jbond": "J-BOND",
    "sppo": "SPPO",
}
METHODS = ("wind", "iterative_bond", "jbond", "sppo")
SAMPLED = ("square", "iterative_bond", "jbond", "sppo")
TITLES = {
    "reward": "reward",
    "win_vs_ref": "win rate against the reference",
    "kl": "KL(equilibrium || policy), nats",
    "exploitability": "exploitability",
}
FLOOR = {"kl": 1e-6, "exploitability": 1e-7}  # of the logarithmic axes
LOGARITHMIC = tuple(FLOOR)


def draw(path: Path, content: dict) -> None:
    """Draw exact methods, sampled methods on equal draws, and WIND's objectives, costs and trade-off in three rows."""
    from matplotlib import rc_context

    sizes: Any = {"font.size": 9, "axes.titlesize": 9.5, "axes.labelsize": 9, "legend.fontsize": 8.5}
    with rc_context(sizes), picture(path, dpi=130, nrows=3, ncols=4, figsize=(14, 9.4)) as (figure, axes):
        for axis, metric in zip(axes[0], TITLES, strict=True):
            _curves(axis, content, "exact", METHODS, metric, "iterations")
            axis.set_xscale("log")
            axis.set_xlabel("iteration (J-BOND: gradient step)")
        for axis, metric in zip(axes[1], TITLES, strict=True):
            _curves(axis, content, "sampled", SAMPLED, metric, "samples")
            axis.set_xlabel("thousand responses drawn in a context")
        objectives = [name for name in content["sampled"] if name not in ("iterative_bond", "jbond", "sppo")]
        _curves(axes[2][0], content, "sampled", objectives, "kl", "samples")
        axes[2][0].set_xlabel("thousand responses drawn in a context")
        axes[2][0].set_title("WIND's objectives: KL(equilibrium || policy)")
        axes[2][0].legend(loc="upper right", frameon=False, fontsize=8, handlelength=1.5, labelspacing=0.3)
        _curves(axes[2][1], content, "sampled", SAMPLED, "kl", "iterations")
        axes[2][1].set_xscale("log")
        axes[2][1].set_xlabel("iteration (J-BOND: gradient step)")
        axes[2][1].set_title("sampled: KL(equilibrium || policy)")
        _trade_off(axes[2][2], content)
        _seconds(axes[2][3], content)
        for row, text in zip(axes[:2], ("exact expectations", "from samples, equal draws"), strict=True):
            row[0].set_ylabel(text, fontsize=11, fontweight="bold")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=10.5)
        figure.supxlabel(_caption(content["settings"]), fontsize=8, color="0.35")


def _caption(settings: dict) -> str:
    verdicts = "Bradley-Terry verdicts" if settings["link"] == "bradley_terry" else "certain verdicts"
    drawn = settings["groups"] * settings["group_size"]
    return (
        f"{settings['seeds']} games of {settings['contexts']} contexts x {settings['responses']} responses, "
        f"{verdicts}, "
        f"beta {settings['beta']:g}, eta {settings['eta']:g}, {drawn} responses per iteration and context; "
        "lines are means over the games, bands standard errors; the equilibrium is that of the game WIND plays"
    )


def _curves(axis: Any, content: dict, part: str, names: Any, metric: str, against: str) -> None:
    """Draw one line per method, with its standard error, over `against`."""
    logarithmic = metric in LOGARITHMIC
    for name in names:
        curve = content[part][name]
        x = np.array(curve[against]) / (1000 if against == "samples" else 1)
        mean, error = np.array(curve[metric]["mean"]), np.array(curve[metric]["se"])
        low, high = mean - error, mean + error
        if logarithmic:
            low = np.maximum(low, mean / 10)
        axis.plot(x, mean, color=COLOURS[name], linewidth=1.6, label=LABELS[name])
        axis.fill_between(x, low, high, color=COLOURS[name], alpha=0.2, linewidth=0)
    if logarithmic:
        axis.set_yscale("log")
        axis.set_ylim(bottom=FLOOR[metric] if part == "exact" else None)
    else:
        level = content["equilibrium"][metric]["mean"]
        axis.axhline(level, color="0.45", linewidth=1, linestyle="--")
        axis.annotate(
            "equilibrium",
            (0.02, level),
            xycoords=("axes fraction", "data"),
            xytext=(0, 2),
            textcoords="offset points",
            ha="left",
            va="bottom",
            fontsize=7.5,
            color="0.4",
        )
    axis.grid(color="0.92", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.set_title(TITLES[metric])


def _trade_off(axis: Any, content: dict) -> None:
    """Draw reward against distance from the reference: up and to the left is better."""
    exact = content["exact"]["wind"]
    axis.plot(exact["kl_ref"]["mean"], exact["reward"]["mean"], color="0.6", linewidth=1, linestyle="--")
    for name in SAMPLED:
        curve = content["sampled"][name]
        axis.plot(curve["kl_ref"]["mean"], curve["reward"]["mean"], color=COLOURS[name], linewidth=1.6)
        axis.plot(
            curve["kl_ref"]["mean"][-1], curve["reward"]["mean"][-1], color=COLOURS[name], marker="o", markersize=5
        )
    centre = content["equilibrium"]
    axis.plot(centre["kl_ref"]["mean"], centre["reward"]["mean"], color="0.2", marker="*", markersize=12, linestyle="")
    axis.set_xlabel("KL(policy || reference), nats")
    axis.set_title("sampled: reward against distance")
    axis.annotate(
        "star: equilibrium\ndashes: exact WIND", (0.97, 0.05), xycoords="axes fraction", ha="right", fontsize=8
    )
    axis.grid(color="0.92", linewidth=0.7)
    axis.set_axisbelow(True)


def _seconds(axis: Any, content: dict) -> None:
    """Draw the wall-clock of the sampled runs, without that of the metrics."""
    names = list(content["sampled"])
    places = -np.arange(len(names))
    seconds = [content["sampled"][name]["seconds"] for name in names]
    axis.barh(
        places,
        [value["mean"] for value in seconds],
        xerr=[value["se"] for value in seconds],
        color=[COLOURS[name] for name in names],
        height=0.65,
        error_kw={"ecolor": "0.3", "elinewidth": 1},
    )
    for place, name, value in zip(places, names, seconds, strict=True):
        axis.annotate(
            LABELS[name],
            (value["mean"] + value["se"], place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axis.set_yticks([])
    axis.set_xlim(right=1.5 * max(value["mean"] + value["se"] for value in seconds))
    axis.set_xlabel("seconds")
    axis.set_title("wall-clock of a sampled run")
    axis.grid(axis="x", color="0.92", linewidth=0.7)
    axis.set_axisbelow(True)
