"""Log-probs of groups under the policy, the anchor and the reference, shared out among processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from windkern.train.config import WindConfig
from windkern.train.fused_head import FusedHead, score_job
from windkern.train.groups import Batch, FitGroup, collate
from windkern.train.world import World

if TYPE_CHECKING:
    from windkern.train.reference import Reference


class Scorer:
    """Scores groups in batches, each on one process; every process gets all results.

    Args:
        head: of the policy.
        wrapped: returns the policy as it is wrapped at the moment.
        world: the processes.
        config: temperature and the options of the fused ops.
        fill: id in padding.
        together: whether the policy's forwards talk to each other (a sharded model).
    """

    def __init__(
        self,
        head: FusedHead,
        wrapped: Callable[[], nn.Module],
        world: World,
        config: WindConfig,
        fill: int,
        together: Callable[[], bool],
    ):
        self.head, self.wrapped, self.world, self.config, self.fill = head, wrapped, world, config, fill
        self.together = together
        self.reference: Reference | None = None

    @property
    def options(self) -> dict[str, object]:
        """Keyword arguments of the fused ops."""
        return {
            "memory_budget": self.config.memory_budget,
            "batch_invariant": self.config.batch_invariant,
            "backend": self.config.backend,
        }

    def score_batch(self, batch: Batch) -> Tensor:
        """(B, K) log-probs under the policy as it is now."""
        job = score_job(batch.targets, self.config.temperature, self.options)
        return self.head(self.wrapped(), batch.input_ids, batch.attention_mask, job).view(batch.shape)

    def policy(
        self, groups: Sequence[FitGroup], size: int, advance: Callable[[int], None] = lambda count: None
    ) -> list[Tensor]:
        """(K,) log-probs of each group under the policy, in batches of `size` neighbours; `advance` counts them."""
        return self._share(groups, size, lambda batch, part: self.score_batch(batch), advance)

    def frozen(
        self, groups: Sequence[FitGroup], size: int, advance: Callable[[int], None] = lambda count: None
    ) -> list[Tensor]:
        """The same under the reference."""
        return self._share(groups, size, self.reference.score, advance)

    @torch.no_grad()
    def _share(
        self,
        groups: Sequence[FitGroup],
        size: int,
        score: Callable[[Batch, list[FitGroup]], Tensor],
        advance: Callable[[int], None],
    ) -> list[Tensor]:
        parts = [list(groups[first : first + size]) for first in range(0, len(groups), size)]
        accelerator = self.world.accelerator
        self.wrapped().eval()

        def work(part: list[FitGroup]) -> list[list[float]]:
            batch = collate(part, self.fill).to(accelerator.device)
            with accelerator.autocast():
                return score(batch, part).float().tolist()

        def done(batches: Sequence[list[FitGroup]]) -> None:
            advance(sum(len(group.completions) for part in batches for group in part))

        rows = [row for part in self.world.share(parts, work, together=self.together(), done=done) for row in part]
        return [torch.tensor(row) for row in rows]
