"""Turn the epochs of transformers.Trainer into outer iterations."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, cast

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import IntervalStrategy

from windkern.train.batches import IterationData
from windkern.train.data.records import records_of, save_records
from windkern.train.evaluation.evaluator import Evaluator
from windkern.train.iteration import Iteration
from windkern.train.metrics import Averages, make_record
from windkern.train.optim import forget_moments
from windkern.train.outer import OuterLoop
from windkern.train.reference import RecordedLogps
from windkern.train.report.completions import columns_of, track_completions, write_completions
from windkern.train.report.history import History
from windkern.train.report.notices import Notices
from windkern.train.report.progress import RECORDED, Observer, Record


class Iterations(TrainerCallback):
    """The outer iterations of a trainer, which begins one before each epoch; events end and record it.

    An iteration ends with its epoch, or with the evaluation after it. A trainer calls `catch_up` and `begin` before
    each epoch, and `catch_up` again after the last.

    Args:
        outer: makes the iterations.
        evaluator: compares on held-out prompts; None if there are none.
        data: filled with the groups to fit.
        notices: receives what a user should know.

    Attributes:
        number: number of the iteration, counted from 1; 0 before the first.
        current: the iteration that has begun; None before the first.
        history: records of the finished iterations.
        averages: means of the steps' metrics since the last log line.
    """

    def __init__(
        self,
        outer: OuterLoop,
        evaluator: Evaluator | None,
        data: IterationData,
        notices: Notices,
    ):
        self.outer, self.evaluator, self.data, self.notices = outer, evaluator, data, notices
        self.config, self.world, self.observer = outer.config, outer.world, outer.observer
        self.records = History(outer.store, judged=outer.plan.judged)
        self.history: list[Record] = []
        self.forget()

    def forget(self) -> None:
        """Reset to the state before the first iteration. Files on disk are kept."""
        self.outer.forget()
        self.outer.policy.anchor = None
        self.averages, self.number = Averages(), 0
        self.current: Iteration | None = None
        self._recorded, self._resumed = True, True  # the first iteration to begin may be resumed
        self._start = time.perf_counter()

    @property
    def evaluated(self) -> bool:
        """Whether each iteration ends with an evaluation."""
        return self.evaluator is not None and self.config.eval_strategy == IntervalStrategy.EPOCH

    # Events of transformers.Trainer.

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        self._mark_reference(state.global_step)
        done, inside = divmod(state.global_step, args.steps_per_iteration)
        if done >= args.num_iterations:
            self.observer.note(f"resumed: all {done} iterations are done")
        elif state.global_step:
            steps = f", {inside} of its {args.steps_per_iteration} steps are done" if inside else ""
            self.observer.note(f"resumed with iteration {done + 1} of {args.num_iterations}{steps}")

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        self._mark_reference(state.global_step)
        if self.outer.policy.anchor is not None:
            self.outer.policy.anchor.update()

    def on_evaluate(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **given: Any,
    ) -> None:
        # An evaluation before the first step, or within an iteration, does not end one.
        if self.evaluated and 0 < state.global_step == self.number * args.steps_per_iteration:
            self._finish(state, {name.removeprefix("eval_"): value for name, value in (metrics or {}).items()})
        self._tell_fitting(state)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        self._tell_fitting(state)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        if not self.evaluated and state.global_step == self.number * args.steps_per_iteration:
            self._finish(state, None)

    # Called by the trainer.

    def catch_up(self, state: TrainerState) -> bool:
        """Record an iteration whose checkpoint was written, but whose evaluation or record was cut off by a kill.

        Returns:
            Whether its evaluation is missing, so that it is recorded once the trainer has evaluated.
        """
        done = state.global_step // self.config.steps_per_iteration
        missing = self.records.missing(done, self.outer.blocks) if done else []
        if self.world.agree(missing) != [f"iteration-{done:04d}/record.json"]:
            return False
        self.number, self.current, self._recorded = done, self.outer.recall(done), False
        if not self.evaluated:
            self._finish(state, None)
        return self.evaluated

    def begin(self, state: TrainerState, optimizer: torch.optim.Optimizer) -> None:
        """Begin the iteration of the coming epoch, or resume it if some of its steps have been taken."""
        config = self.config
        done, inside = divmod(state.global_step, config.steps_per_iteration)
        if self._resumed and done and self.world.is_main:
            self.records.tell_missing(done, self.outer.blocks, self.notices)
        self._resumed = False
        self._start, self.number = time.perf_counter(), done + 1
        self.read_history(state)
        self._prepare_reference(state.global_step)
        if self.outer.plan.group == "anchor" and self.outer.policy.anchor is None:
            self.outer.policy.follow(config.anchor_rate)
        if config.reset_optimizer and not inside:
            forget_moments(getattr(optimizer, "optimizer", optimizer))
        self.outer.respond.update()
        self.current, self._recorded = self.outer.begin(self.number, inside=inside > 0), False
        self.outer.respond.look_at(self.current.groups)
        if config.log_completions and self.world.is_main:
            table = columns_of(self.number, state.global_step, self.outer.prompts, self.current.groups)
            write_completions(self.outer.store.folder, table)
            track_completions(table, config.report_to)
        self.data.fill(self.number, self.current.fitted)
        if not inside:
            self.averages.add(self.outer.measure(self.current))
        self._tell_fitting(state)

    def read_history(self, state: TrainerState) -> None:
        """Read the records of all finished iterations."""
        done = state.global_step // self.config.steps_per_iteration
        self.history = self.world.first(lambda: self.records.read(done))

    # Helpers of the methods above.

    def _prepare_reference(self, step: int) -> None:
        """Do everything that needs the untrained policy: precomputed log-probs and the reference's answers."""
        reference = self.outer.reference
        if isinstance(reference, RecordedLogps) and not reference.load():
            if step:
                raise FileNotFoundError(
                    f"{reference.path} is missing, and the policy has been trained since it was written"
                )
            groups = self.outer.respond.recorded()
            self.observer.phase(0, "scoring", sum(len(group.completions) for group in groups), RECORDED)
            reference.record(groups, self.observer.advance)
        if self.evaluator is not None and not step:
            self.evaluator.answer_once(0)

    def _mark_reference(self, step: int) -> None:
        if isinstance(self.outer.reference, RecordedLogps):
            self.outer.reference.gone = step > 0

    def _finish(self, state: TrainerState, evaluated: Mapping[str, float] | None) -> None:
        if self._recorded or self.current is None:
            return
        first, last = (k * self.config.steps_per_iteration for k in (self.number - 1, self.number))
        lines = [line for line in state.log_history if "loss" in line and first < line["step"] <= last]
        record = make_record(self.current, evaluated, lines, time.perf_counter() - self._start)
        self._recorded = True
        self.history.append(record)
        if self.world.is_main:
            file = self.outer.store.responses(self.number)
            save_records(file, records_of(self.outer.prompts, self.current.groups))
            self.records.write(record)
        cast(Observer, self.observer).finished(record)  # the trainer's observer

    def _tell_fitting(self, state: TrainerState) -> None:
        """Tell the observer that the steps of the iteration follow, unless all have been taken."""
        batches = self.config.gradient_accumulation_steps
        inside = state.global_step - (self.number - 1) * self.config.steps_per_iteration
        if self.number and inside < self.config.steps_per_iteration:
            steps = self.config.steps_per_iteration * batches
            self.observer.phase(self.number, "fitting", steps, "batches", inside * batches)
