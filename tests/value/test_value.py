"""A value model on a frozen base, against plain sums of logits; training is tested in test_value_training.py."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("rich")

import tiny_model  # noqa: E402
from value_cases import VOCAB, batch, brute_force, llama, pair, summed_logits  # noqa: E402

from windkern import hf  # noqa: E402
from windkern.kernels import buffers  # noqa: E402
from windkern.train.samplers.sampler import TransformersSampler  # noqa: E402
from windkern.value.model import ValueLogits, ValueModel  # noqa: E402


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
    base.requires_grad_(True)  # by other code; still no gradient
    model(*batch()).sum().backward()
    assert all(each.grad is None for each in base.parameters())
    assert all(each.grad is not None for each in value.parameters())


@pytest.mark.parametrize("fault", ["block dropped", "gradient swapped"])
def test_a_planted_fault_is_caught(fault, monkeypatch):
    plain = hf.hidden_and_head

    def broken(model):
        parts = plain(model)
        hidden, weight = parts.hidden, parts.weight
        if fault == "block dropped" and model is faulty.value:
            hidden = lambda *given: 0 * parts.hidden(*given)  # noqa: E731
        if fault == "gradient swapped" and model is faulty.value:
            weight = weight.detach()
        return SimpleNamespace(
            hidden=hidden,
            blocks=lambda states: (states, dataclasses.replace(parts.head, weight=weight)),
            weight=weight,
            bias=parts.bias,
            head=parts.head,
        )

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


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_recomputed_activations_give_the_same_gradients(name):
    model = pair(torch.float64).train()
    if not hasattr(model.value, f"{name}_enable"):
        pytest.skip(f"this transformers has no {name}_enable")
    model(*batch()).sum().backward()
    wanted = gradients(model)
    model.zero_grad()
    getattr(model, f"{name}_enable")()
    assert getattr(model.value, f"is_{name}") and not getattr(model.base, f"is_{name}")
    model(*batch()).sum().backward()
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[key], rtol=1e-10, atol=1e-12, msg=key)


# Generation


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Return two prompts, the first padded on the left."""
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
        assert distance(base_alone) > 1000  # so the test would notice a missing value model


def test_the_sampler_takes_a_value_model():
    tokenizer, model = tiny_model.make_tokenizer(), pair()
    sampler = TransformersSampler(model, tokenizer, max_completion_length=5, temperature=0.7)
    completions = sampler.sample(["the bus was", "rain"], 3, seed=1)
    assert completions.num_generations == 3 and completions.num_tokens > 0
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


# Refusals


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
    assert all(each.requires_grad for each in one.parameters())  # nothing was frozen before the error


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers warns of a call by peft
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # some releases of peft
def test_an_adapter_on_the_head_of_the_base_is_not_left_out():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(llama(1), peft.LoraConfig(target_modules=["lm_head"], r=2))
    for name, each in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(each)
    model = ValueModel(adapted, llama(2))
    plain = ValueModel(llama(1), llama(2))(*batch())
    torch.testing.assert_close(model(*batch()), brute_force(model, *batch()), rtol=1e-4, atol=1e-4)
    assert (model(*batch()) - plain).abs().max() > 0.1


def test_batches_that_do_not_fit_say_so():
    model, (ids, attention, scored) = pair(), batch()
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(3, 7\), got \(3, 6\)"):
        model(ids, attention[:, 1:], scored)
    scored[1, 6] = 1
    with pytest.raises(ValueError, match="must be 0 wherever attention_mask is 0"):
        model(ids, attention, scored)
