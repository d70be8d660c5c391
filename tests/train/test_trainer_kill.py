"""A run that is killed and resumed ends with the same bits as one that was not."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import trainer_cases
from safetensors.torch import load_file

from windkern.train import responder

CHANGES = {
    "num_iterations": 3,
    "steps_per_iteration": 3,
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_responses": 2,
    "gradient_accumulation_steps": 1,
}
PLACES = (
    "sampling:1",
    "sampling:6",
    "judging:2",
    "writing a block:9",
    "scoring:2",
    "a step:2",
    "a step:6",
    "saving:2",
    "the manifest:1",
    "the manifest:3",
    "evaluating:2",
)


@pytest.fixture(scope="module")
def processes():
    """Provide processes forked from a server that has imported everything and run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainer_cases", "windkern.train.trainer", "windkern.train.judges.judge"])
    return context


def run(processes, folder: Path, *, resume: bool = False, hang_at: str | None = None, changes: dict = CHANGES):
    arguments = (str(folder), resume, hang_at, changes)
    process = processes.Process(target=trainer_cases.run_or_hang, args=arguments, daemon=True)  # ends with this one
    process.start()
    return process


def finish(process) -> None:
    process.join()
    assert process.exitcode == 0


def kill(process) -> None:
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def kill_where_it_hangs(process, folder: Path) -> None:
    while not (folder / "hanging").exists():
        assert process.is_alive()
        time.sleep(0.01)
    kill(process)


def result_of(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Return the final weights, and the records without times."""
    records = []
    for path in sorted(folder.glob("completions/iteration-*/record.json")):
        record = json.loads(path.read_text())
        del record["seconds"]
        records.append(record)
    return load_file(folder / "model.safetensors"), records


@pytest.fixture(scope="module")
def finished(processes, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    finish(run(processes, folder))
    return folder


def assert_same(first: Path, second: Path) -> None:
    (ours, records), (theirs, others) = result_of(first), result_of(second)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert records == others and len(records) == CHANGES["num_iterations"]


@pytest.mark.parametrize("place", PLACES)
def test_a_run_killed_at_a_place_ends_with_the_same_bits(processes, finished, tmp_path, place):
    kill_where_it_hangs(run(processes, tmp_path, hang_at=place), tmp_path)
    finish(run(processes, tmp_path, resume=True))
    assert_same(finished, tmp_path)


def files_of(folder: Path) -> set[str]:
    """List files, also of folders that are renamed or removed meanwhile."""
    return {os.path.join(place, name) for place, _, names in os.walk(folder) for name in names}


def test_a_run_killed_at_random_moments_ends_with_the_same_bits(processes, finished, tmp_path):
    """The run is killed again and again, each time after a few more files, however long that takes."""
    draws, seen, ends = random.Random(0), set(), []
    for _ in range(4):
        process = run(processes, tmp_path, resume=True)
        wanted = len(seen) + draws.randint(1, 15)
        while process.is_alive() and len(seen) < wanted:
            time.sleep(0.01)
            seen |= files_of(tmp_path)
        process.kill()
        process.join()
        ends.append(process.exitcode)
    assert -signal.SIGKILL in ends
    finish(run(processes, tmp_path, resume=True))
    assert_same(finished, tmp_path)


@pytest.mark.filterwarnings("ignore:no complete checkpoint")
def test_completions_that_were_sampled_and_judged_are_not_made_again(processes, tmp_path, monkeypatch):
    kill_where_it_hangs(run(processes, tmp_path, hang_at="sampling:3"), tmp_path)
    there = {path.name: path.read_bytes() for path in tmp_path.glob("completions/iteration-0001/block-*.json")}
    assert sorted(there) == ["block-0000.json", "block-0001.json"]
    asked = []
    original = responder.Responder.__call__
    monkeypatch.setattr(
        responder.Responder,
        "__call__",
        lambda self, places, iteration, block: (
            asked.append((iteration, block)) or original(self, places, iteration, block)
        ),
    )
    trainer_cases.make_trainer(tmp_path, heldout=trainer_cases.HELDOUT, eval_strategy="epoch", **CHANGES).train(
        resume_from_checkpoint=True
    )
    assert (1, 0) not in asked and (1, 1) not in asked and (1, 2) in asked
    assert all((tmp_path / "completions/iteration-0001" / name).read_bytes() == value for name, value in there.items())
