"""The evaluator: the reference's answers are read once for each state of their files."""

from __future__ import annotations

import json
import os

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from trainer_cases import HELDOUT, make_trainer

from windkern._files import DamagedRecordError
from windkern.train.store import GroupStore


def test_the_answers_of_the_reference_are_parsed_again_only_when_their_files_change(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, heldout=HELDOUT, num_iterations=1, sampling_batch_size=2, reference_responses=2)
    evaluator = trainer.evaluator
    evaluator.folder = tmp_path / "held-out"
    reads, read = [], GroupStore.read
    monkeypatch.setattr(GroupStore, "read", lambda *given: reads.append(1) or read(*given))
    first = evaluator.answer_once(0)
    blocks = sorted(evaluator.folder.glob("block-*.json"))
    assert len(blocks) == 2
    reads.clear()
    assert evaluator.answer_once(1) == first and not reads
    content = json.loads(blocks[0].read_text())
    content["groups"][0]["texts"][0] = "another text"
    blocks[0].write_text(json.dumps(content))
    assert evaluator.answer_once(2)[0].texts[0] == "another text" and len(reads) == 2
    kept = blocks[1].stat()
    blocks[1].write_text("{")
    os.utime(blocks[1], ns=(kept.st_atime_ns, kept.st_mtime_ns))  # like a copy that preserves times
    with pytest.raises(DamagedRecordError):
        evaluator.answer_once(3)
