"""benchmarks/bandwidth.py without a GPU: its calls run on a CPU, and its arithmetic on given times."""

import json
import sys
from pathlib import Path

import pytest
import torch

import windkern as wk

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import bandwidth, record
from windkern.kernels.contract import WIDEST_ROW


class FakeTimer:
    """Runs every call once and returns given times."""

    def __init__(self, *times):
        self.times = times

    def seconds(self, call, prepare, samples):
        prepare()
        call()
        return list(self.times)

    def peak_bytes(self, call):
        call()
        return 1 << 20


@pytest.fixture
def saved():
    return []


@pytest.fixture
def data(capsys, saved):
    return bandwidth.measure(
        FakeTimer(3e-6, 1e-6, 2e-6),
        "cpu",
        3,
        shapes=((8, 64), (5, 33)),
        pair_sizes=(16, 32),
        copy_bytes=1000,
        largest_matrix=16,
        save=lambda data: saved.append(len(data["rows"])),
    )


def test_every_kernel_of_every_back_end_is_measured(data):
    backends = wk.backends.available("cpu")
    rows = [row for row in data["rows"] if row["kernel"] != "pair_loss"]
    assert len(rows) == 2 * 3 * 7 * len(backends)
    assert {row["backend"] for row in rows} == set(backends)
    pairs = [(row["n"], row["backend"]) for row in data["rows"] if row["kernel"] == "pair_loss"]
    assert pairs == [*((16, name) for name in backends), (16, "n x n"), *((32, name) for name in backends)]


def test_no_shape_is_wider_than_a_slab():
    assert all(width <= WIDEST_ROW for _, width in bandwidth.SHAPES)


def test_rates_follow_from_bytes_and_the_median(data):
    assert data["copy_bytes_per_s"] == 2 * 1000 / 2e-6
    wanted = {
        "forward scoring": 4,
        "forward kept": 6,
        "forward unit": 6,
        "backward kept": 4,
        "backward recomputed": 6,
    }
    for row in data["rows"]:
        assert row["median_s"] == 2e-6
        if row["kernel"] in wanted and row["dtype"] == "bf16":
            assert row["bytes"] == wanted[row["kernel"]] * row["rows"] * row["width"]
            assert row["bytes_per_s"] == row["bytes"] / 2e-6
            assert row["share_of_copy"] == row["bytes_per_s"] / data["copy_bytes_per_s"]


def test_a_run_that_is_stopped_leaves_what_it_has(data, saved):
    assert saved == sorted(set(saved)) and len(saved) == 4
    assert saved[-1] == len(data["rows"])


def test_the_results_can_be_written_and_read(data, tmp_path):
    record.write_atomically(tmp_path / "bandwidth.json", data)
    assert record.read(tmp_path / "bandwidth.json")["kind"] == "bandwidth"
    assert json.loads((tmp_path / "bandwidth.json").read_text()) == data


def test_kernels_compute_the_right_thing_on_what_they_are_given():
    """A benchmark of kernels with wrong inputs would measure nothing."""
    slab = bandwidth.Matrices(wk.backends.BACKENDS["torch"].kernels(), 6, 50, torch.float32, "cpu")
    p = slab.logits.softmax(1)
    dz = torch.nn.functional.one_hot(slab.targets, 50) - p
    for kernel, result in (("backward kept", "low"), ("backward recomputed", "z")):
        slab.fresh()
        slab.calls()[kernel][0]()
        torch.testing.assert_close(getattr(slab, result), dz)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys, tmp_path):
    assert bandwidth.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().out == "no GPU\n"
    assert list(tmp_path.iterdir()) == []
