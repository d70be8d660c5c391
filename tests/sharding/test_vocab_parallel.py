"""Heads whose vocabulary is cut over ranks: values, gradients and bits, and what goes wrong, in CPU processes."""

import pytest
from distributed_tools import launch
from sharding_jobs import assert_passed


def test_two_ranks(tmp_path):
    assert_passed(launch("vocab_parallel", tmp_path, "some", module="sharding_jobs"), 70)


@pytest.mark.parametrize("processes", [2, 3, 4])
@pytest.mark.slow
def test_every_gear_and_dtype(tmp_path, processes):
    assert_passed(launch("vocab_parallel", tmp_path, "all", processes=processes, module="sharding_jobs"), 300)


def test_four_ranks(tmp_path):
    assert_passed(launch("vocab_parallel", tmp_path, "some", processes=4, module="sharding_jobs"), 30)


def test_faults(tmp_path):
    assert_passed(launch("faults", tmp_path, module="sharding_faults"), 20)


def test_a_rank_that_dies(tmp_path):
    assert_passed(launch("death", tmp_path, module="sharding_faults"), 1)


def test_planted_faults_are_caught(tmp_path):
    assert_passed(launch("teeth", tmp_path, module="sharding_faults"), 4)
