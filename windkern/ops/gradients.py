"""Backward of a walk: gradients of its rows from what forward saved, by the gear of the specification."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from torch import Tensor

from windkern.kernels import buffers
from windkern.kernels.contract import (
    DZ_BINADES,
    HiddenGrad,
    Kept,
    TileKernels,
    Upstream,
    other_slope,
    target_slope,
)
from windkern.ops.walk import Relative, Saved, Walk
from windkern.sharding.passing import CollectedRows, PassedRows
from windkern.sharding.ranks import Ranks
from windkern.spec import row_stride


def backward(
    walk: Walk,
    upstream: Upstream,
    hidden: list[Tensor],
    weight: list[Tensor] | list[PassedRows],
    bias: Tensor | None,
    targets: Tensor,
    saved: Saved,
    dweight: list[Tensor | None] | list[CollectedRows | None],
    dbias: Tensor | None,
    *,
    accumulate: bool,
) -> list[HiddenGrad | None]:
    """Return dhidden_k of sum(upstream * outputs) over compacted rows, to be finished; None where it is not wanted.

    dweight_k (V, H_k) and dbias (V,) are filled, or added to if `accumulate`. `upstream` is not read in ignored rows.
    """
    spec, frozen = walk.spec, walk.spec.gear == "frozen_head"
    factored = spec.factored and upstream.lse is None and upstream.logp is not None
    if not factored or (frozen and (spec.merges or spec.streams)):
        scored = targets >= 0
        upstream = Upstream(*(None if part is None else torch.where(scored, part, 0.0) for part in upstream))
    # Hazard: the gradient of a sum is one number, expanded to all rows, and kernels read row after row.
    upstream = Upstream(*(None if part is None else part.contiguous() for part in upstream))
    run = _Backward(walk, upstream, hidden, weight, bias, targets, saved, dweight, dbias, accumulate)
    grads = run.from_units() if frozen else run.from_exps() if factored else run.from_dz()
    for sink in dweight:
        if isinstance(sink, CollectedRows):
            run.waits.append(sink.finish)
    for wait in run.waits:
        wait()
    return grads


@dataclass
class _Backward:
    walk: Walk
    upstream: Upstream
    hidden: list[Tensor]
    weight: list[Tensor] | list[PassedRows]
    bias: Tensor | None
    targets: Tensor
    saved: Saved
    dweight: list[Tensor | None] | list[CollectedRows | None]
    dbias: Tensor | None
    accumulate: bool
    waits: list[Callable[[], None]] = field(default_factory=list)  # for sums over the ranks of a sharded head

    @property
    def device(self) -> torch.device:
        return self.targets.device

    @property
    def multiplies(self) -> bool:
        """Whether a gradient is wanted that needs a product over the vocabulary."""
        return any(self.walk.spec.hidden_grad) or any(self.walk.spec.weight_grad)

    def _totals(self, make: Callable[..., Tensor]) -> list[Tensor | None]:
        acc = self.walk.products.acc
        return [
            make("dhidden", tuple(block.shape), acc, self.device) if wanted else None
            for block, wanted in zip(self.hidden, self.walk.spec.hidden_grad, strict=True)
        ]

    def _operands(self) -> list[Tensor]:
        """Return the hidden states for logits that forward did not keep."""
        return [self.walk.products.prepared(block) for block in self.hidden]

    def _multiply(
        self,
        dz: Tensor,
        start: int,
        heads: list[Tensor] | None,
        totals: list[Tensor | None],
        operands: list[Tensor | None],
        gain: Tensor | None,
        *,
        first: bool,
        then: Callable[[], None] | None,
    ) -> None:
        """Run both products of the vocabulary columns from `start` on, for every block, with `then` between them."""
        self._to_hidden(dz, start, heads, totals, first=first)
        if then is not None:
            then()
        self._to_weight(dz, start, operands, gain)

    def _to_hidden(
        self, dz: Tensor, start: int, heads: list[Tensor] | None, totals: list[Tensor | None], *, first: bool
    ) -> None:
        products, stop = self.walk.products, start + dz.shape[1]
        for k in range(len(self.weight)):
            if totals[k] is not None:
                head = products.prepared(self.weight[k][start:stop]) if heads is None else heads[k]
                totals[k] = products.hidden_grad(dz, head, totals[k], first=first)
            elif self.walk.spec.streams and heads is None:
                self.weight[k][start:stop]  # all ranks take part in reading it

    def _to_weight(self, dz: Tensor, start: int, operands: list[Tensor], gain: Tensor | None) -> None:
        products, stop = self.walk.products, start + dz.shape[1]
        for k in range(len(self.weight)):
            sink = self.dweight[k]
            if isinstance(sink, CollectedRows):
                with sink.rows(start, stop) as place:
                    products.weight_grad(dz, operands[k], place, accumulate=False, gain=gain)
            elif sink is not None:
                products.weight_grad(dz, operands[k], sink[start:stop], accumulate=self.accumulate, gain=gain)

    def _merge(self, totals: list[Tensor | None], factor: Tensor | None) -> None:
        """For a sharded head, multiply the complete dhidden by `factor` (M,) and begin to sum it over the ranks.

        The sum overlaps with the products of dweight that follow.
        """
        if not self.walk.spec.merges:
            return
        ranks, dtype = Ranks(self.walk.spec.group), self.walk.spec.reduce_dtype
        for total in totals:
            if total is not None:
                if factor is not None:
                    total.mul_(factor.unsqueeze(1))
                self.waits.append(_begin_sum(total, ranks, dtype))

    def _unfinished(self, totals: list[Tensor | None], factor: Tensor | None) -> list[HiddenGrad | None]:
        """Return the sums with the factor that `_merge` has not multiplied them by."""
        factor = None if self.walk.spec.merges else factor
        return [None if total is None else HiddenGrad(total, factor) for total in totals]

    def _put_bias(self, start: int, sums: Tensor) -> None:
        place = self.dbias[start : start + sums.shape[0]]
        place.copy_(place + sums if self.accumulate else sums)

    def _scaled(self, total: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Return the factors g (M,) of the rows, and g * hidden_k where dweight_k is wanted."""
        slope, dtype = self.walk.spec.transform.slope_at_zero, self.walk.products.multiplied
        g = buffers.empty("rows", tuple(total.shape), total.dtype, self.device)
        scaled: list[Tensor | None] = [
            None if sink is None else buffers.empty("scaled", tuple(block.shape), dtype, self.device)
            for block, sink in zip(self.hidden, self.dweight, strict=True)
        ]
        wanted = [pair for pair in zip(self.hidden, scaled, strict=True) if pair[1] is not None]
        for block, place in wanted or [(None, None)]:
            self.walk.kernels.row_factors(self.upstream.logp, total, self.targets, slope, g, block, place)
        return g, scaled

    def from_exps(self) -> list[HiddenGrad | None]:
        """dz = g * E with one g per row: dweight = E.T @ (g * hidden), dhidden = g * (E @ weight), dbias = E.T @ g."""
        spec, products = self.walk.spec, self.walk.products
        pivot, total, entry = Relative.of(self.saved.offsets)
        g, scaled = self._scaled(total)
        vocab = self.weight[0].shape[0]
        totals = self._totals(buffers.empty if vocab else buffers.zeros)
        kept = spec.kept_columns(vocab)
        # Reason: a sharded head's dhidden is summed over the ranks while the products of dweight run; so they are last.
        later = spec.merges and any(spec.hidden_grad) and any(spec.weight_grad)
        for start in range(0, kept, spec.product_columns):
            values = self.saved.kept[:, start : min(start + spec.product_columns, kept)]
            if self.dbias is not None:
                self._bias_from(values, start, g)
            if self.multiplies or spec.streams:
                values = products.widened(values)
                self._to_hidden(values, start, None, totals, first=start == 0)
                if not later:
                    self._to_weight(values, start, scaled, None)
        merge = partial(self._merge, totals, g)
        if kept < vocab:
            self._recomputed(kept, vocab, g, pivot, entry, totals, scaled, merge)
        else:
            merge()
        for start in range(0, kept, spec.product_columns) if later else ():
            values = self.saved.kept[:, start : min(start + spec.product_columns, kept)]
            self._to_weight(products.widened(values), start, scaled, None)
        return self._unfinished(totals, g)

    def _bias_from(self, values: Tensor, start: int, g: Tensor) -> None:
        """Compute dbias of some columns, one slab at a time so that partial sums stay small."""
        step = self.walk.spec.slab_width
        for first in range(0, values.shape[1], step):
            part = values[:, first : first + step]
            sums = buffers.empty("rows", (part.shape[1],), self.walk.products.acc, self.device)
            self.walk.kernels.column_sums(part, g, sums)
            self._put_bias(start + first, sums)

    def _recomputed(
        self,
        kept: int,
        vocab: int,
        g: Tensor | None,
        pivot: Tensor | None,
        entry: Tensor | None,
        totals: list[Tensor | None],
        scaled: list[Tensor | None],
        merge: Callable[[], None],
    ) -> None:
        """Recompute the exponentials of slabs that forward did not keep, and multiply several slabs at once."""
        walk, spec, products = self.walk, self.walk.spec, self.walk.products
        rows, acc = self.targets.shape[0], products.acc
        operands, wide = self._operands(), spec.slab_width * spec.slabs_at_once
        in_place = products.multiplied == acc and not products.allocates
        slab_buffer = unit = None
        if not products.allocates and not spec.fused:
            columns = min(wide if in_place else spec.slab_width, row_stride(vocab - kept))
            slab_buffer = buffers.empty("slab", (rows, columns), acc, self.device)
        if not in_place:
            unit = buffers.empty("unit", (rows, min(wide, row_stride(vocab - kept))), products.multiplied, self.device)
        step = wide if walk.joins_slabs(self.weight) else spec.slab_width
        for begin in range(kept, vocab, wide):
            end = min(begin + wide, vocab)
            for start in range(begin, end, step):
                stop = min(start + step, end)
                place, z, heads = slice(start - begin, stop - begin), None, None  # frees the previous slab's
                if slab_buffer is not None:
                    z = slab_buffer[:, place] if in_place else slab_buffer[:, : stop - start]
                heads = walk.heads(self.weight, start, stop)
                logits = None if spec.fused else walk.logits(operands, heads, z)
                slab = walk.slab(logits, self.bias, self.targets, start, stop - start)
                if spec.fused:
                    tiles = cast(TileKernels, walk.kernels)
                    tiles.tile_exps_backward(operands[0], heads[0], slab, pivot, entry, unit[:, place])
                else:
                    walk.kernels.exps_backward(slab, pivot, entry, slab.logits if in_place else unit[:, place])
                del logits, slab, z
            values = (slab_buffer if in_place else unit)[:, : end - begin]
            if self.dbias is not None:
                self._bias_from(values, begin, g)
            heads = heads if end - begin <= step else None
            then = merge if end == vocab else None
            self._multiply(values, begin, heads, totals, scaled, None, first=begin == 0, then=then)
            heads = None

    def from_dz(self) -> list[HiddenGrad | None]:
        """Write dz slab by slab, from kept values or from logits."""
        walk, spec, products = self.walk, self.walk.spec, self.walk.products
        rows, vocab, acc = self.targets.shape[0], self.weight[0].shape[0], products.acc
        scale = row_scale(self.upstream, walk.dz_dtype, spec.transform.slope_at_zero)
        upstream = self.upstream
        if scale is not None:
            upstream = Upstream(*(None if part is None else part / scale for part in upstream))
        totals = self._totals(buffers.zeros)
        merge = partial(self._merge, totals, scale)
        weight_operands, gain = self._weight_operands(scale)
        all_kept = spec.kept_columns(vocab) >= vocab
        operands = [] if all_kept else self._operands()
        in_place = walk.dz_dtype == acc
        slab_buffer = dz_buffer = None
        if not products.allocates and (not all_kept or spec.saves_logits or in_place):
            slab_buffer = buffers.empty("slab", (rows, spec.slab_width), acc, self.device)
        if not in_place:
            dz_buffer = buffers.empty("dz", (rows, spec.slab_width), walk.dz_dtype, self.device)
        for index, (start, stop) in enumerate(spec.slabs(vocab)):
            width, kept, heads = stop - start, None, None
            z = None if slab_buffer is None else slab_buffer[:, :width]
            values = self.saved.kept[:, start:stop] if index < spec.slabs_kept else None
            if values is not None and not spec.saves_logits:
                kept = Kept(values, self.saved.offsets[0 if spec.factored else index])
                if z is None and in_place:
                    z = buffers.empty("slab", (rows, width), acc, self.device)
            elif values is not None:  # a copy: the kernel overwrites it
                z = (buffers.empty("slab", (rows, width), acc, self.device) if z is None else z).copy_(values)
            else:
                heads = walk.heads(self.weight, start, stop)
                z = walk.logits(operands, heads, z)
            dz = z if in_place else dz_buffer[:, :width]
            slab = walk.slab(None if kept is not None else z, self.bias, self.targets, start, width)
            sums = buffers.empty("rows", (width,), acc, self.device) if self.dbias is not None else None
            walk.kernels.slab_backward(slab, kept, self.saved.stats, upstream, scale, dz, sums)
            del slab, z
            if sums is not None:
                self._put_bias(start, sums)
            if self.multiplies:
                dz = products.widened(dz)
            then = merge if stop == vocab else None
            self._multiply(dz, start, heads, totals, weight_operands, gain, first=False, then=then)
            del dz
        if vocab == 0:
            merge()
        return self._unfinished(totals, scale)

    def _weight_operands(self, scale: Tensor | None) -> tuple[list[Tensor | None], Tensor | None]:
        """Return the hidden operand of dweight, row-scaled for float16, and the common factor of the scales."""
        products, wanted = self.walk.products, self.walk.spec.weight_grad
        if scale is None or not any(wanted):
            blocks = zip(self.hidden, wanted, strict=True)
            return [products.prepared(block) if flag else None for block, flag in blocks], None
        gain = scale.amax() if scale.numel() else scale.new_ones(())
        relative = (scale / gain).unsqueeze(1)
        operands = [
            products.prepared(buffers.track("cast", (block * relative).to(block.dtype))) if flag else None
            for block, flag in zip(self.hidden, wanted, strict=True)
        ]
        return operands, gain

    def from_units(self) -> list[HiddenGrad | None]:
        """dhidden = at_target * W_y + factor * unit - c_ent * unit_entropy: no product over the vocabulary."""
        spec, stats, upstream, acc = self.walk.spec, self.saved.stats, self.upstream, self.walk.products.acc
        slope = spec.transform.slope_at_zero
        relative = Relative.of(self.saved.offsets) if spec.factored else None
        apart = spec.merges or spec.streams
        if relative is not None and not apart and upstream.logp is not None and upstream.lse is None:
            g, _ = self._scaled(relative.total)
            return self._with_targets(g, g * relative.entry)
        at_target, factor = target_slope(stats, upstream, spec.transform), other_slope(stats, upstream)
        if upstream.entropy is not None:
            factor = factor + upstream.entropy * stats.log_sum  # log P = (y - max) - log_sum; units hold the first term
        safe_targets = self.targets.clamp(min=0)
        if spec.merges:  # the target's row may lie on another rank
            here = self.targets < self.weight[0].shape[0]
            safe_targets, at_target = torch.where(here, safe_targets, 0), torch.where(here, at_target, 0.0)
        if relative is not None:
            factor = factor / relative.total
        if upstream.entropy is None and not apart:
            return self._with_targets(factor * slope, at_target)
        wanted = [k for k, flag in enumerate(spec.hidden_grad) if flag]
        totals = self._totals(buffers.empty)
        for place, k in enumerate(wanted):
            total = totals[k]
            step = max(1, (1 << 20) // max(1, total.shape[1] * acc.itemsize))
            for first in range(0, self.targets.shape[0], step):
                rows = slice(first, first + step)
                torch.mul(self.saved.units[place][rows], (factor[rows] * slope).unsqueeze(1), out=total[rows])
                if self.weight[k].shape[0]:
                    if spec.streams:
                        head_rows = self.saved.units[place - len(wanted)][rows]
                    else:
                        head = cast(Tensor, self.weight[k])
                        head_rows = buffers.track("scratch", head.index_select(0, safe_targets[rows]))
                    if head_rows.dtype != spec.operand:
                        head_rows = head_rows.to(spec.operand)
                    total[rows].addcmul_(head_rows.to(acc), at_target[rows].unsqueeze(1))
                if upstream.entropy is not None:
                    logged = self.saved.units[len(wanted) + place]
                    total[rows].addcmul_(logged[rows], (upstream.entropy[rows] * -slope).unsqueeze(1))
        self._merge(totals, None)
        return self._unfinished(totals, None)

    def _with_targets(self, factor: Tensor, at_target: Tensor) -> list[HiddenGrad | None]:
        """Return factor * unit_k + at_target * W_y, to be finished."""
        spec, units = self.walk.spec, iter(self.saved.units)
        return [
            HiddenGrad(next(units), factor, at_target, cast(Tensor, head), spec.operand, owned=False) if flag else None
            for head, flag in zip(self.weight, spec.hidden_grad, strict=True)
        ]


def _begin_sum(total: Tensor, ranks: Ranks, dtype: torch.dtype) -> Callable[[], None]:
    """Begin to sum `total` over the ranks in `dtype`; the returned function waits until `total` holds the sum."""
    what = "sum the gradient of the hidden states"
    if dtype == total.dtype:
        return ranks.begin_sum(total, what)
    narrow = buffers.track("cast", total.to(dtype))
    wait = ranks.begin_sum(narrow, what)

    def finish() -> None:
        wait()
        total.copy_(narrow)

    return finish


def row_scale(upstream: Upstream, dtype: torch.dtype, slope: float) -> Tensor | None:
    """Return a power of two per row by which dz is divided if it is float16, else None.

    Hazard: a coefficient of 1e-6 times a probability flushes to zero in float16. Remedy: divide dz by this scale, and
    multiply the float32 dhidden and the hidden operand of dweight by it.
    """
    if dtype != torch.float16:
        return None
    parts = [part.abs() for part in upstream if part is not None]
    return power_of_two(torch.stack(parts).amax(0) * slope, DZ_BINADES[torch.float16])


def power_of_two(largest: Tensor, binades: int) -> Tensor:
    """Return the power of two by which `largest` is divided to be at most 2^binades, elementwise.

    Reason: it is the smallest one for zeros, so that an empty row does not set the scale of others.
    """
    exponent = torch.where(largest > 0, torch.ceil(torch.log2(largest)), -100.0).clamp(-100, 120)
    return torch.exp2(exponent - binades)
