"""Row kernels in Triton's interpreter beside those in plain PyTorch, on two adjacent slabs at odd sizes."""

import torch

from windkern.kernels.contract import (
    Exps,
    HiddenGrad,
    Kept,
    RowState,
    RowStats,
    Settled,
    Slab,
    Unit,
    Upstream,
)
from windkern.kernels.torch import rows as torch_rows
from windkern.transform import LogitTransform

HIDDEN_COLUMNS = 1029  # of hidden states: a block and five columns of another
TRANSFORMS = {"identity": LogitTransform(), "softcap": LogitTransform(1.3, 5.0, 1.7)}


def close(got, want, dtype):
    """Assert equality: float64 to 1e-11, float32 to rounding, 16 bits to one unit because the interpreter truncates."""
    if dtype.itemsize == 2:
        torch.testing.assert_close(got.double(), want.double(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    else:
        tolerance = 1e-11 if dtype == torch.float64 else 2e-5
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


class Slabs:
    """Two adjacent slabs with targets in either, in none, and beyond; a bias masks one entry."""

    def __init__(self, dtype, transform, entropy, with_bias, rows=5, width=67):
        self.dtype, self.acc = dtype, torch.float64 if dtype == torch.float64 else torch.float32
        self.transform, self.entropy, self.rows, self.width = transform, entropy, rows, width
        self.targets = torch.tensor([3, -1, width + 2, 2 * width - 1, 0])
        self.logits = [3 * torch.randn(rows, width, dtype=self.acc) for _ in range(2)]
        self.bias = [torch.randn(width, dtype=self.acc) if with_bias else None for _ in range(2)]
        if with_bias:
            self.bias[0][5] = self.bias[1][0] = -torch.inf

    def state(self):
        fresh = [torch.full((self.rows,), value, dtype=self.acc) for value in (-torch.inf, 0.0, -torch.inf, 0.0)]
        return RowState(*fresh[:3], fresh[3] if self.entropy else None)

    def vector(self):
        return torch.full((self.rows,), torch.nan, dtype=self.acc)

    def matrix(self):
        return torch.full((self.rows, self.width), torch.nan, dtype=self.dtype)

    def forward(self, kernels, *, unit):
        """Return everything that the forward kernels write, slab by slab."""
        state, written = self.state(), []
        for k, z in enumerate(self.logits):
            if unit:
                outputs = [self.matrix(), self.matrix() if self.entropy else None, self.vector()]
                outputs.append(self.vector() if self.entropy else None)
                kernels.slab_forward_unit(self.slab(k, z.clone()), state, Unit(*outputs))
            else:
                outputs = [self.matrix(), self.vector().unsqueeze(1)]
                kernels.slab_forward(self.slab(k, z.clone()), state, Kept(*outputs))
            written += [part for part in outputs if part is not None]
        return written + [part for part in state if part is not None]

    def scored(self, kernels):
        """Return the statistics of both slabs without anything kept."""
        state = self.state()
        for k, z in enumerate(self.logits):
            kernels.slab_forward(self.slab(k, z.clone()), state, None)
        return [part for part in state if part is not None]

    def exps(self, kernels):
        """Run both slabs in one matrix, the second with maxima that move some pivots; then run exps_backward."""
        state = RowState(*self.state()[:3], None)
        both, pivot = torch.full((self.rows, 2 * self.width), torch.nan, dtype=self.dtype), self.vector()
        pivot.fill_(-torch.inf)
        written = []
        for k, z in enumerate(self.logits):
            z = z + 50.0 * k * (torch.arange(self.rows) % 2).unsqueeze(1)
            values, moved = both[:, k * self.width : (k + 1) * self.width], self.vector()
            kernels.exps_forward(self.slab(k, z), state, Exps(values, pivot, k * self.width, moved))
            written += [moved, pivot.clone()]
        sums, again = torch.full((2 * self.width,), torch.nan, dtype=self.acc), self.matrix()
        kernels.column_sums(both, torch.linspace(-1, 1, self.rows, dtype=self.acc), sums)
        kernels.exps_backward(self.slab(0, self.logits[0].clone()), pivot, torch.sin(pivot), again)
        factor = torch.where(torch.arange(self.rows) % 2 == 0, 1.0, 0.3).to(self.acc)
        scaled = both.clone()
        kernels.rescale_rows(scaled, factor)
        finished = [self.vector() for _ in range(5)]
        raised = state._replace(run_max=state.run_max + 25.0 * (torch.arange(self.rows) % 3 == 0))
        for moves in (False, True):
            settled = Settled(both, pivot, finished[3], finished[4], moves)
            kernels.finish_rows(raised, self.targets, *finished[:3], settled)
            written += [pivot.clone(), both.clone(), *(each.clone() for each in finished)]
        kernels.finish_rows(raised, self.targets, *finished[:3], None)
        return [*written, *state[:3], both, again, scaled, sums, *finished]

    def ends_of_backward(self, kernels):
        """Return what row_factors and write_hidden_grad write: with and without hidden states, rows and the head."""
        places, columns = torch.arange(self.rows, dtype=self.acc), HIDDEN_COLUMNS
        upstream, total, factor = torch.sin(1 + places), 1 + places, self.vector()
        upstream[1] = torch.nan  # the ignored row's
        hidden, scaled, out = (torch.full((5, columns), torch.nan, dtype=self.dtype) for _ in range(3))
        sums, head = torch.empty(5, columns, dtype=self.acc), torch.empty(2 * self.width, columns, dtype=self.dtype)
        for value in (hidden, sums, head):
            value.copy_(torch.randn(value.shape, dtype=self.acc, generator=torch.Generator().manual_seed(1)))
        # Exactly between two numbers of bfloat16 nowhere, so that the interpreter, which truncates, rounds alike.
        head.copy_(head.bfloat16().to(self.dtype) * (1 + 2.0**-12))
        hidden[1] = sums[1] = torch.nan
        kernels.row_factors(upstream, total, self.targets, 0.7, factor, hidden, scaled)
        alone = self.vector()
        kernels.row_factors(upstream, total, self.targets, 0.7, alone, None, None)
        targets, rounded = self.targets.clamp(max=2 * self.width - 1), torch.bfloat16
        if self.dtype == torch.float64:  # which the interpreter does not round to bfloat16
            rounded = self.dtype
        kernels.write_hidden_grad(HiddenGrad(sums, factor, upstream, head, rounded, owned=False), targets, None, out)
        spread, rows = torch.zeros(9, columns, dtype=self.dtype), torch.tensor([7, 7, 1, 4])
        kernels.write_hidden_grad(HiddenGrad(sums.clone(), factor), targets, rows, spread)
        whole = sums.clone()
        kernels.write_hidden_grad(HiddenGrad(whole), targets, None, whole)
        return [factor, alone, scaled, out, spread, whole, sums]

    def slab(self, k, z):
        return Slab(z, self.bias[k], self.targets, k * self.width, self.transform)

    def backward(self, kernels, *, kept, scaled=False):
        state = self.state()
        kept_slabs = []
        for k, z in enumerate(self.logits):
            kept_slabs.append(Kept(self.matrix(), self.vector().unsqueeze(1)))
            torch_rows.slab_forward(self.slab(k, z.clone()), state, kept_slabs[-1])
        log_sum = state.run_sum.log()
        entropy = log_sum - state.entropy_sum / state.run_sum if self.entropy else None
        stats = RowStats(state.run_max, log_sum, state.target_logit, entropy)
        places = torch.arange(self.rows, dtype=self.acc)
        c_ent = torch.sin(2 * places) if self.entropy and not kept else None  # kept values do not allow it
        upstream = Upstream(torch.sin(places), torch.cos(places), c_ent)
        scale = 2.0 ** (places - 3) if scaled else None
        written = []
        for k, z in enumerate(self.logits):
            dz, dbias = self.matrix(), torch.full((self.width,), torch.nan, dtype=self.acc)
            slab = self.slab(k, None if kept else z.clone())
            kernels.slab_backward(slab, kept_slabs[k] if kept else None, stats, upstream, scale, dz, dbias)
            written += [dz, dbias]
        return written


def compare_rows(kernels, dtype, transform, entropy, with_bias):
    slabs = Slabs(dtype, transform, entropy, with_bias)
    for got, want in zip(slabs.scored(kernels), slabs.scored(torch_rows), strict=True):
        close(got, want, slabs.acc)
    for unit in (False, True):
        for got, want in zip(slabs.forward(kernels, unit=unit), slabs.forward(torch_rows, unit=unit), strict=True):
            close(got, want, dtype if got.dtype == dtype else slabs.acc)
    for got, want in zip(slabs.ends_of_backward(kernels), slabs.ends_of_backward(torch_rows), strict=True):
        torch.testing.assert_close(got.isnan(), want.isnan())
        close(got.nan_to_num(), want.nan_to_num(), dtype if got.dtype == dtype else slabs.acc)
    if transform.softcap is None and not entropy:
        for got, want in zip(slabs.exps(kernels), slabs.exps(torch_rows), strict=True):
            if got.shape == (2 * slabs.width,) and dtype.itemsize == 2:  # summed from rounded exponentials
                torch.testing.assert_close(got, want, rtol=0.03, atol=0.03)
            else:
                close(got, want, dtype if got.dtype == dtype else slabs.acc)
    for kept in (False, True):
        ours = slabs.backward(kernels, kept=kept, scaled=dtype == torch.float16)
        plain = slabs.backward(torch_rows, kept=kept, scaled=dtype == torch.float16)
        for got, want in zip(ours, plain, strict=True):
            if got.dim() == 1 and dtype.itemsize == 2:  # summed from rounded dz
                torch.testing.assert_close(got, want, rtol=0.03, atol=0.03)
            else:
                close(got, want, dtype)


def compare_wide_rows(kernels, dtype, with_bias):
    """Compare slabs that are wider than a program's registers, with pivots that move inside of them.

    A pivot follows the maxima of blocks here and of whole slabs there, so exponentials are compared without it.
    """
    transform = TRANSFORMS["identity"]
    capped = Slabs(dtype, TRANSFORMS["softcap"], True, with_bias)
    for got, want in zip(capped.scored(kernels), capped.scored(torch_rows), strict=True):
        close(got, want, capped.acc)
    slabs, found = Slabs(dtype, transform, False, with_bias), []
    for back_end in (kernels, torch_rows):
        state, pivot = RowState(*slabs.state()[:3], None), slabs.vector().fill_(-torch.inf)
        both = torch.full((slabs.rows, 2 * slabs.width), torch.nan, dtype=dtype)
        for k, z in enumerate(slabs.logits):
            z = z + 45.0 * (torch.arange(slabs.rows) % 2 * (k + 1)).unsqueeze(1) * (torch.arange(slabs.width) > 40)
            before, moved = pivot.clone(), slabs.vector()
            values = both[:, k * slabs.width : (k + 1) * slabs.width]
            back_end.exps_forward(slabs.slab(k, z), state, Exps(values, pivot, k * slabs.width, moved))
            close(moved, torch.where(before == -torch.inf, 1.0, torch.exp(before - pivot)), slabs.acc)
        found.append((both.double(), pivot.double().unsqueeze(1), *state[:3]))
    (ours, our_pivot, *our_state), (plain, plain_pivot, *plain_state) = found
    assert not torch.equal(our_pivot, plain_pivot)
    close((ours * torch.exp(our_pivot - plain_pivot)).to(dtype), plain.to(dtype), dtype)
    for got, want in zip(our_state, plain_state, strict=True):
        close(got, want, slabs.acc)
