"""Heads sharded by FSDP2 and streamed through the walk, in CPU processes."""

import pytest
from distributed_tools import launch
from sharding_jobs import assert_passed

CHECKS = {"streamed_jobs:streamed:some": 40, "streamed_jobs:teeth": 4}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> list[dict]:
    """Start two ranks once for all jobs and return what they report."""
    return launch("several", tmp_path_factory.mktemp("pair"), *CHECKS, module="sharding_session")


@pytest.mark.parametrize("job", CHECKS)
def test_two_ranks(pair, job):
    assert_passed([rank[job] for rank in pair], CHECKS[job])


@pytest.mark.parametrize("processes", [2, 3, 4])
@pytest.mark.slow
def test_every_gear_and_dtype_and_order_of_arrival(tmp_path, processes):
    assert_passed(launch("streamed", tmp_path, "all", processes=processes, module="streamed_jobs"), 200)


@pytest.mark.slow
def test_four_ranks(tmp_path):
    assert_passed(launch("streamed", tmp_path, "some", processes=4, module="streamed_jobs"), 40)
