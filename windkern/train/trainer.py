"""WindTrainer: sample, judge, fit, and again, on transformers.Trainer."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path

from windkern.train import tried  # noqa: F401

# isort: split
import torch
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import IntervalStrategy, TrainOutput

from windkern.train import parts
from windkern.train.anchor import Anchor, anchor_file
from windkern.train.callbacks import Iterations
from windkern.train.checkpoints.identity import fingerprint, models_inside
from windkern.train.checkpoints.lock import owned_by_run
from windkern.train.checkpoints.opening import open_run
from windkern.train.checkpoints.saving import AtomicCheckpoints, latest_checkpoint
from windkern.train.config import WindConfig, check_one_gpu
from windkern.train.data.loading import Demonstration, padding_id
from windkern.train.data.prompts import with_template_arguments
from windkern.train.evaluation.evaluate import Evaluation
from windkern.train.evaluation.heldout import HeldOut, Texts
from windkern.train.fused_head import FusedHead, Watch, loss_job
from windkern.train.groups import IterationData, collate
from windkern.train.judges import make_judge
from windkern.train.judges.judge import Judge, check_judge
from windkern.train.metrics import Averages, make_record, step_metrics
from windkern.train.models import name_base, public_name
from windkern.train.objectives import make_objective
from windkern.train.optimizing import Optimizing
from windkern.train.outer import OuterLoop
from windkern.train.preconditions import Room, check_model, check_reporting
from windkern.train.reference import PrecomputedReference, make_reference
from windkern.train.report.card import write_card
from windkern.train.report.completions import columns_of, track_completions, write_completions
from windkern.train.report.history import History
from windkern.train.report.progress import RECORDED, Observer, Record, Unobserved
from windkern.train.responder import Responder
from windkern.train.rollouts import RolloutStore
from windkern.train.samplers import make_sampler
from windkern.train.samplers.sampler import Sampler, TransformersSampler
from windkern.train.scoring import Scorer
from windkern.train.sharded import prepare_plugin
from windkern.train.world import World


class WindTrainer(Optimizing, AtomicCheckpoints, Trainer):
    """Aligns a causal LM with a judge by WIND, or by another separable loss of `windkern.losses`.

    An outer iteration freezes pi_t, samples N responses to each of some prompts, has them judged, scores them with pi_t
    and pi_ref, and fits

        log pi_{t+1} = a log pi_t + b log pi_ref + c w - log Z,   a = 1/(1 + eta*beta), b = eta*beta*a, c = eta*a

    by `steps_per_iteration` optimizer steps on `windkern.losses.wind` inside `windkern.fused_loss`. No logits exist
    outside generation, and no log-prob is taken over from a sampler. One epoch of transformers is one outer iteration.

    What is sampled and judged is saved under `output_dir/completions` as it comes; checkpoints are written as a whole
    or not at all. A killed run goes on with `train(resume_from_checkpoint=True)`; on a CPU it ends with the same bits.

    Args:
        model: causal LM to train, in any mode; with `peft_config`, the base under the adapter.
        args: the settings.
        train_prompts: user messages (or `ChatPrompt`s); for loss="spin" `Demonstration`s of a prompt and an answer.
        eval_prompts: held-out ones for `evaluate`; None or empty where there is no evaluation.
        judge: says who wins; None takes the one that `args.judge` names.
        reference: frozen causal LM, pi_ref, where `args.reference` is "model" and the loss or the evaluation needs it;
            another object than `model`.
        sampler: answers prompts; None takes the one that `args.sampler` names. If it has a method `update(model)`, that
            is called before each iteration, for servers whose weights must follow.
        processing_class: tokenizer of the model.
        peft_config: puts a new adapter on the model, which must have none; `args.reference` "adapter" then needs no
            second model. A PEFT model's own adapter is trained further.
        observer: told about progress.
        callbacks, optimizers: as `transformers.Trainer`.

    Raises:
        ValueError: prompt lists overlap or are empty, a prompt is too long for the model, nothing of the model is
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
        train_prompts: Sequence[str] | Sequence[Demonstration],
        processing_class,
        eval_prompts: Sequence[str] | None = None,
        judge: Judge | None = None,
        reference: nn.Module | None = None,
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
        self.objective = make_objective(args)
        note = self._warn if args.process_index == 0 else Unobserved().note
        prompts, heldout = list(train_prompts), list(eval_prompts or ())
        shown = parts.demonstrations_of(prompts, self.objective.group == "demonstration")
        parts.check_prompts([one.prompt for one in shown] or prompts, heldout)
        parts.check_evaluation(args, heldout, note)
        self.weights_at_start = {"model": fingerprint(model), "reference": fingerprint(reference)}
        new_adapter = peft_config is not None and parts.starts_as_base(peft_config)
        if peft_config is not None:
            model = parts.with_adapter(model, peft_config, args.seed)
        check_model(model)
        processing_class = with_template_arguments(processing_class, args.chat_template_kwargs)
        self.head = FusedHead(model)
        room = Room(args, model, processing_class)
        prompts, self.demonstrations, self.eval_prompts = parts.fitting(room, prompts, heldout, note)
        if args.disable_dropout:
            parts.disable_dropout(model)
        super().__init__(
            model=model,
            args=args,
            data_collator=self._collate,
            train_dataset=(),
            eval_dataset=self.eval_prompts or None,
            processing_class=processing_class,
            callbacks=[Iterations(self), *(callbacks or [])],
            optimizers=optimizers,
        )
        if self.is_fsdp_enabled:
            prepare_plugin(self.accelerator)
        self.loss_is_scaled_for_ga = False  # a mean over the groups of a batch; batches of a step are of one size
        self.world = World(self.accelerator)
        judge = make_judge(args) if judge is None else judge
        self.judge = None if judge is None else check_judge(judge)
        for inside in models_inside(self.judge):
            self.weights_at_start["judge"] = self.weights_at_start.get("judge", {}) | fingerprint(inside)
        if self.judge is None and (self.objective.judged or self.eval_prompts):
            raise ValueError(f"judge must be given for loss={args.loss!r}: pass judge=, or name one in args.judge")
        self.responder = Responder(
            args,
            self.objective.group,
            prompts,
            self.demonstrations,
            processing_class,
            sampler or make_sampler(args, processing_class),
            self._policy_sampler,
            lambda line: self._warn(line) if self.world.is_main else None,
        )
        self.fill = padding_id(processing_class)
        self.scorer = Scorer(self.head, self._scoring_model, self.world, args, self.fill, self._sharded)
        self.scorer.reference = self.reference = make_reference(
            args,
            self.model,
            reference,
            self.scorer,
            self.accelerator if self.is_fsdp_enabled else None,
            new_adapter=new_adapter,
            sharded=self._sharded(),
        )
        folder = Path(args.output_dir) / "completions"
        self.store = RolloutStore(folder)
        self.heldout = HeldOut(self.eval_prompts, args, self.judge, self.world, folder / "held-out", self.observer)
        per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * self.world.size
        self.train_dataset = IterationData(args.steps_per_iteration * per_step, per_step, args.seed)
        self.outer = OuterLoop(
            args,
            self.objective,
            prompts,
            self.world,
            self.store,
            self.responder,
            self.judge,
            self.scorer,
            self.observer,
            args.steps_per_iteration * per_step // args.passes_per_iteration,
        )
        self.history: list[Record] = []
        self._records = History(self.store)
        self._averages, self._iteration = Averages(), 0
        self._iteration_start = time.perf_counter()
        self._anchor_path: Path | None = None  # of the checkpoint that is resumed

    # Setting up.

    def _policy_sampler(self) -> TransformersSampler:
        return self._sampler_of(self.accelerator.unwrap_model(self.model_wrapped))

    def _sampler_of(self, model: nn.Module) -> TransformersSampler:
        def tell(done: float) -> None:
            self.observer.under_way(done * self.world.size)

        synced = self._sharded()
        return parts.transformers_sampler(model, self.processing_class, self.args, synced=synced, under_way=tell)

    def _scoring_model(self) -> nn.Module:
        # Hazard: DDP broadcasts buffers in every forward, and processes do not score equally often. Remedy: without it.
        return self.model_wrapped if self._sharded() else self.model

    def _sharded(self) -> bool:
        """Whether a forward of the policy talks to other processes."""
        loaded = getattr(self, "is_distributed_loading_by_transformers", False)  # transformers 5.17 has no such thing
        return self.is_fsdp_enabled or self.is_deepspeed_enabled or loaded

    def _get_train_sampler(self, *_) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # IterationData has the order

    def _collate(self, groups) -> dict:
        batch = collate(groups, self.fill)  # beside it, what transformers counts tokens by
        return {"batch": batch, "input_ids": batch.input_ids, "attention_mask": batch.attention_mask}

    # The run.

    def train(self, resume_from_checkpoint: str | bool | None = None, **given) -> TrainOutput:
        """Do the iterations that are left.

        Args:
            resume_from_checkpoint: True goes on from the newest whole checkpoint in `output_dir`, a path from that one;
                without it, completions of an earlier run are deleted, and checkpoints too if `args.overwrite`.
            given: as `transformers.Trainer.train`.

        Raises:
            ResumeError: what is in `output_dir` is of a run with other settings, models, prompts or judge.
            FolderInUseError: another process trains in `output_dir`.
            DamagedRecordError, FileNotFoundError: a file of the run that is resumed is damaged or missing.
            ValueError: not resuming, and `output_dir` holds checkpoints that may not be deleted, or an earlier call
                has trained already.
            FloatingPointError: a loss is infinite or no number.
        """
        resume, moved = resume_from_checkpoint, self.state.global_step > 0
        if moved and (
            not resume or (resume is True and latest_checkpoint(self.args.output_dir, lambda _: None) is None)
        ):
            raise ValueError(
                f"train has taken {self.state.global_step} steps with this object, so its model is not where a run "
                "begins; resume from a checkpoint, or make a new trainer with the model that is wanted"
            )
        self.outer.forget()  # what an earlier call knew
        self.responder.anchor, self._averages, self._iteration = None, Averages(), 0
        with owned_by_run(self.args, self._warn):
            self.world.first(lambda: open_run(self, resume))
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **given)
            done = self.state.global_step // self.args.steps_per_iteration
            self._catch_up(done)
            self.history = self.world.first(lambda: self._records.read(done))
        return output

    def begin_iteration(self, step: int) -> None:
        """Fill the data set for the iteration that optimizer step `step` belongs to."""
        done, inside = divmod(step, self.args.steps_per_iteration)
        resumed = not self._iteration and done
        self._catch_up(done)
        if resumed and self.world.is_main:
            self._records.tell_missing(done, self.outer.blocks, self._warn)
        self._iteration_start, self._iteration = time.perf_counter(), done + 1
        self.history = self.world.first(lambda: self._records.read(done))
        self._prepare_reference(step)
        self._prepare_anchor(step)
        if self.args.reset_optimizer and not inside:
            self._forget_moments()
        self.responder.update(self.model)
        groups = self.outer.begin(self._iteration, inside=inside > 0, together=self._sharded())
        self.responder.look_at(self.outer.rollouts)
        if self.args.log_completions and self.world.is_main:
            table = columns_of(self._iteration, step, self.outer.prompts, self.outer.rollouts)
            write_completions(self.store.folder, table)
            track_completions(table, self.args.report_to)
        self.train_dataset.fill(self._iteration, groups)
        if not inside:
            self._averages.add(self.outer.measure(groups))

    def _prepare_reference(self, step: int) -> None:
        """What can only be done while the policy still is what it was in the beginning."""
        if isinstance(self.reference, PrecomputedReference) and not self.reference.load():
            if step:
                raise FileNotFoundError(f"{self.reference.path} is missing, and the policy has moved since it was made")
            groups = self.responder.recorded()
            self.observer.phase(0, "scoring", sum(len(group.completions) for group in groups), RECORDED)
            self.reference.save(groups, self.scorer.policy(groups, 1, self.observer.advance), write=self.world.is_main)
        if self.eval_prompts and not step:
            self._reference_texts(0)

    def _prepare_anchor(self, step: int) -> None:
        if self.objective.group != "anchor" or self.outer.anchor is not None:
            return
        self.outer.anchor = Anchor(self.accelerator.unwrap_model(self.model_wrapped), self.args.anchor_rate)
        self.responder.anchor = self.outer.anchor
        if step:
            self.outer.anchor.load_state_dict(torch.load(self._anchor_path, weights_only=True))

    def _warn(self, line: str) -> None:
        if isinstance(self.observer, Unobserved):
            super()._warn(line)
        else:
            self.observer.note(line)

    def _write_extra(self, folder: Path) -> None:
        if self.outer.anchor is not None:
            torch.save(self.outer.anchor.state_dict(), folder / anchor_file(self.world.rank, self.world.size))

    def _save_checkpoint(self, model, trial) -> None:
        self.observer.phase(self._iteration, "saving a checkpoint")
        super()._save_checkpoint(model, trial)

    def _reference_texts(self, iteration: int) -> Texts:
        if self.reference is None:
            raise ValueError("an evaluation compares with the reference: pass reference=")
        with self.reference.sampling() as model:
            moved = isinstance(self.reference, PrecomputedReference) and self.state.global_step > 0
            return self.heldout.reference_texts(self._sampler_of(model), self._sharded(), iteration, moved=moved)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss over the groups of a batch, through the wrapped model's `__call__`."""
        batch = inputs["batch"].to(self.args.device)
        watch = Watch(self.objective.function, self.objective.scale)
        targets = batch.targets.view(*batch.shape, -1)
        job = loss_job(watch, targets, batch.constants, self.args.temperature, self.scorer.options)
        loss = self.head(model, batch.input_ids, batch.attention_mask, job)
        if not loss.isfinite():  # transformers would log 0 and go on
            raise parts.not_finite(self.args, self.state.global_step + 1, loss.item())
        self._averages.add(step_metrics(watch.logps, batch.constants, self.args))
        self.observer.advance()
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As transformers, with the means of what was counted since the last line."""
        if "loss" in logs:
            extra = self._averages.take()
            if extra and self.world.size > 1:
                values = torch.tensor(list(extra.values()), device=self.args.device)
                extra = dict(zip(extra, self.accelerator.reduce(values, "mean").tolist(), strict=True))
            logs = {**logs, **extra}
        super().log(logs, start_time)

    # Evaluation and records.

    def compare(self, responses: int, iteration: int | None = None) -> tuple[Evaluation, Texts, Texts]:
        """Compare the policy as it is now with the reference on the held-out prompts.

        Args:
            responses: of the policy to each prompt. The draws are the same at every call.
            iteration: for the observer; None is after the last.

        Returns:
            The evaluation, the responses of the policy, and those of the reference.
        """
        iteration = self.args.num_iterations + 1 if iteration is None else iteration
        reference = self._reference_texts(iteration)
        rollouts = self.heldout.sample(self._policy_sampler(), responses, self._sharded(), iteration)
        frozen = None if isinstance(self.reference, PrecomputedReference) else self.scorer.frozen
        result = self.heldout.evaluate(rollouts, reference, self.scorer.policy, frozen, iteration)
        return result, [rollout.texts for rollout in rollouts], reference

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Win rate against the reference on the held-out prompts, its standard error, reward and KL.

        Raises:
            ValueError: there are no held-out prompts, or others are given here.
        """
        if not self.eval_prompts:
            raise ValueError("eval_prompts must be given to the trainer for an evaluation")
        if eval_dataset is not None and eval_dataset is not self.eval_dataset:
            raise ValueError("eval_dataset must be None: the trainer evaluates on its eval_prompts")
        result, metrics = self._evaluation(metric_key_prefix)
        if self.is_in_train and self.evaluates_each_iteration and self.iteration_is_over:
            self.finish_iteration(result)
        return metrics

    def _evaluation(self, prefix: str = "eval") -> tuple[Evaluation, dict[str, float]]:
        result, _, _ = self.compare(self.args.eval_responses, self._iteration)
        metrics = {}
        for name in ("win_rate", "reward", "kl"):
            estimate = getattr(result, name)
            if estimate is not None:
                metrics[f"{prefix}_{name}"] = estimate.mean
                if math.isfinite(estimate.standard_error):  # of one prompt there is none
                    metrics[f"{prefix}_{name}_se"] = estimate.standard_error
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return result, metrics

    @property
    def evaluates_each_iteration(self) -> bool:
        return bool(self.eval_prompts) and self.args.eval_strategy == IntervalStrategy.EPOCH

    @property
    def iteration_is_over(self) -> bool:
        """Whether all steps of the iteration have been taken, and nothing came before (eval_on_start) or in between."""
        return 0 < self.state.global_step == self._iteration * self.args.steps_per_iteration

    def finish_iteration(self, result: Evaluation | None) -> None:
        """Record the iteration that has just been fitted."""
        seconds = time.perf_counter() - self._iteration_start
        first, last = (k * self.args.steps_per_iteration for k in (self._iteration - 1, self._iteration))
        lines = [line for line in self.state.log_history if "loss" in line and first < line["step"] <= last]
        record = make_record(self._iteration, self.outer.rollouts, result, lines, seconds)
        self.history.append(record)
        if self.world.is_main:
            self._records.write(record)
        self.observer.finished(record)

    def _catch_up(self, iteration: int) -> None:
        """Record an iteration whose checkpoint was written, but whose evaluation or record was cut off by a kill."""
        missing = self._records.missing(iteration, self.outer.blocks) if iteration else []
        if self.world.agree(missing) == [f"iteration-{iteration:04d}/record.json"]:
            self._iteration = iteration
            self.outer.recall(iteration)
            self.finish_iteration(self._evaluation()[0] if self.evaluates_each_iteration else None)

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
