"""Plan an op: decide its memory and FLOPs before it runs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from windkern import backends
from windkern._checks import check_choice, check_count, check_device, check_each, check_flag, check_float_dtype
from windkern.costs import MIB, Problem, fixed_tile, round_up
from windkern.kernels.gemm import products_of
from windkern.spec import WalkSpec
from windkern.transform import LogitTransform

# Reason: a constant per device type, not a query of free memory: results must not depend on what else runs. 256 MiB on
# a CPU would recompute 6 to 18 % of the operations for heads of 50 to 150 thousand tokens; 384 MiB recompute 0 to 10 %.
# On a GPU, 2.5 GiB are what 8192 rows of a head of 128256 tokens need in bfloat16 to recompute nothing.
DEFAULT_BUDGET = {"cpu": 384 * MIB}
DEFAULT_BUDGET_GPU = 2560 * MIB


@dataclass(frozen=True)
class Plan:
    """The decisions about an op before it runs. Pure data; `print` explains it.

    `units` counts GEMM work in multiples of rows * hidden_size * vocab_size multiply-adds, forward and backward
    together: plain logits take 6, recomputing every logit takes 8. `peak_bytes` is everything allocated besides
    outputs and gradients.
    """

    rows: int  # scored rows, after padding to fixed tiles when batch_invariant
    hidden_sizes: tuple[int, ...]
    vocab_size: int
    walk: WalkSpec
    products: str  # the library that multiplies, in words
    flops: int
    units: float
    seconds: float  # on the reference device of the device type
    peak_bytes: int
    memory_budget: int
    chunk_groups: int | None = None  # fused_loss: groups finished together
    num_chunks: int = 1
    problem: Problem | None = field(default=None, repr=False, compare=False)  # of one chunk

    @property
    def gear(self) -> str:
        return self.walk.gear

    @property
    def slab_width(self) -> int:
        return self.walk.slab_width

    @property
    def slabs_kept(self) -> int:
        return self.walk.slabs_kept

    @property
    def num_slabs(self) -> int:
        return -(-self.vocab_size // self.slab_width)

    def chunk(self, rows: int) -> WalkSpec:
        """Return the walk of a chunk of `fused_loss` with that many scored rows."""
        assert self.problem is not None  # `plan` sets it
        return _planned_walk(replace(self.problem, rows=self.walk.padded_rows(rows)), self.memory_budget)

    def __str__(self) -> str:
        walk = self.walk
        way = "backward multiplies exponentials" if walk.factored else "backward writes dz"
        lines = [
            f"gear {self.gear}: {self.units:g} units of rows x hidden x vocab ({self.flops / 1e12:.3g} TFLOP)",
            f"{self.rows} rows, hidden {' + '.join(map(str, self.hidden_sizes))}, vocabulary {self.vocab_size}",
            f"{self.num_slabs} slabs of {self.slab_width} columns, {self.slabs_kept} kept for backward"
            + ("; their logits stay in registers" if walk.fused else ""),
            f"products of {str(walk.operand).removeprefix('torch.')} by {self.products}"
            + ("" if self.gear in ("scoring", "frozen_head") else f"; {way}"),
            f"peak {self.peak_bytes / MIB:.1f} MiB of a budget of {self.memory_budget / MIB:.1f} MiB",
        ]
        if self.chunk_groups is not None:
            lines.append(f"{self.num_chunks} chunks of up to {self.chunk_groups} groups")
        return "\n".join(lines)


def gear_of(hidden_grad: Sequence[bool], weight_grad: Sequence[bool], bias_grad: bool) -> str:
    if any(weight_grad) or bias_grad:
        return "trained" if any(hidden_grad) else "frozen_body"
    return "frozen_head" if any(hidden_grad) else "scoring"


def default_budget(device_type: str) -> int:
    return DEFAULT_BUDGET.get(device_type, DEFAULT_BUDGET_GPU)


def plan(
    rows: int,
    hidden_size: int | Sequence[int],
    vocab_size: int,
    dtype: torch.dtype,
    *,
    hidden_grad: bool | Sequence[bool] = True,
    weight_grad: bool | Sequence[bool] = True,
    bias_grad: bool = False,
    entropy: bool = False,
    group_rows: int | None = None,
    memory_budget: int | None = None,
    device: str | torch.device = "cuda",
    batch_invariant: bool = False,
    total_rows: int | None = None,
    hidden_dtype: torch.dtype | Sequence[torch.dtype] | None = None,
    weight_dtype: torch.dtype | Sequence[torch.dtype] | None = None,
    head_in_place: bool = True,
    capped: bool = False,
    backend: str = "auto",
) -> Plan:
    """Return the plan an op with these arguments will follow.

    The same arguments give the same plan wherever the current GPU is of the same kind, and wherever there is none.

    Args:
        rows: scored rows M (targets that are not ignored).
        hidden_size: H, or the sizes of the blocks.
        vocab_size: V.
        dtype: of the GEMM operands: that of the head (the widest if its blocks differ); under autocast, its dtype.
        hidden_grad, weight_grad, bias_grad: which gradients are wanted, one flag or one for each block.
        entropy: whether the entropy is an output.
        group_rows: for `fused_loss`, the rows of the largest group (N * T); None for the other ops.
        memory_budget: bytes for everything besides outputs and gradients; None is 2.5 GiB on a GPU, 384 MiB on a CPU.
            If no plan fits, the smallest one is taken.
        device: "cuda", "cpu" or a torch.device.
        batch_invariant: whether tiles are fixed, so that a row's log-prob depends on nothing but the row.
        total_rows: rows before ignored ones are dropped; if larger than `rows`, rows are copied first.
        hidden_dtype: of the hidden states where it differs from `dtype`, one or one for each block; rows are cast as
            they are copied.
        weight_dtype: of the head where it differs from `dtype`, likewise; its slabs are cast one at a time.
        head_in_place: whether rows of the head are contiguous and 16 bytes aligned, as those of a parameter are. Where
            no logits are written, other heads are copied one slab at a time.
        capped: whether the logits have a softcap.
        backend: of the row kernels; "auto" is the preferred one for the device.

    Returns:
        A `Plan` with the gear, slab width, slabs kept, units, FLOPs and peak bytes; `print(plan)` explains it.

    Raises:
        ValueError: a size or the budget is too small, values by block do not match the blocks, or `device` or
            `backend` is unknown.
        TypeError: a size is not an integer, a flag is not True or False, or a dtype is not one windkern supports.

    Example:
        >>> p = plan(8192, 4096, 128256, torch.bfloat16, device="cuda")
        >>> p.gear, 6 <= p.units <= 8, p.peak_bytes <= 5 << 29
        ('trained', True, True)
    """
    problem, budget = _asked(
        rows,
        hidden_size,
        vocab_size,
        dtype,
        hidden_grad=hidden_grad,
        weight_grad=weight_grad,
        bias_grad=bias_grad,
        entropy=entropy,
        memory_budget=memory_budget,
        device=device,
        batch_invariant=batch_invariant,
        total_rows=total_rows,
        hidden_dtype=hidden_dtype,
        weight_dtype=weight_dtype,
        head_in_place=head_in_place,
        capped=capped,
        backend=backend,
    )
    if group_rows is None:
        return _solve(problem, budget)
    return _solve_chunks(problem, int(rows), check_count("group_rows", group_rows, least=1), budget)


def _asked(
    rows: int,
    hidden_size: int | Sequence[int],
    vocab_size: int,
    dtype: torch.dtype,
    *,
    hidden_grad: bool | Sequence[bool] = True,
    weight_grad: bool | Sequence[bool] = True,
    bias_grad: bool = False,
    entropy: bool = False,
    memory_budget: int | None = None,
    device: str | torch.device = "cuda",
    batch_invariant: bool = False,
    total_rows: int | None = None,
    hidden_dtype: torch.dtype | Sequence[torch.dtype] | None = None,
    weight_dtype: torch.dtype | Sequence[torch.dtype] | None = None,
    head_in_place: bool = True,
    capped: bool = False,
    backend: str = "auto",
) -> tuple[Problem, int]:
    """Check the arguments of `plan` and return the problem they describe, and the budget."""
    rows = check_count("rows", rows)
    sizes = check_each("hidden_size", hidden_size, lambda name, size: check_count(name, size, least=1))
    vocab_size = check_count("vocab_size", vocab_size, least=1)
    device, batch_invariant = check_device("device", device), check_flag("batch_invariant", batch_invariant)
    device_type = device.type
    budget = default_budget(device_type) if memory_budget is None else check_count("memory_budget", memory_budget)
    dtype = check_float_dtype("dtype", dtype)
    hidden_dtypes, weight_dtypes = (
        check_each(name, dtype if value is None else value, check_float_dtype, len(sizes))
        for name, value in (("hidden_dtype", hidden_dtype), ("weight_dtype", weight_dtype))
    )
    total_rows = rows if total_rows is None else check_count("total_rows", total_rows)
    if total_rows < rows:
        raise ValueError(f"total_rows must be at least rows, {rows}, got {total_rows}")
    check_choice("backend", backend, ["auto", *backends.BACKENDS])
    hidden_grad = check_each("hidden_grad", hidden_grad, check_flag, len(sizes))
    weight_grad = check_each("weight_grad", weight_grad, check_flag, len(sizes))
    gear = gear_of(hidden_grad, weight_grad, check_flag("bias_grad", bias_grad))
    entropy, capped = check_flag("entropy", entropy), check_flag("capped", capped)
    facts = {"trains": gear != "scoring", "entropy": entropy, "capped": capped, "batch_invariant": batch_invariant}
    tiles_fit = backends.may_fuse(len(sizes), dtype, **facts)
    backend = backends.planned(backend, device, dtype, tiles=tiles_fit)
    tiles = backends.tile_columns(backend, sizes, dtype, batch_invariant) or 0
    if gear == "frozen_head" and tiles:
        # Reason: the frozen head's gear needs slabs; where all gears must give the same bits, all of them run tiles.
        gear, tiles = ("trained", tiles) if batch_invariant else (gear, 0)
    plain = not (entropy or tiles or capped or dtype == torch.float16)
    pads = batch_invariant and not tiles
    fuses = tiles_fit and not tiles and backends.fuses(backend, sizes, dtype)
    walk = WalkSpec(
        gear=gear,
        operand=dtype,
        hidden_grad=hidden_grad,
        weight_grad=weight_grad,
        bias_grad=bias_grad,
        entropy=entropy,
        scale=1.0,
        softcap=None,
        temperature=1.0,
        slab_width=0,
        slabs_kept=0,
        slabs_at_once=1,
        product_columns=1,
        row_block=fixed_tile(device_type)[0] if pads else 0,
        tile_columns=tiles,
        # Reason: such kernels write the operands of the products as they are, and a library may take them wider.
        fused=fuses and not products_of(device_type, dtype).widens,
        factored=plain and gear != "scoring",
        wide_dz=backends.BACKENDS[backend].wide_dz,
        backend=backend,
    )
    problem = Problem(
        rows=walk.padded_rows(rows),
        hidden_sizes=sizes,
        vocab_size=vocab_size,
        products=products_of(device_type, dtype),
        hidden_dtypes=hidden_dtypes,
        weight_dtypes=weight_dtypes,
        copies=not check_flag("head_in_place", head_in_place),
        compact=pads or total_rows > rows or any(each != dtype for each in hidden_dtypes),
        batch_invariant=batch_invariant,
        walk=walk,
    )
    return problem, budget


def _solve(problem: Problem, budget: int) -> Plan:
    walk = _planned_walk(problem, budget)
    flops = problem.flops(walk)
    return Plan(
        rows=problem.rows,
        hidden_sizes=problem.hidden_sizes,
        vocab_size=problem.vocab_size,
        walk=walk,
        products=problem.products.said,
        flops=flops,
        units=flops / max(1, problem.rows * sum(problem.hidden_sizes) * problem.vocab_size),
        seconds=problem.seconds(walk),
        peak_bytes=problem.peak_bytes(walk),
        memory_budget=budget,
        problem=problem,
    )


@functools.lru_cache(maxsize=1024)
def _walk_of(problem: Problem, budget: int) -> WalkSpec:
    return problem.solve(budget)


def _planned_walk(problem: Problem, budget: int) -> WalkSpec:
    return _walk_of(replace(problem, rows=_planned_rows(problem)), budget)


def _planned_rows(problem: Problem) -> int:
    """Return the row count to plan for: on a GPU rounded up by at most 6 %, so that ragged batches share a plan."""
    if problem.products.device_type == "cpu":
        return problem.rows
    return round_up(problem.rows, max(64, 1 << max(0, problem.rows.bit_length() - 5)))


def planned(rows: int, hidden_sizes: tuple[int, ...], vocab_size: int, **options: Any) -> Plan:
    """Return the plan of an op whose arguments are checked; it is kept like the answers of `planned_spec`."""
    return _kept_plan((rows, hidden_sizes, vocab_size), *_kept_by(hidden_sizes, **options))


@functools.lru_cache(maxsize=1024)
def _kept_plan(sizes: tuple, asked: tuple, facts: tuple) -> Plan:
    return plan(*sizes, **dict(asked))


def _kept_by(
    hidden_sizes: tuple[int, ...],
    *,
    dtype: torch.dtype,
    device: str,
    backend: str,
    batch_invariant: bool,
    memory_budget: int | None,
    **options: Any,
) -> tuple[tuple, tuple]:
    """Return the options of a plan, and all that it depends on besides its arguments."""
    if memory_budget is not None:  # Hazard: 0.0 and False equal 0, so a cache would answer for them.
        memory_budget = check_count("memory_budget", memory_budget)
    asked = {"dtype": dtype, "device": device, "backend": backend, "batch_invariant": batch_invariant}
    tiles = backends.tile_columns(backend, hidden_sizes, dtype, batch_invariant)
    ways = backends.BACKENDS[backend], tiles, backends.fuses(backend, hidden_sizes, dtype)
    facts = products_of(device, dtype), ways, default_budget(device), fixed_tile(device)
    return tuple({**asked, "memory_budget": memory_budget, **options}.items()), facts


def planned_spec(
    rows: int,
    hidden_sizes: tuple[int, ...],
    vocab_size: int,
    *,
    transform: tuple[float, float | None, float] = (1.0, None, 1.0),
    masks: bool = True,
    **options: Any,
) -> tuple:
    """Return the values of the plan's `WalkSpec` with this transform, which is all that a walk over slabs needs.

    The answer is kept by the arguments and whatever else it depends on. Reason: a GPU's first launch waits for it.
    """
    return _spec_values((rows, hidden_sizes, vocab_size), transform, masks, *_kept_by(hidden_sizes, **options))


@functools.lru_cache(maxsize=1024)
def _spec_values(sizes: tuple, transform: tuple, masks: bool, asked: tuple, facts: tuple) -> tuple:
    problem, budget = _asked(*sizes, **dict(asked))
    return _planned_walk(problem, budget).of(LogitTransform(*transform), masks=masks).values()


# torch.compile runs this while it traces instead of tracing it: tracing the search would take minutes.
planned_spec._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _solve_chunks(problem: Problem, rows: int, group_rows: int, budget: int) -> Plan:
    """Split whole groups into nearly equal chunks, as many as are predicted to be fastest within the budget.

    One chunk may have to recompute some logits. Several recompute fewer or none, but add up dweight in float32.
    """
    tile = problem.walk.row_block or 1
    groups = max(1, -(-rows // group_rows))
    best = None
    for chunks in reversed(_chunk_counts(groups)):  # of several that are equal, the fewest
        each = -(-groups // chunks)
        # Reason: fused_loss scales float16 gradients by a power of two that is known only at the end.
        is_half = torch.float16 in problem.weight_dtypes
        several = any(problem.walk.weight_grad) and (each < groups or is_half)
        part = replace(problem, rows=round_up(min(rows, each * group_rows), tile), accumulates=several)
        if best is not None and part.least_bytes > max(budget, best[3].peak_bytes):
            break  # neither this chunk nor a larger one can fit, or be the smallest
        inner = _solve(part, budget)
        seconds = -(-groups // each) * (inner.seconds + several * part.accumulating_seconds())
        # Reason: several chunks take another 4 * V * H bytes, which are not worth a few percent of time.
        key = (
            (True, -seconds * (1.05 if several else 1.0)) if inner.peak_bytes <= budget else (False, -inner.peak_bytes)
        )
        if best is None or key >= best[0]:
            best = key, each, part, inner, seconds
    assert best is not None  # there is at least one chunk
    _, each, part, inner, seconds = best
    full, rest = divmod(rows, each * group_rows)
    flops = full * inner.flops
    if rest:
        flops += _solve(replace(part, rows=round_up(rest, tile)), budget).flops
    accumulator = 0
    if part.accumulates:
        blocks = zip(problem.hidden_sizes, problem.walk.weight_grad, problem.weight_dtypes, strict=True)
        columns = sum(size for size, wanted, dtype in blocks if wanted and dtype != problem.products.acc)
        accumulator = problem.vocab_size * columns * problem.products.acc.itemsize
    return replace(
        inner,
        rows=rows,
        flops=flops,
        units=flops / max(1, rows * sum(problem.hidden_sizes) * problem.vocab_size),
        seconds=seconds,
        peak_bytes=inner.peak_bytes + accumulator,
        chunk_groups=each,
        num_chunks=max(1, -(-groups // each)),
    )


def _chunk_counts(groups: int) -> list[int]:
    """Return the numbers of chunks to consider: all small ones, then steps of an eighth, and one per group."""
    counts = []
    count = 1
    while count < groups:
        counts.append(count)
        count = max(count + 1, count * 9 // 8)
    return [*counts, groups]
