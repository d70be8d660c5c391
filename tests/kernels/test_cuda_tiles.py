"""The kernels that multiply themselves, under the emulator, against float64 and against a product with torch_rows."""

import shutil

import cuda_tools
import pytest
import torch
from cuda_cases import TRANSFORMS
from tile_cases import (
    LAYOUTS,
    POISON,
    Tiles,
    assert_state,
    compare_again,
    compare_begun,
    compare_exps,
    compare_large,
    compare_scores,
    compare_values,
    laid_out,
)

from windkern.kernels import buffers
from windkern.kernels.contract import Exps, RowState, Slab
from windkern.kernels.native import cuda as cuda_rows
from windkern.kernels.torch import rows as torch_rows

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

# Rows and vocabulary entries of one tile, of several, and just beyond; inner sizes of one step of 64, and of more.
SHAPES = [(1, 1, 8), (5, 255, 72), (5, 700, 136), (130, 257, 8), (257, 1, 72), (257, 257, 8)]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return cuda_tools.emulated_module(tmp_path_factory)


@pytest.fixture(autouse=True)
def tiles(monkeypatch, emulated):
    cuda_tools.install(monkeypatch, emulated, tiles=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "width", "inner"), SHAPES)
def test_scores(rows, width, inner, dtype):
    """Bias and entropy take turns, so that both are seen with and without the other."""
    for entropy in (False, True):
        bias = entropy == (inner == 8)
        transform = "scaled" if bias else "identity"
        compare_scores(Tiles(rows, (width,), inner, dtype, transform, bias=bias, entropy=entropy))


@pytest.mark.parametrize("size", [1.0, 300.0, 1e4, 1e8, 1e12])
@pytest.mark.parametrize("width", [1, 256, 300])
def test_equal_logits_of_any_size(size, width):
    """The exponential of a row's maximum is exactly 1, so that a sum is a count, and no log-prob is positive."""
    hidden, weight = torch.zeros(5, 8).bfloat16(), torch.zeros(width, 8).bfloat16()
    hidden[:, 0], weight[:, 0] = 1.0, size
    slab = Slab(None, None, torch.zeros(5, dtype=torch.int64), 0, TRANSFORMS["identity"])
    for exps in (False, True):
        state = RowState(*(torch.full((5,), torch.nan) for _ in range(3)), None)
        values, pivot = torch.zeros(5, 320).bfloat16(), torch.full((5,), torch.nan)
        if exps:
            out = Exps(values[:, :width], pivot, 0, None)
            cuda_rows.tile_exps_forward(hidden, weight, slab, state, out, fresh=True)
            assert (values[:, 1:width] == 1.0).all() and (values[:, 0] == 0.0).all()
        else:
            cuda_rows.tile_forward(hidden, weight, slab, state, None, fresh=True)
        assert (state.run_sum == width).all() and torch.equal(state.run_max, state.target_logit)


@pytest.mark.parametrize("rows", [5, 130])
def test_a_walk_begins_its_rows(rows):
    """Targets lie before, in and after the slabs, and in the second of them."""
    compare_begun(Tiles(rows, (64, 300), 72, bias=True))


@pytest.mark.parametrize(("rows", "width", "inner"), SHAPES)
def test_exponentials(rows, width, inner):
    """The second slab begins at a column that no tile begins at."""
    for bias, transform in ((False, "identity"), (True, "scaled")):
        compare_exps(Tiles(rows, (64, width), inner, transform=transform, bias=bias))
        compare_again(Tiles(rows, (64, width), inner, transform=transform, bias=bias))


@pytest.mark.parametrize("spread", [60.0, 200.0])
@pytest.mark.parametrize("bias", [False, True])
def test_pivots_that_move(spread, bias):
    """Between tiles of a slab and between slabs, by more than float32 can hold the exponential of."""
    tiles = Tiles(70, (512, 300), 8, bias=bias, spread=spread)
    _, moves = compare_exps(tiles)
    assert moves.sum() > 3
    compare_again(tiles)


def test_a_pivot_stays_where_it_is_near_enough():
    """A row's second slab has larger logits by less than 40, and later ones are relative to the same pivot."""
    tiles = Tiles(5, (64, 64, 64), 8, spread=4.0)
    results, moves = compare_exps(tiles)
    assert not moves.any()
    assert all((moved[tiles.scored] == 1.0).all() for moved in results[-3:])


def test_what_all_rows_mask():
    """Slabs whose entries are all masked leave pivot, maximum and sum as they are, and their exponentials are 0."""
    tiles = Tiles(5, (64, 300, 64), 8, bias=True)
    tiles.bias[:364] = -torch.inf
    state, pivot, (_, values) = tiles.state(), tiles.row(-torch.inf), tiles.room()
    for number, (columns, head, slab) in enumerate(tiles.slabs()):
        moved = tiles.row(torch.nan)
        cuda_rows.tile_exps_forward(
            tiles.hidden, head, slab, state, Exps(values[:, columns], pivot, columns.start, moved)
        )
        assert moved.isfinite().all()
        if number < 2:
            assert (pivot == -torch.inf).all() and (values[:, columns] == 0).all()
            assert_state(state[:2], tiles.state()[:2], tiles.scored, 1e-6)
    assert pivot[tiles.scored].isfinite().all() and (values[:, :364] == 0).all()
    compare_values(tiles, values, tiles.logits(), pivot, 0.0, 2**-7)
    compare_scores(tiles)


def test_sums_of_large_logits_lose_no_digits():
    compare_large()


def test_many_row_tiles_go_through_the_vocabulary_in_groups():
    """More than 16 row tiles: a group goes through all columns before the next begins."""
    compare_scores(Tiles(17 * 128 + 1, (257,), 8))


def test_many_column_tiles():
    """Each of the eight runs that join the tiles of a row has some."""
    compare_scores(Tiles(5, (3900,), 8, entropy=True))
    compare_exps(Tiles(5, (3900,), 8))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operands_anywhere_in_memory(layout):
    """The copy engine reads rows where they lie, or a copy of them; the bits are the same."""
    results = []
    for where in ("dense", layout):
        torch.manual_seed(0)
        tiles = Tiles(5, (256, 72), 72, layout=where)
        assert cuda_rows.reads_in_place(tiles.hidden) == (where in ("dense", "padded"))
        results.append([*compare_scores(tiles), *compare_exps(tiles)[0], *compare_again(tiles)])
    assert same_bits(*results)


def test_which_matrices_are_copied():
    matrix = torch.randn(6, 16).bfloat16()
    for layout in LAYOUTS:
        placed = laid_out(matrix, layout)
        assert torch.equal(placed, matrix)
        assert cuda_rows.reads_in_place(placed) == (layout in ("dense", "padded"))
        with buffers.recording() as record:
            read = cuda_rows._readable(placed)
        assert torch.equal(read, matrix) and read.is_contiguous() == (layout != "padded")
        assert record.by_name == ({} if layout in ("dense", "padded") else {"cast": matrix.nbytes})
    expanded = matrix[:1].expand(6, 16)
    assert not cuda_rows.reads_in_place(expanded)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_an_ignored_row_may_hold_anything(number):
    """Its exponentials are 0 in every slab, and other rows are what they are without it."""
    results = []
    for lies in (None, number):
        torch.manual_seed(0)
        tiles = Tiles(9, (64, 300), 8, lies=lies)
        results.append([*compare_exps(tiles)[0], *compare_again(tiles), *compare_scores(tiles)])
    for one, two in zip(*results, strict=True):
        assert (one is two is None) or torch.equal(one[tiles.scored], two[tiles.scored])


def test_an_ignored_row_of_many_tiles_may_hold_nan():
    """Every run that joins its tiles has one, so that its maximum is no number either."""
    compare_exps(Tiles(5, (64, 2048), 8, lies=torch.nan))


def test_a_value_that_is_no_number_stays_one():
    """A scored row with NaN in its hidden states, or an infinite logit, has no log-prob."""
    tiles = Tiles(4, (600,), 8)
    tiles.hidden[1, 3], tiles.hidden[2, 3] = torch.nan, torch.inf
    state, pivot, (_, values) = tiles.state(), tiles.row(-torch.inf), tiles.room()
    ((_, head, slab),) = tiles.slabs()
    cuda_rows.tile_forward(tiles.hidden, head, slab, state, None)
    assert state.run_sum.isnan().tolist() == [False, True, True, False]
    state = tiles.state()
    cuda_rows.tile_exps_forward(tiles.hidden, head, slab, state, Exps(values, pivot, 0, None))
    assert state.run_sum.isnan().tolist() == [False, True, True, False]


@pytest.mark.parametrize(("rows", "width"), [(0, 300), (5, 0), (0, 0)])
def test_no_rows_or_no_columns(rows, width):
    tiles = Tiles(rows, (width,), 8)
    ((_, head, slab),) = tiles.slabs()
    state, moved, pivot = tiles.state(), tiles.row(torch.nan), tiles.row(-torch.inf)
    values = torch.full((rows, width), POISON, dtype=torch.bfloat16)
    cuda_rows.tile_forward(tiles.hidden, head, slab, state, None)
    cuda_rows.tile_exps_forward(tiles.hidden, head, slab, state, Exps(values, pivot, 0, moved))
    cuda_rows.tile_exps_forward(tiles.hidden, head, slab, state, Exps(values, pivot, 0, None))
    cuda_rows.tile_exps_backward(tiles.hidden, head, slab, pivot, tiles.entries(), values)
    for got, want in zip(state[:3], tiles.state(), strict=False):
        assert torch.equal(got, want)
    assert torch.equal(moved, torch.ones(rows)) and (pivot == -torch.inf).all()


def test_exponentials_are_those_of_the_row_kernels():
    """What a product and torch_rows write, relative to their own pivots; the sums relative to them agree."""
    tiles = Tiles(70, (64, 300), 8, bias=True)
    (pivot, plain), ours, want = (tiles.row(-torch.inf) for _ in range(2)), tiles.state(), tiles.state()
    values, wanted = tiles.room()[1], torch.empty(70, 364, dtype=torch.bfloat16)
    for columns, head, slab in tiles.slabs():
        exps = Exps(values[:, columns], pivot, columns.start, None)
        cuda_rows.tile_exps_forward(tiles.hidden, head, slab, ours, exps)
        exps = Exps(wanted[:, columns], plain, columns.start, None)
        z = tiles.hidden.float() @ head.float().T
        torch_rows.exps_forward(slab._replace(logits=z), want, exps)
    assert_state(ours, want, tiles.scored, 1e-5)
    scale = (pivot - plain).exp().unsqueeze(1)[tiles.scored]
    torch.testing.assert_close(
        values.float()[tiles.scored] * scale, wanted.float()[tiles.scored], rtol=2**-6, atol=1e-12
    )
    entry, again, plain_again = tiles.entries(), torch.empty_like(wanted), torch.empty_like(wanted)
    for columns, head, slab in tiles.slabs():
        cuda_rows.tile_exps_backward(tiles.hidden, head, slab, plain, entry, again[:, columns])
        z = tiles.hidden.float() @ head.float().T
        torch_rows.exps_backward(slab._replace(logits=z), plain, entry, plain_again[:, columns])
    torch.testing.assert_close(again, plain_again, rtol=2**-7, atol=1e-12)


def test_refused_arguments():
    """Rows of exponentials that are not a multiple of 8 bytes apart, and another dtype of them."""
    tiles = Tiles(5, (6,), 8)
    ((_, head, slab),) = tiles.slabs()
    state, pivot = tiles.state(), tiles.row(-torch.inf)
    for values in (torch.empty(5, 6).bfloat16(), torch.empty(5, 9).bfloat16()[:, 1:7]):
        for run in (
            lambda values=values: cuda_rows.tile_exps_forward(
                tiles.hidden, head, slab, state, Exps(values, pivot, 0, None)
            ),
            lambda values=values: cuda_rows.tile_exps_backward(tiles.hidden, head, slab, pivot, pivot, values),
        ):
            with pytest.raises(ValueError, match="values must be bfloat16, with rows a multiple of 8 bytes apart"):
                run()
    half = Tiles(5, (6,), 8, torch.float16)
    with pytest.raises(ValueError, match="exps_tiles_backward: values must be bfloat16"):
        cuda_rows.tile_exps_backward(half.hidden, half.weight, slab, pivot, pivot, torch.empty(5, 8).half()[:, :6])


def same_bits(first, second):
    """Whether two lists of results have the same bits, NaN included."""
    pairs = list(zip(first, second, strict=True))
    return all(
        (one is None and two is None) or torch.equal(one.nan_to_num(POISON), two.nan_to_num(POISON))
        for one, two in pairs
    )


def every_tile_kernel():
    torch.manual_seed(0)
    tiles = Tiles(130, (256, 260), 72, bias=True, entropy=True, spread=60.0)
    (results, moves), scores = compare_exps(tiles), compare_scores(tiles)
    assert moves.any()
    return [*results, *scores, *compare_again(tiles)]


def test_bits_do_not_depend_on_the_order_of_threads(monkeypatch):
    first = every_tile_kernel()
    for order in ("forward", "reverse", "random:3"):
        monkeypatch.setenv("CUDA_EMULATOR_ORDER", order)
        assert same_bits(first, every_tile_kernel()), order
