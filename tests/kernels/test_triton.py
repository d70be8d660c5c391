"""The Triton kernels in Triton's interpreter on a CPU: maths and masks. Speed and races need a GPU."""

import pytest
import test_ignored_rows as ignored_rows
import test_kept_accuracy
import test_pairs
import torch
from cases import NARROW, SHAPES, UNLIMITED, Problem, Shape
from tolerances import assert_within
from triton_cases import TRANSFORMS, close, compare_rows, compare_wide_rows

import windkern as wk
from windkern.kernels.contract import (
    Kept,
    RowState,
    Slab,
    relative_slope,
)
from windkern.kernels.torch import pairs as torch_pairs
from windkern.kernels.torch import rows as torch_rows

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("a GPU runs the kernels themselves: tests/kernels/test_gpu.py", allow_module_level=True)

from windkern.kernels import tuned
from windkern.kernels.triton import backward as triton_backward
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


def transposed(value):
    return value.t().contiguous().t()


@pytest.mark.parametrize("gear", ["frozen_head", "trained"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed weight", "transposed hidden", "strided targets"])
def test_any_strides_of_inputs_and_upstream(monkeypatch, gear, layout):
    """The gradient of a sum is one number expanded to all rows; inputs can be views, and a GPU copies no targets."""
    monkeypatch.setattr(wk.backends, "checks_values", lambda device: False)
    hidden, weight, targets = torch.randn(6, 9), torch.randn(31, 9), torch.randint(0, 31, (12,))[::2]
    if layout != "strided targets":
        targets = targets.contiguous()
    hidden = transposed(hidden) if layout == "transposed hidden" else hidden
    weight = transposed(weight) if layout == "transposed weight" else weight
    leaves = [hidden.requires_grad_(), weight.requires_grad_(gear == "trained")]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]

    def token(logps):
        return torch.autograd.grad(logps.sum(), wanted)

    def grouped():
        loss = wk.fused_loss(
            lambda logps: logps.sum(-1), hidden.view(1, 1, 6, 9), weight, targets.view(1, 1, 6), backend="triton"
        )
        return torch.autograd.grad(loss, wanted)

    exact = token(wk.naive.token_logps(hidden.double(), weight.double(), targets)[0])
    for found in (token(wk.token_logps(hidden, weight, targets, backend="triton").logps), grouped()):
        for got, want in zip(found, exact, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, check_dtype=False)
