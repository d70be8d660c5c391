"""How much memory and how many FLOPs an op will take, decided before it runs and obeyed by it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from windkern._checks import check_count, check_device, check_each, check_flag, check_float_dtype
from windkern.kernels import torch_rows
from windkern.kernels.gemm import Gemm

MIB = 1 << 20
# Reason: a constant for each device type, never a query of free memory: results must not depend on what else runs.
DEFAULT_BUDGET = {"cpu": 256 * MIB}
DEFAULT_BUDGET_GPU = 2048 * MIB
# Bytes of one float32 slab where the budget allows it: on a CPU inside the heap and near the last-level cache, on a
# GPU wide enough for full-rate GEMMs.
SLAB_BYTES = {"cpu": 16 * MIB}
SLAB_BYTES_GPU = 256 * MIB
SLAB_COLUMNS = (256, 16384)  # narrowest and widest slab; a Triton program holds a row of one in registers
# Relative cost of a slab of w columns is 1 + this / w: narrow products run below full rate.
NARROW_SLAB_COST = 32
COLUMN_STEP = 64
# Rows and columns of the fixed tiles of `deterministic=True`, by device type.
DETERMINISTIC_TILE = {"cpu": (128, 2048)}
DETERMINISTIC_TILE_GPU = (1024, 8192)


@dataclass(frozen=True)
class Plan:
    """What an op will do: pure data, printed as an explanation.

    `units` counts GEMM work in multiples of rows * hidden_size * vocab_size multiply-adds, forward and backward
    together: plain logits take 6, recomputing every logit takes 8. `peak_bytes` is everything allocated beside
    outputs and gradients.
    """

    gear: str  # scoring | frozen_head | frozen_body | trained
    rows: int  # scored rows, after padding to fixed tiles when deterministic
    hidden_sizes: tuple[int, ...]
    vocab_size: int
    slab_width: int
    num_slabs: int
    slabs_kept: int
    row_block: int  # rows of one GEMM in forward
    flops: int
    units: float
    peak_bytes: int
    memory_budget: int
    offset_tiles: int = 1  # offsets of a row in a kept slab; more than one where the forward runs in fused tiles
    chunk_groups: int | None = None  # fused_loss: groups finished together
    num_chunks: int = 1

    def __str__(self) -> str:
        lines = [
            f"gear {self.gear}: {self.units:g} units of rows x hidden x vocab ({self.flops / 1e12:.3g} TFLOP)",
            f"{self.rows} rows, hidden {' + '.join(map(str, self.hidden_sizes))}, vocabulary {self.vocab_size}",
            f"{self.num_slabs} slabs of {self.slab_width} columns, {self.slabs_kept} kept for backward",
            f"peak {self.peak_bytes / MIB:.1f} MiB of a budget of {self.memory_budget / MIB:.1f} MiB",
        ]
        if self.chunk_groups is not None:
            lines.append(f"{self.num_chunks} chunks of up to {self.chunk_groups} groups")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Problem:
    """Everything the byte and FLOP formulas look at except the slab width and the slabs kept."""

    rows: int
    hidden_sizes: tuple[int, ...]
    vocab_size: int
    gemm: Gemm
    hidden_dtypes: tuple[torch.dtype, ...]
    weight_dtypes: tuple[torch.dtype, ...]
    hidden_grad: tuple[bool, ...]
    weight_grad: tuple[bool, ...]
    bias_grad: bool
    entropy: bool
    compact: bool  # rows are copied before the walk: cast, ignored ones dropped, or padded to fixed tiles
    deterministic: bool
    accumulates: bool = False  # dweight of several chunks adds up in float32
    tile_columns: int | None = None  # of the fused tiles of a forward that has no slab

    @property
    def gear(self) -> str:
        if any(self.weight_grad) or self.bias_grad:
            return "trained" if any(self.hidden_grad) else "frozen_body"
        if not any(self.hidden_grad):
            return "scoring"
        # Reason: the frozen head's gear needs the slab; where all gears must give the same bits, all run tiles.
        return "trained" if self.deterministic and self.tile_columns is not None else "frozen_head"

    @property
    def row_block(self) -> int:
        return deterministic_tile(self.gemm.device_type)[0] if self.pads else self.rows

    @property
    def narrowed_item(self) -> int:
        """Bytes of a number of dhidden in the caller's dtype."""
        return max(dtype.itemsize for dtype in self.hidden_dtypes)

    @property
    def pads(self) -> bool:
        """Whether rows are padded to the fixed tiles of a library's products."""
        return self.deterministic and self.tile_columns is None

    @property
    def tiled(self) -> bool:
        """Whether forward runs in fused tiles; the frozen head needs the slab itself."""
        return self.tile_columns is not None and self.gear != "frozen_head"

    def tiles(self, width: int) -> int:
        return -(-width // self.tile_columns) if self.tiled else 1

    def kept_bytes(self, width: int, kept: int) -> int:
        """Slabs kept for backward: exponentials and their offsets, or the logits where the entropy is an output."""
        acc, item = self.gemm.acc.itemsize, self.gemm.operand.itemsize
        if self.entropy:
            return kept * self.rows * width * acc
        return kept * self.rows * (width * item + self.tiles(width) * acc)

    def forward_bytes(self, width: int, kept: int) -> int:
        M, R, H = self.rows, self.row_block, sum(self.hidden_sizes)
        H_max = max(self.hidden_sizes)
        acc, item = self.gemm.acc.itemsize, self.gemm.operand.itemsize
        tiles = self.tiles(width)
        total = self._common_bytes(R, width) + self.kept_bytes(width, kept)
        total += R * tiles * acc * (2 + self.entropy) if self.tiled else R * width * acc
        total += self.gemm.widens * M * H * acc
        packed = self.gemm.packed_bytes(width, H_max)
        if self.gear == "frozen_head":
            H_grad = sum(size for size, wanted in zip(self.hidden_sizes, self.hidden_grad, strict=True) if wanted)
            total += (1 + self.entropy) * M * H_grad * acc
            total += R * width * item * ((item != acc) + self.entropy)
            total += self._product_bytes(R, width, H_max)
            packed = max(packed, self.gemm.packed_bytes(H_max, width))
        return total + packed

    def backward_bytes(self, width: int, kept: int) -> int:
        M, H, H_max = self.rows, sum(self.hidden_sizes), max(self.hidden_sizes)
        acc, item = self.gemm.acc.itemsize, self.gemm.operand.itemsize
        if self.gear == "scoring":
            return 0
        H_grad = sum(size for size, wanted in zip(self.hidden_sizes, self.hidden_grad, strict=True) if wanted)
        if self.gear == "frozen_head":
            # Saved unit gradients, their combination, compacted rows, and blocks of gathered rows of the head.
            block = 3 * min(MIB, M * H_max * acc)
            copies = self.compact * M * (H * item + H_max * self.narrowed_item)
            return (2 + self.entropy) * M * H_grad * acc + copies + block
        all_kept = kept * width >= self.vocab_size
        total = self._common_bytes(M, width) + self.kept_bytes(width, kept)
        total += M * width * (acc if (item == acc or not all_kept or self.entropy) else 0)
        total += M * width * (item if item != acc else 0)
        if self.gemm.widens and not all_kept:
            total += M * H * acc
        packed = [0 if all_kept else self.gemm.packed_bytes(width, H_max)]
        if any(self.hidden_grad) or any(self.weight_grad):
            total += self._product_bytes(M, width, H_max * any(self.hidden_grad))
        if any(self.hidden_grad):
            total += M * H_grad * acc + self.compact * M * H_max * self.narrowed_item
            packed.append(self.gemm.packed_bytes(H_max, width))
        if any(self.weight_grad):
            packed.append(self.gemm.packed_bytes(H_max, M))
            total += width * H_max * acc * self._weight_product()
            total += self.gemm.widens * M * H * acc
            total += M * H * item * (self.gemm.operand == torch.float16)
        return total + max(packed)

    def _common_bytes(self, rows: int, width: int) -> int:
        """Row vectors, a slab's bias and its gradient, compacted rows, scratch, the head's slab in another dtype."""
        acc, item = self.gemm.acc.itemsize, self.gemm.operand.itemsize
        slab = width * max(self.hidden_sizes)
        total = self.rows * (12 * acc + 16) + 2 * width * acc + self.compact * self.rows * sum(self.hidden_sizes) * item
        total += torch_rows.scratch_bytes(rows, width, acc, self.gemm.device_type)
        total += slab * item * any(dtype != self.gemm.operand for dtype in self.weight_dtypes)
        return total + slab * acc * self.gemm.widens

    def _product_bytes(self, rows: int, width: int, inner: int) -> int:
        """Temporaries of dhidden += dz @ weight: a widened dz, and the library's own result of `inner` columns."""
        return rows * (width * self.gemm.widens + inner * self.gemm.allocates) * self.gemm.acc.itemsize

    def _weight_product(self) -> bool:
        """Whether dweight of a slab exists apart from its place in the gradient."""
        if self.gemm.packs:
            return False
        same = all(dtype == self.gemm.operand for dtype in self.weight_dtypes) and not self.accumulates
        return self.gemm.device_type == "cpu" or self.gemm.operand == torch.float16 or not same

    def peak_bytes(self, width: int, kept: int) -> int:
        return max(self.forward_bytes(width, kept), self.backward_bytes(width, kept))

    def flops(self, width: int, kept: int) -> int:
        H, total = sum(self.hidden_sizes), sum(self.hidden_sizes)
        H_grad = sum(size for size, wanted in zip(self.hidden_sizes, self.hidden_grad, strict=True) if wanted)
        if self.gear == "frozen_head":
            total += H_grad * (1 + self.entropy)
        elif self.gear != "scoring":
            total += H_grad + sum(
                size for size, wanted in zip(self.hidden_sizes, self.weight_grad, strict=True) if wanted
            )
        recomputed = max(0, self.vocab_size - kept * width) if self.gear in ("trained", "frozen_body") else 0
        return 2 * self.rows * (total * self.vocab_size + H * recomputed)

    def plan(self, budget: int) -> Plan:
        width, kept = self._choose(budget)
        flops = self.flops(width, kept)
        return Plan(
            gear=self.gear,
            rows=self.rows,
            hidden_sizes=self.hidden_sizes,
            vocab_size=self.vocab_size,
            slab_width=width,
            num_slabs=-(-self.vocab_size // width),
            slabs_kept=kept,
            row_block=self.row_block,
            flops=flops,
            units=flops / max(1, self.rows * sum(self.hidden_sizes) * self.vocab_size),
            peak_bytes=self.peak_bytes(width, kept),
            memory_budget=budget,
            offset_tiles=self.tiles(width),
        )

    def _choose(self, budget: int) -> tuple[int, int]:
        """Slab width and slabs kept: the cheapest choice within the budget, else the smallest."""
        best = None
        for width in self._widths():
            kept = self._most_kept(width, budget)
            peak = self.peak_bytes(width, kept)
            cost = self.flops(width, kept) * (1 + NARROW_SLAB_COST / width)
            key = (True, -cost) if peak <= budget else (False, -peak)
            if best is None or key > best[0]:
                best = key, width, kept
        return best[1:]

    def _widths(self) -> list[int]:
        """Slab widths worth looking at, widest first; one fixed width where results may not depend on it."""
        narrowest, widest = SLAB_COLUMNS
        device_type = self.gemm.device_type
        if self.deterministic:
            return [min(deterministic_tile(device_type)[1], _round_up(self.vocab_size, COLUMN_STEP))]
        if self.tiled and self.gear == "scoring":
            return [_even_width(self.vocab_size, widest)]
        target = SLAB_BYTES.get(device_type, SLAB_BYTES_GPU) // max(1, self.rows * self.gemm.acc.itemsize)
        widths = [_even_width(self.vocab_size, min(widest, max(narrowest, target)))]
        while widths[-1] > narrowest:
            widths.append(_even_width(self.vocab_size, max(narrowest, widths[-1] // 2)))
        return widths

    def _most_kept(self, width: int, budget: int) -> int:
        if self.gear not in ("trained", "frozen_body") or (self.tiled and self.entropy):  # tiles have no logits to keep
            return 0
        low, high = 0, -(-self.vocab_size // width)
        if self.peak_bytes(width, high) <= budget:  # less than keeping all but one, which needs a slab to recompute
            return high
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.peak_bytes(width, middle) <= budget else (low, middle - 1)
        return low


def deterministic_tile(device_type: str) -> tuple[int, int]:
    return DETERMINISTIC_TILE.get(device_type, DETERMINISTIC_TILE_GPU)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _even_width(vocab_size: int, width: int) -> int:
    """Split the vocabulary into slabs of nearly one size, none wider than `width` rounded to whole steps."""
    width = max(COLUMN_STEP, width // COLUMN_STEP * COLUMN_STEP)
    slabs = -(-vocab_size // width)
    return _round_up(-(-vocab_size // slabs), COLUMN_STEP)


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
    deterministic: bool = False,
    total_rows: int | None = None,
    hidden_dtype: torch.dtype | Sequence[torch.dtype] | None = None,
    weight_dtype: torch.dtype | Sequence[torch.dtype] | None = None,
    tile_columns: int | None = None,
) -> Plan:
    """Return the plan an op with these arguments will follow. Pure: the same arguments give the same plan anywhere.

    Args:
        rows: scored rows M (targets that are not ignored).
        hidden_size: H, or the sizes of the blocks.
        vocab_size: V.
        dtype: of the GEMM operands: that of the head, the widest where its blocks differ; under autocast its dtype.
        hidden_grad, weight_grad, bias_grad: which gradients are wanted, one flag or one for each block.
        entropy: whether the entropy is an output.
        group_rows: for `fused_loss`, the rows of the largest group (N * T); None for the other ops.
        memory_budget: bytes for everything beside outputs and gradients; None is 2 GiB on a GPU, 256 MiB on a CPU.
            Below the smallest possible plan the smallest plan is taken.
        device: "cuda", "cpu" or a torch.device.
        deterministic: fixed tiles, so that a row's log-prob does not depend on anything but the row.
        total_rows: rows before ignored ones are dropped; larger than `rows` means that rows are copied first.
        hidden_dtype: of the hidden states where it differs from `dtype`, one or one for each block; rows are cast as
            they are copied.
        weight_dtype: of the head where it differs from `dtype`, the same; its slabs are cast one at a time.
        tile_columns: of the tiles of a forward without a slab, where a back end runs one for these sizes.

    Returns:
        A `Plan` with the gear, slab width, slabs kept, units, FLOPs and peak bytes; `print(plan)` explains it.

    Raises:
        ValueError: a size or the budget is too small, what is given by block does not match the blocks, or `device`
            names none.
        TypeError: a size is not an integer, a flag not True or False, or a dtype not one windkern supports.

    Example:
        >>> p = plan(8192, 4096, 128256, torch.bfloat16, device="cuda")
        >>> p.gear, 6 <= p.units <= 8, p.peak_bytes <= 2 << 30
        ('trained', True, True)
    """
    rows = check_count("rows", rows)
    sizes = check_each("hidden_size", hidden_size, lambda name, size: check_count(name, size, least=1))
    vocab_size = check_count("vocab_size", vocab_size, least=1)
    device_type, deterministic = check_device("device", device).type, check_flag("deterministic", deterministic)
    budget = default_budget(device_type) if memory_budget is None else check_count("memory_budget", memory_budget)
    dtype = check_float_dtype("dtype", dtype)
    hidden_dtypes, weight_dtypes = (
        check_each(name, dtype if value is None else value, check_float_dtype, len(sizes))
        for name, value in (("hidden_dtype", hidden_dtype), ("weight_dtype", weight_dtype))
    )
    if tile_columns is not None:
        tile_columns = check_count("tile_columns", tile_columns, least=1)
    total_rows = rows if total_rows is None else check_count("total_rows", total_rows)
    if total_rows < rows:
        raise ValueError(f"total_rows must be at least rows, {rows}, got {total_rows}")
    pads = deterministic and tile_columns is None
    problem = _Problem(
        rows=_round_up(rows, deterministic_tile(device_type)[0]) if pads else rows,
        hidden_sizes=sizes,
        vocab_size=vocab_size,
        gemm=Gemm(device_type, dtype),
        hidden_dtypes=hidden_dtypes,
        weight_dtypes=weight_dtypes,
        hidden_grad=check_each("hidden_grad", hidden_grad, check_flag, len(sizes)),
        weight_grad=check_each("weight_grad", weight_grad, check_flag, len(sizes)),
        bias_grad=check_flag("bias_grad", bias_grad),
        entropy=check_flag("entropy", entropy),
        compact=pads or total_rows > rows or any(each != dtype for each in hidden_dtypes),
        deterministic=deterministic,
        tile_columns=tile_columns,
    )
    if group_rows is None:
        return _solve(problem, budget)
    return _solve_chunks(problem, rows, check_count("group_rows", group_rows, least=1), budget)


@functools.lru_cache(maxsize=1024)
def _solve(problem: _Problem, budget: int) -> Plan:
    return problem.plan(budget)


def walk_sizes(
    rows: int, hidden_sizes: tuple[int, ...], vocab_size: int, **options: object
) -> tuple[str, int, int, int]:
    """Gear, slab width, slabs kept and offset tiles of the plan: all that a walk over slabs must know."""
    made = plan(rows, hidden_sizes, vocab_size, **options)
    return made.gear, made.slab_width, made.slabs_kept, made.offset_tiles


# Run while torch.compile traces, not traced: the search would take minutes there.
walk_sizes._dynamo_marked_constant = True


def _solve_chunks(problem: _Problem, rows: int, group_rows: int, budget: int) -> Plan:
    """As many groups at once as finish within the budget without recomputing a logit; one group at the least."""
    tile = problem.row_block if problem.pads else 1
    groups = -(-rows // group_rows)

    def chunk(num_groups: int) -> tuple[_Problem, Plan]:
        # Reason: fused_loss hands float16 gradients over scaled by a power of two, known only at the end.
        is_half = torch.float16 in problem.weight_dtypes
        several = any(problem.weight_grad) and (num_groups < groups or is_half)
        part = replace(problem, rows=_round_up(min(rows, num_groups * group_rows), tile), accumulates=several)
        return part, _solve(part, budget)

    def finishes(num_groups: int) -> bool:
        part, inner = chunk(num_groups)
        recomputes = part.gear in ("trained", "frozen_body") and inner.slabs_kept < inner.num_slabs
        return inner.peak_bytes <= budget and not recomputes

    low, high = 1, max(1, groups)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if finishes(middle) else (low, middle - 1)
    part, inner = chunk(low)
    num_chunks = max(1, -(-groups // low))
    full, rest = divmod(rows, low * group_rows)
    flops = full * inner.flops
    if rest:
        flops += _solve(replace(part, rows=_round_up(rest, tile)), budget).flops
    accumulator = 0
    if part.accumulates:
        blocks = zip(problem.hidden_sizes, problem.weight_grad, problem.weight_dtypes, strict=True)
        columns = sum(size for size, wanted, dtype in blocks if wanted and dtype != problem.gemm.acc)
        accumulator = problem.vocab_size * columns * problem.gemm.acc.itemsize
    return replace(
        inner,
        rows=rows,
        flops=flops,
        units=flops / max(1, rows * sum(problem.hidden_sizes) * problem.vocab_size),
        peak_bytes=inner.peak_bytes + accumulator,
        chunk_groups=low,
        num_chunks=num_chunks,
    )
