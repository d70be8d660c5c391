"""WindTrainer: sample, judge, fit and repeat, on top of transformers.Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from pathlib import Path
from typing import Any, cast

from windkern.train import tried  # noqa: F401

# isort: split
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput

from windkern.train.assembly import Run, start_of
from windkern.train.batches import Collator
from windkern.train.checkpoints.lock import owned_by_run
from windkern.train.checkpoints.opening import check_first
from windkern.train.checkpoints.saving import AtomicCheckpoints
from windkern.train.config import WindConfig
from windkern.train.evaluation.evaluator import Comparison
from windkern.train.iterations import Iterations
from windkern.train.jobs import Watch, loss_job
from windkern.train.judges.judge import Judge
from windkern.train.loss_plan import not_finite
from windkern.train.metrics import step_metrics
from windkern.train.models import name_base
from windkern.train.optimizing import Optimizing
from windkern.train.report.card import write_run_card
from windkern.train.report.notices import Notices
from windkern.train.report.progress import Observer, Record, Unobserved
from windkern.train.samplers.sampler import Sampler
from windkern.train.sharded import prepare_plugin
from windkern.train.world import World


class WindTrainer(Optimizing, AtomicCheckpoints, Trainer):
    """Aligns a causal LM with a judge by WIND, or by another separable loss of `windkern.losses`.

    An outer iteration freezes pi_t, samples N responses to each of some prompts, has them judged, scores them with pi_t
    and pi_ref, and fits

        log pi_{t+1} = a log pi_t + b log pi_ref + c w - log Z,   a = 1/(1 + eta*beta), b = eta*beta*a, c = eta*a

    by `steps_per_iteration` optimizer steps on `windkern.losses.wind` inside `windkern.fused_loss`. No logits exist
    outside generation, and log-probs of a sampler are never used. One epoch of transformers is one outer iteration.

    Responses and verdicts are saved under `output_dir/completions` as they come, and a checkpoint is complete or
    absent. `train(resume_from_checkpoint=True)` resumes a killed run; on a CPU the result has the same bits.

    Args:
        model: causal LM to train, in any mode; with `peft_config`, the base under the adapter.
        args: the settings.
        train_dataset: a list or `datasets.Dataset` of prompts: strings, lists of chat messages, or rows with "prompt"
            as either (TRL's prompt-only formats); for losses that learn from demonstrations, with "completion" too.
        eval_dataset: held-out prompts for `evaluate`; None or empty for no evaluation.
        judge: compares responses: a judge of `windkern.train.judges`, or any callable (prompts, responses) -> rewards,
            whose Bradley-Terry link has strength `args.judge_strength`. None: the one that `args.judge` names.
        ref_model: frozen causal LM, pi_ref, where `args.reference` is "model" and the loss or the evaluation needs it;
            not the same object as `model`.
        sampler: answers prompts; None: the one that `args.sampler` names. A method `update(model)`, if it has one,
            is called before each iteration, for servers that hold a copy of the weights.
        processing_class: tokenizer of the model.
        peft_config: puts a new adapter on the model, which must have none; `args.reference` "adapter" then needs no
            second model. A PEFT model's own adapter is trained further.
        observer: told about progress.
        callbacks, optimizers: as for `transformers.Trainer`.

    Raises:
        ValueError: the data sets overlap or are empty, a prompt is too long for the model, no parameter of the model is
            trainable or its weights are not finite, the settings need something that is missing, or they contradict
            each other.
        MissingPackageError: `args.report_to` names a package that is not installed.
        UnsupportedModelError: see `windkern.hf.hidden_and_head`.

    Memory:
        A step needs the decoder's memory plus what `windkern.plan` gives for the scored tokens of a batch.

    Source:
        WIND, arXiv 2410.20727; docs/theory.md.
    """

    args: WindConfig
    processing_class: Any

    def __init__(
        self,
        model: nn.Module,
        args: WindConfig,
        *,
        train_dataset: Iterable,
        processing_class: Any,
        eval_dataset: Iterable | None = None,
        judge: Judge | Callable | None = None,
        ref_model: nn.Module | None = None,
        sampler: Sampler | None = None,
        peft_config: Any = None,
        observer: Observer | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
    ):
        if not isinstance(args, WindConfig):
            raise TypeError(f"args must be a WindConfig, got {type(args).__name__}")
        self.observer = observer or Unobserved()
        self.notices = Notices(self.observer, heard=args.process_index == 0)
        start = start_of(
            args,
            model,
            processing_class,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            ref_model=ref_model,
            peft_config=peft_config,
            observer=self.observer,
            notices=self.notices,
        )
        self.policy, self.loss_plan = start.policy, start.plan
        self.demonstrations, self.eval_prompts = start.prompts.demonstrations, start.prompts.heldout
        super().__init__(
            model=self.policy.model,
            args=args,
            data_collator=Collator(self.policy),
            train_dataset=(),
            eval_dataset=self.eval_prompts or None,
            processing_class=self.policy.tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.is_fsdp_enabled:
            prepare_plugin(self.accelerator, model)
        self.loss_is_scaled_for_ga = False  # a mean over the groups of a batch; a step's batches are equally large
        self.world = self.policy.world = World(self.accelerator)
        loaded = getattr(self, "is_distributed_loading_by_transformers", False)  # older releases lack it
        self.policy.sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled or loaded
        self.run = Run(
            args,
            start,
            judge=judge,
            ref_model=ref_model,
            sampler=sampler,
            notices=self.notices,
            fsdp=self.is_fsdp_enabled,
        )
        self.train_dataset = self.run.data
        self.judge, self.reference = self.run.judge, self.run.reference
        self.outer, self.evaluator = self.run.outer, self.run.evaluator
        self.iterations = Iterations(self.outer, self.evaluator, self.run.data, self.notices)
        self.callback_handler.callbacks.insert(1, self.iterations)  # after the one that decides when to save

    @property
    def model_wrapped(self) -> nn.Module:
        """The model as accelerate has wrapped it, which is what the policy runs."""
        return self.policy.wrapped

    @model_wrapped.setter
    def model_wrapped(self, model: nn.Module) -> None:
        self.policy.wrapped = model

    @property
    def history(self) -> list[Record]:
        """Records of the finished iterations."""
        return self.iterations.history

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(cast(Sized, self.train_dataset))  # IterationData has the order

    def train(  # type: ignore[override]  # `given` has the rest of transformers' arguments
        self, resume_from_checkpoint: str | bool | None = None, **given: Any
    ) -> TrainOutput:
        """Run the remaining iterations.

        Args:
            resume_from_checkpoint: True resumes from the newest complete checkpoint in `output_dir`, a path from that
                checkpoint; without it, completions of an earlier run are deleted, and checkpoints too if
                `args.overwrite`.
            given: as for `transformers.Trainer.train`.

        Raises:
            ResumeError: `output_dir` holds a run with other settings, models, prompts or judge.
            FolderInUseError: another process trains in `output_dir`.
            DamagedRecordError, FileNotFoundError: a file of the resumed run is damaged or missing.
            ValueError: the run is not resumed, and `output_dir` holds checkpoints that may not be deleted, or an
                earlier call has trained already.
            FloatingPointError: a loss is infinite or NaN.
        """
        check_first(self.state.global_step, self.args.output_dir, resume_from_checkpoint)
        self.iterations.forget()
        with owned_by_run(self.args, self.notices):
            self.run.open(resume_from_checkpoint)
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **given)
            self._catch_up()
            self.iterations.read_history(self.state)
        return output

    def _run_epoch(self, **options: Any) -> None:  # type: ignore[override]  # called by keyword, whichever there are
        """Run an epoch of transformers, which is one outer iteration."""
        self._catch_up()
        self.iterations.begin(self.state, self.optimizer)
        super()._run_epoch(**options)

    def _catch_up(self) -> None:
        if self.iterations.catch_up(self.state):  # as at the end of an epoch, which a kill has cut off
            self._determine_best_metric(self._evaluate(None, None), None)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor | tuple[Tensor, dict]:
        """Return the mean loss over the groups of a batch, computed in the wrapped model's `__call__`."""
        batch = inputs["batch"].to(self.args.device)
        watch = Watch(self.loss_plan.function, self.loss_plan.scale)
        settings = self.policy.settings
        job = loss_job(watch, batch.targets, batch.constants, settings.temperature, settings.options)
        loss = self.policy.run(model, batch, job)
        if self._updates_in_backward or not loss.requires_grad:  # `training_step` would look too late, or does not run
            self._check_finite(loss)
        self.iterations.averages.add(step_metrics(watch.logps, batch.constants, self.loss_plan))
        self.observer.advance()
        return (loss, {}) if return_outputs else loss

    def training_step(self, *args: Any, **given: Any) -> Tensor:
        """Run forward and backward of a batch.

        Raises:
            FloatingPointError: the loss is infinite or NaN, on any process if they have just exchanged gradients.
        """
        loss = super().training_step(*args, **given)
        # Reason: a check before backward makes the host wait for the forward pass, and then the GPU for the host. Here
        # no weight has moved yet, and transformers reads the loss next.
        self._check_finite(self.accelerator.gather(loss) if self.accelerator.sync_gradients else loss)
        return loss

    def _check_finite(self, losses: Tensor) -> None:
        finite = losses.isfinite()
        if not finite.all():  # transformers would log 0 and continue
            loss = losses[~finite].tolist()[0]
            raise not_finite(self.loss_plan, self.args.learning_rate, self.state.global_step + 1, loss)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as transformers does, with the means of the steps' metrics since the last line."""
        if "loss" in logs:
            logs = {**logs, **self.world.mean(self.iterations.averages.take())}
        super().log(logs, start_time)

    def compare(self, responses: int, iteration: int | None = None) -> Comparison:
        """Compare the current policy with the reference on the held-out prompts.

        Args:
            responses: number of responses of the policy to each prompt. The draws are the same at every call.
            iteration: number for the observer; None: after the last iteration.

        Raises:
            ValueError: there are no held-out prompts.
        """
        if self.evaluator is None:
            raise ValueError("eval_dataset must be given to the trainer for an evaluation")
        return self.evaluator.compare(responses, self.args.num_iterations + 1 if iteration is None else iteration)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return the win rate against the reference on held-out prompts, its standard error, reward and KL.

        Raises:
            ValueError: there are no held-out prompts, or others are given here.
        """
        if eval_dataset is not None and eval_dataset is not self.eval_dataset:
            raise ValueError("eval_dataset must be None: the trainer evaluates on the one that it was created with")
        found = self.compare(self.args.eval_responses, self.iterations.number).result.metrics()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.observer.phase(self.iterations.number, "saving a checkpoint")
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            name_base(folder)
            write_run_card(folder, self.args, self.model, self.judge, self.history)
