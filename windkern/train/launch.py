"""Do a run from its settings: load everything, train, compare, report."""

from __future__ import annotations

import dataclasses
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback

from windkern._files import sync_files
from windkern.display import Display, clock
from windkern.settings.run import RunConfig
from windkern.train.checkpoints.lock import owned_by_run
from windkern.train.checkpoints.opening import check_unused
from windkern.train.config import WindConfig
from windkern.train.data.datasets import check_prompts
from windkern.train.data.loading import Demonstration, demo_prompts, load_demonstrations, load_prompts
from windkern.train.evaluation.evaluate import Evaluation
from windkern.train.evaluation.evaluator import Comparison
from windkern.train.judges import make_judge
from windkern.train.models import (
    PACKAGED,
    adapter_of,
    describe,
    dtype_named,
    in_words,
    load_model,
    load_policy,
)
from windkern.train.reference import needs_reference
from windkern.train.report import show as report
from windkern.train.report.card import write_run_card
from windkern.train.report.progress import HELD_OUT, OF_HELD_OUT, OF_REFERENCE, RECORDED, Observer, Unobserved
from windkern.train.sharded import whole_models
from windkern.train.trainer import WindTrainer
from windkern.train.world import World

SHOWN = 4  # prompts whose completions are printed
DEMO_PROMPTS = "demo"
MERGED = "merged_base"  # folder of the merged base under a new adapter
_OF_A_START = ("init_lora_weights", "task_type")  # these say how an adapter starts, not what it is
# Guesses of a phase's cost relative to sampling as many responses; measured costs replace them during the run.
_SCORING, _FITTING, _JUDGING, _SAVING = 0.7, 2.0, 0.05, 10.0


@dataclass(frozen=True)
class Outcome:
    """The result of a run."""

    trainer: WindTrainer
    final: Evaluation | None  # on held-out prompts, where there are any


def prompts_of(source: str | None, split: str, limit: int | None) -> list[str]:
    """Return the prompts that a setting names; an empty list for None."""
    if source is None:
        return []
    found = demo_prompts(split) if source == DEMO_PROMPTS else load_prompts(source)
    return found[:limit]


def make_trainer(
    run: RunConfig, config: WindConfig, observer: Observer | None = None, *, resume: bool = False
) -> WindTrainer:
    """Load models, prompts and judge, and make a trainer from them.

    Args:
        run, config: the settings.
        observer: told about progress.
        resume: whether a run continues, so that the files in `config.output_dir` are its own.

    Raises:
        ValueError, TypeError, OSError: a setting is wrong or something cannot be read; the message says which.
    """
    observer = observer or Unobserved()
    observer.phase(0, "reading the prompts")
    train: list[Any]
    if config.entry.group.kind == "demonstration":
        train = load_demonstrations(run.train_dataset)[: run.max_train_prompts]
    else:
        train = prompts_of(run.train_dataset, "train", run.max_train_prompts)
    heldout = prompts_of(run.eval_dataset, "heldout", run.max_eval_prompts)
    options: dict[str, Any] = {"dtype": dtype_named(run.dtype, config.device.type), "attention": run.attention}
    check_prompts([one.prompt if isinstance(one, Demonstration) else one for one in train], heldout)
    judge, reference = None, None
    with whole_models(config):
        if config.judge is not None:
            observer.phase(0, f"loading the judge {config.judge}")
            judge = make_judge(config)
        once = " (converted the first time, which takes 30 s more)" if run.model == PACKAGED else ""
        observer.phase(0, f"loading the model {run.model}{once}")
        if run.quantization is not None:
            _check_quantized(config)
        model, tokenizer = load_policy(run.model, adapter=run.adapter, quantization=run.quantization, **options)
        if config.reference == "model" and (heldout or needs_reference(config)):
            observer.phase(0, f"loading the reference {run.ref_model or run.model}")
            if run.ref_model is None:
                reference, _ = load_policy(run.model, adapter=run.adapter, **options)
            else:
                reference, _ = load_model(run.ref_model, **options)
    observer.phase(0, "preparing the run")
    new_adapter = None if run.peft is None else _lora(run.peft)
    if run.adapter == "merge" and adapter_of(run.model) is None:
        raise ValueError(f"adapter must be continue where model is not an adapter, got 'merge' for {run.model!r}")
    if new_adapter is not None and hasattr(model, "peft_config"):
        _check_continued(run, new_adapter, model.active_peft_config)
        new_adapter = None
    if new_adapter is not None and run.adapter == "merge":
        _keep_base(model, tokenizer, config, resume)
    with warnings.catch_warnings():  # peft reads an attribute that transformers has renamed
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        trainer = WindTrainer(
            model,
            config,
            train_dataset=train,
            eval_dataset=heldout,
            judge=judge,
            ref_model=reference,
            processing_class=tokenizer,
            peft_config=new_adapter,
            observer=observer,
        )
    for callback in (PrinterCallback, ProgressCallback):  # the observer shows what they would
        trainer.remove_callback(callback)
    return trainer


def _check_quantized(config: WindConfig) -> None:
    if config.reference == "model":
        raise ValueError("quantization needs reference: adapter, so that both policies have the same base")


def _lora(settings: dict) -> Any:
    from peft import LoraConfig

    try:
        return LoraConfig(**{"task_type": "CAUSAL_LM"} | settings)
    except TypeError as error:
        raise ValueError(f"peft: {error}; its keys are arguments of peft.LoraConfig") from None


def _check_continued(run: RunConfig, wanted: Any, held: Any) -> None:
    """Raise unless the settings of `peft` are those of the adapter that is trained further."""
    for key in run.peft:
        ours, theirs = (_plain(getattr(each, key)) for each in (wanted, held))
        if ours != theirs and key not in _OF_A_START and ours != "all-linear":
            raise ValueError(
                f"peft.{key} is {ours!r}, but the adapter {run.model!r} has {theirs!r}, and adapter: continue trains "
                "it as it is; leave peft out, or set adapter: merge to start a new one on top of it"
            )


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, (set, list, tuple)) else getattr(value, "value", value)


def _keep_base(model: Any, tokenizer: Any, config: WindConfig, resume: bool) -> None:
    """Write the merged base beside its new adapter and make the adapter name it, since no other copy exists."""
    folder = Path(config.output_dir).absolute() / MERGED
    model.name_or_path = model.config._name_or_path = str(folder)

    def write() -> None:
        if resume and (folder / "config.json").is_file():
            return
        scratch = folder.with_name(f".{MERGED}.part")
        for old in (scratch, folder):
            shutil.rmtree(old, ignore_errors=True)
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        sync_files(scratch)
        scratch.rename(folder)

    World(config.distributed_state).first(write)


def drawn_prompts(total: int, iterations: int, each: int) -> str:
    """Say how many prompts there are and how many of them are drawn.

    Args:
        total: training prompts.
        iterations: number of iterations of the run.
        each: prompts that an iteration draws.

    Example:
        >>> drawn_prompts(640, 3, 16)
        '640 training prompts; 3 iterations draw 16 each, 48 in all'
        >>> drawn_prompts(20, 3, 16)
        '20 training prompts; 3 iterations draw 16 each, 48 in all, so a prompt is drawn 2.4 times on average'
    """
    often = (
        f", so a prompt is drawn {iterations * each / total:.2g} times on average" if iterations * each > total else ""
    )
    return f"{total} training prompts; {iterations} iterations draw {each} each, {iterations * each} in all{often}"


def introduce(display: Display, run: RunConfig, trainer: WindTrainer) -> None:
    """Print a few lines about the run."""
    config, judge = trainer.args, trainer.judge
    model: Any = trainer.model
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    total = sum(value.numel() for value in model.parameters())
    share = "every weight trained" if trained == total else f"{in_words(trained)} of them trained"
    display.print((run.model, "bold"), f": {describe(base)}, {share}")
    lines = []
    if judge is not None:
        strength = getattr(judge, "strength", None)
        link = "" if strength is None else f"; P(i beats j) = sigmoid({strength:g} * (reward_i - reward_j))"
        lines.append(f"judge: {judge.name}{link}")
    arguments = [f"{name} {value}" for name, value in config.loss_arguments.items()]
    lines.append(", ".join([f"loss {config.loss}", *arguments, f"seed {config.seed}"]))
    fitted = (
        ""
        if config.fit_responses in (None, config.num_generations)
        else (f"; the {config.fit_responses} with the highest and lowest win rates are fitted")
    )
    each = trainer.outer.prompts_per_iteration
    lines.append(drawn_prompts(len(trainer.outer.prompts), config.num_iterations, each))
    lines.append(f"{config.num_generations} responses to each{fitted}")
    if trainer.eval_prompts:
        when = "after each iteration" if trainer.iterations.evaluated else "at the end (eval_strategy is not epoch)"
        lines.append(
            f"evaluated {when} on {len(trainer.eval_prompts)} held-out prompts, against {config.reference_responses} "
            "responses of the reference"
        )
    for line in lines:
        display.print(line)


def plan(trainer: WindTrainer, final_responses: int) -> dict[str, dict[tuple[str, str], float]]:
    """Return the phases of a run and their estimated costs in sampled responses, as `Display.plan` takes them."""
    config, prompts, heldout = trainer.args, trainer.outer.prompts_per_iteration, len(trainer.eval_prompts)
    fitted = prompts * (2 if trainer.loss_plan.group == "pair" else config.fit_responses or config.num_generations)
    batches = config.passes_per_iteration * fitted

    def evaluation(responses: int) -> dict[tuple[str, str], float]:
        asked = heldout * responses
        scored = {} if config.reference == "precomputed" else {("scoring", OF_HELD_OUT): _SCORING * 2 * asked}
        judged = {("judging held-out responses", ""): _JUDGING * (asked + heldout * config.reference_responses)}
        return {("sampling", HELD_OUT): asked, **scored, **judged} if heldout else {}

    before: dict[tuple[str, str], float] = {}
    if heldout:
        before[("sampling", OF_REFERENCE)] = heldout * config.reference_responses
    if config.reference == "precomputed":
        before = {("scoring", RECORDED): _SCORING * len(trainer.outer.prompts) * config.num_generations, **before}
    return {
        "before": before,
        "each": {
            ("sampling", "responses"): prompts * config.num_generations,
            ("scoring", "log-probs"): _SCORING * fitted * len(trainer.loss_plan.logps),
            ("fitting", "batches"): _FITTING * batches,
            **(evaluation(config.eval_responses) if trainer.iterations.evaluated else {}),
            ("saving a checkpoint", ""): _SAVING,
        },
        "after": {("saving the model", ""): _SAVING, **evaluation(final_responses)},
    }


def start(
    run: RunConfig, config: WindConfig, *, resume: bool, display: Display | None = None, kind: str = "train"
) -> Outcome:
    """Do a run, and write model, card, picture and numbers to `config.output_dir`.

    Args:
        run, config: the settings.
        resume: continue from the newest complete checkpoint.
        display: display to show progress on, already entered; only the first process uses it. None: stdout.
        kind: the "kind" in the results file.

    Raises:
        As `make_trainer` and `WindTrainer.train`.
    """
    report.quiet_libraries()
    output = Path(config.output_dir)
    with display or Display() as shown:
        shown.hush(config.process_index != 0)
        if config.disable_tqdm:  # no bar, and no lines in its place
            shown.stop()
        with owned_by_run(config, shown.note):
            if not resume:  # before models are loaded
                World(config.distributed_state).first(lambda: check_unused(output, overwrite=config.overwrite) and None)
            trainer = make_trainer(run, config, report.LiveReport(shown, config.num_iterations), resume=resume)
            introduce(shown, run, trainer)
            shown.plan("iteration", config.num_iterations, **plan(trainer, run.final_responses))
            trainer.train(resume_from_checkpoint=resume)
            shown.phase(config.num_iterations + 1, "saving the model")
            trainer.save_model()
            compared = trainer.compare(run.final_responses) if trainer.eval_prompts else None
            final = None if compared is None else compared.result
            shown.stop()
            if config.process_index == 0:
                # Once more: the trainer knows neither the source of its prompts nor the final comparison.
                write_run_card(
                    output,
                    config,
                    trainer.model,
                    trainer.judge,
                    trainer.history,
                    prompts=run.train_dataset,
                    final=final,
                )
                _report(shown, run, trainer, compared, output, kind)
    return Outcome(trainer, final)


def _report(
    display: Display,
    run: RunConfig,
    trainer: WindTrainer,
    compared: Comparison | None,
    output: Path,
    kind: str,
) -> None:
    final = None if compared is None else compared.result
    after = [] if compared is None else [group.texts for group in compared.policy]
    before = [] if compared is None else [group.texts for group in compared.reference]
    display.print()
    display.print(rich=report.history_table(trainer.history))
    picture, numbers = output / "win_rate.png", output / "result.json"
    settings = {**dataclasses.asdict(run), **trainer.args.own_settings(), "seed": trainer.args.seed}
    del settings["overwrite"]  # says how the run was started, not what it is
    report.as_json(
        numbers,
        settings=settings,
        history=trainer.history,
        final=final,
        prompts=trainer.eval_prompts,
        before=before,
        after=after,
        kind=kind,
    )
    where = f"model {os.path.relpath(output)}, numbers {os.path.relpath(numbers)}"
    if final is None:
        display.print(f"{clock(display.elapsed)} in all")
        display.print(where)
        return
    report.print_completions(display.console, trainer.eval_prompts, before, after, SHOWN)
    report.draw(picture, trainer.history, final, f"{trainer.args.loss} on {run.model}, seed {trainer.args.seed}")
    kl = "" if final.kl is None else f"; KL {report.plus_minus(final.kl, 1)} nats a response"
    display.print()
    display.print(
        "held-out win rate against the reference: ",
        (f"{final.win_rate.mean:.2f}", "bold"),
        f", {report.interval(final.win_rate)}{kl}; {clock(display.elapsed)} in all",
    )
    display.print(f"{where}, picture {os.path.relpath(picture)}")
