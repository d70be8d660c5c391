"""The hook for lm_eval: its arguments for models and adapters, and which results are kept."""

from __future__ import annotations

import doctest
import importlib.machinery
import json
import sys
from types import ModuleType

import pytest

pytest.importorskip("transformers")

import tiny_model
from trainer_cases import lora

from windkern.train.evaluation import harness
from windkern.train.models import MissingPackageError


@pytest.fixture
def asked(monkeypatch):
    """Replace lm_eval with the functions that the hook calls."""
    calls = []
    module = ModuleType("lm_eval")
    module.__spec__ = importlib.machinery.ModuleSpec("lm_eval", None)

    def simple_evaluate(**given):
        calls.append(given)
        (task,) = given["tasks"]
        return {"results": {task: {"alias": task, "acc,none": 0.25, "acc_stderr,none": 0.01}}}

    module.simple_evaluate = simple_evaluate
    monkeypatch.setitem(sys.modules, "lm_eval", module)
    return calls


def test_the_examples_run():
    assert not doctest.testmod(harness).failed


def test_the_tasks_of_the_paper_are_asked_with_their_shots(asked, tmp_path, capsys):
    folder = tiny_model.save(tmp_path)
    harness.main([str(folder), "--limit", "3", "--batch-size", "2"])
    assert [(call["tasks"], call["num_fewshot"]) for call in asked] == [
        (["gsm8k"], 5),
        (["hellaswag"], 10),
        (["mmlu"], 5),
    ]
    assert asked[0]["model_args"] == f"pretrained={folder},dtype=auto"
    assert asked[0]["limit"] == 3 and asked[0]["batch_size"] == 2
    results = json.loads((folder / "lm_eval.json").read_text())
    assert results == json.loads(capsys.readouterr().out)
    assert results["mmlu"] == {"acc,none": 0.25, "acc_stderr,none": 0.01}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers for it
def test_an_adapter_is_put_on_its_base(asked, tmp_path):
    peft = pytest.importorskip("peft")
    base = tiny_model.save(tmp_path / "base")
    model = tiny_model.make_model()
    model.config._name_or_path = model.name_or_path = str(base)
    peft.get_peft_model(model, lora()).save_pretrained(tmp_path / "adapter")
    harness.benchmark(str(tmp_path / "adapter"), ["arc_easy"])
    assert asked[0]["model_args"] == f"pretrained={base},peft={tmp_path / 'adapter'},dtype=auto"
    assert asked[0]["num_fewshot"] is None


def test_mistakes_are_named(monkeypatch):
    with pytest.raises(ValueError, match="tasks must name at least one"):
        harness.benchmark("model", [])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises((MissingPackageError, ValueError), match="lm_eval"):
        harness.benchmark("model", ["gsm8k"])
