"""What can be tested of ZeRO-3 without DeepSpeed, with parameters that look like its own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import tiny_model
from trainer_cases import PROMPTS, make_config
from transformers.integrations import deepspeed

import windkern as wk
from windkern.settings.run import RunConfig
from windkern.train import launch
from windkern.train.jobs import check_scorable
from windkern.train.sharded import whole_models


class Stage3:
    """The part of DeepSpeed's settings in transformers that says stage 3."""

    def is_zero3(self) -> bool:
        return True


def as_zero3(parameter: torch.nn.Parameter, *, whole: bool) -> torch.nn.Parameter:
    parameter.ds_id, parameter.ds_shape = 0, parameter.shape
    if not whole:
        parameter.data = torch.empty(0)
    return parameter


@pytest.fixture
def zero3(tmp_path):
    """Set up ZeRO-3 as TrainingArguments does."""
    config = make_config(tmp_path)
    config.hf_deepspeed_config = Stage3()
    config.deepspeed_plugin = SimpleNamespace(dschf=None)
    deepspeed.set_hf_deepspeed_config(config.hf_deepspeed_config)
    yield config
    deepspeed.unset_hf_deepspeed_config()


def test_a_head_that_hooks_have_gathered_is_left_to_them():
    """DeepSpeed raises an error if it is freed in its own forward pass."""
    weight = as_zero3(torch.nn.Parameter(torch.ones(5, 2)), whole=True)
    with wk.sharding.gathered(weight) as found:
        assert found is weight
    weight = as_zero3(torch.nn.Parameter(torch.ones(5, 2)), whole=False)
    with pytest.raises(ImportError, match="partitioned by ZeRO-3; install deepspeed"), wk.sharding.gathered(weight):
        pass


def test_a_model_in_pieces_is_refused():
    model = tiny_model.make_model()
    check_scorable(model)
    as_zero3(model.model.norm.weight, whole=False)
    with pytest.raises(ValueError, match=r"partitioned its parameter model.norm.weight; load policy"):
        check_scorable(model)


def test_models_are_loaded_whole(zero3, monkeypatch):
    with pytest.raises(KeyError), whole_models(zero3):
        assert not deepspeed.is_deepspeed_zero3_enabled()
        raise KeyError
    assert deepspeed.is_deepspeed_zero3_enabled()
    seen = []

    def load(name, **options):
        seen.append((name, deepspeed.is_deepspeed_zero3_enabled()))
        return tiny_model.make_model(), tiny_model.make_tokenizer()

    def stop(*args, **given):
        assert deepspeed.is_deepspeed_zero3_enabled()
        raise KeyError

    for each in ("load_policy", "load_model"):
        monkeypatch.setattr(launch, each, load)
    monkeypatch.setattr(launch, "make_judge", lambda config: load(config.judge))
    monkeypatch.setattr(launch, "prompts_of", lambda source, split, limit: list(PROMPTS) if source else [])
    monkeypatch.setattr(launch, "WindTrainer", stop)
    zero3.judge = "judge"
    with pytest.raises(KeyError):
        launch.make_trainer(RunConfig(model="policy", ref_model="reference", train_dataset="any"), zero3, None)
    assert seen == [("judge", False), ("policy", False), ("reference", False)]
