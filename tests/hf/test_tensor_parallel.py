"""A model under tensor parallelism gives the results of one process; its head becomes vocab_parallel automatically."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

from distributed_tools import launch
from tensor_parallel_jobs import KINDS, make_model, sequences, steps

from windkern import hf


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensor-parallel")
    for kind in KINDS:
        make_model(kind).save_pretrained(folder / kind)
    return launch("tensor_parallel", folder, module="tensor_parallel_jobs")


@pytest.mark.parametrize("name", [*KINDS, "accelerate"])
def test_values_and_gradients_are_those_of_one_process(ranks, name):
    model = make_model("tied" if name == "tied" else "untied")
    with torch.no_grad():
        apart = hf.sequence_logps(model, *sequences())
    alone = steps(model)
    for rank in ranks:
        found = rank[name]
        torch.testing.assert_close(torch.tensor(found["apart"]), apart, rtol=1e-5, atol=1e-5)
        for key in ("logps", "groups"):
            torch.testing.assert_close(torch.tensor(found[key]), torch.tensor(alone[key]), rtol=1e-4, atol=1e-4)
        assert found["grads"].keys() == alone["grads"].keys()
        for key, value in alone["grads"].items():
            gap = torch.tensor(found["grads"][key]) - torch.tensor(value)
            share = float(gap.norm() / torch.tensor(value).norm())
            assert share < 1e-4, f"{key} is off by {share:.2g} of its size"  # float32, two steps, sums in another order
    assert ranks[0][name]["logps"] == ranks[1][name]["logps"], "replicated layers would drift apart"


def test_the_plan_of_transformers_cuts_the_head(ranks):
    assert all(rank["untied"]["placements"] == "(Shard(dim=0),)" for rank in ranks)
