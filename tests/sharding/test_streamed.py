"""Heads of FSDP2 that are streamed through the walk, in CPU processes."""

import pytest
from distributed_tools import launch
from sharding_jobs import assert_passed


def test_two_ranks(tmp_path):
    assert_passed(launch("streamed", tmp_path, "some", module="streamed_jobs"), 40)


@pytest.mark.parametrize("processes", [2, 3, 4])
@pytest.mark.slow
def test_every_gear_and_dtype_and_order_of_arrival(tmp_path, processes):
    assert_passed(launch("streamed", tmp_path, "all", processes=processes, module="streamed_jobs"), 200)


def test_four_ranks(tmp_path):
    assert_passed(launch("streamed", tmp_path, "some", processes=4, module="streamed_jobs"), 40)


def test_planted_faults_are_caught(tmp_path):
    assert_passed(launch("teeth", tmp_path, module="streamed_jobs"), 4)
