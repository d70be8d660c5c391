"""Assemble a run from the arguments of `WindTrainer`: policy, prompts, judge, reference and outer loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from windkern.train.adapters import starts_as_base, with_adapter
from windkern.train.batches import IterationData
from windkern.train.checkpoints.identity import fingerprint, identity_of, models_inside
from windkern.train.checkpoints.opening import open_run
from windkern.train.config import WindConfig, check_one_gpu
from windkern.train.data.datasets import PromptSets, prompt_sets
from windkern.train.data.prompts import with_template_arguments
from windkern.train.dropout import disable_dropout
from windkern.train.evaluation.evaluator import Evaluator
from windkern.train.judges import make_judge
from windkern.train.judges.judge import Judge, as_judge
from windkern.train.loss_plan import LossPlan, plan_loss
from windkern.train.outer import OuterLoop
from windkern.train.policy import Policy, PolicySettings
from windkern.train.preconditions import Room, check_evaluation, check_model, check_reporting, check_tokenizer
from windkern.train.reference import make_reference
from windkern.train.report.notices import Notices
from windkern.train.report.progress import Observer
from windkern.train.responder import Responder
from windkern.train.samplers import make_sampler
from windkern.train.samplers.sampler import Sampler
from windkern.train.store import GroupStore


@dataclass(frozen=True)
class Start:
    """The part of a run that is known before transformers chooses devices and processes.

    Attributes:
        plan: plan of the loss.
        policy: the model to train, with its adapter and tokenizer; it does not know the processes yet.
        prompts: the prompts that fit into the model.
        new_adapter: whether the policy's adapter is new, so that its base is the initial policy.
        weights: `fingerprint`s of policy and reference, taken before anything changes them.
    """

    plan: LossPlan
    policy: Policy
    prompts: PromptSets
    new_adapter: bool
    weights: dict[str, dict[str, str]]


def start_of(
    config: WindConfig,
    model: nn.Module,
    tokenizer: Any,
    *,
    train_dataset: Iterable,
    eval_dataset: Iterable | None,
    ref_model: nn.Module | None,
    peft_config: Any,
    observer: Observer,
    notices: Notices,
) -> Start:
    """Check the arguments of `WindTrainer`, and return the start of its run.

    Arguments and errors are those of `WindTrainer`.
    """
    check_one_gpu(config.n_gpu)
    check_reporting(config)
    check_tokenizer(tokenizer)
    plan = plan_loss(config)
    given = prompt_sets(train_dataset, eval_dataset, demonstrations=plan.group == "demonstration")
    check_evaluation(config, given.heldout, notices)
    weights = {"model": fingerprint(model), "reference": fingerprint(ref_model)}
    if peft_config is not None:
        model = with_adapter(model, peft_config, config.seed)
    check_model(model)
    tokenizer = with_template_arguments(tokenizer, config.chat_template_kwargs)
    policy = Policy(model, tokenizer, PolicySettings.of(config), observer=observer)
    prompts = Room(config, model, tokenizer).fit_all(given, notices)
    if config.disable_dropout:
        disable_dropout(model)
    return Start(
        plan=plan,
        policy=policy,
        prompts=prompts,
        new_adapter=peft_config is not None and starts_as_base(peft_config),
        weights=weights,
    )


class Run:
    """The parts of a run, once its processes and devices are known.

    Args:
        config: settings of the run.
        start: the start of the run; its policy knows the processes by now.
        judge: a judge, or a callable that returns rewards; None: the one that `config` names.
        ref_model: frozen causal LM, where `config.reference` is "model".
        sampler: answers prompts; None: the one that `config` names.
        notices: receives what a user should know.
        fsdp: whether FSDP2 shards models.

    Attributes:
        judge: compares responses; None where the loss needs no judge and nothing is evaluated.
        reference: pi_ref; None where neither the loss nor an evaluation needs it.
        data: the groups of an iteration, as steps take them.
        outer: makes the iterations.
        evaluator: compares on held-out prompts; None if there are none.

    Raises:
        ValueError: as `WindTrainer`.
    """

    def __init__(
        self,
        config: WindConfig,
        start: Start,
        *,
        judge: Judge | Callable | None,
        ref_model: nn.Module | None,
        sampler: Sampler | None,
        notices: Notices,
        fsdp: bool,
    ):
        self.config, self.start, self.notices = config, start, notices
        policy, prompts = start.policy, start.prompts
        self.world = policy.world
        self.judge = as_judge(judge, config.judge_strength) if judge is not None else make_judge(config)
        if self.judge is None and (start.plan.judged or prompts.heldout):
            why = f"loss={config.loss!r}" if start.plan.judged else "an evaluation on eval_dataset"
            raise ValueError(f"judge must be given for {why}: pass judge=, or name one in args.judge")
        self.weights = dict(start.weights)
        for inside in models_inside(self.judge):
            self.weights["judge"] = self.weights.get("judge", {}) | fingerprint(inside)
        sampler = sampler or make_sampler(config, policy.tokenizer)
        self.reference = make_reference(config, policy, ref_model, new_adapter=start.new_adapter, fsdp=fsdp)
        if prompts.heldout and self.reference is None:
            raise ValueError("an evaluation compares with the reference: pass ref_model=")
        step_size = config.prompts_per_step(self.world.size)
        self.data = IterationData(config.steps_per_iteration * step_size, step_size, config.seed)
        self.outer = OuterLoop(
            config,
            start.plan,
            policy,
            self.reference,
            Responder(config, start.plan.group, prompts, policy, sampler, notices),
            self.judge,
            GroupStore(Path(config.output_dir) / "completions"),
        )
        self.evaluator = self._make_evaluator() if prompts.heldout else None

    def _make_evaluator(self) -> Evaluator:
        config, policy = self.config, self.start.policy
        return Evaluator(
            self.start.prompts.heldout,
            self.judge,
            policy,
            self.reference,
            self.world,
            None,  # Reason: until `open` has been called, the output folder may belong to another run
            policy.observer,
            seed=config.seed,
            reference_responses=config.reference_responses,
            sampling_batch_size=config.sampling_batch_size,
            scoring_batch_size=config.per_device_eval_batch_size,
        )

    def identity(self) -> dict[str, Any]:
        """Return everything that determines the weights at the end of the run."""
        config, policy, prompts, judge = self.config, self.start.policy, self.start.prompts, self.judge
        return identity_of(
            config,
            policy.model,
            policy.tokenizer,
            reference=getattr(self.reference, "model", None) if config.reference == "model" else None,
            prompts=prompts.demonstrations or prompts.train,
            heldout=prompts.heldout,
            judge="" if judge is None else f"{judge.name}, strength {getattr(judge, 'strength', None)}",
            processes=self.world.size,
            weights=self.weights,
        )

    def open(self, resume: str | bool | None) -> None:
        """Claim the output folder for this run; see `windkern.train.checkpoints.opening.open_run`.

        Args:
            resume: whether to resume, or the checkpoint to resume from.

        Raises:
            ResumeError, DamagedRecordError, ValueError: as `open_run`, on the first process.
            AnotherProcessError: on the other processes, if the first has failed.
        """
        store = self.outer.store
        self.world.first(lambda: open_run(self.config, store, self.identity(), resume, self.notices))
        if self.evaluator is not None:
            self.evaluator.folder = store.folder / "held-out"
