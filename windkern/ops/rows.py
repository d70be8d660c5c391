"""A block of rows on its way through a walk: gathered and padded going down, scattered coming back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from windkern import backends
from windkern.kernels import buffers
from windkern.kernels.contract import Upstream
from windkern.ops import gradients, walk
from windkern.ops.inputs import IGNORED, check_targets
from windkern.spec import WalkSpec


@dataclass
class RowBlock:
    """The rows of a walk: `total` of them, the first `count` those of `targets`."""

    walk: walk.Walk
    hidden: list[Tensor]  # (total, H_k) in the operands' dtype
    weight: list[Tensor]  # (V, H_k)
    bias: Tensor | None
    targets: Tensor  # (total,)
    scored: Tensor  # (count,)
    count: int

    @classmethod
    def of(
        cls,
        spec: WalkSpec,
        hidden: list[Tensor],
        weight: list[Tensor],
        bias: Tensor | None,
        targets: Tensor,
        rows: Tensor | None,
    ) -> RowBlock:
        """Rows `rows` (count,) of the blocks, all of them where that is None; `targets` (count,) are theirs."""
        total = spec.padded_rows(targets.shape[0])
        return cls(
            walk.Walk.of(spec, targets.device.type),
            _gather(hidden, rows, targets, total, spec.operand),
            weight,
            bias,
            _pad(targets, total, IGNORED),
            targets >= 0,
            targets.shape[0],
        )

    def forward(self) -> walk.Saved:  # type: ignore[name-defined]  # the field hides the module
        check_targets(self.targets, self.weight[0].shape[0])
        with backends.on_device_of(self.targets):
            saved = walk.forward(self.walk, self.hidden, self.weight, self.bias, self.targets)
        _check_some_entry_is_open(saved, self.bias, self.targets)
        return saved

    def selected(self, values: Tensor) -> Tensor:
        """(count,) of the walk's (total,) results, 0 where ignored."""
        return torch.where(self.scored, values[: self.count], 0.0)

    def padded(self, values: Tensor) -> Tensor:
        return _pad(values, self.targets.shape[0], 0.0)

    def backward(
        self,
        upstream: Upstream,
        saved: walk.Saved,  # type: ignore[name-defined]
        dweight: list[Tensor | None],
        dbias: Tensor | None,
        *,
        accumulate: bool,
    ) -> gradients.Grads:
        """Gradients for `upstream` (count,) of each output; dhidden_k is (total, H_k) in the dtype of sums."""
        upstream = Upstream(
            *(None if part is None else self.padded(torch.where(self.scored, part, 0.0)) for part in upstream)
        )
        rows = self.hidden, self.weight, self.bias, self.targets
        with backends.on_device_of(self.targets):
            return gradients.backward(self.walk, upstream, *rows, saved, dweight, dbias, accumulate=accumulate)


def _gather(
    blocks: list[Tensor], rows: Tensor | None, targets: Tensor, total: int, operand: torch.dtype
) -> list[Tensor]:
    """The walk's rows: copies of the blocks in the operand dtype, with `total` rows; themselves if nothing changes.

    Hazard: a row with an ignored target may hold NaN, and 0 * NaN is NaN in a product. Remedy: such rows are 0, as
    those at the end.
    """
    if rows is None and all(block.shape[0] == total and block.dtype == operand for block in blocks):
        return blocks
    count, ignored = targets.shape[0], (targets < 0).unsqueeze(1)
    gathered = []
    for block in blocks:
        copy = buffers.empty("compact", (total, block.shape[1]), operand, block.device)
        if rows is None:
            copy[:count].copy_(block)
        elif block.dtype == operand:
            torch.index_select(block, 0, rows, out=copy[:count])
        else:
            step = max(1, (1 << 20) // max(1, block.shape[1] * block.element_size()))
            for first in range(0, count, step):
                part = slice(first, min(first + step, count))
                copy[part].copy_(buffers.track("scratch", block.index_select(0, rows[part])))
        copy[:count].masked_fill_(ignored, 0.0)
        copy[count:].zero_()
        gathered.append(copy)
    return gathered


def _pad(values: Tensor, total: int, fill: float) -> Tensor:
    if values.shape[0] == total:
        return values
    return torch.cat([values, values.new_full((total - values.shape[0],), fill)])


def _check_some_entry_is_open(saved: walk.Saved, bias: Tensor | None, targets: Tensor) -> None:
    """A row whose logits are all -inf has no distribution; seen on a CPU and in debug mode."""
    if targets.device.type != "cpu" and not backends.debug_mode():
        return
    closed = (saved.stats.run_max == -torch.inf) & (targets >= 0)
    if not bool(closed.any()):
        return
    row = f"every vocabulary entry of scored row {int(closed.nonzero()[0])}"
    if bias is not None and bool((bias == -torch.inf).all()):
        raise ValueError(f"bias masks {row} with -inf")
    raise ValueError(
        f"the logits of {row} are -inf: hidden @ weight.T overflows {saved.stats.run_max.dtype}, so hidden or weight "
        "holds -inf or numbers that are too large"
    )
