"""The CUDA kernels under the emulator: every kernel against torch_rows, and the whole walk against float64."""

import shutil

import cuda_tools
import pytest
import test_ignored_rows
import test_kept_accuracy
import test_pairs
import test_plan
import test_sequence
import torch
from cases import DTYPES, GEARS, NARROW, SHAPES, UNLIMITED, VARIANTS, Problem, Shape
from cuda_cases import WIDTHS, Rows, close_pairs, compare, jumps
from test_logprobs import check

import windkern as wk
from windkern.kernels import buffers
from windkern.kernels.contract import HiddenGrad, Kept, RowState, RowStats, Settled, Slab, Upstream
from windkern.kernels.native import cuda as cuda_rows
from windkern.kernels.torch import rows as torch_rows
from windkern.transform import LogitTransform

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    return cuda_tools.emulated_module(tmp_path_factory)


@pytest.fixture
def backend(monkeypatch, emulated):
    """Overrides the fixture of the other tests, so that they run on this back end too."""
    cuda_tools.install(monkeypatch, emulated)
    return "cuda"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_row_kernels(backend, dtype, width):
    if width > 8192 and dtype not in (torch.float32, torch.bfloat16):
        pytest.skip("the emulator takes its time, and the widest rows are alike in all dtypes")
    for transform, bias, entropy, shifted in (
        ("identity", False, False, False),
        ("scaled", True, True, False),
        ("softcap", False, True, True),
        ("softcap", True, False, False),
        ("identity", True, True, True),
    ):
        if width > 2000 and shifted:
            continue

        def make(options=(transform,), bias=bias, entropy=entropy, shifted=shifted):
            return Rows(9 if width < 2000 else 5, width, dtype, *options, bias=bias, entropy=entropy, shifted=shifted)

        for keep in (False, True):
            compare(make, "forward", keep)
        own = dtype in (torch.float32, torch.float64)
        for alias in {False, own}:
            compare(make, "unit", alias)
        for kept in (False, True):
            for alias in {False, own and not kept}:
                compare(make, "backward", kept, alias, bias)
        if not entropy:
            for kernel in ("exps", "again"):
                for alias in {False, own}:
                    compare(make, kernel, alias)
            compare(make, "sums")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 65, 520, 2056])
def test_ends_of_the_walk(backend, dtype, width):
    """The end of forward, and both ends of backward with hidden states and a head of every dtype."""
    for shifted in (False, True):

        def make(rows=5, shifted=shifted):
            return Rows(rows, width, dtype, shifted=shifted)

        for options in ((False,), (True, False), (True, True)):
            compare(lambda: make(11), "finish", *options)
        for other in [dtype] if shifted or width not in (65, 520) else DTYPES:
            for strided in {False, width == 65 and other == dtype}:
                compare(make, "factors", other, strided)
                compare(make, "grads", other, strided, shifted)
        if not shifted:
            compare(make, "grads", dtype, False, True)


def test_ends_of_a_walk_over_no_rows_and_no_columns(backend):
    none, targets = torch.empty(0), torch.empty(0, dtype=torch.int64)
    settled = Settled(torch.empty(0, 8), none, none, none, True)
    cuda_rows.finish_rows(RowState(none, none, none, None), targets, none, none, none, settled)
    cuda_rows.row_factors(none, none, targets, 1.0, none, torch.empty(0, 8), torch.empty(0, 8))
    cuda_rows.write_hidden_grad(HiddenGrad(torch.empty(3, 8)), targets, targets, torch.zeros(4, 8))
    results = []
    for kernels in (cuda_rows, torch_rows):
        maxima, pivot = torch.tensor([3.0, 50.0, -torch.inf]), torch.tensor([1.0, 1.0, -torch.inf])
        written = [torch.full((3,), torch.nan) for _ in range(5)]
        settled = Settled(torch.empty(3, 0), pivot, *written[3:], True)
        state = RowState(maxima, torch.tensor([2.0, 1.0, 0.0]), maxima - 1, None)
        kernels.finish_rows(state, torch.tensor([0, 5, 1]), *written[:3], settled)
        results.append([*written, pivot])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("rows", [0, 1, 31, 33, 100])
def test_rows_of_every_tile_reach_dbias(backend, rows):
    """Row tiles of 32 and the batches inside a tile can end at any row; without rows, dbias is zero."""
    width = 40
    z, targets = torch.randn(rows, width, dtype=torch.float64), torch.full((rows,), 3)
    zeros = torch.zeros(rows, dtype=torch.float64)
    stats = RowStats(zeros, z.exp().sum(1).log(), z[:, 3].contiguous(), None)
    upstream = Upstream(torch.ones(rows, dtype=torch.float64), None, None)
    results = []
    for kernels in (cuda_rows, torch_rows):
        dz, dbias = torch.empty_like(z), torch.empty(width, dtype=torch.float64)
        slab = Slab(z.clone(), None, targets, 0, LogitTransform())
        kernels.slab_backward(slab, None, stats, upstream, None, dz, dbias)
        results.append((dz, dbias))
    torch.testing.assert_close(*results)
    torch.testing.assert_close(results[0][1], results[0][0].sum(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gear", GEARS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_walk(backend, variant, gear, dtype):
    if gear == "bias_only" and not VARIANTS[variant]["bias"]:
        pytest.skip("this variant has no bias")
    problem = Problem(SHAPES["odd"], variant)
    for budget in (NARROW, UNLIMITED):
        check(problem, dtype, gear, memory_budget=budget, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["tiny", "blocks", "one_row"])
def test_walk_of_other_shapes(backend, shape, dtype):
    for gear in ("frozen_head", "trained"):
        problem = Problem(SHAPES[shape], "all")
        for budget in (NARROW, problem.middle_budget(dtype, gear)):
            check(problem, dtype, gear, memory_budget=budget, backend=backend)


def test_ignored_rows_and_no_rows(backend):
    problem = Problem(Shape((2, 3), (8,), 37), "all")
    problem.targets.fill_(-100)
    for gear in ("frozen_head", "trained"):
        results = problem.run(wk.token_logps, torch.float32, gear, max_scored=3, backend=backend)
        assert all(torch.equal(value, torch.zeros_like(value)) for value in results.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_ignored_row_may_hold_anything(backend, dtype):
    test_ignored_rows.check_row_kernel(cuda_rows, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_what_is_kept_is_as_good_as_what_is_recomputed(backend, dtype):
    test_kept_accuracy.check_softcap(backend, dtype, "one over fifty")
    test_kept_accuracy.check_entropy(backend, dtype)
    test_kept_accuracy.check_saturated(backend, dtype, 1.0, 6.0)


def test_slopes_near_saturation(backend):
    test_kept_accuracy.check_near_saturation(backend, 5, 33.0, 2.0)


def test_a_value_that_is_no_number_stays_one(backend):
    z = torch.randn(4, 600)
    z[1, 77], z[2, 599] = torch.nan, torch.inf
    for keep in (False, True):
        state = RowState(torch.full((4,), -torch.inf), torch.zeros(4), torch.full((4,), -torch.inf), None)
        kept = Kept(torch.empty(4, 600), torch.empty(4, 1)) if keep else None
        cuda_rows.slab_forward(Slab(z.clone(), None, torch.arange(4), 0, LogitTransform()), state, kept)
        assert state.run_sum.isnan().tolist() == [False, True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_plan_is_obeyed(backend, dtype):
    """The plan includes the scratch of dbias, in tall and in wide slabs."""
    for shape in (Shape((4, 40), (64,), 131), Shape((5,), (64,), 4001)):
        problem = Problem(shape, "all")
        for gear in ("frozen_head", "trained"):
            for name, budget in test_plan.budgets(problem, dtype, gear).items():
                plan = test_plan.plan_of(problem, dtype, gear, dropped=True, memory_budget=budget, backend=backend)
                with buffers.recording() as record:
                    problem.run(wk.token_logps, dtype, gear, memory_budget=budget, backend=backend)
                assert record.flops == plan.flops, name
                assert record.peak_bytes <= plan.peak_bytes, (name, record.by_name)


@pytest.mark.parametrize(("loss", "link", "given"), test_pairs.CASES)
def test_pair_kernels(backend, loss, link, given):
    for dtype in (torch.float64, torch.float32):
        for masked in (False, True):
            for n in (2, 13, 70):
                test_pairs.test_parity(backend, loss, link, given, dtype, masked, n)


def test_pair_kernels_of_large_and_of_masked_groups(backend):
    for loss in ("square", "logistic", "hinge"):
        test_pairs.test_masked_responses_equal_dropped_ones_even_as_nan(backend, loss)
        scores, rewards = torch.randn(1, 1100), torch.randn(1, 1100)
        ours = cuda_rows.pair_terms(scores, None, rewards, None, "step", loss)
        exact = torch_rows.pair_terms(scores.double(), None, rewards.double(), None, "step", loss)
        close_pairs(ours, exact, scores, loss, rtol=1e-5, atol=1e-3)
    for left in (0, 1):
        test_pairs.test_groups_with_fewer_than_two_contribute_zero(backend, left)
    assert cuda_rows.pair_terms(torch.empty(0, 3), None, torch.empty(0, 3), None, "step", "hinge")[0].shape == (0,)


def test_only_the_slope_of_a_hinge_may_jump_and_only_at_its_margin():
    """1 - 2^-25 is 1 in float32, where the hinge has no slope."""
    scores, rewards = torch.tensor([[1.0, 2**-25, 5.0]]), torch.tensor([[1.0, 0.0, 9.0]])
    ours = torch_rows.pair_terms(scores, None, rewards, None, "step", "hinge")
    exact = torch_rows.pair_terms(scores.double(), None, rewards.double(), None, "step", "hinge")
    assert (ours[1] - exact[1]).abs().tolist() == jumps(scores).tolist() == [[1.0, 1.0, 0.0]]
    options = {"rtol": 1e-6, "atol": 1e-6}
    close_pairs(ours, exact, scores, "hinge", **options)
    for error in ([[0.0, 0.0, 0.01]], [[0.0, 1.01, 0.0]], [[torch.nan, 0.0, 0.0]]):
        with pytest.raises(AssertionError, match="Mismatched elements: 1 / 3"):
            close_pairs((ours[0], exact[1] + torch.tensor(error)), exact, scores, "hinge", **options)
    for loss, given in (("logistic", scores), ("hinge", scores.double())):
        with pytest.raises(AssertionError, match="Mismatched elements: 2 / 3"):
            close_pairs(ours, exact, given, loss, **options)
    with pytest.raises(AssertionError, match="Mismatched elements: 1 / 1"):
        close_pairs((ours[0] + 1, ours[1]), exact, scores, "hinge", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_pairs_of_well_ordered_groups(backend, dtype):
    for loss in ("square", "logistic", "hinge"):
        test_pairs.check_well_ordered(backend, loss, dtype)
    test_pairs.check_diagonal(backend)


def test_segment_sums(backend):
    for index in (torch.int64, torch.int32):
        test_sequence.test_packed(backend, "sum", index)
    values, bounds = torch.randn(5000), torch.tensor([0, 0, 1, 130, 130, 5000])
    exact = torch_rows.segment_sum(values.double(), bounds)
    torch.testing.assert_close(cuda_rows.segment_sum(values, bounds).double(), exact, rtol=1e-6, atol=0)
    assert cuda_rows.segment_sum(values, torch.tensor([0])).shape == (0,)


@pytest.mark.parametrize("rows", [1, 31, 1024, 1025, 3000])
@pytest.mark.parametrize("scored", ["none", "all", "first", "last", "some"])
def test_scored_rows_are_found_in_order(backend, rows, scored):
    targets = torch.full((rows,), -100)
    where = {"none": slice(0), "all": slice(None), "first": slice(1), "last": slice(-1, None)}.get(scored)
    targets[torch.randperm(rows)[: rows // 3] if where is None else where] = 5
    found, exact = cuda_rows.find_scored(targets, -100), (targets != -100).nonzero().squeeze(1)
    assert (found is None) == (exact.shape[0] == rows)
    assert found is None or torch.equal(found, exact)


def every_kernel() -> list[torch.Tensor]:
    """Return the results of all kernels on teams of a warp and of a block, with NaN replaced."""
    torch.manual_seed(0)
    rows = Rows(9, 1000, torch.bfloat16, "softcap", bias=True, entropy=True)
    narrow = Rows(40, 40, torch.float32, "softcap", bias=True, entropy=True)
    results = []
    for one in (rows, narrow):
        results += one.forward(cuda_rows, True) + one.forward(cuda_rows, False)
        results += one.unit(cuda_rows, one is narrow) + one.backward(cuda_rows, True, False, True)
        results += one.backward(cuda_rows, False, one is narrow, True)
        results += one.finish(cuda_rows, True, True) + one.factors(cuda_rows, one.dtype, False)
        results += one.grads(cuda_rows, one.dtype, False, True)
    pairs = torch.randn(2, 2, 700)
    results += cuda_rows.pair_terms(pairs[0], None, pairs[1], None, "bradley_terry", "logistic")
    results += [cuda_rows.win_rates(None, pairs[1], None, "step")]
    results += [cuda_rows.segment_sum(pairs.flatten(), torch.tensor([0, 700, 2800]))]
    results += [cuda_rows.find_scored(torch.arange(2100) % 7, 3)]
    return [value.nan_to_num(7.0) for value in results if value is not None]


def test_bits_do_not_depend_on_the_order_of_threads(backend, monkeypatch):
    """The bits are the same again, with the last thread first, and in an order drawn again at every barrier."""
    first = every_kernel()
    for order in ("forward", "reverse", "random:1"):
        monkeypatch.setenv("CUDA_EMULATOR_ORDER", order)
        for one, two in zip(first, every_kernel(), strict=True):
            assert torch.equal(one, two)
