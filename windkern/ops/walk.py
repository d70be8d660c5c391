"""Forward of a walk over vocabulary slabs: log-probs of compacted rows, and the results that backward needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from windkern import backends
from windkern.kernels import buffers
from windkern.kernels.contract import (
    Exps,
    Kept,
    RowKernels,
    RowState,
    RowStats,
    Settled,
    Slab,
    TileKernels,
    Unit,
    kept_gain,
)
from windkern.kernels.gemm import Products, accumulator, products_of
from windkern.sharding.agreement import agreed
from windkern.sharding.merge import merged
from windkern.sharding.passing import PassedRows
from windkern.sharding.ranks import Ranks
from windkern.spec import WalkSpec, row_stride

Blocks: TypeAlias = list[Tensor] | list[PassedRows]  # (V, H_k) of a head, read slab by slab


@dataclass(frozen=True)
class Walk:
    """A specification with the kernels and products that run it on one kind of device."""

    spec: WalkSpec
    kernels: RowKernels
    products: Products

    @classmethod
    def of(cls, spec: WalkSpec, device_type: str) -> Walk:
        return cls(spec, backends.BACKENDS[spec.backend].kernels(), products_of(device_type, spec.operand))

    @property
    def dz_dtype(self) -> torch.dtype:
        return self.products.multiplied if self.spec.wide_dz else self.spec.operand

    def slab(self, logits: Tensor | None, bias: Tensor | None, targets: Tensor, start: int, width: int) -> Slab:
        if bias is not None:
            bias = bias[start : start + width].to(self.products.acc).contiguous()
        return Slab(logits, bias, targets, start, self.spec.transform)

    def heads(self, weight: Blocks, start: int, stop: int) -> list[Tensor]:
        """Return rows (W, H_k) of the head in the dtype that is multiplied."""
        return [self.products.prepared(head[start:stop]) for head in weight]

    def joins_slabs(self, weight: Blocks) -> bool:
        """Return whether a kernel takes several slabs at once, because it writes no logits.

        Reason: a product of more columns fills a GPU better. A head that is cast or copied is read slab by slab.
        """
        head = weight[0]
        if not self.spec.fused or not isinstance(head, Tensor) or head.dtype != self.spec.operand:
            return False
        return cast(TileKernels, self.kernels).reads_in_place(head)

    def spans(self, weight: Blocks) -> list[tuple[int, int]]:
        """Return the columns that kernels of forward take at once, in order: slabs, or what is kept and what is not."""
        vocab = weight[0].shape[0]
        if not self.joins_slabs(weight):
            return self.spec.slabs(vocab)
        kept = self.spec.kept_columns(vocab)
        return [(start, stop) for start, stop in ((0, kept), (kept, vocab)) if start < stop]

    def logits(self, hidden: list[Tensor], heads: list[Tensor], out: Tensor | None) -> Tensor:
        """Return the logits (R, W) of one slab: the sum of the products of all blocks, in one float32 buffer."""
        z = None
        for block, head in zip(hidden, heads, strict=True):
            z = self.products.logits(block, head, out, add_to=z)
        return z


@dataclass
class Saved:
    """Results of forward that backward needs.

    If the walk is factored, `kept` (M, ld) holds exp(y - pivot) with the target's entry replaced, and `offsets`
    (3, M, 1) holds the pivots, the sums relative to them, and the target's entries. Otherwise `offsets`
    (slabs_kept, M, tiles) belong to slabs of exponentials, and are empty if the slabs hold logits.
    """

    stats: RowStats
    kept: Tensor
    offsets: Tensor
    # Frozen head: (M, H_k) sums of P * slope * W without the target (if factored, of exp(y - pivot) * W); those of
    # P * log P; if streamed, targets' rows.
    units: list[Tensor]


class Relative(NamedTuple):
    """What a factored walk knows of its rows, relative to their pivots."""

    pivot: Tensor  # (M,)
    total: Tensor  # (M,) sums of the exponentials
    entry: Tensor  # (M,) at the target, see `Settled`

    @classmethod
    def of(cls, offsets: Tensor) -> Relative:
        return cls(*offsets.squeeze(2).unbind(0))


class Results(NamedTuple):
    """Results of forward, 0 in ignored rows, and the tensor whose rows are the statistics of `Saved`."""

    logps: Tensor  # (M,)
    lse: Tensor  # (M,)
    entropy: Tensor | None  # (M,)
    stats: Tensor  # (3, M) run_max, log_sum, target_logit


class KeptLayout(NamedTuple):
    """Shape and dtype of the matrix that forward keeps, and the shape of its offsets."""

    shape: tuple[int, int]
    dtype: torch.dtype
    offsets: tuple[int, int, int]


def kept_layout(spec: WalkSpec, rows: int, vocab_size: int) -> KeptLayout:
    shape = rows, row_stride(spec.kept_columns(vocab_size))
    if spec.saves_logits:
        return KeptLayout(shape, accumulator(spec.operand), (0, rows, 1))
    if spec.factored:
        return KeptLayout(shape, spec.operand, (3, rows, 1))
    return KeptLayout(shape, spec.operand, (spec.slabs_kept, rows, spec.offset_tiles))


def forward(
    walk: Walk, hidden: list[Tensor], weight: Blocks, bias: Tensor | None, targets: Tensor
) -> tuple[Results, Saved]:
    """Walk over hidden_k (M, H_k), weight_k (V, H_k), bias (V,) and targets (M,), negative where a row is ignored."""
    spec, M, V, device, acc = walk.spec, targets.shape[0], weight[0].shape[0], targets.device, walk.products.acc
    # Reason: each of these is a launch before the first product, and kernels that multiply begin the rows themselves.
    fresh = spec.fused and V > 0
    three = (buffers.empty if fresh else buffers.lowest)("rows", (3, M), acc, device)
    run_max, log_sum, target_logit = three.unbind(0)
    entropy_sum = buffers.zeros("rows", (M,), acc, device) if spec.entropy else None
    run_sum = (buffers.empty if fresh else buffers.zeros)("rows", (M,), acc, device)
    state = RowState(run_max, run_sum, target_logit, entropy_sum)
    layout = kept_layout(spec, M, V)
    kept, columns = buffers.empty("kept", layout.shape, layout.dtype, device), spec.kept_columns(V)
    if columns < kept.shape[1]:
        kept[:, columns:].zero_()
    begun = fresh and (columns > 0 or spec.gear == "frozen_head")  # by the first kernel, which writes exponentials
    offsets = (buffers.lowest if spec.factored and not begun else buffers.empty)("kept", layout.offsets, acc, device)
    relative = Relative.of(offsets) if spec.factored else None
    units: list[Tensor] = []
    if spec.gear == "frozen_head":
        for _ in range(1 + spec.entropy):
            for block, wanted in zip(hidden, spec.hidden_grad, strict=True):
                if wanted:
                    # The first product of a factored walk fills them.
                    make = buffers.empty if spec.factored and V else buffers.zeros
                    units.append(make("dhidden", tuple(block.shape), acc, device))
    target_rows: list[Tensor] = []
    if spec.streams and spec.gear == "frozen_head":
        blocks = zip(hidden, spec.hidden_grad, strict=True)
        shapes = [tuple(block.shape) for block, wanted in blocks if wanted]
        target_rows = [buffers.zeros("dhidden", shape, spec.operand, device) for shape in shapes]
    operands = [walk.products.prepared(block) for block in hidden]
    step = spec.row_block or max(1, M)
    pivot = None if relative is None else relative.pivot
    writer = _Writer(walk, min(step, max(1, M)), kept, offsets, pivot, device)
    for first in range(0, M, step):
        rows, labels, block_state, read, found = slice(first, first + step), targets, state, operands, target_rows
        # One list, so that a product that returns its own result frees the one it replaces.
        block_units = units
        if step < M:
            labels, block_units = targets[rows], [unit[rows] for unit in units]
            block_state = RowState(*(None if part is None else part[rows] for part in state))
            read, found = [operand[rows] for operand in operands], [part[rows] for part in target_rows]
        if spec.gear == "frozen_head":
            writer.frozen(rows, read, weight, bias, labels, block_state, block_units, found)
        else:
            writer.slabs(rows, read, weight, bias, labels, block_state)
        if block_units is not units:
            for unit, block_unit in zip(units, block_units, strict=True):
                unit[rows].copy_(block_unit)
    if spec.merges:
        ranks = Ranks(spec.group)
        # Reason: collectives of different sizes hang, end the process, or mix up rows. On a GPU the host would have to
        # wait for the device in every call to read the answers, and a captured graph could not contain that.
        if backends.checks_values(device):
            moves = int(any(spec.hidden_grad))
            agreed(ranks, device, [], {"rows": M, "entropy": int(spec.entropy), "a gradient of hidden": moves})
        own, state = state, merged(state, ranks)
        if units and not spec.factored:
            _move_units(units, own, state, spec.entropy)
        run_max.copy_(state.run_max)
        target_logit.copy_(state.target_logit)
    settled = None
    if relative is not None:  # a frozen head's sums are relative to the pivots as they are
        settled = Settled(kept[:, :columns], *relative, moves=spec.gear != "frozen_head")
    logps, lse = torch.empty_like(run_max), torch.empty_like(run_max)
    walk.kernels.finish_rows(state, targets, log_sum, logps, lse, settled)
    entropy = log_sum - state.entropy_sum / state.run_sum if spec.entropy else None
    if units and relative is None:
        scale = (state.run_sum * kept_gain(spec.operand)).unsqueeze(1)
        for unit in units:
            unit.div_(scale)
    stats = RowStats(run_max, log_sum, target_logit, entropy)
    if entropy is not None:
        entropy = torch.where(targets >= 0, entropy, 0.0)
    return Results(logps, lse, entropy, three), Saved(stats, kept, offsets, units + target_rows)


def _move_units(units: list[Tensor], own: RowState, whole: RowState, entropy: bool) -> None:
    """Rescale sums relative to the maximum of a rank's part of the vocabulary to the maximum of the whole."""
    step = torch.where(own.run_max == -torch.inf, 0.0, own.run_max - whole.run_max).unsqueeze(1)
    wanted = len(units) // (1 + entropy)
    for k, unit in enumerate(units[:wanted]):
        if entropy:
            units[wanted + k].addcmul_(unit, step).mul_(step.exp())
        unit.mul_(step.exp())


class _Writer:
    """Passes one block of rows over the vocabulary, with the buffers of a slab."""

    def __init__(
        self, walk: Walk, rows: int, kept: Tensor, offsets: Tensor, pivot: Tensor | None, device: torch.device
    ):
        self.walk, self.kept, self.offsets, self.pivot, self.device = walk, kept, offsets, pivot, device
        spec, products = walk.spec, walk.products
        # Exponentials overwrite the logits if both have one dtype and the product writes to a given buffer.
        dtype = products.multiplied if spec.gear == "frozen_head" else kept.dtype
        self.in_place = spec.factored and dtype == products.acc and not products.allocates
        self.slab = self.unit = None
        if spec.gear == "frozen_head" and spec.factored:
            wide = spec.slab_width * spec.slabs_at_once
            if not products.allocates and not spec.fused:
                columns = wide if self.in_place else spec.slab_width
                self.slab = buffers.empty("slab", (rows, columns), products.acc, device)
            if not self.in_place:
                self.unit = buffers.empty("unit", (rows, wide), products.multiplied, device)

    def _buffer(self, rows: int, width: int) -> Tensor | None:
        """Return a buffer for logits, allocated for the first slab that needs it; None if the product allocates."""
        if self.walk.products.allocates:
            return None
        if self.slab is None:
            shape = rows, self.walk.spec.slab_width
            self.slab = buffers.empty("slab", shape, self.walk.products.acc, self.device)
        return self.slab if self.slab.shape == (rows, width) else self.slab[:rows, :width]

    def slabs(
        self, rows: slice, hidden: list[Tensor], weight: Blocks, bias: Tensor | None, targets: Tensor, state: RowState
    ) -> None:
        walk, spec = self.walk, self.walk.spec
        kept, pivot = self.kept, self.pivot
        if targets.shape[0] < kept.shape[0]:
            kept, pivot = kept[rows], None if pivot is None else pivot[rows]
        columns = spec.kept_columns(weight[0].shape[0])
        for index, (start, stop) in enumerate(walk.spans(weight)):
            place = kept.narrow(1, start, stop - start) if start < columns else None
            in_place = place is not None and self.in_place
            if spec.tile_columns or spec.fused:
                # Tiles are planned only for kernels with them.
                tiles, slab = cast(TileKernels, walk.kernels), walk.slab(None, bias, targets, start, stop - start)
                operands = hidden[0], walk.products.prepared(weight[0][start:stop])
                if place is not None and spec.fused:
                    exps = Exps(place, pivot, earlier=start, moved=None)
                    tiles.tile_exps_forward(*operands, slab, state, exps, fresh=start == 0)
                elif spec.fused:
                    tiles.tile_forward(*operands, slab, state, None, fresh=start == 0)
                else:
                    kept_tile = None if place is None else Kept(place, self.offsets[index][rows])
                    tiles.tile_forward(*operands, slab, state, kept_tile)
                del operands, slab  # before the next slab's are made
                continue
            z = place if in_place else self._buffer(targets.shape[0], stop - start)
            z = walk.logits(hidden, walk.heads(weight, start, stop), z)
            slab = walk.slab(z, bias, targets, start, stop - start)
            if place is None or spec.saves_logits:
                if place is not None:
                    place.copy_(slab.logits)  # now: the kernel overwrites the logits
                walk.kernels.slab_forward(slab, state, None)
            elif spec.factored:
                walk.kernels.exps_forward(slab, state, Exps(place, pivot, earlier=start, moved=None))
            else:
                walk.kernels.slab_forward(slab, state, Kept(place, self.offsets[index][rows]))
            del slab, z  # before the next slab's are made

    def frozen(
        self,
        rows: slice,
        hidden: list[Tensor],
        weight: Blocks,
        bias: Tensor | None,
        targets: Tensor,
        state: RowState,
        units: list[Tensor],
        target_rows: list[Tensor],
    ) -> None:
        """Add exp(y - pivot) @ weight of every slab to the unit gradients, several slabs in one product.

        `target_rows` (M, H_k), if any, are filled with the targets' rows of the head.
        """
        walk, spec = self.walk, self.walk.spec
        if not spec.factored:
            for start, stop in spec.slabs(weight[0].shape[0]):
                heads = walk.heads(weight, start, stop)
                z = walk.logits(hidden, heads, self._buffer(targets.shape[0], stop - start))
                self._unit_slab(walk.slab(z, bias, targets, start, stop - start), heads, state, units)
                self._find_targets(heads, targets, start, target_rows)
                del heads, z  # before the next slab's are made
            return
        count, moved = targets.shape[0], buffers.empty("rows", targets.shape, walk.products.acc, self.device)
        pivot = self.pivot if count == self.kept.shape[0] else self.pivot[rows]
        slabs = spec.slabs(weight[0].shape[0])
        tiles = cast(TileKernels, walk.kernels)
        joined = walk.joins_slabs(weight)
        for group in (slabs[i : i + spec.slabs_at_once] for i in range(0, len(slabs), spec.slabs_at_once)):
            begin, end = group[0][0], group[-1][1]
            group = [(begin, end)] if joined else group
            for start, stop in group:
                place, z = slice(start - begin, stop - begin), None
                if self.in_place:
                    z = self.slab[:count, place]
                elif self.slab is not None:
                    z = self.slab[:count, : stop - start]
                heads = walk.heads(weight, start, stop)
                logits = None if spec.fused else walk.logits(hidden, heads, z)
                slab = walk.slab(logits, bias, targets, start, stop - start)
                values = slab.logits if self.in_place else self.unit[:count, place]
                exps = Exps(values, pivot, start - begin, moved)
                if spec.fused:
                    tiles.tile_exps_forward(hidden[0], heads[0], slab, state, exps, fresh=start == 0)
                else:
                    walk.kernels.exps_forward(slab, state, exps)
                for unit in units if begin else ():
                    walk.kernels.rescale_rows(unit, moved)
                del logits, slab, z, exps, values
                if len(group) > 1:
                    del heads
            if len(group) > 1:
                heads = walk.heads(weight, begin, end)
            values = (self.slab if self.in_place else self.unit)[:count, : end - begin]
            self._find_targets(heads, targets, begin, target_rows)
            for k, head in enumerate(self._wanted(heads)):
                units[k] = walk.products.hidden_grad(values, head, units[k], first=begin == 0)
            del heads, head

    def _find_targets(self, heads: list[Tensor], targets: Tensor, start: int, target_rows: list[Tensor]) -> None:
        """Copy the rows of the targets in a slab of the head, which is gone when backward needs them."""
        for head, found in zip(self._wanted(heads) if target_rows else (), target_rows, strict=True):
            step = max(1, (1 << 20) // max(1, found.shape[1] * head.element_size()))
            for first in range(0, targets.shape[0], step):
                column = targets[first : first + step] - start
                inside = ((column >= 0) & (column < head.shape[0])).unsqueeze(1)
                rows = buffers.track("scratch", head.index_select(0, column.clamp(0, head.shape[0] - 1)))
                place = found[first : first + step]
                place.copy_(torch.where(inside, rows, place))

    def _wanted(self, heads: list[Tensor]) -> list[Tensor]:
        return [head for head, wanted in zip(heads, self.walk.spec.hidden_grad, strict=True) if wanted]

    def _unit_slab(self, slab: Slab, heads: list[Tensor], state: RowState, units: list[Tensor]) -> None:
        """Do the same for one slab relative to the running maximum, to which the sums are rescaled after every slab."""
        walk, (rows, width) = self.walk, slab.logits.shape
        products, acc, operand = walk.products, walk.products.acc, walk.spec.operand
        values = slab.logits
        if operand != acc:
            values = buffers.empty("unit", (rows, width), operand, self.device)
        unit = Unit(
            values,
            buffers.empty("unit", (rows, width), operand, self.device) if walk.spec.entropy else None,
            buffers.empty("rows", (rows,), acc, self.device),
            buffers.empty("rows", (rows,), acc, self.device) if walk.spec.entropy else None,
        )
        walk.kernels.slab_forward_unit(slab, state, unit)
        heads = self._wanted(heads)
        for k, head in enumerate(heads):
            if walk.spec.entropy:
                logged = len(heads) + k
                units[logged].addcmul_(units[k], unit.max_step.unsqueeze(1)).mul_(unit.rescale.unsqueeze(1))
                units[logged] = products.hidden_grad(products.widened(unit.logged), head, units[logged])
            units[k].mul_(unit.rescale.unsqueeze(1))
            units[k] = products.hidden_grad(products.widened(unit.values), head, units[k])
