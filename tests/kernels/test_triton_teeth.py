"""Planted faults in the Triton kernels: the comparisons that the real ones pass must detect them."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("a GPU runs the kernels themselves: tests/kernels/test_gpu.py", allow_module_level=True)

import test_triton
from test_triton import compare_pairs, compare_tiles
from triton_cases import TRANSFORMS, compare_rows, compare_wide_rows

from windkern.kernels.contract import CONTRACT
from windkern.kernels.triton import backward as triton_backward
from windkern.kernels.triton import exps as triton_exps
from windkern.kernels.triton import finish as triton_finish
from windkern.kernels.triton import hidden as triton_hidden
from windkern.kernels.triton import maths as triton_maths
from windkern.kernels.triton import pairs as triton_pairs
from windkern.kernels.triton import rows as triton_rows
from windkern.kernels.triton import tile as triton_tile

pytestmark = test_triton.pytestmark
small_tiles = test_triton.small_tiles
narrow_blocks = test_triton.narrow_blocks

ROWS, BACKWARD, EXPS, FINISH = (
    Path(module.__file__) for module in (triton_rows, triton_backward, triton_exps, triton_finish)
)
HIDDEN, MATHS, TILE, PAIRS = (
    Path(module.__file__) for module in (triton_hidden, triton_maths, triton_tile, triton_pairs)
)


def broken(path, old, new, folder, monkeypatch):
    """Return the module at `path` with one piece of its text replaced."""
    text = path.read_text()
    assert old in text, f"{path.name} no longer contains {old!r}"
    copy = folder / f"broken_{path.name}"
    copy.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location(copy.stem, copy)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, copy.stem, module)
    spec.loader.exec_module(module)
    return module


def fails(fault, *, capped):
    with pytest.raises(AssertionError):
        if capped:
            compare_rows(fault, torch.float32, TRANSFORMS["softcap"], True, True)
        else:
            compare_rows(fault, torch.float32, TRANSFORMS["identity"], False, True)


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        (BACKWARD, "- start).to(tl.int32)", "- start + 1).to(tl.int32)"),
        (BACKWARD, "c_logp * one_minus_p(target_logp)", "c_logp * 0.0"),
        (ROWS, "tl.store(kept_ptr + row * kept_stride", "tl.store(kept_ptr + row"),
        (BACKWARD, "d * relative_slope(y, cap_out)", "d * 1.0"),
        (EXPS, "- start).to(tl.int32)", "- start + 1).to(tl.int32)"),
        (EXPS, "(columns == column) | ignored", "columns == column"),
        (EXPS, "earlier, earlier, factor", "earlier, earlier, 0.0 * factor + 1.0"),
        (EXPS, "pivot + _ROOM", "pivot"),
        (EXPS, "values_row - earlier", "values_row"),
        (EXPS, "factor == 1.0, 0, columns_before", "factor == 1.0, 0, columns_before - 1"),
        (EXPS, "d * tl.load(weights_ptr + row", "d * 1.0 * tl.load(weights_ptr + 0 * row"),
        (FINISH, "values.to(entry.dtype) * factor", "values.to(entry.dtype)"),
        (FINISH, "place == target, entry,", "place == target + 1, entry,"),
        (FINISH, "mask=alone", "mask=alone & (row > 0)"),
        (FINISH, "pivot + _ROOM", "pivot"),
        (FINISH, "run_sum * careful_exp(run_max - new)", "run_sum * careful_exp(run_max - pivot)"),
        (FINISH, "tl.where(target < 0, 0.0, logp)", "logp"),
        (FINISH, "tl.where(target < 0, 0.0, run_max + log_sum)", "run_max"),
        (HIDDEN, "tl.where(ignored, 0.0, factor)", "factor"),
        (HIDDEN, "mask=inside & (ignored == 0)", "mask=inside"),
        (HIDDEN, "-slope * (", "slope * ("),
        (HIDDEN, "tl.where(scored, values, 0.0)", "values"),
        (HIDDEN, "values = values * tl.load(factor_ptr + row)", "values = values * 1.0"),
        (HIDDEN, "target * head_stride", "row * head_stride"),
        (HIDDEN, "found.to(ROUNDED)", "found"),
        (HIDDEN, "values, mask=scored)", "values, mask=inside)"),
        (HIDDEN, "tl.load(rows_ptr + row) * out_stride", "row * out_stride"),
    ],
    ids=[
        "target backward",
        "zero gradient",
        "rows on top of each other",
        "slope forgotten",
        "target once more",
        "ignored rows",
        "a pivot that moves alone",
        "a pivot that follows every maximum",
        "the wrong columns rescaled",
        "the last column left behind",
        "one weight for all rows",
        "kept values that a pivot leaves behind",
        "an entry beside the target",
        "an entry left out",
        "a pivot that follows every maximum at the end",
        "a sum relative to the old pivot",
        "a log-prob in an ignored row",
        "a maximum for a log-sum-exp",
        "a factor of an ignored row",
        "hidden states of an ignored row",
        "the sign of the factors",
        "dhidden of an ignored row",
        "a factor forgotten",
        "another row of the head",
        "a row of the head that is not rounded",
        "spare rows on top of a scored one",
        "rows that stay compacted",
    ],
)
def test_a_fault_in_the_row_kernels_is_seen(path, old, new, tmp_path, monkeypatch):
    module = broken(path, old, new, tmp_path, monkeypatch)
    fault = SimpleNamespace(**{name: getattr(module, name, getattr(triton_rows, name)) for name in CONTRACT})
    fails(fault, capped=path not in (EXPS, FINISH, HIDDEN))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('y = tl.where(inside, y, float("-inf"))', "y = y * 1.0"),
        ("- start).to(tl.int32)", "- start + 1).to(tl.int32)"),
        ("row * z_stride", "row"),
    ],
    ids=["tail mask", "target forward", "rows on top of each other"],
)
@pytest.mark.parametrize("capped", [True, False])
def test_a_fault_in_the_look_at_a_row_is_seen(old, new, capped, tmp_path, monkeypatch):
    fault = broken(MATHS, old, new, tmp_path, monkeypatch)
    for module in (triton_rows, triton_exps):
        monkeypatch.setattr(module, "look_at_row", fault.look_at_row)
    fails(triton_rows, capped=capped)


def test_a_missing_rescale_is_seen(tmp_path, monkeypatch):
    fault = broken(MATHS, "run_sum * old_factor + part_sum", "run_sum + part_sum", tmp_path, monkeypatch)
    monkeypatch.setattr(triton_rows, "merge", fault.merge)
    with pytest.raises(AssertionError):
        compare_rows(triton_rows, torch.float32, TRANSFORMS["identity"], False, False)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('total, input_precision="ieee")', 'total, input_precision="ieee").to(tl.bfloat16).to(tl.float32)'),
        ('y = tl.where(in_columns[None, :], y, float("-inf"))', "y = y * 1.0"),
        ("tile * BV + tl.arange(0, BV)", "tile * BV + tl.arange(0, BV) + 1"),
    ],
    ids=["storage-dtype accumulation", "dropped tail mask", "columns off by one"],
)
def test_a_fault_in_the_tile_kernel_is_seen(small_tiles, old, new, tmp_path, monkeypatch):
    fault = broken(TILE, old, new, tmp_path, monkeypatch)
    monkeypatch.setattr(fault, "tile_config", triton_tile.tile_config)
    with pytest.raises(AssertionError):
        compare_tiles(fault.tile_forward, torch.bfloat16, 20, "plain")


@pytest.mark.parametrize(
    ("old", "new"), [("& (i[:, None] != j[None, :])", ""), ("other=0) != 0)", "other=0) < 2)"), ("4.0 * r", "2.0 * r")]
)
def test_a_fault_in_the_pair_kernels_is_seen(old, new, tmp_path, monkeypatch):
    fault = broken(PAIRS, old, new, tmp_path, monkeypatch)
    with pytest.raises(AssertionError):
        compare_pairs(fault)


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        (EXPS, "z_ptr + first", "z_ptr"),
        (EXPS, "values_ptr + first", "values_ptr"),
        (EXPS, "bias_ptr + first", "bias_ptr"),
        (EXPS, "start + first", "start"),
        (EXPS, "earlier + first", "earlier"),
        (EXPS, "moved * factor", "factor"),
        (ROWS, "z_ptr + first", "z_ptr"),
        (ROWS, "start + first", "start"),
    ],
)
def test_a_fault_in_a_row_wider_than_a_block_is_seen(narrow_blocks, path, old, new, tmp_path, monkeypatch):
    module = broken(path, old, new, tmp_path, monkeypatch)
    fault = SimpleNamespace(**{name: getattr(module, name, getattr(triton_rows, name)) for name in CONTRACT})
    with pytest.raises(AssertionError):
        compare_wide_rows(fault, torch.float32, True)
