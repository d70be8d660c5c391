"""WindTrainer: sample, judge, fit, and again, on transformers.Trainer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

from windkern.train import tried  # noqa: F401

# isort: split
import torch
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput

from windkern.train.adapters import starts_as_base, with_adapter
from windkern.train.anchor import anchor_file
from windkern.train.batches import IterationData
from windkern.train.checkpoints.identity import fingerprint, identity_of, models_inside
from windkern.train.checkpoints.lock import owned_by_run
from windkern.train.checkpoints.opening import open_run
from windkern.train.checkpoints.saving import AtomicCheckpoints, latest_checkpoint
from windkern.train.config import WindConfig, check_one_gpu
from windkern.train.data.datasets import prompt_sets
from windkern.train.data.prompts import with_template_arguments
from windkern.train.dropout import disable_dropout
from windkern.train.evaluation.evaluator import Comparison, Evaluator
from windkern.train.iterations import Iterations
from windkern.train.jobs import Watch, loss_job
from windkern.train.judges import make_judge
from windkern.train.judges.judge import Judge, as_judge
from windkern.train.loss_plan import not_finite, plan_loss
from windkern.train.metrics import step_metrics
from windkern.train.models import name_base, public_name
from windkern.train.optimizing import Optimizing
from windkern.train.outer import OuterLoop
from windkern.train.policy import Policy, PolicySettings
from windkern.train.preconditions import Room, check_evaluation, check_model, check_reporting
from windkern.train.reference import make_reference
from windkern.train.report.card import write_card
from windkern.train.report.progress import Observer, Record, Unobserved
from windkern.train.responder import Responder
from windkern.train.samplers import make_sampler
from windkern.train.samplers.sampler import Sampler
from windkern.train.sharded import prepare_plugin
from windkern.train.store import GroupStore
from windkern.train.world import World


class WindTrainer(Optimizing, AtomicCheckpoints, Trainer):
    """Aligns a causal LM with a judge by WIND, or by another separable loss of `windkern.losses`.

    An outer iteration freezes pi_t, samples N responses to each of some prompts, has them judged, scores them with pi_t
    and pi_ref, and fits

        log pi_{t+1} = a log pi_t + b log pi_ref + c w - log Z,   a = 1/(1 + eta*beta), b = eta*beta*a, c = eta*a

    by `steps_per_iteration` optimizer steps on `windkern.losses.wind` inside `windkern.fused_loss`. No logits exist
    outside generation, and no log-prob is taken over from a sampler. One epoch of transformers is one outer iteration.

    What is sampled and judged is saved under `output_dir/completions` as it comes, and a checkpoint is complete or
    absent. `train(resume_from_checkpoint=True)` resumes a killed run; on a CPU it ends with the same bits.

    Args:
        model: causal LM to train, in any mode; with `peft_config`, the base under the adapter.
        args: the settings.
        train_dataset: a list or `datasets.Dataset` of prompts: strings, lists of chat messages, or rows with "prompt"
            as either (TRL's prompt-only formats); for losses that learn from demonstrations, with "completion" too.
        eval_dataset: held-out prompts for `evaluate`; None or empty where there is no evaluation.
        judge: says who wins: a judge of `windkern.train.judges`, or any callable (prompts, responses) -> rewards, whose
            Bradley-Terry link has strength `args.judge_strength`. None takes the one that `args.judge` names.
        ref_model: frozen causal LM, pi_ref, where `args.reference` is "model" and the loss or the evaluation needs it;
            another object than `model`.
        sampler: answers prompts; None takes the one that `args.sampler` names. If it has a method `update(model)`, that
            is called before each iteration, for servers whose weights must follow.
        processing_class: tokenizer of the model.
        peft_config: puts a new adapter on the model, which must have none; `args.reference` "adapter" then needs no
            second model. A PEFT model's own adapter is trained further.
        observer: told about progress.
        callbacks, optimizers: as `transformers.Trainer`.

    Raises:
        ValueError: the data sets overlap or are empty, a prompt is too long for the model, nothing of the model is
            trained or its weights are not finite, something is missing that the settings ask for, or they contradict
            each other.
        MissingPackageError: `args.report_to` names what is not installed.
        UnsupportedModelError: see `windkern.hf.hidden_and_head`.

    Memory:
        Of a step: the decoder's, and what `windkern.plan` gives for the scored tokens of a batch.

    Source:
        WIND, arXiv 2410.20727; docs/theory.md.
    """

    def __init__(
        self,
        model: nn.Module,
        args: WindConfig,
        *,
        train_dataset: Iterable,
        processing_class,
        eval_dataset: Iterable | None = None,
        judge: Judge | Callable | None = None,
        ref_model: nn.Module | None = None,
        sampler: Sampler | None = None,
        peft_config=None,
        observer: Observer | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
    ):
        if not isinstance(args, WindConfig):
            raise TypeError(f"args must be a WindConfig, got {type(args).__name__}")
        check_one_gpu(args.n_gpu)
        check_reporting(args)
        self.observer = observer or Unobserved()
        self.loss_plan = plan_loss(args)
        note = self._warn if args.process_index == 0 else Unobserved().note
        given = prompt_sets(train_dataset, eval_dataset, demonstrations=self.loss_plan.group == "demonstration")
        check_evaluation(args, given.heldout, note)
        self.weights_at_start = {"model": fingerprint(model), "reference": fingerprint(ref_model)}
        new_adapter = peft_config is not None and starts_as_base(peft_config)
        if peft_config is not None:
            model = with_adapter(model, peft_config, args.seed)
        check_model(model)
        processing_class = with_template_arguments(processing_class, args.chat_template_kwargs)
        self.policy = Policy(model, processing_class, PolicySettings.of(args), observer=self.observer)
        given = Room(args, model, processing_class).fit_all(given, note)
        self.demonstrations, self.eval_prompts = given.demonstrations, given.heldout
        if args.disable_dropout:
            disable_dropout(model)
        super().__init__(
            model=model,
            args=args,
            data_collator=self._collate,
            train_dataset=(),
            eval_dataset=self.eval_prompts or None,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.is_fsdp_enabled:
            prepare_plugin(self.accelerator, model)
        self.loss_is_scaled_for_ga = False  # a mean over the groups of a batch; batches of a step are of one size
        self.world = self.policy.world = World(self.accelerator)
        loaded = getattr(self, "is_distributed_loading_by_transformers", False)  # transformers 5.17 has no such thing
        self.policy.sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled or loaded
        self.judge = as_judge(judge, args.judge_strength) if judge is not None else make_judge(args)
        for inside in models_inside(self.judge):
            self.weights_at_start["judge"] = self.weights_at_start.get("judge", {}) | fingerprint(inside)
        if self.judge is None and (self.loss_plan.judged or self.eval_prompts):
            raise ValueError(f"judge must be given for loss={args.loss!r}: pass judge=, or name one in args.judge")
        sampler = sampler or make_sampler(args, processing_class)
        self.reference = make_reference(
            args, self.policy, ref_model, new_adapter=new_adapter, fsdp=self.is_fsdp_enabled
        )
        if self.eval_prompts and self.reference is None:
            raise ValueError("an evaluation compares with the reference: pass ref_model=")
        self.store = GroupStore(Path(args.output_dir) / "completions")
        per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * self.world.size
        self.train_dataset = IterationData(args.steps_per_iteration * per_step, per_step, args.seed)
        warn = self._warn if self.world.is_main else Unobserved().note
        respond = Responder(args, self.loss_plan.group, given.train, self.demonstrations, self.policy, sampler, warn)
        self.outer = OuterLoop(
            args,
            self.loss_plan,
            self.policy,
            self.reference,
            respond,
            self.judge,
            self.store,
            self.observer,
            args.steps_per_iteration * per_step // args.passes_per_iteration,
        )
        self.evaluator = self._make_evaluator() if self.eval_prompts else None
        self.iterations = Iterations(self.outer, self.evaluator, self.train_dataset, self, warn)
        self.callback_handler.callbacks.insert(1, self.iterations)  # behind the one that decides about saving

    def _identity(self) -> dict:
        """What determines the weights that the run ends with."""
        judge = self.judge
        return identity_of(
            self.args,
            self.model,
            self.processing_class,
            reference=self.reference.model if self.args.reference == "model" and self.reference else None,
            prompts=self.demonstrations or self.outer.prompts,
            heldout=self.eval_prompts,
            judge="" if judge is None else f"{judge.name}, strength {getattr(judge, 'strength', None)}",
            processes=self.world.size,
            weights=self.weights_at_start,
        )

    def _make_evaluator(self) -> Evaluator:
        return Evaluator(
            self.eval_prompts,
            self.judge,
            self.policy,
            self.reference,
            self.world,
            None,  # Reason: until `train` has opened it, the output folder may be of another run
            self.observer,
            seed=self.args.seed,
            reference_responses=self.args.reference_responses,
            sampling_batch_size=self.args.sampling_batch_size,
            scoring_batch_size=self.args.per_device_eval_batch_size,
        )

    @property
    def model_wrapped(self) -> nn.Module:
        """The model as accelerate has wrapped it, which is what the policy runs."""
        return self.policy.wrapped

    @model_wrapped.setter
    def model_wrapped(self, model: nn.Module) -> None:
        self.policy.wrapped = model

    @property
    def history(self) -> list[Record]:
        """Records of the iterations that are over."""
        return self.iterations.history

    def _get_train_sampler(self, *_) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # IterationData has the order

    def _collate(self, groups) -> dict:
        batch = self.policy.batch(groups)  # beside it, what transformers counts tokens by
        return {"batch": batch, "input_ids": batch.rows.input_ids, "attention_mask": batch.rows.attention_mask}

    def train(self, resume_from_checkpoint: str | bool | None = None, **given) -> TrainOutput:
        """Do the iterations that are left.

        Args:
            resume_from_checkpoint: True resumes from the newest whole checkpoint in `output_dir`, a path from that one;
                without it, completions of an earlier run are deleted, and checkpoints too if `args.overwrite`.
            given: as `transformers.Trainer.train`.

        Raises:
            ResumeError: what is in `output_dir` is of a run with other settings, models, prompts or judge.
            FolderInUseError: another process trains in `output_dir`.
            DamagedRecordError, FileNotFoundError: a file of the run that is resumed is damaged or missing.
            ValueError: not resuming, and `output_dir` holds checkpoints that may not be deleted, or an earlier call
                has trained already.
            FloatingPointError: a loss is infinite or NaN.
        """
        resume, moved = resume_from_checkpoint, self.state.global_step > 0
        if moved and (
            not resume or (resume is True and latest_checkpoint(self.args.output_dir, lambda _: None) is None)
        ):
            raise ValueError(
                f"This trainer has already trained for {self.state.global_step} steps. Resume from a checkpoint, or "
                "make a new trainer from the initial model."
            )
        self.iterations.forget()
        with owned_by_run(self.args, self._warn):
            self.world.first(lambda: open_run(self.args, self.store, self._identity(), resume, self._warn))
            if self.evaluator is not None:
                self.evaluator.folder = self.store.folder / "held-out"
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **given)
            self.iterations.catch_up(self.state)
            self.iterations.read_history(self.state)
        return output

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss over the groups of a batch, through the wrapped model's `__call__`."""
        batch = inputs["batch"].to(self.args.device)
        watch = Watch(self.loss_plan.function, self.loss_plan.scale)
        settings = self.policy.settings
        job = loss_job(watch, batch.targets, batch.constants, settings.temperature, settings.options)
        loss = self.policy.run(model, batch, job)
        if not loss.isfinite():  # transformers would log 0 and go on
            raise not_finite(self.loss_plan, self.args.learning_rate, self.state.global_step + 1, loss.item())
        self.iterations.averages.add(step_metrics(watch.logps, batch.constants, self.loss_plan))
        self.observer.advance()
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As transformers, with the means of what was counted since the last line."""
        if "loss" in logs:
            extra = self.iterations.averages.take()
            if extra and self.world.size > 1:
                values = torch.tensor(list(extra.values()), device=self.args.device)
                extra = dict(zip(extra, self.accelerator.reduce(values, "mean").tolist(), strict=True))
            logs = {**logs, **extra}
        super().log(logs, start_time)

    def compare(self, responses: int, iteration: int | None = None) -> Comparison:
        """Compare the policy as it is now with the reference on the held-out prompts.

        Args:
            responses: of the policy to each prompt. The draws are the same at every call.
            iteration: for the observer; None is after the last.

        Raises:
            ValueError: there are no held-out prompts.
        """
        if self.evaluator is None:
            raise ValueError("eval_dataset must be given to the trainer for an evaluation")
        return self.evaluator.compare(responses, self.args.num_iterations + 1 if iteration is None else iteration)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Win rate against the reference on the held-out prompts, its standard error, reward and KL.

        Raises:
            ValueError: there are no held-out prompts, or others are given here.
        """
        if eval_dataset is not None and eval_dataset is not self.eval_dataset:
            raise ValueError("eval_dataset must be None: the trainer evaluates on the one that it was made with")
        found = self.compare(self.args.eval_responses, self.iterations.number).result.metrics()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluate_late(self) -> None:
        """The evaluation at the end of an iteration that a kill cut off; schedules and the best model know of it."""
        self._determine_best_metric(self._evaluate(None, None), None)

    def _warn(self, line: str) -> None:
        if isinstance(self.observer, Unobserved):
            super()._warn(line)
        else:
            self.observer.note(line)

    def _write_extra(self, folder: Path) -> None:
        if self.policy.anchor is not None:
            torch.save(self.policy.anchor.state_dict(), folder / anchor_file(self.world.rank, self.world.size))

    def _save_checkpoint(self, model, trial) -> None:
        self.observer.phase(self.iterations.number, "saving a checkpoint")
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            name_base(folder)
            write_card(
                folder,
                config=self.args.own_settings(),
                base_model=public_name(getattr(self.model.config, "_name_or_path", "")) or type(self.model).__name__,
                judge=None if self.judge is None else self.judge.name,
                history=[record.as_dict() for record in self.history],
                name=self.args.hub_model_id or folder.name,
                library="peft" if hasattr(self.model, "peft_config") else "transformers",
                defaults={field.name: field.default for field in dataclasses.fields(WindConfig)},
            )
