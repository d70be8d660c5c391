"""Vocabulary-parallel heads: values, gradients, bits and errors, in CPU processes."""

import pytest
from distributed_tools import launch
from sharding_jobs import assert_passed

CHECKS = {
    "sharding_session:adapters": 1,
    "sharding_jobs:vocab_parallel:some": 70,
    "sharding_faults:faults": 20,
    "sharding_faults:teeth": 4,
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> list[dict]:
    """Start two ranks once for all jobs and return what they report."""
    return launch("several", tmp_path_factory.mktemp("pair"), *CHECKS, module="sharding_session")


@pytest.mark.parametrize("job", CHECKS)
def test_two_ranks(pair, job):
    assert_passed([rank[job] for rank in pair], CHECKS[job])


@pytest.mark.parametrize("processes", [2, 3, 4])
@pytest.mark.slow
def test_every_gear_and_dtype(tmp_path, processes):
    assert_passed(launch("vocab_parallel", tmp_path, "all", processes=processes, module="sharding_jobs"), 300)


@pytest.mark.slow
def test_four_ranks(tmp_path):
    assert_passed(launch("vocab_parallel", tmp_path, "some", processes=4, module="sharding_jobs"), 30)


def test_a_rank_that_dies(tmp_path):
    assert_passed(launch("death", tmp_path, module="sharding_faults"), 1)
