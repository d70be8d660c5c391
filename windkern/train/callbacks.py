"""Where the epochs of transformers.Trainer become outer iterations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import TrainerCallback

if TYPE_CHECKING:
    from windkern.train.trainer import WindTrainer


class Iterations(TrainerCallback):
    """Tells the trainer where its iterations begin and end."""

    def __init__(self, trainer: WindTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **given) -> None:
        self.trainer.begin_iteration(state.global_step)

    def on_step_end(self, args, state, control, **given) -> None:
        if self.trainer.outer.anchor is not None:
            self.trainer.outer.anchor.update()

    def on_epoch_end(self, args, state, control, **given) -> None:
        if not self.trainer.evaluates_each_iteration and self.trainer.iteration_is_over:
            self.trainer.finish_iteration(None)
