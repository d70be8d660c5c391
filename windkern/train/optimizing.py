"""Make, save and load the optimizer of a WindTrainer."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from windkern.train.anchor import anchor_file
from windkern.train.checkpoints.manifest import CorruptCheckpointError
from windkern.train.errors import one_line
from windkern.train.inherited import check_optimizer_arguments
from windkern.train.optim import forget_moments, master_optimizer

if TYPE_CHECKING:
    from transformers import Trainer as _Mixed

    from windkern.train.config import WindConfig
    from windkern.train.loss_plan import LossPlan
    from windkern.train.policy import Policy
    from windkern.train.report.notices import Notices
    from windkern.train.world import World
else:
    _Mixed = object


class Optimizing(_Mixed):
    """Mixin of `WindTrainer` for its optimizer; it precedes `transformers.Trainer` among the bases."""

    args: WindConfig
    loss_plan: LossPlan
    notices: Notices
    policy: Policy
    world: World

    @property
    def _updates_in_backward(self) -> bool:
        """Whether weights are updated inside the backward pass: by DeepSpeed, LOMO, or an optimizer for each layer."""
        return self.is_deepspeed_enabled or any(kind in self.args.optim for kind in ("lomo", "layerwise"))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer as transformers does, with float32 master weights where 16-bit weights are trained."""
        check_optimizer_arguments(self.args, self.model)
        if self.optimizer is None and not self.policy.sharded:
            self.optimizer_cls_and_kwargs = master_optimizer(self.model, self.args, self.world.size, self.notices)
        return super().create_optimizer(model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.reset_optimizer and self.state.global_step % self.args.steps_per_iteration == 0:
            # The next step would drop the moments anyway, and they are two thirds of the file.
            forget_moments(getattr(self.optimizer, "optimizer", self.optimizer))
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not self.policy.sharded and not Path(checkpoint, "optimizer.pt").is_file():
            raise FileNotFoundError(
                f"{checkpoint} has no optimizer.pt (save_only_model=True?), so a run cannot be resumed from it"
            )
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except (EOFError, pickle.UnpicklingError) as error:
            why = one_line(error).split(". ")[0]
            raise CorruptCheckpointError(f"{checkpoint}: optimizer.pt or scheduler.pt cannot be read: {why}") from error
        if checkpoint is not None and self.loss_plan.group == "anchor":
            path = Path(checkpoint) / anchor_file(self.world.rank, self.world.size)
            self.policy.follow(self.args.anchor_rate).load_state_dict(torch.load(path, weights_only=True))

    def _write_extra(self, folder: Path) -> None:
        if self.policy.anchor is not None:
            torch.save(self.policy.anchor.state_dict(), folder / anchor_file(self.world.rank, self.world.size))

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 6 operations for each parameter and token."""
        return 6 * inputs["batch"].rows.input_ids.numel() * sum(value.numel() for value in self.model.parameters())
