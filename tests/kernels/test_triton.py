"""The Triton kernels in Triton's interpreter on a CPU: maths and masks. Speed and races need a GPU."""

import pytest
import test_ignored_rows as ignored_rows
import test_kept_accuracy
import test_pairs
import torch
from cases import NARROW, SHAPES, UNLIMITED, Problem, Shape
from tolerances import assert_within

import windkern as wk
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
    relative_slope,
)
from windkern.kernels.torch import pairs as torch_pairs
from windkern.kernels.torch import rows as torch_rows

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("a GPU runs the kernels themselves: tests/kernels/test_gpu.py", allow_module_level=True)

from windkern.kernels import tuned
from windkern.kernels.triton import backward as triton_backward
from windkern.kernels.triton import hidden as triton_hidden
from windkern.kernels.triton import launch as triton_launch
from windkern.kernels.triton import maths as triton_maths
from windkern.kernels.triton import pairs as triton_pairs
from windkern.kernels.triton import rows as triton_rows
from windkern.kernels.triton import tile as triton_tile
from windkern.transform import LogitTransform

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:numpy"),
]
FEW = 5  # rows: the interpreter is slow
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
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
        finished = [self.vector() for _ in range(4)]
        raised = state._replace(run_max=state.run_max + 25.0 * (torch.arange(self.rows) % 3 == 0))
        for moves in (False, True):
            settled = Settled(both, pivot, finished[3], moves)
            kernels.finish_rows(raised, self.targets, *finished[:3], settled)
            written += [pivot.clone(), both.clone(), *(each.clone() for each in finished)]
        kernels.finish_rows(raised, self.targets, *finished[:3], None)
        return [*written, *state[:3], both, again, scaled, sums, *finished]

    def ends_of_backward(self, kernels):
        """Return what row_factors and write_hidden_grad write: with and without hidden states, rows and the head."""
        places, columns = torch.arange(self.rows, dtype=self.acc), triton_hidden.BLOCK + 5
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


@pytest.fixture
def narrow_blocks(monkeypatch):
    """Make rows of more than 20 columns wide, and pass over them in blocks of 16."""
    monkeypatch.setattr(triton_launch, "WIDEST_ROW", 20)
    monkeypatch.setattr(triton_launch, "WIDE_BLOCK", 16)
    triton_launch._constants.cache_clear()
    yield
    triton_launch._constants.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)  # float16 has no room for a pivot's
@pytest.mark.parametrize("with_bias", [False, True])
def test_rows_wider_than_a_block(narrow_blocks, dtype, with_bias):
    compare_wide_rows(triton_rows, dtype, with_bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("entropy", "with_bias"), [(False, False), (True, True)])
def test_row_kernels(dtype, transform, entropy, with_bias):
    compare_rows(triton_rows, dtype, TRANSFORMS[transform], entropy, with_bias)


@pytest.mark.parametrize(
    ("shape", "gear", "dtype"),
    [
        ("odd", "scoring", torch.float32),
        ("odd", "frozen_head", torch.float16),
        ("odd", "trained", torch.bfloat16),
        ("blocks", "frozen_body", torch.float32),
        ("blocks", "trained", torch.float64),
        ("tiny", "trained", torch.float32),
    ],
)
def test_gears(shape, gear, dtype):
    problem = Problem(SHAPES[shape], "all")
    exact, plain = problem.exact(dtype, gear), problem.plain(dtype, gear)
    for budget in (NARROW, UNLIMITED):
        ours = problem.run(wk.token_logps, dtype, gear, memory_budget=budget, backend="triton")
        for name, value in ours.items():
            assert_within(value, exact[name], plain[name], dtype, name)


@pytest.mark.parametrize("gear", ["scoring", "frozen_head", "trained"])
def test_gears_with_rows_wider_than_a_block(narrow_blocks, gear):
    problem, dtype = Problem(SHAPES["odd"], "plain"), torch.float32
    exact, plain = problem.exact(dtype, gear), problem.plain(dtype, gear)
    for budget in (NARROW, UNLIMITED):
        ours = problem.run(wk.token_logps, dtype, gear, memory_budget=budget, backend="triton")
        for name, value in ours.items():
            assert_within(value, exact[name], plain[name], dtype, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ignored_rows(dtype):
    ignored_rows.check_row_kernel(triton_rows, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_small_softcap(dtype):
    test_kept_accuracy.check_softcap("triton", dtype, "a hundredth", FEW)


def test_slopes_near_saturation():
    test_kept_accuracy.check_near_saturation("triton", 3, 33.0, 2.0, FEW)


def test_gradcheck():
    hidden = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 6, -100])

    def outputs(hidden, weight, bias):
        options = {"softcap": 4.0, "entropy": True, "backend": "triton"}
        return tuple(wk.token_logps(hidden, weight, targets, bias=bias, **options))

    assert torch.autograd.gradcheck(outputs, (hidden, weight, bias))


def test_fused_loss():
    hidden = torch.randn(2, 2, 3, 8, requires_grad=True)
    weight, targets = torch.randn(301, 8, requires_grad=True), torch.randint(0, 301, (2, 2, 3))

    def value_and_gradients(backend):
        loss = wk.fused_loss(lambda logps: logps.square().sum(-1), hidden, weight, targets, backend=backend)
        return loss, *torch.autograd.grad(loss, (hidden, weight))

    for got, want in zip(value_and_gradients("triton"), value_and_gradients("torch"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# Tiles ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_tiles(monkeypatch):
    config = tuned.Tile(rows=16, columns=64, inner=16, warps=4, stages=3, group=2)
    for module in (triton_tile, triton_backward, tuned):
        monkeypatch.setattr(module, "tile_config", lambda arch=None: config)
    monkeypatch.setattr(tuned, "tile_hidden", lambda arch=None: 1 << 20)


def compare_tiles(tile_forward, dtype, inner, variant):
    """Compare statistics and kept probabilities of tiles with a product and torch's row kernel."""
    entropy = variant == "all"
    transform = TRANSFORMS["softcap" if entropy else "identity"]
    rows, width = 37, 150
    hidden, weight = torch.randn(rows, inner).to(dtype), torch.randn(width, inner).to(dtype)
    bias = torch.randn(width) if entropy else None
    if entropy:
        bias[70] = -torch.inf
    targets = torch.randint(-1, 2 * width, (rows,))
    fresh = [[torch.full((rows,), value) for value in (-torch.inf, 0.0, -torch.inf, 0.0)] for _ in range(2)]
    ours, plain = (RowState(*state[:3], state[3] if entropy else None) for state in fresh)
    kept, offset = torch.full((rows, width), torch.nan, dtype=dtype), torch.full((rows, 3), torch.nan)
    plain_kept, plain_offset = torch.empty(rows, width, dtype=dtype), torch.empty(rows, 1)
    for start in (0, width):
        slab = Slab(None, bias, targets, start, transform)
        tile_forward(hidden, weight, slab, ours, Kept(kept, offset))
        slab = slab._replace(logits=hidden.float() @ weight.float().T)
        torch_rows.slab_forward(slab, plain, Kept(plain_kept, plain_offset))
    for got, want in zip(ours, plain, strict=True):
        if got is not None:
            close(got, want, torch.float32)
    columns = torch.arange(width) // 64
    got, want = kept.float().log() + offset[:, columns], plain_kept.float().log() + plain_offset
    seen = plain_kept.float() > 1e-3
    if transform.softcap is not None:
        # Near the cap, 1 - tanh^2 cancels and magnifies the rounding of a logit, which is different in tiles.
        y = hidden.float() @ weight.float().T
        torch_rows._apply_transform(y, bias, transform)
        seen &= relative_slope(y, transform, torch.empty_like(y)) > 1e-2
    assert seen.float().mean() > 0.1
    torch.testing.assert_close(got[seen], want[seen], rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inner", [24, 20])  # rows the tensor copy engine can address, and rows it cannot
@pytest.mark.parametrize("variant", ["plain", "all"])
def test_tile_kernel(small_tiles, dtype, inner, variant):
    compare_tiles(triton_tile.tile_forward, dtype, inner, variant)


@pytest.mark.parametrize("gear", ["scoring", "trained"])
def test_a_walk_over_tiles(small_tiles, gear):
    problem = Problem(Shape((3, 11), (24,), 517), "all")
    exact, plain = problem.exact(torch.bfloat16, gear), problem.plain(torch.bfloat16, gear)
    for budget in (NARROW, UNLIMITED):
        ours = problem.run(wk.token_logps, torch.bfloat16, gear, memory_budget=budget, backend="triton")
        for name, value in ours.items():
            assert_within(value, exact[name], plain[name], torch.bfloat16, name)


def test_a_walk_over_tiles_obeys_its_plan(small_tiles):
    hidden = torch.randn(40, 24).bfloat16().requires_grad_()
    weight = torch.randn(517, 24).bfloat16().requires_grad_()
    targets = torch.randint(0, 517, (40,))
    for budget, entropy in ((NARROW, False), (UNLIMITED, False), (UNLIMITED, True)):
        options = {"memory_budget": budget, "entropy": entropy}
        plan = wk.plan(40, 24, 517, torch.bfloat16, device="cpu", backend="triton", **options)
        assert plan.walk.offset_tiles > 1
        assert plan.slabs_kept == (0 if entropy or budget == NARROW else plan.num_slabs)  # tiles have no logits to keep
        with wk.kernels.buffers.recording() as record:
            out = wk.token_logps(hidden, weight, targets, backend="triton", **options)
            (out.entropy if entropy else out.logps).sum().backward()
        assert record.peak_bytes <= plan.peak_bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tiles_keep_what_a_small_softcap_needs(small_tiles, dtype):
    test_kept_accuracy.check_softcap("triton", dtype, "one over fifty", FEW)
    test_kept_accuracy.check_entropy("triton", dtype, FEW)


def test_tiles_near_saturation(small_tiles):
    test_kept_accuracy.check_near_saturation("triton", 5, 1.0, rows=FEW)


def test_rows_of_tiles_do_not_depend_on_their_neighbours(small_tiles):
    hidden, weight = torch.randn(40, 24).bfloat16(), torch.randn(301, 24).bfloat16()
    targets = torch.randint(0, 301, (40,))
    whole = wk.token_logps(hidden, weight, targets, backend="triton").logps
    assert torch.equal(wk.token_logps(hidden[7:20], weight, targets[7:20], backend="triton").logps, whole[7:20])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_batch_invariant_runs_tiles_in_every_gear(small_tiles, monkeypatch, dtype):
    """The bits are the same for any gear, budget and other rows; gradients are within the error budget."""
    monkeypatch.setattr(tuned, "tile_hidden", lambda arch=None: 0)
    problem = Problem(Shape((3, 11), (24,), 517), "all")
    options = {"batch_invariant": True, "backend": "triton"}
    whole = problem.run(wk.token_logps, dtype, "scoring", **options)["logps"]
    for gear in ("frozen_head", "frozen_body"):
        exact, plain = problem.exact(dtype, gear), problem.plain(dtype, gear)
        for budget in (NARROW, UNLIMITED):
            ours = problem.run(wk.token_logps, dtype, gear, memory_budget=budget, **options)
            assert torch.equal(ours["logps"], whole)
            for name, value in ours.items():
                assert_within(value, exact[name], plain[name], dtype, name)
    hidden, weight = problem.hidden[0].to(dtype)[1:2, 3:9], problem.weight[0].to(dtype)
    bias, targets = problem.bias.to(dtype), problem.targets[1:2, 3:9]
    part = wk.token_logps(hidden, weight, targets, bias=bias, **problem.transform, **options).logps
    assert torch.equal(part, whole[1:2, 3:9])


@pytest.mark.parametrize("vocab", [64, 100])
def test_a_vocabulary_of_one_tile_takes_the_gear_of_its_plan(small_tiles, monkeypatch, vocab):
    """If all gears run tiles, a frozen head does too, although a row has one offset as in a slab."""
    monkeypatch.setattr(tuned, "tile_hidden", lambda arch=None: 0)
    options = {"batch_invariant": True, "backend": "triton"}
    plan = wk.plan(9, 24, vocab, torch.bfloat16, weight_grad=False, device="cpu", **options)
    assert plan.gear == "trained" and plan.walk.tile_columns
    hidden, weight = torch.randn(9, 24).bfloat16(), torch.randn(vocab, 24).bfloat16()
    targets = torch.randint(0, vocab, (9,))
    whole = wk.token_logps(hidden, weight, targets, **options).logps
    ran = []
    for name in ("tile_forward", "exps_forward", "slab_forward_unit"):
        right = getattr(triton_rows, name)
        monkeypatch.setattr(triton_rows, name, lambda *args, right=right, name=name: (ran.append(name), right(*args)))
    frozen = wk.token_logps(hidden.requires_grad_(), weight, targets, **options).logps
    assert torch.equal(frozen, whole) and set(ran) == {"tile_forward"}
    frozen.sum().backward()


# Pairs and segments ---------------------------------------------------------------------------------------------------


def compare_pairs(kernels, n=41):
    scores, rewards = torch.randn(2, n, dtype=torch.float64), torch.randn(2, n, dtype=torch.float64).round()
    prefs = torch.rand(2, n, n, dtype=torch.float64)
    where = torch.rand(2, n) < 0.7
    scores[~where] = rewards[~where] = torch.nan
    clean = scores.nan_to_num(), rewards.nan_to_num()
    for link in ("bradley_terry", "step"):
        for mask, (s, r) in ((None, clean), (where, (scores, rewards))):
            for given in ((None, r), (prefs, None)):
                want = torch_pairs.win_rates(*given, mask, link)
                torch.testing.assert_close(kernels.win_rates(*given, mask, link), want, rtol=1e-9, atol=1e-9)
                for loss in ("square", "logistic", "hinge"):
                    got = kernels.pair_terms(s, *given, mask, link, loss)
                    want = torch_pairs.pair_terms(s, *given, mask, link, loss)
                    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_pair_kernels():
    compare_pairs(triton_pairs)
    for loss in ("square", "logistic", "hinge"):
        for dtype in (torch.float32, torch.float64):
            test_pairs.check_well_ordered("triton", loss, dtype)
    test_pairs.check_diagonal("triton")


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (1, 1)])
def test_no_pairs(shape):
    value, slope = triton_pairs.pair_terms(torch.ones(shape), None, torch.ones(shape), None, "step", "hinge")
    assert value.tolist() == [0.0] * shape[0] and slope.tolist() == torch.zeros(shape).tolist()


def test_segment_sum():
    values, bounds = torch.randn(3000), torch.tensor([0, 0, 5, 2500, 3000])
    torch.testing.assert_close(triton_pairs.segment_sum(values, bounds), torch_rows.segment_sum(values, bounds))


def test_one_minus_p_and_tanh_keep_their_digits(monkeypatch):
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x_ptr, p_ptr, tanh_ptr, N: tl.constexpr):
        place = tl.arange(0, N)
        x = tl.load(x_ptr + place)
        tl.store(p_ptr + place, triton_maths.one_minus_p(x))
        tl.store(tanh_ptr + place, triton_maths.tanh(-x))

    for dtype, tolerance in ((torch.float32, 5e-7), (torch.float64, 1e-13)):
        x = -torch.logspace(-20, 1.3, 512, dtype=dtype)
        p, tanh = torch.empty_like(x), torch.empty_like(x)
        kernel[(1,)](x, p, tanh, N=512)
        torch.testing.assert_close(p, -torch.expm1(x), rtol=tolerance, atol=0)
        torch.testing.assert_close(tanh, torch.tanh(-x), rtol=4 * tolerance, atol=0)


# The table and the reasons --------------------------------------------------------------------------------------------


def test_reasons(monkeypatch):
    assert wk.backends.why_not("triton", "cpu") is None  # interpreting
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "it runs on NVIDIA and AMD GPUs, not on cpu" in wk.backends.why_not("triton", "cpu")
    with pytest.raises(wk.BackendUnavailableError, match="backend='triton' cannot run on cpu"):
        wk.token_logps(torch.randn(2, 3), torch.randn(5, 3), torch.tensor([1, 2]), backend="triton")


def test_block_sizes_come_from_the_table():
    assert tuned.row_warps(16384, "sm_90") == 16 and tuned.row_warps(64, "sm_90") == 1
    assert tuned.backward_config(10**6, "sm_90") == (4096, 8)
    assert tuned.backward_config(300, "sm_90") == (512, 1)
    assert tuned.tile_hidden("default") == 0  # tiles were not shown to be faster on a GPU
    assert {"cpp", *tuned.preferred("sm_90")} == set(wk.backends.BACKENDS)
    for width, kept, most in ((20000, Kept(torch.empty(1, 20000), torch.empty(1, 1)), 16384), (140000, None, 131072)):
        with pytest.raises(RuntimeError, match=f"at most {most} columns"):
            state = RowState(*(torch.zeros(1) for _ in range(3)), None)
            slab = Slab(torch.zeros(1, width), None, torch.zeros(1, dtype=torch.int64), 0, LogitTransform())
            triton_rows.slab_forward(slab, state, kept)
