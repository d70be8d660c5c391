"""Training a value model on demonstrations, its effect on a base it never saw, and the written files."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("rich")

import tiny_model  # noqa: E402
from value_cases import batch, brute_force, llama, pair  # noqa: E402

from windkern.train.data import loading as data  # noqa: E402
from windkern.value import run as value_module  # noqa: E402
from windkern.value.model import ValueModel  # noqa: E402
from windkern.value.run import check_same_tokens, nll_per_token, run_value  # noqa: E402
from windkern.value.trainer import DemonstrationCollator, ValueConfig, ValueTrainer  # noqa: E402

DEMONSTRATIONS = [(f"{a} {b}", f"{b} {a} so {b}") for a in tiny_model.WORDS[:6] for b in tiny_model.WORDS[6:9]]


def settings(folder, **options) -> ValueConfig:
    common = {
        "output_dir": str(folder),
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "per_device_train_batch_size": 6,
        "max_steps": 50,
        "learning_rate": 1e-2,
        "logging_steps": 10,
        "save_strategy": "no",
        "lr_scheduler_type": "constant",
        "max_completion_length": 8,
    }
    return ValueConfig(**(common | options))


def trainer_of(folder, model: ValueModel | None = None, **options) -> ValueTrainer:
    return ValueTrainer(
        model or pair(),
        settings(folder, **options),
        train_dataset=DEMONSTRATIONS,
        eval_dataset=DEMONSTRATIONS,
        processing_class=tiny_model.make_tokenizer(),
    )


def nll(model: nn.Module, score=None) -> float:
    model.eval()
    collate = DemonstrationCollator(tiny_model.make_tokenizer(), 8)
    return nll_per_token(score or model, DEMONSTRATIONS, collate, batch_size=5)[0]


def test_a_batch_of_demonstrations():
    tokenizer = tiny_model.make_tokenizer()
    made = DemonstrationCollator(tokenizer, 3)([("rain", "so good"), ("the bus", "a very bad day")])
    assert made["attention_mask"][0, 0] == 0  # padded on the left
    answers = [ids[mask].tolist() for ids, mask in zip(made["input_ids"], made["completion_mask"], strict=True)]
    assert tokenizer.batch_decode(answers) == ["so good <eos>", "a very bad"]  # a cut answer has no end token
    assert torch.equal(made["labels"] != -100, made["completion_mask"])


def test_training_lowers_the_loss_on_the_base_and_on_one_never_seen(tmp_path):
    model, other = pair(), llama(7, hidden=32)
    frozen = {name: each.clone() for name, each in model.base.named_parameters()}
    before, alone = nll(model), nll(model, model.base_logps)
    trainer = trainer_of(tmp_path, model)
    trainer.train()
    assert all(torch.equal(each, frozen[name]) for name, each in model.base.named_parameters())
    assert nll(model) < 0.5 * min(before, alone)
    assert trainer.state.log_history[0]["loss"] > trainer.state.log_history[4]["loss"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(nll(model), rel=0.05)
    moved = ValueModel(other, model.value)
    assert nll(moved) < 0.7 * nll(moved, moved.base_logps)


def test_accumulation_equals_the_big_batch(tmp_path):
    """Answers differ in length, so a mean of means would differ."""
    ends, longer = [], [("rain", "good"), ("the", "a very very bad day so good"), ("so", "bad bus"), ("a", "day")] * 2
    for size, steps in ((8, 1), (2, 4), (4, 2)):
        model = pair()
        trainer = ValueTrainer(
            model,
            settings(
                tmp_path,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=steps,
                max_steps=3,
                optim="sgd",
                learning_rate=0.5,
                logging_steps=1,
                max_grad_norm=0,
            ),
            train_dataset=longer,
            processing_class=tiny_model.make_tokenizer(),
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        ends.append((losses, [each.detach() for each in model.value.parameters()]))
    for losses, weights in ends[1:]:
        assert losses == pytest.approx(ends[0][0], rel=1e-5)
        for ours, theirs in zip(weights, ends[0][1], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    whole = trainer_of(tmp_path / "whole", max_steps=6)
    whole.train()
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    trainer_of(tmp_path / "cut", **options).train()
    saved = tmp_path / "cut" / "checkpoint-3"
    written = sum(file.stat().st_size for file in saved.glob("model*.safetensors"))
    size = sum(each.numel() * 4 for each in whole.model.value.parameters())
    assert size <= written < size + 4096  # the base is not in it
    resumed = trainer_of(tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=str(saved))
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_saved_and_put_on_another_base(tmp_path):
    base = tmp_path / "base"
    llama(1, hidden=24).save_pretrained(base)
    tiny_model.make_tokenizer().save_pretrained(base)
    model = ValueModel(transformers.AutoModelForCausalLM.from_pretrained(base), llama(2))
    model.save_pretrained(tmp_path / "value")
    assert json.loads((tmp_path / "value" / "windkern_value.json").read_text()) == {"base": str(base), "vocab_size": 18}
    again = ValueModel.from_pretrained(tmp_path / "value", memory_budget=1 << 20)
    assert torch.equal(again(*batch()), model(*batch())) and not again.training and again.memory_budget == 1 << 20
    other = llama(7, hidden=32).double()
    moved = ValueModel.from_pretrained(tmp_path / "value", other)
    wanted = brute_force(ValueModel(other, llama(2).double()), *batch())
    torch.testing.assert_close(moved(*batch()), wanted, rtol=1e-10, atol=1e-10)
    with pytest.raises(FileNotFoundError, match=r"base holds no value model: windkern_value.json is missing"):
        ValueModel.from_pretrained(base)
    ValueModel(llama(1), llama(2)).save_pretrained(tmp_path / "nameless")
    with pytest.raises(ValueError, match="base must be given"):
        ValueModel.from_pretrained(tmp_path / "nameless")


def test_a_whole_run_writes_its_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "load_demonstrations", lambda source: DEMONSTRATIONS, raising=False)
    for name, model in (("base", llama(1, hidden=24)), ("small", llama(2)), ("other", llama(7, hidden=32))):
        model.save_pretrained(tmp_path / name)
        tiny_model.make_tokenizer().save_pretrained(tmp_path / name)
    names = {"base_model": str(tmp_path / "base"), "value_model": str(tmp_path / "small")}
    options = names | {"train_demonstrations": "demonstrations.jsonl", "transfer_base": str(tmp_path / "other")}
    steps = {"max_steps": 20, "save_strategy": "steps", "save_steps": 10}
    output = tmp_path / "run"
    assert run_value(settings(output, **options, **steps), resume=False) == 0
    result = json.loads((output / "result.json").read_text())
    assert result["kind"] == "value" and result["steps"] == 20 and result["tokens"] == 5 * len(DEMONSTRATIONS)
    found, moved = result["nll_per_token"], result["transfer_nll_per_token"]
    assert found["after"] < min(found["base"], found["before"]) and moved["with_value"] < moved["base"]
    assert found["before"] == pytest.approx(nll(pair()), rel=1e-5)
    assert f"{found['after']:.4f}" in capsys.readouterr().out
    reloaded = ValueModel.from_pretrained(output)
    assert nll(reloaded) == pytest.approx(found["after"], rel=1e-5)
    (output / "result.json").unlink()
    assert run_value(settings(output, **options, **steps), resume=True) == 0  # nothing remains to do
    assert json.loads((output / "result.json").read_text())["nll_per_token"] == pytest.approx(found)


def test_nothing_to_measure_on_says_so():
    with pytest.raises(ValueError, match="must hold at least one pair"):
        nll_per_token(pair(), [], DemonstrationCollator(None, 8), batch_size=2)


def test_settings_that_do_not_fit_say_so(tmp_path):
    for wrong, words in (
        ({"memory_budget": 0}, "memory_budget must be at least 1, got 0"),
        ({"backend": "trition"}, "did you mean 'triton'"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
        ({"label_smoothing_factor": 0.1}, r"label_smoothing_factor must be 0, got 0\.1"),
        ({"fsdp": "full_shard"}, "fsdp and deepspeed must not be set"),
    ):
        with pytest.raises(ValueError, match=words):
            settings(tmp_path, **wrong)
    with pytest.raises(ValueError, match="base_model must be set, got None"):
        run_value(settings(tmp_path), resume=False)
    with pytest.raises(TypeError, match="model must be a ValueModel, got LlamaForCausalLM"):
        trainer_of(tmp_path, llama(1))
    with pytest.raises(TypeError, match="args must be a ValueConfig, got TrainingArguments"):
        ValueTrainer(pair(), transformers.TrainingArguments(str(tmp_path)), processing_class=None)


def test_every_setting_says_what_it_is():
    inherited = {each.name for each in dataclasses.fields(transformers.TrainingArguments)}
    own = [each for each in dataclasses.fields(ValueConfig) if each.name not in inherited]
    assert len(own) == 8 and all(len(each.metadata["help"]) > 40 for each in own)


class Words:
    def __init__(self, *words):
        self.words = words

    def get_vocab(self):
        return {word: k for k, word in enumerate(self.words)}


def test_tokenizers_must_agree():
    check_same_tokens(Words("a", "b", "<end>"), Words("a", "b", "<eos>", "c"), ("one", "two"))
    with pytest.raises(ValueError, match=r"one and two must have one tokenizer, but 2 tokens .* 'a' is 0 and 1"):
        check_same_tokens(Words("a", "b"), Words("b", "a"), ("one", "two"))
    with pytest.raises(ValueError, match="only 0 of 2 and 2 tokens"):
        check_same_tokens(Words("a", "b"), Words("c", "d"), ("one", "two"))


def test_half_precision_keeps_the_value_model_in_float32(tmp_path):
    assert value_module._dtypes(settings(tmp_path, bf16=True)) == (torch.bfloat16, torch.float32)
    model = ValueModel(llama(1, hidden=24).to(torch.bfloat16), llama(2))
    trainer = trainer_of(tmp_path, model, bf16=True, max_steps=3, logging_steps=1)
    trainer.train()
    assert model.value.dtype == torch.float32 and model.base.dtype == torch.bfloat16
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and all(math.isfinite(loss) for loss in losses)
