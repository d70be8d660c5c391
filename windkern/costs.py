"""Predict the cost of a walk by slab width and slabs kept: bytes, FLOPs, and seconds of a reference device."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from windkern import backends
from windkern.kernels.contract import TILE_COLUMNS, WIDEST_ROW, WIDEST_SLAB, WIDEST_UNIT_SLAB
from windkern.kernels.gemm import Products
from windkern.spec import WalkSpec, row_stride

MIB = 1 << 20
# Rows and columns of the fixed tiles of a batch-invariant walk, by device type.
FIXED_TILE = {"cpu": (128, 2048)}
FIXED_TILE_GPU = (1024, 8192)
SLAB_COLUMNS = (256, WIDEST_ROW)  # narrowest and widest slab
COLUMN_STEP = 64
# Bytes of one float32 slab on a CPU: inside the heap and near the last-level cache.
SLAB_BYTES_CPU = 16 * MIB
# The same, and the fewest columns, where products of bfloat16 are so fast that passes over a slab show: on a Zen 5,
# 16 MiB took up to 9 % longer than 4, and a frozen head 6 % longer with 512 columns; on a Zen 4, where the start and
# the end of a product cost more, 4 MiB took up to 7 % longer than 8.
SLAB_BYTES_OWN, COLUMNS_OWN = 8 * MIB, 1024
# The same on a GPU, for few rows: wider slabs take fewer launches, which is all that counts there.
SLAB_BYTES_GPU = 128 * MIB
# Slabs per product on a GPU, for a frozen head or where forward kept nothing.
SLABS_AT_ONCE = (1, 2, 4, 8)


@dataclass(frozen=True)
class Device:
    """A reference device of the cost model: an H100 for GPUs, two cores with AVX-512 for CPUs."""

    flops: float  # per second, of products that fill the device
    bytes: float  # per second
    launch: float  # seconds at the boundary of a kernel
    host: float  # seconds of Python per slab, hidden on a GPU where its own work takes longer
    units: int  # multiprocessors; a product takes whole waves of tiles over them
    tile: tuple[int, int]
    exposed: float  # share of the dhidden traffic that products do not hide
    narrow: int = 0  # a product over this many columns takes twice as long per column as a wide one


GPU = Device(790e12, 3.0e12, 2.5e-6, 75e-6, 132, (128, 256), 0.5)
CPU = Device(200e9, 12e9, 5e-6, 0.0, 1, (1, 1), 1.0, narrow=32)


@dataclass(frozen=True)
class Problem:
    """Inputs of the formulas, except the slab width, the slabs kept and the slabs per product."""

    rows: int
    hidden_sizes: tuple[int, ...]
    vocab_size: int
    products: Products
    hidden_dtypes: tuple[torch.dtype, ...]
    weight_dtypes: tuple[torch.dtype, ...]
    compact: bool  # rows are copied before the walk: cast, ignored ones dropped, or padded to fixed tiles
    batch_invariant: bool
    copies: bool  # kernels that multiply themselves cannot read the head where it lies
    walk: WalkSpec  # with its gear, tiles and row block; the sizes are still open
    accumulates: bool = False  # dweight of several chunks adds up in float32

    @property
    def acc(self) -> int:
        """Bytes of an accumulated element (`item`: of an operand; `multiplied`: of an input of a product)."""
        return self.products.acc.itemsize

    @property
    def item(self) -> int:
        return self.walk.operand.itemsize

    @property
    def multiplied(self) -> int:
        return self.products.multiplied.itemsize

    @property
    def dz_dtype(self) -> torch.dtype:
        return self.products.multiplied if self.walk.wide_dz else self.walk.operand

    @property
    def narrowed_item(self) -> int:
        """Bytes of an element of dhidden in the caller's dtype."""
        return max(dtype.itemsize for dtype in self.hidden_dtypes)

    @property
    def block(self) -> int:
        """Rows of a forward product."""
        return self.walk.row_block or self.rows

    @property
    def hidden_grads(self) -> int:
        """Sum of H_k over the blocks whose dhidden is wanted."""
        return sum(size for size, wanted in zip(self.hidden_sizes, self.walk.hidden_grad, strict=True) if wanted)

    @property
    def weight_grads(self) -> int:
        return sum(size for size, wanted in zip(self.hidden_sizes, self.walk.weight_grad, strict=True) if wanted)

    @property
    def keeps(self) -> bool:
        """Whether forward can keep slabs for backward. The entropy needs logits, and tiles have none to keep."""
        return self.walk.gear in ("trained", "frozen_body") and not (self.walk.tile_columns and self.walk.entropy)

    def spec(self, width: int, kept: int, at_once: int = 1) -> WalkSpec:
        columns = min(self.vocab_size, kept * width)
        inner = max(self.hidden_sizes)
        product = max(1, self.products.columns_at_once(self.rows, max(1, columns), inner))
        return replace(self.walk, slab_width=width, slabs_kept=kept, slabs_at_once=at_once, product_columns=product)

    @property
    def least_bytes(self) -> int:
        """Bytes that every walk needs, however narrow its slabs: those of row vectors, and of dhidden."""
        return self.rows * (self._vector_bytes + self.hidden_grads * self.acc)

    @property
    def _vector_bytes(self) -> int:
        return 14 * self.acc + 16

    def peak_bytes(self, spec: WalkSpec) -> int:
        return max(self.forward_bytes(spec), self.backward_bytes(spec))

    def kept_bytes(self, spec: WalkSpec) -> int:
        """Bytes that forward keeps: exponentials and their offsets, or the logits where the entropy is an output."""
        matrix = self.rows * row_stride(spec.kept_columns(self.vocab_size))
        if spec.saves_logits:
            return matrix * self.acc
        return matrix * self.item + self.rows * self.acc * (3 if spec.factored else spec.slabs_kept * spec.offset_tiles)

    def forward_bytes(self, spec: WalkSpec) -> int:
        M, R, width, acc = self.rows, self.block, spec.slab_width, self.acc
        inner = max(self.hidden_sizes)
        total = self._common_bytes(R, width) + self.kept_bytes(spec)
        total += self.products.widens * M * sum(self.hidden_sizes) * acc
        packed = self.products.scratch_bytes(width, inner)
        in_place = not self.products.allocates and spec.factored
        if spec.fused:
            total += self._part_bytes(spec)
            if spec.gear != "frozen_head":
                return total
            total += M * self.hidden_grads * acc + R * width * spec.slabs_at_once * self.multiplied
            total += self._head_bytes(width * spec.slabs_at_once) * (spec.slabs_at_once > 1)
            return total + self._product_bytes(R, 0, inner)
        if spec.tile_columns:
            return total + packed + R * spec.offset_tiles * acc * (2 + spec.entropy)
        if spec.gear != "frozen_head":
            all_in_place = in_place and self.item == acc and spec.kept_columns(self.vocab_size) >= self.vocab_size
            return total + packed + (0 if all_in_place else R * width * acc)
        total += (1 + spec.entropy) * M * self.hidden_grads * acc
        wide = min(width * spec.slabs_at_once, row_stride(self.vocab_size)) if spec.slabs_at_once > 1 else width
        if spec.factored:
            in_place = in_place and self.multiplied == acc
            total += R * (wide * acc if in_place else width * acc + wide * self.multiplied)
            total += self._head_bytes(wide) * (spec.slabs_at_once > 1)
            return total + self._product_bytes(R, 0, inner) + max(packed, self.products.scratch_bytes(inner, wide))
        total += R * width * acc + R * width * self.item * ((self.item != acc) + spec.entropy)
        return total + self._product_bytes(R, width, inner) + max(packed, self.products.scratch_bytes(inner, width))

    def backward_bytes(self, spec: WalkSpec) -> int:
        M, acc = self.rows, self.acc
        if spec.gear == "scoring":
            return 0
        if spec.gear == "frozen_head":
            # Saved unit gradients, their combination, compacted rows, and blocks of gathered rows of the head.
            inner = max(self.hidden_sizes)
            block = 3 * min(MIB, M * inner * acc)
            copies = self.compact * M * (sum(self.hidden_sizes) * self.item + inner * self.narrowed_item)
            return (2 + spec.entropy) * M * self.hidden_grads * acc + copies + block
        total = self._common_bytes(M, spec.slab_width) + self.kept_bytes(spec)
        if any(spec.hidden_grad):
            total += M * self.hidden_grads * acc + self.compact * M * max(self.hidden_sizes) * self.narrowed_item
        return total + (max(self._exps_bytes(spec), self._dz_bytes(spec)) if spec.factored else self._dz_bytes(spec))

    def _exps_bytes(self, spec: WalkSpec) -> int:
        """Bytes of backward's own buffers where exponentials are the operands."""
        M, width, acc = self.rows, spec.slab_width, self.acc
        inner, kept = max(self.hidden_sizes), spec.kept_columns(self.vocab_size)
        columns = min(spec.product_columns, kept) if kept else 0
        total, scratch = M * self.weight_grads * self.multiplied, 0
        recomputed = self.vocab_size - kept
        if recomputed:
            wide = min(width * spec.slabs_at_once, row_stride(recomputed))
            in_place = self.multiplied == acc and not self.products.allocates
            logits = 0 if spec.fused else width * acc
            total += M * (wide * acc if in_place else logits + wide * self.multiplied)
            total += self.products.widens * M * sum(self.hidden_sizes) * acc
            total += self._head_bytes(wide) * (spec.slabs_at_once > 1)
            columns, scratch = max(columns, wide), self.products.scratch_bytes(width, inner)
        total += self.products.widens * M * min(columns, kept) * acc
        return total + self._products_bytes(columns, scratch)

    def _dz_bytes(self, spec: WalkSpec) -> int:
        """Bytes of backward's own buffers where dz is written, slab by slab."""
        M, width, acc = self.rows, spec.slab_width, self.acc
        all_kept = spec.kept_columns(self.vocab_size) >= self.vocab_size
        dz = self.dz_dtype
        total = M * width * (acc if (dz.itemsize == acc or not all_kept or spec.entropy) else 0)
        total += M * width * (dz.itemsize if dz.itemsize != acc else 0)
        total += M * width * acc * (dz != self.products.multiplied)
        if self.products.widens:
            total += M * sum(self.hidden_sizes) * acc * ((not all_kept) + any(spec.weight_grad))
        total += M * sum(self.hidden_sizes) * self.item * (dz == torch.float16) * any(spec.weight_grad)
        scratch = 0 if all_kept else self.products.scratch_bytes(width, max(self.hidden_sizes))
        return total + self._products_bytes(width, scratch)

    def _products_bytes(self, columns: int, scratch: int) -> int:
        """Bytes of the temporaries of both products over `columns` of the vocabulary."""
        inner, total = max(self.hidden_sizes), self._head_bytes(columns)
        total += self.products.copied_bytes(self.rows, columns)
        if any(self.walk.hidden_grad):
            total += self._product_bytes(self.rows, 0, inner)
            scratch = max(scratch, self.products.scratch_bytes(inner, columns))
        if any(self.walk.weight_grad):
            total += columns * inner * self.acc * self._copies_weight_grad()
            scratch = max(scratch, self.products.scratch_bytes(inner, self.rows))
        return total + scratch

    def _common_bytes(self, rows: int, width: int) -> int:
        """Bytes of row vectors, a slab's bias and gradient, compacted rows, scratch, and a cast slab of the head."""
        acc, H = self.acc, sum(self.hidden_sizes)
        total = self.rows * self._vector_bytes + 2 * width * acc + self.compact * self.rows * H * self.item
        if self.walk.fused and self.compact:  # rows that are cast as they are copied
            casts = any(dtype != self.walk.operand for dtype in self.hidden_dtypes)
            total += casts * min(MIB, self.rows * max(self.hidden_sizes) * 4)
        if not self.walk.fused or self.walk.bias_grad:
            total += backends.BACKENDS[self.walk.backend].scratch_bytes(rows, width, acc, self.products.device_type)
        return total + self._head_bytes(width)

    @property
    def casts(self) -> bool:
        """Whether rows of the head are cast or copied, slab by slab."""
        copies = self.copies and self.walk.fused
        return copies or any(dtype != self.walk.operand for dtype in self.weight_dtypes)

    def _columns_at_once(self, spec: WalkSpec) -> int:
        """Columns of forward's widest product where no logits are written, see `Walk.spans`."""
        if self.casts or spec.gear == "frozen_head":
            at_once = 1 if self.casts else spec.slabs_at_once
            return min(spec.slab_width * at_once, self.vocab_size)
        kept = spec.kept_columns(self.vocab_size)
        return max(kept, self.vocab_size - kept)

    def _part_bytes(self, spec: WalkSpec) -> int:
        """Bytes of the statistics that each tile writes for its rows, and of a bias in float32."""
        columns = self._columns_at_once(spec)
        count = 2 + (spec.entropy or spec.gear != "scoring")
        return self.block * -(-columns // TILE_COLUMNS) * count * 4 + columns * 4

    def _head_bytes(self, columns: int) -> int:
        """Bytes of rows of the head in other dtypes: the operand's where the caller's differs, and a widened one."""
        return columns * sum(self.hidden_sizes) * (self.item * self.casts + self.acc * self.products.widens)

    def _product_bytes(self, rows: int, width: int, inner: int) -> int:
        """Bytes of the temporaries of dhidden += dz @ weight: a widened dz, and a result of `inner` columns."""
        own = self.products.allocates or not self.products.adds
        return rows * (width * self.products.widens + inner * own) * self.acc

    def _copies_weight_grad(self) -> bool:
        """Whether dweight of some columns is first computed outside the gradient tensor."""
        if self.accumulates:  # in place only where the library also fills a given place
            in_place = self.products.adds and self.products.writes(self.products.acc)
            return not in_place or self.dz_dtype == torch.float16
        direct = all(self.products.writes(dtype) for dtype in self.weight_dtypes)
        return not direct or self.dz_dtype == torch.float16

    def flops(self, spec: WalkSpec) -> int:
        H = total = sum(self.hidden_sizes)
        if spec.gear == "frozen_head":
            total += self.hidden_grads * (1 + spec.entropy)
        elif spec.gear != "scoring":
            total += self.hidden_grads + self.weight_grads
        recomputed = 0
        if spec.gear in ("trained", "frozen_body"):
            recomputed = self.vocab_size - spec.kept_columns(self.vocab_size)
        return 2 * self.rows * (total * self.vocab_size + H * recomputed)

    @property
    def device(self) -> Device:
        """The reference device of the device type."""
        return CPU if self.products.device_type == "cpu" else GPU

    def seconds(self, spec: WalkSpec) -> float:
        """Predicted seconds of forward and backward on the reference device of the device type."""
        device = self.device
        M, V, W = self.rows, self.vocab_size, spec.slab_width
        rate = device.bytes * (_filled(W) if device is GPU and not spec.fused else 1.0)  # of row kernels
        read = 0 if spec.fused else self.acc  # bytes of each logit that a row kernel reads
        slabs, kept = -(-V // W), spec.kept_columns(V)
        own = [0.0, 0.0]  # the device's time in forward and in backward
        launches = [2 * slabs, 0]
        if spec.fused and not self.casts and spec.gear != "frozen_head":
            spans = kept, V - kept
            own[0] = sum(self._product_seconds(device, M, columns, sum(self.hidden_sizes)) for columns in spans)
            launches[0] = 6
        else:
            own[0] = slabs * self._product_seconds(device, M, W, sum(self.hidden_sizes))
        traffic, again = M * 8 * self.hidden_grads, V - kept
        if spec.gear == "scoring":
            own[0] += M * V * read / rate
        elif spec.gear == "frozen_head":
            products = -(-slabs // spec.slabs_at_once) if spec.factored else slabs * (1 + spec.entropy)
            wide = W * spec.slabs_at_once if spec.factored else W
            own[0] += products * self._product_seconds(device, M, self.hidden_grads, wide)
            own[0] += M * V * (read + self.item) / rate
            own[0] += products * traffic * (device.exposed if spec.factored else 1 + device.exposed) / device.bytes
            launches[0] += products + slabs
        else:
            own[0] += M * V * read / rate + M * kept * self.item / rate
            at_once = W * spec.slabs_at_once if spec.factored else W
            parts = ([kept] if kept and spec.factored else [W] * spec.slabs_kept) + [at_once] * -(-again // at_once)
            for columns in parts:
                own[1] += self._product_seconds(device, M, self.hidden_grads, columns)
                own[1] += self._product_seconds(device, columns, self.weight_grads, M)
                own[1] += traffic * device.exposed / device.bytes
            span = at_once if spec.fused and not self.casts else W
            own[1] += -(-again // span) * self._product_seconds(device, M, span, sum(self.hidden_sizes))
            own[1] += M * again * (read + self.item) / device.bytes
            if not spec.factored:
                own[1] += 2 * M * kept * self.item / device.bytes
            launches[1] = 2 * len(parts) + 2 * -(-again // span) + (0 if spec.factored else spec.slabs_kept)
        total = 0.0
        for seconds, count in zip(own, launches, strict=True):
            total += max(seconds + count * device.launch, count * device.host / 2 if device is GPU else 0.0)
        return total

    def accumulating_seconds(self) -> float:
        """Seconds that a chunk needs to add its dweight to that of the others: one read and one write in float32."""
        return 2 * self.vocab_size * self.weight_grads * self.acc / self.device.bytes

    @staticmethod
    def _product_seconds(device: Device, rows: int, columns: int, inner: int) -> float:
        """Predicted seconds of a product (rows, inner) @ (inner, columns) in whole waves of tiles."""
        if not (rows and columns and inner):
            return 0.0
        high, wide = device.tile
        waves = math.ceil(math.ceil(rows / high) * math.ceil(columns / wide) / device.units)
        seconds = waves * device.units * high * wide * 2 * inner / device.flops
        return seconds * (1 + device.narrow / min(columns, inner)) if device.narrow else seconds

    def solve(self, budget: int) -> WalkSpec:
        """Return the fastest choice within the budget; if none fits, the smallest."""
        best: tuple[tuple[bool, float], WalkSpec] | None = None
        for width in self._widths():
            for at_once in self._groups(width):
                spec = self._most_kept(width, at_once, budget)
                peak = self.peak_bytes(spec)
                key = (True, -self.seconds(spec)) if peak <= budget else (False, -peak)
                if best is None or key > best[0]:
                    best = key, spec
        assert best is not None  # both loops run at least once
        return best[1]

    def _groups(self, width: int) -> tuple[int, ...]:
        """Return the numbers of slabs per product to consider."""
        mixes = self.walk.factored and self.products.mixes and self.products.device_type != "cpu"
        counts = SLABS_AT_ONCE if mixes and self.walk.gear != "scoring" else (1,)
        return tuple(count for count in counts if count == 1 or (count - 1) * width < self.vocab_size)

    def _widths(self) -> list[int]:
        """Return the slab widths to consider, widest first; for a batch-invariant walk, one fixed width."""
        narrowest, widest = SLAB_COLUMNS
        if self.batch_invariant:
            return [min(fixed_tile(self.products.device_type)[1], round_up(self.vocab_size, COLUMN_STEP))]
        if self.walk.tile_columns and self.walk.gear == "scoring":
            return [_even_width(self.vocab_size, widest)]
        if self.walk.fused and self.walk.gear in ("scoring", "frozen_head") and not self.casts:
            return _gpu_widths(self.vocab_size, round_up(self.vocab_size, TILE_COLUMNS))
        if self.products.device_type != "cpu" or self.walk.fused:
            if self.walk.gear == "scoring" or self.walk.factored:
                fit = SLAB_BYTES_GPU // max(1, self.rows * self.acc) // 256 * 256
                half = round_up(-(-self.vocab_size // 2), 256)  # the logits are never held whole
                widest = max(widest, min(WIDEST_SLAB, fit, half))
            elif self.walk.gear == "frozen_head":
                widest = WIDEST_UNIT_SLAB
            return _gpu_widths(self.vocab_size, widest)
        row_bytes = max(1, self.rows * self.acc)
        target = SLAB_BYTES_CPU // row_bytes
        if self.products.name == "own":
            target = min(target, max(COLUMNS_OWN, SLAB_BYTES_OWN // row_bytes))
        if self.products.widens:  # the widened part of the head stays in the cache
            target = min(target, self.products.columns_at_once(1, target, max(self.hidden_sizes)))
        widths = [_even_width(self.vocab_size, min(widest, max(narrowest, target)))]
        while widths[-1] > narrowest:
            widths.append(_even_width(self.vocab_size, max(narrowest, widths[-1] // 2)))
        return widths

    def _most_kept(self, width: int, at_once: int, budget: int) -> WalkSpec:
        low, high = 0, -(-self.vocab_size // width) if self.keeps else 0
        whole = self.spec(width, high, 1 if self.keeps else at_once)
        if self.peak_bytes(whole) <= budget:  # can be less than keeping all but one, which needs a slab to recompute
            return whole
        while low < high:
            middle = (low + high + 1) // 2
            if self.peak_bytes(self.spec(width, middle, at_once)) <= budget:
                low = middle
            else:
                high = middle - 1
        return self.spec(width, low, at_once)


def _filled(width: int) -> float:
    """Return the share of its rate that a row kernel reaches for a slab of `width` columns.

    A program's registers hold a power of two of columns. On an H100 it took 1.24 times as long a column with 61 % of
    them filled, and 1.06 times with 88 %.
    """
    block = min(1 << (width - 1).bit_length(), WIDEST_ROW)
    return (1 + width / round_up(width, block)) / 2


def fixed_tile(device_type: str) -> tuple[int, int]:
    return FIXED_TILE.get(device_type, FIXED_TILE_GPU)


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _gpu_widths(vocab_size: int, widest: int) -> list[int]:
    """Return one width per number of slabs, widest first: multiples of 256, or of 64 for a narrow vocabulary."""
    step = 256 if vocab_size > 256 else COLUMN_STEP
    widest = min(widest, round_up(vocab_size, step))
    widths: list[int] = []
    slabs = -(-vocab_size // widest)
    while not widths or widths[-1] > step:
        width = round_up(-(-vocab_size // slabs), step)
        if not widths or width < widths[-1]:
            widths.append(min(width, widest))
        slabs = max(slabs + 1, -(-vocab_size // max(step, width - step)) if width > 4096 else round(slabs * 1.2))
    return widths


def _even_width(vocab_size: int, width: int) -> int:
    """Return the width of nearly equal slabs, none wider than `width` rounded down to whole steps."""
    width = max(COLUMN_STEP, width // COLUMN_STEP * COLUMN_STEP)
    slabs = -(-vocab_size // width)
    return round_up(-(-vocab_size // slabs), COLUMN_STEP)
