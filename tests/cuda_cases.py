"""Arguments of the row kernels at odd shapes, on any device, and how far two back ends may be apart."""

from __future__ import annotations

import torch

import windkern as wk
from windkern.kernels import cuda_rows, torch_rows
from windkern.kernels.contract import RowState, RowStats, Upstream

# A warp or a block for a row, with and without 16-byte accesses, rows that a team's registers hold and wider ones.
WIDTHS = (1, 3, 32, 65, 512, 520, 1003, 4096, 4104, 8200, 8203)
TRANSFORMS = {
    "identity": wk.LogitTransform(),
    "scaled": wk.LogitTransform(scale=0.5, temperature=0.7),
    "softcap": wk.LogitTransform(1.3, 5.0, 1.7),
}


def close(got, want, dtype, what, scale=1.0):
    """Equal to one rounding of the storage dtype, or to float32 rounding of sums."""
    if got is None or want is None:
        assert got is want
        return
    relative = {torch.float64: 1e-11, torch.float32: 5e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    absolute = scale * {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-4, torch.float16: 2e-5}[dtype]
    torch.testing.assert_close(
        got.double(), want.double(), rtol=relative, atol=absolute, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def wide_of(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


class Rows:
    """Arguments of the row kernels for one slab: targets before, in and after it, an ignored row, a masked row."""

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
        self.arguments = self.bias, self.targets, self.start, self.transform

    def place(self, value):
        """A copy of `value` on the device, 16-byte aligned or just not."""
        room = torch.empty(value.numel() + 16, dtype=value.dtype, device=self.device)
        skip = 1 if self.shifted else 0
        return room[skip : skip + value.numel()].view(value.shape).copy_(value)

    def slab(self):
        return self.place(torch.empty(self.rows, self.width, dtype=self.dtype))

    def row(self, *shape):
        return torch.empty(*(shape or (self.rows,)), dtype=self.wide, device=self.device)

    def state(self):
        """One that has seen nothing in its first rows and another slab in the others."""
        some = torch.linspace(-2, 5, self.rows, dtype=self.wide, device=self.device)
        some[:2] = -torch.inf
        seen = some > -torch.inf
        entropy = torch.where(seen, -0.3, 0.0).to(self.wide) if self.entropy else None
        return RowState(some, torch.where(seen, 2.5, 0.0).to(self.wide), some - 1, entropy)

    def forward(self, kernels, keep):
        state = self.state()
        kept = self.slab() if keep else None
        offset = self.row(self.rows, 1) if keep else None
        kernels.slab_forward(self.place(self.z), *self.arguments, state, kept, offset)
        return [*state, kept, offset]

    def unit(self, kernels, alias):
        state, z = self.state(), self.place(self.z)
        unit = z if alias else self.slab()
        logged = self.slab() if self.entropy else None
        rescale = self.row()
        step = self.row() if self.entropy else None
        kernels.slab_forward_unit(z, *self.arguments, state, unit, logged, rescale, step)
        return [*state, unit, logged, rescale, step]

    def backward(self, kernels, kept, alias, dbias):
        """From what torch_rows kept, so that both see the same; that serves no upstream of the entropy."""
        state, offset = self.state(), self.row(self.rows, 1)
        stored = self.slab()
        torch_rows.slab_forward(self.z.clone(), *self.arguments, state, stored, offset)
        seen = state.run_sum > 0
        log_sum = torch.where(seen, state.run_sum.log(), torch.nan)
        entropy = None if state.entropy_sum is None else log_sum - state.entropy_sum / state.run_sum
        stats = RowStats(state.run_max, log_sum, state.target_logit, entropy)
        places = torch.arange(self.rows, dtype=self.wide, device=self.device)
        c_ent = torch.sin(2 + 3 * places) if self.entropy and not kept else None
        upstream = Upstream(torch.sin(1 + places), torch.cos(places), c_ent)
        scale = torch.exp2(-(places % 5)) if self.dtype == torch.float16 else None
        total = self.row(self.width).fill_(torch.nan) if dbias else None
        src = stored if kept else self.place(self.z)
        dz = src if alias else self.slab()
        kernels.slab_backward(src, offset if kept else None, *self.arguments, stats, upstream, scale, dz, total)
        return [dz, total]


def compare(make, kernel, *options):
    results = []
    for kernels in (cuda_rows, torch_rows):
        torch.manual_seed(0)
        results.append(getattr(make(), kernel)(kernels, *options))
    for place, (got, want) in enumerate(zip(*results, strict=True)):
        if got is not None:
            rows = make().rows if want.dim() == 1 and kernel == "backward" else 1  # a sum over rows
            close(got, want, got.dtype, f"{kernel}, output {place}", scale=float(rows))
