"""`windkern train --method value`: load base, value model and demonstrations, train, and measure the gain."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from windkern._figures import picture
from windkern._files import to_json
from windkern.display import Display, clock
from windkern.terminal import printable
from windkern.train.models import describe, load_model
from windkern.train.report import show as report
from windkern.train.report.notices import Notices
from windkern.value.model import ValueModel
from windkern.value.trainer import ValueConfig, ValueTrainer

RESULT = "result.json"


@torch.no_grad()
def nll_per_token(
    score: Callable[[Tensor, Tensor, Tensor], Tensor],
    demonstrations: Sequence,
    collate: Callable[[Sequence], dict[str, Any]],
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[float, int]:
    """Return the negative log-likelihood of the answers per token, in nats, and the number of tokens.

        - sum of score(...) / tokens of the answers, their end tokens included

    Args:
        score: (input_ids, attention_mask, completion_mask) to (S,) log-probs: a `ValueModel` in eval mode, or its
            `base_logps`.
        demonstrations: pairs (prompt, answer), at least one.
        collate: makes batches of them.
        batch_size: demonstrations scored at a time.
        device: device of the models.
        advance: called with the number of demonstrations just scored.

    Raises:
        ValueError: there are no demonstrations.
    """
    if not demonstrations:
        raise ValueError("demonstrations must hold at least one pair (prompt, answer), got none")
    total, tokens = 0.0, 0
    for first in range(0, len(demonstrations), batch_size):
        part = demonstrations[first : first + batch_size]
        batch = collate(part)
        masks = (batch[name].to(device) for name in ("input_ids", "attention_mask", "completion_mask"))
        total -= float(score(*masks).double().sum())
        tokens += int(batch["completion_mask"].sum())
        advance(len(part))
    return total / tokens, tokens


def check_same_tokens(base: Any, value: Any, names: tuple[str, str]) -> None:
    """Raise if two tokenizers give one token different ids, or share less than half of their tokens.

    Args:
        base, value: tokenizers of transformers.
        names: what to call them.

    Raises:
        ValueError: the tokenizers disagree; the message shows a token.
    """
    ours, theirs = base.get_vocab(), value.get_vocab()
    moved = [token for token, place in ours.items() if theirs.get(token, place) != place]
    if moved:
        token = moved[0]
        raise ValueError(
            f"{names[0]} and {names[1]} must have one tokenizer, but {len(moved)} tokens have different ids: "
            f"{token!r} is {ours[token]} and {theirs[token]}"
        )
    shared = len(ours.keys() & theirs.keys())
    if 2 * shared < max(len(ours), len(theirs)):
        raise ValueError(
            f"{names[0]} and {names[1]} must have one tokenizer, but only {shared} of {len(ours)} and {len(theirs)} "
            "tokens are the same"
        )


def _dtypes(config: ValueConfig) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtypes of base and value model: the trained weights stay float32, autocast computes in 16 bits."""
    low = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else torch.float32
    return low, torch.float32


class _Meter:
    """Measures models, all on the same demonstrations."""

    def __init__(self, config: ValueConfig, demonstrations: Sequence, collate: Callable, display: Display):
        self.config, self.demonstrations, self.collate, self.display = config, demonstrations, collate, display
        self.tokens = 0

    def __call__(self, model: ValueModel, what: str, *, base_alone: bool = False) -> float:
        was_training = model.training
        model.eval()
        device = model.device
        low, _ = _dtypes(self.config)
        self.display.phase(0, f"measuring {what}", len(self.demonstrations), "demonstrations")
        try:
            with torch.autocast(device.type, dtype=low, enabled=low != torch.float32):
                nll, self.tokens = nll_per_token(
                    model.base_logps if base_alone else model,
                    self.demonstrations,
                    self.collate,
                    batch_size=self.config.per_device_eval_batch_size,
                    device=device,
                    advance=self.display.advance,
                )
        finally:
            model.train(was_training)
        return nll


class _Steps(TrainerCallback):
    """Shows the steps of transformers.Trainer and what it logs."""

    def __init__(self, display: Display):
        self.display, self._evaluating = display, False

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step:
            self.display.note(f"resumed: {state.global_step} of {state.max_steps} steps are done")
        self._fitting(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.display.advance()

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **given: Any
    ) -> None:
        if not self._evaluating:
            self._evaluating = True
            self.display.phase(0, "evaluating", len(eval_dataloader), "batches")
        self.display.advance()

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._fitting(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any) -> None:
        shown = [f"{name} {logs[name]:.4f}" for name in ("loss", "eval_loss") if name in logs]
        if shown:
            self.display.print(f"{state.global_step}/{state.max_steps}  {'  '.join(shown)}")

    def _fitting(self, state: Any) -> None:
        self._evaluating = False
        self.display.phase(0, "fitting", state.max_steps, "steps", state.global_step)


def _table(rows: Sequence[tuple[str, float]], tokens: int, measured_on: str) -> Table:
    table = Table(title=Text(f"negative log-likelihood per token, {tokens} tokens of {printable(measured_on)}"))
    table.add_column("model")
    table.add_column("nats", justify="right")
    for name, nll in rows:
        table.add_row(Text(printable(name)), f"{nll:.4f}")
    return table


def draw(path: Path, content: dict) -> None:
    """Draw the negative log-likelihoods of a result as bars, into a PNG."""
    nll, transfer = content["nll_per_token"], content["transfer_nll_per_token"]
    bars = [
        ("base alone", nll["base"], "0.7"),
        ("before", nll["before"], "0.7"),
        ("with the value model", nll["after"], "C0"),
    ]
    if transfer is not None:
        bars += [("second base alone", transfer["base"], "0.7"), ("with the value model", transfer["with_value"], "C1")]
    with picture(path, figsize=(7.2, 0.9 + 0.5 * len(bars))) as (_, axes):
        places = range(len(bars), 0, -1)
        shown = axes.barh(places, [value for _, value, _ in bars], color=[color for _, _, color in bars])
        axes.bar_label(shown, fmt="%.3f", padding=3)
        axes.set_yticks(list(places), [name for name, _, _ in bars])
        axes.set_xlabel(f"negative log-likelihood per token, nats ({content['tokens']} tokens)")
        axes.margins(x=0.12)


def _plan(config: ValueConfig, measured: int, trained: int) -> dict[tuple[str, str], float]:
    """Return the phases of a run and their estimated costs in scored demonstrations, as `Forecast` takes them."""
    epochs = config.num_train_epochs
    if config.max_steps > 0:
        each = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
        epochs = config.max_steps * each / trained
    names = ["the base", "the start", "the end"]
    names += ["the second base", "the value model on it"] if config.transfer_base else []
    phases: dict[tuple[str, str], float] = {(f"measuring {name}", "demonstrations"): measured for name in names}
    before, after = list(phases.items())[:2], list(phases.items())[2:]
    return dict([*before, (("fitting", "steps"), 3.0 * trained * epochs), *after])


def _named(config: ValueConfig) -> tuple[str, str, str]:
    """Return the names of base, value model and demonstrations, which must all be set."""
    found = []
    for name in ("base_model", "value_model", "train_demonstrations"):
        value = getattr(config, name)
        if not value:
            raise ValueError(f"{name} must be set, got {value!r}")
        found.append(value)
    return found[0], found[1], found[2]


def run_value(config: ValueConfig, *, resume: bool, display: Display | None = None) -> int:
    """Train a value model as the settings say, save it to `config.output_dir`, and compare it with its base.

    Prints the negative log-likelihood per token of the base alone, with the value model before and after training, and
    of `config.transfer_base` with and without it; writes the same to result.json (kind "value"), and draws nll.png.

    Args:
        config: base_model, value_model and train_demonstrations must be set. With bf16 or fp16 the base is loaded in
            16 bits; the value model is float32 always.
        resume: continue from the newest checkpoint in the output directory.
        display: where to show progress, already entered; None: stdout.

    Returns:
        0.

    Raises:
        ValueError: a field is missing, tokenizers or vocabularies differ, or there is no checkpoint to resume from.
        OSError, MissingPackageError: see `windkern.train.models.load_model`.
    """
    _named(config)
    report.quiet_libraries()
    with display or Display() as shown:
        shown.hush(config.process_index != 0)
        return _run(config, resume, shown)


def _run(config: ValueConfig, resume: bool, display: Display) -> int:
    from windkern.train.data.loading import load_demonstrations

    start = time.perf_counter()
    display.phase(0, "reading the demonstrations")
    base_name, value_name, demonstrations = _named(config)
    train = load_demonstrations(demonstrations)
    measured_on = config.eval_demonstrations or demonstrations
    measured = load_demonstrations(config.eval_demonstrations) if config.eval_demonstrations else train
    base_dtype, value_dtype = _dtypes(config)
    display.phase(0, f"loading the base {base_name}")
    base, tokenizer = load_model(base_name, dtype=base_dtype, device=config.device)
    display.phase(0, f"loading the value model {value_name}")
    value, value_tokenizer = load_model(value_name, dtype=value_dtype, device=config.device)
    check_same_tokens(tokenizer, value_tokenizer, ("base_model", "value_model"))
    model = ValueModel(base, value)
    trainer = ValueTrainer(model, config, train_dataset=train, eval_dataset=measured, processing_class=tokenizer)
    for callback in (PrinterCallback, ProgressCallback):  # the display shows what they would
        trainer.remove_callback(callback)
    trainer.add_callback(_Steps(display))
    trainer.notices = Notices(display)
    display.print((base_name, "bold"), f": {describe(base)}, the frozen base")
    display.print((value_name, "bold"), f": {describe(value)}, the value model, trained")

    display.plan(before=_plan(config, len(measured), len(train)))
    meter = _Meter(config, measured, trainer.data_collator, display)
    nll = {"base": meter(model, "the base", base_alone=True), "before": meter(model, "the start")}
    trainer.train(resume_from_checkpoint=resume or None)
    display.phase(0, "saving the value model")
    trainer.save_model()
    nll["after"] = meter(model, "the end")
    rows = [
        ("base alone", nll["base"]),
        ("with the value model, before training", nll["before"]),
        ("with the value model, after training", nll["after"]),
    ]
    transfer = None
    if config.transfer_base:
        display.phase(0, f"loading the second base {config.transfer_base}")
        other, other_tokenizer = load_model(config.transfer_base, dtype=base_dtype, device=config.device)
        check_same_tokens(tokenizer, other_tokenizer, ("base_model", "transfer_base"))
        moved = ValueModel(other, value, memory_budget=config.memory_budget, backend=config.backend)
        transfer = {
            "base": meter(moved, "the second base", base_alone=True),
            "with_value": meter(moved, "the value model on it"),
        }
        rows += [
            (f"{config.transfer_base} alone", transfer["base"]),
            (f"{config.transfer_base} with the value model", transfer["with_value"]),
        ]
    display.stop()
    display.print(rich=_table(rows, meter.tokens, measured_on))
    if config.should_save:
        content = {
            "kind": "value",
            "base_model": config.base_model,
            "value_model": config.value_model,
            "transfer_base": config.transfer_base,
            "measured_on": measured_on,
            "tokens": meter.tokens,
            "nll_per_token": nll,
            "transfer_nll_per_token": transfer,
            "steps": trainer.state.global_step,
            "seconds": time.perf_counter() - start,
        }
        path = Path(cast(str, config.output_dir)) / RESULT
        path.write_text(to_json(content, indent=1) + "\n", encoding="utf-8")
        picture = path.with_name("nll.png")
        draw(picture, content)
        where = f"numbers {os.path.relpath(path)}, picture {os.path.relpath(picture)}"
        display.print(f"{clock(display.elapsed)} in all; {where}")
    return 0
