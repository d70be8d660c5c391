"""Where the epochs of transformers.Trainer become outer iterations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import TrainerCallback

if TYPE_CHECKING:
    from windkern.train.trainer import WindTrainer


class Iterations(TrainerCallback):
    """Tells the trainer where its iterations begin and end, and its observer which steps are taken."""

    def __init__(self, trainer: WindTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **given) -> None:
        done, inside = divmod(state.global_step, args.steps_per_iteration)
        if done >= args.num_iterations:
            self.trainer.observer.note(f"resumed: all {done} iterations are done")
        elif state.global_step:
            steps = f", {inside} of its {args.steps_per_iteration} steps are done" if inside else ""
            self.trainer.observer.note(f"resumed with iteration {done + 1} of {args.num_iterations}{steps}")

    def on_epoch_begin(self, args, state, control, **given) -> None:
        self.trainer.begin_iteration(state.global_step)
        self._fitting(args, state)

    def on_step_end(self, args, state, control, **given) -> None:
        if self.trainer.outer.anchor is not None:
            self.trainer.outer.anchor.update()

    def on_evaluate(self, args, state, control, **given) -> None:
        self._fitting(args, state)

    def on_save(self, args, state, control, **given) -> None:
        self._fitting(args, state)

    def on_epoch_end(self, args, state, control, **given) -> None:
        if not self.trainer.evaluates_each_iteration and self.trainer.iteration_is_over:
            self.trainer.finish_iteration(None)

    def _fitting(self, args, state) -> None:
        """Steps are taken from here on, unless all of the iteration have been."""
        iteration, batches = self.trainer._iteration, args.gradient_accumulation_steps
        inside = state.global_step - (iteration - 1) * args.steps_per_iteration
        if iteration and inside < args.steps_per_iteration:
            self.trainer.observer.phase(
                iteration, "fitting", args.steps_per_iteration * batches, "batches", inside * batches
            )
