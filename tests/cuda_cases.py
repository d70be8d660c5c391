"""Arguments of the row kernels at odd shapes, on any device, and the allowed differences of two back ends."""

from __future__ import annotations

import torch

from windkern.kernels.contract import Exps, HiddenGrad, Kept, RowState, RowStats, Settled, Slab, Unit, Upstream
from windkern.kernels.native import cuda as cuda_rows
from windkern.kernels.torch import rows as torch_rows
from windkern.transform import LogitTransform

# A warp or a block per row, with and without 16-byte accesses, rows that fit in a team's registers and wider ones.
WIDTHS = (1, 3, 32, 65, 512, 520, 1003, 4096, 4104, 8200, 8203)
TRANSFORMS = {
    "identity": LogitTransform(),
    "scaled": LogitTransform(scale=0.5, temperature=0.7),
    "softcap": LogitTransform(1.3, 5.0, 1.7),
}


def close(got, want, dtype, what, scale=1.0):
    """Assert equality up to one rounding of the storage dtype, or float32 rounding of sums."""
    if got is None or want is None:
        assert got is want
        return
    relative = {torch.float64: 1e-11, torch.float32: 5e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    absolute = scale * {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-4, torch.float16: 2e-5}[dtype]
    torch.testing.assert_close(
        got.double(), want.double(), rtol=relative, atol=absolute, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def close_pairs(ours, exact, scores, loss, **tolerance):
    """Assert that value and slope of a pair loss are those of float64, up to `jumps` in the slope of the hinge loss."""
    for place, (got, want) in enumerate(zip(ours, exact, strict=True)):
        gap = got.double() - want
        if place and loss == "hinge":
            gap = gap.sign() * (gap.abs() - jumps(scores)).clamp(min=0)
        torch.testing.assert_close(want + gap, want, **tolerance)


def jumps(scores):
    """Count, for each response of (B, N) scores, the pairs whose margin 1 - d can be 0 on one side of a rounding.

    The hinge's slope in d jumps there by the weight of the pair, which is at most 1. float64 rounds as float64 does.
    """
    near, wide = torch.finfo(scores.dtype).eps / 2, scores.double()
    count = torch.zeros_like(wide)
    if scores.dtype != torch.float64:
        for found, group in zip(count, wide, strict=True):
            for some, part in zip(found.split(1024), group.split(1024), strict=True):
                some.copy_((((part[:, None] - group).abs() - 1).abs() <= near).sum(1))
    return count


def wide_of(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


class Rows:
    """Arguments of the row kernels for one slab: targets before, in and after it, an ignored row, a masked entry."""

    def __init__(
        self, rows, width, dtype, transform="identity", *, bias=False, entropy=False, shifted=False, device="cpu"
    ):
        self.dtype, self.wide, self.shifted, self.device = dtype, wide_of(dtype), shifted, device
        self.rows, self.width, self.start = rows, width, 7
        self.z = self.place(3 * torch.randn(rows, width, dtype=self.wide))
        self.bias = self.place(torch.randn(width, dtype=self.wide)) if bias else None
        if bias and width > 1:
            self.bias[width // 2] = -torch.inf
        self.z[rows - 1] = -torch.inf
        targets = self.start + torch.arange(rows) * 5 % width
        targets[1], targets[2], targets[3] = -100, self.start - 1, self.start + width
        self.targets = targets.to(device)
        self.transform, self.entropy = TRANSFORMS[transform], entropy

    def place(self, value):
        """Return a copy of `value` on the device, aligned to 16 bytes or just not."""
        room = torch.empty(value.numel() + 16, dtype=value.dtype, device=self.device)
        skip = 1 if self.shifted else 0
        return room[skip : skip + value.numel()].view(value.shape).copy_(value)

    def slab(self, z):
        return Slab(z, self.bias, self.targets, self.start, self.transform)

    def matrix(self):
        return self.place(torch.empty(self.rows, self.width, dtype=self.dtype))

    def row(self, *shape):
        return torch.empty(*(shape or (self.rows,)), dtype=self.wide, device=self.device)

    def state(self):
        """Return a state that has seen nothing in its first rows and another slab in the others."""
        some = torch.linspace(-2, 5, self.rows, dtype=self.wide, device=self.device)
        some[:2] = -torch.inf
        seen = some > -torch.inf
        entropy = torch.where(seen, -0.3, 0.0).to(self.wide) if self.entropy else None
        return RowState(some, torch.where(seen, 2.5, 0.0).to(self.wide), some - 1, entropy)

    def forward(self, kernels, keep):
        state = self.state()
        kept = Kept(self.matrix(), self.row(self.rows, 1)) if keep else None
        kernels.slab_forward(self.slab(self.place(self.z)), state, kept)
        return [*state, *(kept or (None, None))]

    def unit(self, kernels, alias):
        state, z = self.state(), self.place(self.z)
        logged = self.matrix() if self.entropy else None
        unit = Unit(z if alias else self.matrix(), logged, self.row(), self.row() if self.entropy else None)
        kernels.slab_forward_unit(self.slab(z), state, unit)
        return [*state, *unit]

    def exps(self, kernels, alias):
        """Run a second slab whose maxima are up to 70 above those of the first, which was passed without a pivot."""
        state, z = self.state(), self.place(self.z)
        z += torch.linspace(0, 70, self.rows, dtype=self.wide, device=self.device).unsqueeze(1)
        both = self.place(torch.rand(self.rows, 2 * self.width, dtype=self.wide).to(z.device)).to(self.dtype)
        pivot = self.row().fill_(1.0)
        pivot[::3] = -torch.inf
        both[::3, : self.width] = 0.0
        exps = Exps(z if alias else both[:, self.width :], pivot, 0 if alias else self.width, self.row())
        kernels.exps_forward(self.slab(z), state, exps)
        return [*state, exps.values, None if alias else both, exps.pivot, exps.moved]

    def again(self, kernels, alias):
        z = self.place(self.z)
        places = torch.arange(self.rows, dtype=self.wide, device=self.device)
        values = z if alias else self.matrix()
        kernels.exps_backward(self.slab(z), places - 3, torch.sin(1 + places), values)
        return [values]

    def sums(self, kernels):
        """Return weighted sums of a matrix's columns, and the matrix with its rows rescaled."""
        values = self.place(torch.rand(self.rows, self.width, dtype=self.wide).to(self.device)).to(self.dtype)
        weights = torch.sin(1 + torch.arange(self.rows, dtype=self.wide, device=self.device))
        total = self.row(self.width).fill_(torch.nan)
        kernels.column_sums(values, weights, total)
        weights[::2] = 1.0
        kernels.rescale_rows(values, weights)
        return [total, values]

    def finish(self, kernels, settles, moves=False):
        """End forward with maxima below and above the pivots, statistics of an ignored row that are no numbers, and
        targets in what is kept and beyond it."""
        places = torch.arange(self.rows, dtype=self.wide, device=self.device)
        state = RowState(5 * torch.cos(places), 1.5 + torch.sin(places), 5 * torch.cos(places) - 0.01 * places, None)
        pivot = state.run_max - torch.linspace(-3, 45, self.rows, dtype=self.wide, device=self.device)
        pivot[-2] = -torch.inf
        targets = self.targets - self.start
        targets[1], targets[2], targets[3], targets[-1] = -100, self.width, 2 * self.width - 1, self.width - 1
        for value in (*state[:3], pivot):
            value[1] = torch.nan
        both = self.place(torch.rand(self.rows, 2 * self.width, dtype=self.wide).to(self.device)).to(self.dtype)
        both[1], both[-2] = 0.0, 0.0
        results = [self.row().fill_(torch.nan) for _ in range(5)]
        settled = Settled(both[:, : self.width], pivot, results[3], results[4], moves) if settles else None
        if kernels is torch_rows:  # which multiplies the zeros of an ignored row by the factor of its pivot
            pivot[1] = 0.0
        kernels.finish_rows(state, targets, *results[:3], settled)
        results[0][1] = results[3][1] = results[4][1] = pivot[1] = 0.0
        return [*results, both, pivot]

    def _hidden(self, dtype, strided, rows=None):
        """Return a matrix of any numbers: hidden states, sums, or a head."""
        shape = (self.width, rows or self.rows) if strided else (rows or self.rows, self.width)
        value = self.place(torch.randn(shape, dtype=self.wide).to(dtype))
        return value.T if strided else value

    def factors(self, kernels, dtype, strided):
        """Scale hidden states, of which those of an ignored row are no numbers; also without them."""
        places = torch.arange(self.rows, dtype=self.wide, device=self.device)
        upstream, total, hidden = torch.sin(1 + places), 1 + places, self._hidden(dtype, strided)
        upstream[1] = total[1] = hidden[1] = torch.nan
        factor, alone = self.row().fill_(torch.nan), self.row().fill_(torch.nan)
        scaled = self.matrix().fill_(torch.nan)
        kernels.row_factors(upstream, total, self.targets, 0.7, factor, hidden, scaled)
        kernels.row_factors(upstream, total, self.targets, 0.7, alone, None, None)
        return [factor, alone, scaled]

    def grads(self, kernels, dtype, strided, spreads):
        """Finish dhidden: with factors and a head of `dtype`, with factors alone, and in place with neither."""
        places = torch.arange(self.rows, dtype=self.wide, device=self.device)
        factor, at_target, entries = torch.sin(1 + places), torch.cos(places), 2 * self.width
        targets = torch.where(self.targets < 0, self.targets, self.targets % entries)
        sums, head = self._hidden(self.wide, False), self._hidden(dtype, strided, entries)
        sums[1] = factor[1] = at_target[1] = torch.nan
        rounded = self.dtype if self.dtype.itemsize < dtype.itemsize else dtype
        count, rows, out = self.rows - 1, None, self.matrix()[:-1].fill_(torch.nan)  # the last row is padding
        if spreads:
            rows = torch.arange(count, device=self.device).flip(0) * 2
            rows[1] = rows[0]
            out = torch.zeros(2 * self.rows, self.width, dtype=self.dtype, device=self.device)
        alone, whole = out.clone(), sums.clone()
        grad = HiddenGrad(sums, factor, at_target, head, rounded, owned=False)
        kernels.write_hidden_grad(grad, targets, rows, out)
        kernels.write_hidden_grad(HiddenGrad(sums.clone(), factor), targets, rows, alone)
        kernels.write_hidden_grad(HiddenGrad(whole), targets, None, whole)
        return [out, alone, whole, sums]

    def backward(self, kernels, kept, alias, dbias):
        """Run backward from values that torch_rows kept, the same for both; they allow no upstream on the entropy."""
        state, stored = self.state(), Kept(self.matrix(), self.row(self.rows, 1))
        torch_rows.slab_forward(self.slab(self.z.clone()), state, stored)
        seen = state.run_sum > 0
        log_sum = torch.where(seen, state.run_sum.log(), torch.nan)
        entropy = None if state.entropy_sum is None else log_sum - state.entropy_sum / state.run_sum
        stats = RowStats(state.run_max, log_sum, state.target_logit, entropy)
        places = torch.arange(self.rows, dtype=self.wide, device=self.device)
        c_ent = torch.sin(2 + 3 * places) if self.entropy and not kept else None
        upstream = Upstream(torch.sin(1 + places), torch.cos(places), c_ent)
        scale = torch.exp2(-(places % 5)) if self.dtype == torch.float16 else None
        total = self.row(self.width).fill_(torch.nan) if dbias else None
        src = stored.values if kept else self.place(self.z)
        dz = src if alias else self.matrix()
        slab = self.slab(None if kept else src)
        kernels.slab_backward(slab, stored if kept else None, stats, upstream, scale, dz, total)
        return [dz, total]


def compare(make, kernel, *options):
    results = []
    for kernels in (cuda_rows, torch_rows):
        torch.manual_seed(0)
        results.append(getattr(make(), kernel)(kernels, *options))
    for place, (got, want) in enumerate(zip(*results, strict=True)):
        if got is not None:
            rows = make().rows if want.dim() == 1 and kernel in ("backward", "sums") else 1  # a sum over rows
            close(got, want, got.dtype, f"{kernel}, output {place}", scale=float(rows))
