"""A block of rows of a walk: it gathers and pads its inputs, runs forward and backward, and selects results."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from windkern import backends
from windkern.kernels import buffers
from windkern.kernels.contract import HiddenGrad, Upstream
from windkern.ops import gradients, walk
from windkern.ops.inputs import IGNORED, check_targets
from windkern.sharding.passing import CollectedRows, PassedRows
from windkern.sharding.ranks import Ranks
from windkern.spec import WalkSpec

_ELSEWHERE = 1 << 24  # columns beyond the vocabulary: more than a tile, whose last columns can lie beyond it too


@dataclass
class RowBlock:
    """The rows of a walk: `total` rows, the first `count` of which belong to the caller's targets."""

    walk: walk.Walk
    hidden: list[Tensor]  # (total, H_k) in the operands' dtype
    weight: list[Tensor] | list[PassedRows]  # (V, H_k)
    bias: Tensor | None
    labels: Tensor  # (total,)
    targets: Tensor  # (total,) labels as row numbers of `weight`, beyond its rows where another rank has the target
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
        """Build the block of rows `rows` (count,) of `hidden` (None: all of them), with their `targets` (count,)."""
        total = spec.padded_rows(targets.shape[0])
        labels = _pad(targets, total, IGNORED)
        blocks: walk.Blocks = weight
        if spec.streams:
            ranks, slabs = Ranks(spec.group), spec.slabs(spec.vocab_size)
            blocks = [PassedRows(head, ranks, spec.vocab_size, slabs, spec.operand) for head in weight]
        return cls(
            walk.Walk.of(spec, targets.device.type),
            _in_place(spec, _gather(spec, hidden, rows, targets, total)),
            blocks,
            bias,
            labels,
            _of_shard(labels, spec.vocab_start, weight[0].shape[0]) if spec.merges else labels,
            targets.shape[0],
        )

    @property
    def scored(self) -> Tensor:
        """Which of the caller's rows are scored, (count,)."""
        return self.labels[: self.count] >= 0

    def forward(self) -> tuple[walk.Results, walk.Saved]:  # type: ignore[name-defined]  # the field hides the module
        """Return the results of the caller's rows, (count,), and what backward needs of all rows."""
        check_targets(self.labels, self.walk.spec.vocab_size or self.weight[0].shape[0])
        with backends.on_device_of(self.targets):
            results, saved = walk.forward(self.walk, self.hidden, self.weight, self.bias, self.targets)
        _check_some_entry_is_open(saved, self.bias, self.targets)
        if self.count < self.targets.shape[0]:
            logps, lse, entropy = (None if part is None else part[: self.count] for part in results[:3])
            results = results._replace(logps=logps, lse=lse, entropy=entropy)
        return results, saved

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
    ) -> list[HiddenGrad | None]:
        """Return dhidden_k (total, H_k), to be finished, for `upstream` (count,); fill dweight and dbias."""
        upstream = Upstream(*(None if part is None else self.padded(part) for part in upstream))
        rows = self.hidden, self.weight, self.bias, self.targets
        sinks: list[Tensor | None] | list[CollectedRows | None] = dweight
        if self.walk.spec.streams:
            sinks = [None if grad is None else self._collected(grad, accumulate) for grad in dweight]
        with backends.on_device_of(self.targets):
            return gradients.backward(self.walk, upstream, *rows, saved, sinks, dbias, accumulate=accumulate)

    def finished(self, grad: HiddenGrad, like: Tensor, rows: Tensor | None) -> Tensor:
        """Return a gradient of `hidden` in the caller's rows and dtype; ignored rows get exact zeros."""
        if rows is not None:
            out = torch.zeros_like(like, memory_format=torch.contiguous_format)
        elif grad.owned and grad.total.dtype == like.dtype:
            out = grad.total[: self.count]
        else:
            out = torch.empty_like(like, memory_format=torch.contiguous_format)
        self.write(grad, rows, out)
        return out

    def write(self, grad: HiddenGrad, rows: Tensor | None, out: Tensor) -> None:
        """Write a gradient of `hidden` to its rows of `out`: to all of them, or to those at `rows`."""
        with backends.on_device_of(self.targets):
            self.walk.kernels.write_hidden_grad(grad, self.targets, rows, out)

    def _collected(self, grad: Tensor, accumulate: bool) -> CollectedRows:
        spec = self.walk.spec
        ranks, width = Ranks(spec.group), spec.slab_width
        return CollectedRows(grad, ranks, spec.vocab_size, width, spec.reduce_dtype, accumulate=accumulate)


def _gather(spec: WalkSpec, blocks: list[Tensor], rows: Tensor | None, targets: Tensor, total: int) -> list[Tensor]:
    """Copy the walk's rows to `total` rows in the operand dtype; return the blocks themselves if nothing changes.

    Hazard: a row with an ignored target can hold NaN, and 0 * NaN is NaN in a product. Remedy: such rows are set to 0,
    like the padding.
    """
    operand, count = spec.operand, targets.shape[0]
    copies = rows is not None or spec.masks
    if not copies and all(block.shape[0] == total and block.dtype == operand for block in blocks):
        return blocks
    ignored = (targets < 0).unsqueeze(1) if spec.masks else None
    gathered = []
    for block in blocks:
        copy = buffers.empty("compact", (total, block.shape[1]), operand, block.device)
        given = copy if count == total else copy[:count]
        if rows is None:
            given.copy_(block)
        elif block.dtype == operand:
            torch.index_select(block, 0, rows, out=given)
        else:
            step = max(1, (1 << 20) // max(1, block.shape[1] * block.element_size()))
            for first in range(0, count, step):
                part = slice(first, min(first + step, count))
                copy[part].copy_(buffers.track("scratch", block.index_select(0, rows[part])))
        if ignored is not None:
            given.masked_fill_(ignored, 0.0)
        if count < total:
            copy[count:].zero_()
        gathered.append(copy)
    return gathered


def _in_place(spec: WalkSpec, blocks: list[Tensor]) -> list[Tensor]:
    """Return rows as kernels that multiply themselves read them, copied once instead of by each of them."""
    if not spec.fused:
        return blocks
    reads, dense = backends.BACKENDS[spec.backend].reads_in_place, torch.contiguous_format
    return [each if reads(each) else buffers.track("compact", each.clone(memory_format=dense)) for each in blocks]


def _of_shard(targets: Tensor, start: int, count: int) -> Tensor:
    """Renumber targets for the `count` rows of the head from `start` on; others lie beyond these rows and all tiles."""
    inside = (targets >= start) & (targets < start + count)
    return torch.where(targets < 0, targets, torch.where(inside, targets - start, count + _ELSEWHERE))


def _pad(values: Tensor, total: int, fill: float) -> Tensor:
    if values.shape[0] == total:
        return values
    return torch.cat([values, values.new_full((total - values.shape[0],), fill)])


def _check_some_entry_is_open(saved: walk.Saved, bias: Tensor | None, targets: Tensor) -> None:
    """Raise for a row whose logits are all -inf, which has no distribution; checked on a CPU and in debug mode."""
    if not backends.checks_values(targets.device):
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
