"""Inverse value learning: a value model on a frozen base, against plain sums of logits."""

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

import windkern.train.value as value_module  # noqa: E402
from windkern import hf  # noqa: E402
from windkern.kernels import buffers  # noqa: E402
from windkern.train import data  # noqa: E402
from windkern.train.sampler import TransformersSampler  # noqa: E402
from windkern.train.value import check_same_tokens, nll_per_token, run_value  # noqa: E402
from windkern.train.value_model import ValueLogits, ValueModel  # noqa: E402
from windkern.train.value_trainer import DemonstrationCollator, ValueConfig, ValueTrainer  # noqa: E402

VOCAB = 18  # of the tiny tokenizer
DEMONSTRATIONS = [(f"{a} {b}", f"{b} {a} so {b}") for a in tiny_model.WORDS[:6] for b in tiny_model.WORDS[6:9]]


def llama(seed: int, hidden: int = 16, vocab: int = VOCAB, family: str = "Llama", **options) -> nn.Module:
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        **({"initializer_range": 0.3} | options),
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    if getattr(model.lm_head, "bias", None) is not None:
        nn.init.normal_(model.lm_head.bias)  # zeros would hide a bias that is left out
    return model


def pair(dtype: torch.dtype = torch.float32) -> ValueModel:
    return ValueModel(llama(1, hidden=24).to(dtype), llama(2).to(dtype))


def batch(vocab: int = VOCAB) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three sequences: padded left, padded right, not padded."""
    ids = torch.randint(2, vocab, (3, 7), generator=torch.Generator().manual_seed(0))
    attention, scored = torch.ones_like(ids), torch.zeros_like(ids)
    attention[0, :3], attention[1, 5:] = 0, 0
    scored[0, 5:], scored[1, 2:5], scored[2, 1:] = 1, 1, 1
    return ids, attention, scored


def summed_logits(model: ValueModel, ids: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    """(S, L, V) by the models' own forward."""
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    given = {"input_ids": ids, "attention_mask": attention, "position_ids": positions}
    return model.base(**given).logits + model.value(**given).logits


def brute_force(model: ValueModel, ids, attention, scored) -> torch.Tensor:
    logps = summed_logits(model, ids, attention)[:, :-1].log_softmax(-1)
    return torch.where(scored[:, 1:].bool(), logps.gather(-1, ids[:, 1:, None]).squeeze(-1), 0.0).sum(-1)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


FAMILIES = {
    "llama on llama": ({}, {}),
    "granite's scale on cohere's": (
        {"family": "Cohere", "logit_scale": 0.3},
        {"family": "Granite", "logits_scaling": 5.0},
    ),
    "bias on the base": ({"family": "Phi"}, {}),
    "scaled base, bias on the value model": ({"family": "Cohere", "logit_scale": 0.3}, {"family": "Phi"}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_log_probs_and_gradients_are_those_of_summed_logits(name):
    of_base, of_value = FAMILIES[name]
    model = ValueModel(llama(1, hidden=24, **of_base).double(), llama(2, **of_value).double())
    upstream = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    theirs = brute_force(model, *batch())
    theirs.backward(upstream)
    wanted = gradients(model)
    model.zero_grad()
    ours = model(*batch())
    ours.backward(upstream)
    assert ours.dtype == torch.float64 and bool((theirs < -1).all())
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    found = gradients(model)
    assert found.keys() == wanted.keys() == {n for n, _ in model.named_parameters() if n.startswith("value.")}
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-8, atol=1e-10, msg=key)


def test_base_log_probs_are_the_bases_own():
    model = pair(torch.float64)
    wanted = hf.sequence_logps(model.base, *batch())
    found = model.base_logps(*batch())
    assert torch.equal(found, wanted) and not found.requires_grad
    assert (found - model(*batch())).abs().min() > 0.1


def test_padding_changes_nothing():
    model = pair(torch.float64)
    ids, attention, scored = batch()
    row = [each[2:] for each in (ids, attention, scored)]
    alone = model(*row)
    for pads in ((3, 0), (0, 3), (2, 1)):
        padded = [nn.functional.pad(each, pads) for each in row]
        torch.testing.assert_close(model(*padded), alone, rtol=1e-10, atol=1e-10)


def test_the_base_is_frozen_whatever_mode_is_set():
    base, value = llama(1, attention_dropout=0.5), llama(2)
    model = ValueModel(base, value).train()
    assert not base.training and value.training
    assert not any(each.requires_grad for each in base.parameters())
    base.requires_grad_(True)  # by somebody else: still no gradient
    model(*batch()).sum().backward()
    assert all(each.grad is None for each in base.parameters())
    assert all(each.grad is not None for each in value.parameters())


@pytest.mark.parametrize("fault", ["block dropped", "gradient swapped"])
def test_a_planted_fault_is_caught(fault, monkeypatch):
    plain = hf.hidden_and_head

    def broken(model):
        parts = plain(model)
        if fault == "block dropped":
            return dataclasses.replace(parts, hidden=lambda *given: parts.hidden(*given) * (model is not faulty.value))
        return dataclasses.replace(parts, weight=parts.weight.detach() if model is faulty.value else parts.weight)

    faulty = pair(torch.float64)
    monkeypatch.setattr(hf, "hidden_and_head", broken)
    ours = faulty(*batch())
    ours.sum().backward()
    found = gradients(faulty)
    monkeypatch.undo()
    faulty.zero_grad()
    theirs = brute_force(faulty, *batch())
    theirs.sum().backward()
    wanted = gradients(faulty)
    if fault == "block dropped":
        assert (ours - theirs).abs().min() > 1e-3
    else:
        assert "value.lm_head.weight" in wanted and "value.lm_head.weight" not in found


def test_no_buffer_of_tokens_by_vocabulary_is_made():
    vocab, budget = 4000, 64 << 10
    model = ValueModel(llama(1, vocab=vocab), llama(2, vocab=vocab), memory_budget=budget)
    ids, attention, scored = batch(vocab)
    rows = int(scored.sum())
    with buffers.recording() as record:
        model(ids, attention, scored).sum().backward()
    assert record.flops > 0 and record.largest <= record.peak_bytes <= budget < rows * vocab * 4 / 2


def test_a_mixture_of_dtypes_needs_autocast():
    model = ValueModel(llama(1).to(torch.bfloat16), llama(2))
    with pytest.raises(TypeError, match=r"base is torch.bfloat16 and value is torch.float32; outside autocast"):
        model(*batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps = model(*batch())
    assert logps.dtype == torch.float32
    logps.sum().backward()
    exact = brute_force(ValueModel(model.base.double(), model.value.double()), *batch())
    torch.testing.assert_close(logps.double(), exact, rtol=0.05, atol=0.05)


# Generation


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts, the first padded on the left."""
    ids, attention = torch.tensor([[0, 0, 3, 2], [2, 1, 0, 3]]), torch.ones(2, 4, dtype=torch.int64)
    attention[0, :2] = 0
    return ids, attention


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_scores_while_generating_are_those_of_summed_logits(family):
    if family == "GPT2":  # learned positions, so that wrong position ids show
        torch.manual_seed(2)
        config = transformers.GPT2Config(vocab_size=8, n_embd=16, n_layer=2, n_head=2, initializer_range=0.4)
        config.bos_token_id = config.eos_token_id = 1
        value = transformers.GPT2LMHeadModel(config).eval()
    else:
        value = llama(2, vocab=8)
    model = ValueModel(llama(1, hidden=24, vocab=8), value)
    ids, attention = prompts()
    out = model.generate(
        ids,
        attention,
        do_sample=True,
        num_return_sequences=2,
        max_new_tokens=4,
        eos_token_id=None,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    attention = nn.functional.pad(attention.repeat_interleave(2, 0), (0, 4), value=1)
    logits = summed_logits(model, out.sequences, attention)
    assert out.sequences.shape == (4, 8) and len(out.scores) == 4
    for step, scores in enumerate(out.scores):
        torch.testing.assert_close(scores.log_softmax(-1), logits[:, 3 + step].log_softmax(-1), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_samples_have_the_distribution_of_the_sum():
    """All 16 two-token answers over a vocabulary of 4, drawn with left padding, by chi-square."""
    vocab, draws = 4, 3000
    model = ValueModel(llama(1, hidden=24, vocab=vocab), llama(2, vocab=vocab))
    ids, attention = prompts()
    torch.manual_seed(5)
    out = model.generate(
        ids.repeat_interleave(draws, 0),
        attention.repeat_interleave(draws, 0),
        do_sample=True,
        max_new_tokens=2,
        eos_token_id=None,
        pad_token_id=0,
        top_k=0,
    )
    answers = torch.cartesian_prod(torch.arange(vocab), torch.arange(vocab))
    scored = nn.functional.pad(torch.zeros(16, 4, dtype=torch.int64), (0, 2), value=1)
    for k in range(2):
        full = torch.cat([ids[k].expand(16, -1), answers], 1)
        mask = nn.functional.pad(attention[k].expand(16, -1), (0, 2), value=1)
        expected = draws * brute_force(model, full, mask, scored).exp()
        assert math.isclose(float(expected.sum()), draws, rel_tol=1e-5)
        drawn = out[k * draws : (k + 1) * draws, 4:]
        counts = (drawn[:, 0] * vocab + drawn[:, 1]).bincount(minlength=16)

        def distance(wanted, counts=counts):
            return float(((counts - wanted) ** 2 / wanted).sum())

        assert distance(expected) < 37.7  # 15 degrees of freedom, one in a thousand
        base_alone = draws * hf.sequence_logps(model.base, full, mask, scored).exp()
        assert distance(base_alone) > 1000  # the test would see the value model left out


def test_the_sampler_takes_a_value_model():
    tokenizer, model = tiny_model.make_tokenizer(), pair()
    sampler = TransformersSampler(model, tokenizer, max_new_tokens=5, temperature=0.7)
    completions = sampler.sample(["the bus was", "rain"], 3, seed=1)
    assert completions.num_responses == 3 and completions.num_tokens > 0
    again = sampler.sample(["the bus was", "rain"], 3, seed=1)
    assert torch.equal(completions.input_ids, again.input_ids)
    model.value.lm_head.weight.data.zero_()[7] = 1e3 * model.value.lm_head.weight.data[7]
    other = sampler.sample(["the bus was", "rain"], 3, seed=1)
    assert completions.texts != other.texts


def test_ways_of_decoding_the_cache_cannot_follow_are_refused():
    model, (ids, attention) = pair(), prompts()
    with pytest.raises(ValueError, match="num_beams must be 1, got 2"):
        model.generate(ids, attention, num_beams=2)
    with pytest.raises(ValueError, match="padded on the left"):
        model.generate(ids, attention.flip(-1))
    processor = ValueLogits(model.value, attention)
    processor(ids, torch.zeros(2, VOCAB))
    with pytest.raises(RuntimeError, match="sequences of 4 tokens grew to 6"):
        processor(nn.functional.pad(ids, (0, 2)), torch.zeros(2, VOCAB))


# Training


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
        "max_new_tokens": 8,
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
    assert tokenizer.batch_decode(answers) == ["so good <eos>", "a very bad"]  # cut, and then without an end
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
    """Answers differ in length, so a mean of means would not."""
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
    assert run_value(settings(output, **options, **steps), resume=True) == 0  # nothing is left to do
    assert json.loads((output / "result.json").read_text())["nll_per_token"] == pytest.approx(found)


# What is refused


def test_models_that_do_not_fit_say_so():
    with pytest.raises(ValueError, match="same vocabulary, got heads of 18 and 20 entries"):
        ValueModel(llama(1), llama(2, vocab=20))
    capped = llama(1, family="Gemma2", head_dim=8, final_logit_softcapping=4.0)
    with pytest.raises(hf.UnsupportedModelError, match=r"base caps its logits at 4\.0"):
        ValueModel(capped, llama(2))
    with pytest.raises(hf.UnsupportedModelError, match=r"value caps its logits at 4\.0"):
        ValueModel(llama(1), capped)
    with pytest.raises(TypeError, match="value must be a transformers PreTrainedModel, got Linear"):
        ValueModel(llama(1), nn.Linear(2, 2))
    one = llama(1)
    with pytest.raises(ValueError, match="must not share parameters"):
        ValueModel(one, one)
    assert all(each.requires_grad for each in one.parameters())  # nothing was frozen on the way


def test_batches_that_do_not_fit_say_so():
    model, (ids, attention, scored) = pair(), batch()
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(3, 7\), got \(3, 6\)"):
        model(ids, attention[:, 1:], scored)
    scored[1, 6] = 1
    with pytest.raises(ValueError, match="must be 0 wherever attention_mask is 0"):
        model(ids, attention, scored)
    with pytest.raises(ValueError, match="must hold at least one pair"):
        nll_per_token(model, [], DemonstrationCollator(None, 8), batch_size=2)


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
    trainer = trainer_of(tmp_path, model, bf16=True, max_steps=3)
    trainer.train()
    assert model.value.dtype == torch.float32 and model.base.dtype == torch.bfloat16
    assert all(math.isfinite(entry.get("loss", 0.0)) for entry in trainer.state.log_history)
