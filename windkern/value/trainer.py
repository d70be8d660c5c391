"""Fit a value model to demonstrations with transformers' Trainer: ValueConfig and ValueTrainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from windkern.train import tried  # noqa: F401

# isort: split
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from windkern import backends
from windkern._checks import check_choice, check_count
from windkern.train.checkpoints.saving import AtomicCheckpoints
from windkern.train.config import check_one_gpu, check_output_dir, setting
from windkern.train.samplers.recorded import completions_of_texts
from windkern.value.model import ValueModel

_TRAINING_ARGUMENTS = "training_args.bin"  # as transformers names it


@dataclass
class ValueConfig(TrainingArguments):
    """Settings of a value model's training, in addition to those of `transformers.TrainingArguments`.

    `per_device_train_batch_size` counts demonstrations. Every field's meaning, unit, range and the origin of its
    default is in its help.

    Raises:
        ValueError, TypeError: a field is out of range, or asks for what the trainer does not do; the message names it.

    Example:
        >>> ValueConfig(output_dir="run", report_to="none", max_completion_length=0)
        Traceback (most recent call last):
        ValueError: max_completion_length must be at least 1, got 0
    """

    base_model: str | None = setting(
        None, "Folder or hub id of the frozen base, or smollm2-135m-instruct (packaged). It must be set."
    )
    value_model: str | None = setting(
        None,
        "Folder or hub id of the causal LM that becomes the value model: a small one with the base's tokenizer and "
        "vocabulary size. It must be set.",
    )
    train_demonstrations: str | None = setting(
        None,
        "Prompts with answers to imitate: a .jsonl, .json, .csv, .tsv or .parquet file, or hub:NAME[:SPLIT[:COLUMN]]. "
        "It must be set.",
    )
    eval_demonstrations: str | None = setting(
        None, "Prompts with answers to measure on, before and after. None: the training demonstrations."
    )
    transfer_base: str | None = setting(
        None,
        "Folder or hub id of a second base with the same tokenizer. At the end it is measured with and without the "
        "value model, which was not trained on it. None: there is no such comparison.",
    )
    max_completion_length: int = setting(
        512,
        "Length limit of an answer in tokens, end token included, at least 1; longer answers are cut. Default: ours.",
    )
    memory_budget: int | None = setting(
        None,
        "Bytes that log-probs may allocate besides outputs and gradients, at least 1. None: 2.5 GiB on a GPU and 384 "
        "MiB on a CPU, as in windkern.token_logps.",
    )
    backend: str = setting(
        "auto", "Row kernels: auto, torch, cpp, triton or cuda. Default: the fastest that can run on the device."
    )
    # Inherited, with a default that this trainer needs.
    remove_unused_columns: bool = setting(False, "Must be False: demonstrations have no columns.")

    def __post_init__(self) -> None:
        check_output_dir(self.output_dir)
        self.max_completion_length = check_count("max_completion_length", self.max_completion_length, least=1)
        if self.memory_budget is not None:
            self.memory_budget = check_count("memory_budget", self.memory_budget, least=1)
        check_choice("backend", self.backend, ["auto", *backends.BACKENDS])
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be False, got True: demonstrations have no columns")
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor must be 0, got {self.label_smoothing_factor}: the loss is a log-likelihood"
            )
        if self.fsdp or self.deepspeed:
            raise ValueError(
                "fsdp and deepspeed must not be set: a value model is small and is trained on one device or by DDP"
            )
        self.label_names = ["labels"]  # tells an evaluation that a batch has a loss
        super().__post_init__()


class DemonstrationCollator:
    """Makes batches of demonstrations: prompts are padded on the left, answers with their end token on the right.

    Args:
        tokenizer: the one that base and value model share.
        max_completion_length: length limit of an answer, end token included.
    """

    def __init__(self, tokenizer: Any, max_completion_length: int):
        self.tokenizer, self.max_completion_length = tokenizer, max_completion_length

    def __call__(self, demonstrations: Sequence) -> dict[str, Tensor]:
        """Return what `ValueModel.forward` takes of pairs (prompt, answer), and labels (-100: not scored)."""
        batch = completions_of_texts(
            self.tokenizer,
            [prompt for prompt, _ in demonstrations],
            [[answer] for _, answer in demonstrations],
            max_completion_length=self.max_completion_length,
        )
        return {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "completion_mask": batch.completion_mask,
            "labels": batch.input_ids.masked_fill(~batch.completion_mask, -100),
        }


def token_mean_nll(logps: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Return minus the summed log-probs over the number of scored tokens of the whole optimizer step.

        L = - sum_s logps[s] / num_items_in_batch

    Args:
        logps: (S,) log-probs of the answers of one micro-batch.
        labels: (S, L), -100 where a token is not scored.
        num_items_in_batch: scored tokens of all micro-batches of the step, as transformers counts them; None counts
            those of `labels`.

    Example:
        >>> token_mean_nll(torch.tensor([-2.0, -4.0]), torch.tensor([[-100, 3, 4], [-100, -100, 5]])).item()
        2.0
    """
    count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return -logps.sum() / count


class ValueTrainer(AtomicCheckpoints, Trainer):
    """Fits a value model to demonstrations: transformers' Trainer with the log-probs of `ValueModel`.

        L = - (1 / n) sum over answers y, tokens t of log softmax(z_base + z_value)[y_t],   n = tokens in the step

    The paper's loss is summed over tokens and divided by the tokens of the optimizer step (over all micro-batches and
    processes), as transformers trains language models; so gradient accumulation equals the big batch. `eval_loss` is
    the mean over batches of each batch's mean.

    Checkpoints hold the value model alone and can be opened by `ValueModel.from_pretrained`.

    Args:
        model: the value model on its base; `args.memory_budget` and `args.backend` become its own.
        args: settings; the fields that name models and data are ignored.
        train_dataset: sequence of pairs (prompt, answer), such as those of
            `windkern.train.data.loading.load_demonstrations`.
        processing_class: the tokenizer of base and value model.
        eval_dataset, callbacks, optimizers and so on: see `transformers.Trainer`.

    Raises:
        TypeError: `model` is not a ValueModel, or `args` is not a ValueConfig.
        ValueError: one process sees more than one GPU.
    """

    args: ValueConfig
    processing_class: Any

    def __init__(self, model: ValueModel, args: ValueConfig, *, processing_class: Any, **options: Any):
        if not isinstance(model, ValueModel):
            raise TypeError(f"model must be a ValueModel, got {type(model).__name__}")
        if not isinstance(args, ValueConfig):
            raise TypeError(f"args must be a ValueConfig, got {type(args).__name__}")
        check_one_gpu(args.n_gpu)
        model.memory_budget, model.backend = args.memory_budget, args.backend
        super().__init__(
            model=model,
            args=args,
            processing_class=processing_class,
            data_collator=DemonstrationCollator(processing_class, args.max_completion_length),
            compute_loss_func=token_mean_nll,
            **options,
        )

    def _run_epoch(self, **options: Any) -> None:  # type: ignore[override]  # called by keyword, whichever there are
        # Hazard: resumed from its last checkpoint inside an epoch, transformers would take one step too many.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**options)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(cast(str, output_dir or self.args.output_dir))
        self.accelerator.unwrap_model(self.model).save_pretrained(folder, base_name=self.args.base_model)
        self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / _TRAINING_ARGUMENTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        value = self.accelerator.unwrap_model(self.model if model is None else model).value
        saved = type(value).from_pretrained(resume_from_checkpoint, dtype=value.dtype)
        value.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(cast(str, self.state.best_model_checkpoint))
