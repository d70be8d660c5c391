"""group_logps on models wrapped in DDP and FSDP, in two processes with groups of different lengths."""

from __future__ import annotations

import pytest
import torch
from distributed_tools import launch

pytest.importorskip("transformers")

from distributed_jobs import GROUPED, grouped_steps

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # peft asks transformers this
    pytest.mark.filterwarnings("ignore:.*[tT]ied:UserWarning"),  # peft warns of saving, not of training
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    return launch("grouped", tmp_path_factory.mktemp("grouped"))


@pytest.mark.parametrize("kind", GROUPED)
def test_two_processes_that_share_prompts_train_as_one_that_does_not(ranks, kind):
    theirs = grouped_steps(kind, None, [0, 1], "never")
    near = {"rtol": GROUPED[kind], "atol": GROUPED[kind]}
    for number, rank in enumerate(ranks):
        found = rank[kind]
        torch.testing.assert_close(torch.tensor(found["logps"][0]), torch.tensor(theirs["logps"][number]), **near)
        for name, value in theirs["weights"].items():
            torch.testing.assert_close(torch.tensor(found["weights"][name]), torch.tensor(value), **near, msg=name)
