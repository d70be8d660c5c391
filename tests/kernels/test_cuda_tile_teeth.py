"""The tests of the kernels that multiply themselves can fail: planted faults are caught.

All faults are planted in one copy of the sources, where a number chooses the one that is made. Faults in clusters of
several blocks, and in the descriptors, swizzles and fences of hopper.h, are not seen here: only a GPU has them.
"""

import ctypes
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import cuda_tools
import pytest
import torch
from test_cuda_tiles import every_tile_kernel
from tile_cases import Tiles, compare_again, compare_begun, compare_exps, compare_large, compare_scores

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

HANGS = "a thread waits for a barrier for ever"


def scores():
    compare_scores(Tiles(70, (300,), 72, bias=True, entropy=True))


def exps():
    """Rows of a tile beyond the last, which a fault may write, are inside the matrix around the exponentials."""
    compare_exps(Tiles(125, (64, 516), 8, bias=True, spread=60.0))


def again():
    compare_again(Tiles(70, (64, 300), 8, lies=torch.nan))


def begins():
    compare_begun(Tiles(9, (64, 300), 72, bias=True))


def deep():
    """More steps than there are stages."""
    compare_scores(Tiles(5, (4,), 328))


def several():
    """More tiles than there are blocks."""
    compare_scores(Tiles(5, (1030,), 200))


def many():
    """Tiles for each of the eight runs that join them."""
    compare_scores(Tiles(5, (3900,), 8))


def broken():
    compare_exps(Tiles(9, (64, 68), 8, lies=torch.inf))


class Fault(NamedTuple):
    file: str
    right: str  # what is between « and » is an expression or statements, the rest is around it
    wrong: str
    seen_by: object
    said: str | None = None  # by the emulator


FAULTS = {
    "stages left before their products ran": Fault("tiles.h", "«wait_products<1>();»\n", "", deep),
    "a stage left while it is read": Fault(
        "tiles.h", "wait_products<1>();\n          leave(«before»);", "place.stage", deep
    ),
    "copies wait for the wrong phase": Fault("tiles.h", "wait(«place.parity ^ 1»)", "place.parity", scores, HANGS),
    "products wait for the wrong phase": Fault("tiles.h", "wait(«place.parity»);", "place.parity ^ 1", scores),
    "bytes that never come": Fault(
        "tiles.h", "expect(«(kTileRows + kTileColumns) * kTileInner * 2»)", "64", scores, HANGS
    ),
    "the last stage is never left": Fault("tiles.h", "fence_sums(acc);\n      «leave(before);»", "", several, HANGS),
    "sums go on from tile to tile": Fault("tiles.h", "«k > 0 || i > 0»", "true", several),
    "both warpgroups take the same rows": Fault(
        "tiles.h", "describe(ring.hidden[place.stage] + «warpgroup * 64» * kTileInner)", "0", scores
    ),
    "half a step along the head's rows": Fault("tiles.h", "along(b, «32 * i»)", "16 * i", scores),
    "columns after the last": Fault("tile_logits.h", "if («columns.cut()») {\n    change_tile", "false", scores),
    "references are rounded": Fault(
        "tile_logits.h",
        "«low = -fmaf(reference, kLog2E, high);»",
        "low = 0.0f;",
        compare_large,
    ),
    "another thread's target": Fault("tile_logits.h", "«int(column) % 8 / 2 == int(threadIdx.x) % 4»", "true", scores),
    "the last run of tiles is left out": Fault("tile_logits.h", "other < «kJoinRuns»; ++other", "kJoinRuns - 1", many),
    "entropy of another maximum": Fault("score_tiles.cu", "e * (acc[k] - «most[h]»)", "most[0]", scores),
    "columns after the last are written": Fault(
        "exps_tiles.cu", "if («columns.cut()») {\n    if (!inside)", "false", exps
    ),
    "rows after the last are written": Fault("exps_tiles.cu", "if («!inside») return;", "false", exps),
    "halves are not exchanged": Fault("exps_tiles.cu", "odd ? here : next, «1»)", "0", exps),
    "pivots of another row": Fault(
        "exps_tiles.cu", "in.hidden + «row» * in.hidden_stride", "(row > 0 ? row - 1 : 0)", exps
    ),
    "the target's exponential stays": Fault(
        "exps_tiles.cu", "«if (column >= 0) set_at(acc, h, column, 0.0f);»", "", exps
    ),
    "ignored rows stay": Fault("exps_tiles.cu", "if («looked.targets[h] < 0») {  //", "false", exps),
    "ignored rows are rescaled": Fault("exps_tiles.cu", "moves && «targets[row] >= 0»", "true", broken),
    "offsets of the first tile": Fault("exps_tiles.cu", "offsets[«c / kTileColumns * rows» + first + r]", "0", exps),
    "earlier columns keep their pivot": Fault("exps_tiles.cu", "int64_t(threadIdx.x) - «out.earlier»", "0", exps),
    "tiles above the pivot's room": Fault("exps_tiles.cu", "|| «most > pivot + float(kPivotRoom)»", "false", exps),
    "sums that overflow": Fault("exps_tiles.cu", "lane_exp(«apart < 80.0f ? apart : 80.0f»)", "apart", exps),
    "fresh rows keep their statistics": Fault("tile_logits.h", "return «fresh» ? OnlineSoftmax", "false", begins),
    "fresh rows keep their target": Fault("score_tiles.cu", "if («fresh && elsewhere» && column_tile", "false", begins),
    "fresh rows keep their pivot": Fault(
        "exps_tiles.cu", "«if (fresh && threadIdx.x == 0) pivots[row] = targets[row] = lowest;»", "", begins
    ),
    "the entry of another row": Fault("exps_tiles.cu", "column, «looked.entries[h]»)", "looked.entries[0]", again),
    "ignored rows come again": Fault(
        "exps_tiles.cu", "y = «looked.targets[h] < 0 ? 0.0f : exps(y)»;", "exps(y)", again
    ),
}


def planted(text, faults):
    """Return a source in which each of its faults is made if `planted_fault` is its number."""
    places = []
    for number, fault in faults.items():
        before, right, after = re.split("[«»]", fault.right)
        assert text.count(before + right + after) == 1, fault
        places.append((text.index(before + right + after) + len(before), right, fault.wrong, number))
    for place, right, wrong, number in sorted(places, reverse=True):
        if right.endswith(";"):
            both = f"{{ if (planted_fault == {number}) {{ {wrong} }} else {{ {right} }} }}"
        else:
            both = f"(planted_fault == {number} ? ({wrong}) : ({right}))"
        text = text[:place] + both + text[place + len(right) :]
    return text


def build_planted(folder: Path, objects: Path) -> None:
    """Build the emulated module with all faults, and the other objects from the real module."""
    cuda = cuda_tools.copy_sources(folder) / "cuda"
    for name in {fault.file for fault in FAULTS.values()}:
        numbered = {number: fault for number, fault in enumerate(FAULTS.values(), start=1) if fault.file == name}
        (cuda / name).write_text(planted((cuda / name).read_text(), numbered))
    header = cuda / "tiles.h"
    variable = 'extern "C" {\n__attribute__((visibility("default"), weak)) int planted_fault = 0;\n}\n'
    header.write_text(header.read_text().replace("#pragma once\n", "#pragma once\n" + variable))
    changed = []
    for name in ("score_tiles", "exps_tiles"):
        changed.append(str(folder / f"{name}.o"))
        flags = [*cuda_tools.EMULATOR_FLAGS, *cuda_tools.WATCHED]
        cuda_tools.run(["g++", *flags, "-x", "c++", "-c", str(cuda / f"{name}.cu"), "-o", changed[-1]])
    others = [str(path) for path in objects.glob("*.o") if path.stem not in ("score_tiles", "exps_tiles")]
    cuda_tools.run(["g++", "-shared", *changed, *others, "-o", str(folder / "_cuda.so")])


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> Path:
    pytest.importorskip("pybind11")
    return cuda_tools.once(cuda_tools.shared_folder(tmp_path_factory), "emulated", cuda_tools.build_emulated)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory, objects) -> Path:
    shared = cuda_tools.shared_folder(tmp_path_factory)
    return cuda_tools.once(shared, "planted", lambda folder: build_planted(folder, objects))


@pytest.fixture
def plant(monkeypatch, faulty):
    """Return a function that makes one of the faults, or none."""
    cuda_tools.install(monkeypatch, cuda_tools.load_emulated(faulty), tiles=True)
    number = ctypes.c_int.in_dll(ctypes.CDLL(str(faulty / "_cuda.so")), "planted_fault")
    yield lambda fault: setattr(number, "value", 0 if fault is None else 1 + list(FAULTS).index(fault))
    number.value = 0


def exercise(monkeypatch, check):
    for order in ("forward", "reverse"):
        monkeypatch.setenv("CUDA_EMULATOR_ORDER", order)
        torch.manual_seed(0)
        check()


def test_without_a_fault(plant, monkeypatch):
    plant(None)
    for check in {fault.seen_by for fault in FAULTS.values()}:
        exercise(monkeypatch, check)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault(fault, plant, monkeypatch):
    plant(fault)
    kinds = (AssertionError, RuntimeError) if FAULTS[fault].said is None else RuntimeError
    with pytest.raises(kinds, match=FAULTS[fault].said):
        exercise(monkeypatch, FAULTS[fault].seen_by)


@pytest.mark.parametrize("barrier", cuda_tools.barriers(of_tiles=True))
def test_every_barrier_is_missed(barrier, objects, monkeypatch):
    """Those of tiles.h publish the barriers of copies: without them the last threads wait for what is not there."""
    cuda_tools.install(monkeypatch, cuda_tools.load_emulated(objects), tiles=True)
    monkeypatch.setenv("CUDA_EMULATOR_SKIP", barrier)
    monkeypatch.setenv("CUDA_EMULATOR_ORDER", "reverse")
    with pytest.raises(
        RuntimeError, match=r"without a barrier between|no thread of its block wrote|an arrival too many"
    ):
        every_tile_kernel()
