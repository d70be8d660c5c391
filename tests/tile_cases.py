"""Arguments of the kernels that multiply themselves, on any device, and comparisons of their results with float64."""

from __future__ import annotations

import torch
from cuda_cases import TRANSFORMS

from windkern.kernels.contract import PIVOT_ROOM, Exps, RowState, Slab
from windkern.kernels.native import cuda as cuda_rows
from windkern.kernels.torch import rows as torch_rows

LAYOUTS = ("dense", "padded", "transposed", "misaligned", "scattered")
POISON = 777.0  # exact in bfloat16
# What a pivot's move can flush to zero: a factor below exp(-87), of an entry that exceeds the old pivot by 40.
FLUSHED = 1e-20


def laid_out(matrix, layout):
    """Return the same matrix in memory that the copy engine reads in place (dense, padded) or that must be copied."""
    rows, columns = matrix.shape
    if layout == "dense":
        return matrix.contiguous()
    if layout == "transposed":
        return matrix.t().contiguous().t()
    first, stride = {"padded": (0, columns + 8), "misaligned": (1, columns), "scattered": (0, columns + 3)}[layout]
    room = torch.full((rows * stride + 8,), POISON, dtype=matrix.dtype, device=matrix.device)
    return room[first : first + rows * stride].view(rows, stride)[:, :columns].copy_(matrix)


class Tiles:
    """Operands, bias and targets of adjacent slabs: targets before, in and after them, and an ignored row.

    Args:
        rows, widths, inner: sizes; one width for each slab.
        dtype: of the operands.
        transform: key of `cuda_cases.TRANSFORMS`.
        bias: whether there is one, with masked entries.
        entropy: whether the entropy is a statistic.
        spread: standard deviation of the logits.
        layout: of the operands in memory.
        lies: a number that the ignored rows hold.
    """

    start = 7

    def __init__(
        self,
        rows,
        widths,
        inner,
        dtype=torch.bfloat16,
        transform="identity",
        *,
        bias=False,
        entropy=False,
        spread=3.0,
        layout="dense",
        lies=None,
        device="cpu",
    ):
        self.rows, self.widths, self.inner, self.device = rows, widths, inner, device
        self.transform, self.entropy, vocab = TRANSFORMS[transform], entropy, sum(widths)
        hidden = (torch.randn(rows, inner) * spread / inner**0.5).to(dtype)
        weight = torch.randn(vocab, inner).to(dtype)
        targets = self.start + torch.arange(rows) * 37 % max(1, vocab)
        if rows > 4:
            targets[1], targets[2], targets[3] = -100, self.start - 1, self.start + vocab
            targets[rows - 1] = -7
        if lies is not None:
            hidden[targets < 0, 0] = lies
        self.bias = torch.randn(vocab).to(device) if bias else None
        if bias and vocab > 1:
            self.bias[vocab // 2 :: 5] = -torch.inf
        self.hidden, self.weight = (laid_out(each.to(device), layout) for each in (hidden, weight))
        self.targets = targets.to(device)

    @property
    def scored(self):
        return self.targets >= 0

    def slabs(self):
        """Yield the columns of each slab, its rows of the head, and its arguments without logits."""
        first = 0
        for width in self.widths:
            columns = slice(first, first + width)
            bias = None if self.bias is None else self.bias[columns].clone()
            yield columns, self.weight[columns], Slab(None, bias, self.targets, self.start + first, self.transform)
            first += width

    def row(self, value, dtype=torch.float32):
        return torch.full((self.rows,), value, dtype=dtype, device=self.device)

    def state(self, dtype=torch.float32):
        """Return a state that has seen nothing in its even rows and another slab in the odd ones."""
        fresh = torch.arange(self.rows, device=self.device) % 2 == 0
        parts = [torch.where(fresh, first, then).to(dtype) for first, then in ((-torch.inf, 1.5), (0.0, 2.5))]
        entropy = torch.where(fresh, 0.0, -0.3).to(dtype) if self.entropy else None
        return RowState(*parts, self.row(-torch.inf, dtype), entropy)

    def logits(self, dtype=torch.float64):
        """Return the transformed logits of all slabs."""
        z = self.hidden.to(dtype) @ self.weight.to(dtype).T
        torch_rows._apply_transform(z, None if self.bias is None else self.bias.to(dtype), self.transform)
        return z

    def reference(self, dtype, slabs=None):
        """Return the state after the first `slabs` slabs (None: all) of a product and torch's row kernel in `dtype`."""
        state = self.state(dtype)
        for _, head, slab in list(self.slabs())[:slabs]:
            z = self.hidden.to(dtype) @ head.to(dtype).T
            bias = None if slab.bias is None else slab.bias.to(dtype)
            if 0 not in z.shape:
                torch_rows.slab_forward(slab._replace(logits=z, bias=bias), state, None)
        return state

    def score(self):
        state = self.state()
        for _, head, slab in self.slabs():
            cuda_rows.tile_forward(self.hidden, head, slab, state, None)
        return state

    def room(self):
        """Return a matrix of poison, and the part of it for the exponentials of all slabs."""
        vocab = sum(self.widths)
        room = torch.full((self.rows + 4, -(-vocab // 64) * 64 + 64), POISON, dtype=torch.bfloat16, device=self.device)
        return room, room[1 : self.rows + 1, 32 : 32 + vocab]

    def entries(self):
        return torch.sin(1.0 + torch.arange(self.rows, device=self.device))


def begun(tiles, fresh, *, exps):
    """Return what a walk finds that begins with NaN everywhere (fresh), or with the state of no entries."""
    lowest, zero = (torch.nan, torch.nan) if fresh else (-torch.inf, 0.0)
    state = RowState(tiles.row(lowest), tiles.row(zero), tiles.row(lowest), None)
    pivot, (_, values) = tiles.row(lowest), tiles.room()
    for number, (columns, head, slab) in enumerate(tiles.slabs()):
        given = tiles.hidden, head, slab, state
        if exps:
            out = Exps(values[:, columns], pivot, columns.start, None)
            cuda_rows.tile_exps_forward(*given, out, fresh=fresh and number == 0)
        else:
            cuda_rows.tile_forward(*given, None, fresh=fresh and number == 0)
    return [*state[:3], pivot, values] if exps else list(state[:3])


def compare_begun(tiles):
    """A walk begins the same, bit for bit, whatever the state and the pivots hold."""
    for exps in (False, True):
        for one, two in zip(*(begun(tiles, fresh, exps=exps) for fresh in (False, True)), strict=True):
            assert torch.equal(one, two)


def outside_is_untouched(room, written):
    rows, columns = written.shape
    seen = room.clone()
    seen[1 : rows + 1, 32 : 32 + columns] = POISON
    return bool((seen == POISON).all())


def assert_state(got, want, scored, tolerance):
    """Compare statistics of scored rows; `want` can have another dtype.

    The sums are relative to the maxima, whose roundings change them.
    """
    for name, one, two in zip(RowState._fields, got, want, strict=False):
        if one is None:
            continue
        scale = want.run_sum.double().abs()[scored] if name == "entropy_sum" else None
        one, two = one.double()[scored], two.double()[scored]
        if scale is not None:
            one, two = one / (1 + scale), two / (1 + scale)
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


def tolerance_of(tiles):
    """Relative error of exponentials and sums of them: some roundings of the largest logit in float32.

    A tensor core cuts digits of a sum at each of its steps, of 16 numbers.
    """
    logits = tiles.logits()
    largest = float(logits.nan_to_num(0.0, 0.0, 0.0).abs().max()) if logits.numel() else 0.0
    steps = 0 if tiles.device == "cpu" else tiles.inner / 16
    return 2e-6 + (4e-7 + 1.2e-7 * steps) * largest


def compare_scores(tiles):
    """Compare the statistics with those of a product in float32 and of one in float64."""
    got, tolerance = tiles.score(), tolerance_of(tiles)
    for dtype in (torch.float32, torch.float64):
        assert_state(got, tiles.reference(dtype), tiles.scored, tolerance)
    return got


def expected_pivots(y, before, found, slab, columns, tolerance):
    """Return the pivots after a slab with the exact logits `y` of all columns, and the slab's maxima.

    Where rounding decides whether a pivot moves, it is the one that was `found`.
    """
    inside = (slab.targets >= slab.start) & (slab.targets < slab.start + columns.stop - columns.start)
    place = columns.start + torch.where(inside, slab.targets - slab.start, 0)
    guessed = torch.where(before == -torch.inf, y.gather(1, place.unsqueeze(1)).squeeze(1), before)
    most = y[:, columns].amax(1)
    pivots = torch.where((guessed == -torch.inf) | (most > guessed + PIVOT_ROOM), most, guessed)
    unsure = (most - guessed - PIVOT_ROOM).abs() <= tolerance * (1 + most.abs())
    return torch.where(unsure, found.double(), pivots), most


def compare_exps(tiles):
    """Run forward over all slabs, and compare with float64 after each; return the results."""
    y, tolerance = tiles.logits(), tolerance_of(tiles)
    # A walk with an entropy has no exponentials.
    scored, state, pivot = tiles.scored, tiles.state()._replace(entropy_sum=None), tiles.row(-torch.inf)
    room, values = tiles.room()
    pivots, moves, results = tiles.row(-torch.inf, torch.float64), torch.zeros_like(scored), []
    for number, (columns, head, slab) in enumerate(tiles.slabs(), start=1):
        moved, before = tiles.row(torch.nan), pivot.clone()
        exps = Exps(values[:, columns], pivot, columns.start, moved)
        cuda_rows.tile_exps_forward(tiles.hidden, head, slab, state, exps)
        assert outside_is_untouched(room, values[:, : columns.stop])
        if 0 in (tiles.rows, columns.stop - columns.start):
            assert torch.equal(moved, torch.ones_like(moved)) and torch.equal(pivot, before)
            continue
        assert_state(state, tiles.reference(torch.float64, number)[:3], scored, tolerance)
        pivots, most = expected_pivots(y, pivots, pivot, slab, columns, tolerance)
        torch.testing.assert_close(pivot.double()[scored], pivots[scored], rtol=tolerance, atol=tolerance)
        finite = scored & (most > -torch.inf)
        slack = tolerance * (1 + most[finite].abs())
        assert (pivot[finite] >= most[finite] - PIVOT_ROOM - slack).all()
        # The factor for what was summed under the old pivot is exactly 1 where it did not move. Without an old pivot
        # there are only zeros, which any finite factor keeps.
        assert moved.isfinite().all()
        assert (moved[scored & (before == pivot)] == 1.0).all()
        steps = scored & (before != pivot) & (before > -torch.inf)
        factors = (before.double() - pivot.double())[steps].exp()
        torch.testing.assert_close(moved.double()[steps], factors, rtol=1e-5 + tolerance, atol=1e-37)
        moves |= steps
        compare_values(tiles, values[:, : columns.stop], y, pivot, 0.0, 2**-7, FLUSHED)
        results += [moved]
    return [*state, pivot, values.clone(), *results], moves


def compare_values(tiles, values, y, pivot, entry, relative, absolute=1e-37):
    """Compare exponentials with exp(y - pivot), `entry` at the target and 0 in ignored rows."""
    width = values.shape[1]
    want = (y[:, :width] - pivot.double().unsqueeze(1)).exp()
    column = tiles.targets - tiles.start
    inside = (column >= 0) & (column < width) & tiles.scored
    here = inside.nonzero().squeeze(1)
    want[here, column[here]] = entry if isinstance(entry, float) else entry.double()[here]
    want[~tiles.scored] = 0.0
    want[pivot == -torch.inf] = 0.0  # all entries are masked
    torch.testing.assert_close(values.double(), want, rtol=relative, atol=absolute)


def compare_again(tiles, pivot=None):
    """Run backward over all slabs relative to `pivot` (None: the row's maximum) and compare with float64."""
    y = tiles.logits()
    if pivot is None:
        pivot = torch.where(y.amax(1).isfinite(), y.amax(1), 0.0).float() if y.shape[1] else tiles.row(0.0)
    entry, (room, values) = tiles.entries(), tiles.room()
    for columns, head, slab in tiles.slabs():
        cuda_rows.tile_exps_backward(tiles.hidden, head, slab, pivot, entry, values[:, columns])
        assert outside_is_untouched(room, values[:, : columns.stop])
    compare_values(tiles, values, y, pivot, entry, 2**-8 + tolerance_of(tiles))
    return [values.clone()]


def compare_large():
    """Logits near 3000 that float32 holds exactly, so that sums of their exponentials are known to its last digits."""
    tiles = Tiles(5, (300,), 8)
    tiles.hidden = torch.tensor([60.0, 59, 58, 57, 61]).unsqueeze(1).repeat(1, 8).bfloat16()
    tiles.weight = torch.zeros(300, 8).bfloat16()
    tiles.weight[:, 0] = 50.0
    tiles.weight[:, 1] = (torch.arange(300) % 7 > 3).bfloat16() / 16
    ((columns, head, slab),) = tiles.slabs()
    y = tiles.logits()
    sums = (y - y.amax(1, keepdim=True)).exp().sum(1)
    for exponentials in (False, True):
        state = RowState(tiles.row(-torch.inf), tiles.row(0.0), tiles.row(-torch.inf), None)
        if exponentials:
            exps = Exps(tiles.room()[1][:, columns], tiles.row(-torch.inf), 0, None)
            cuda_rows.tile_exps_forward(tiles.hidden, head, slab, state, exps)
        else:
            cuda_rows.tile_forward(tiles.hidden, head, slab, state, None)
        assert torch.equal(state.run_max.double(), y.amax(1))
        torch.testing.assert_close(state.run_sum.double(), sums, rtol=1e-6, atol=0)
