"""Transformers' continuous batching as a sampler: counts, ends, the distribution, adapters, and a run."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from tiny_model import make_model, make_tokenizer
from trainer_cases import lora, make_trainer

from windkern.train.samplers.batched import BatchedSampler

PROMPTS = ["the bus was", "rain", "rain"]


def sampler_of(model, **options) -> BatchedSampler:
    made = BatchedSampler(make_tokenizer(), **({"max_completion_length": 6, "batch_size": 16} | options))
    made.update(model)
    return made


def test_each_prompt_gets_as_many_responses_as_are_wanted():
    batch = sampler_of(make_model()).sample(PROMPTS, 4, seed=0)
    assert [len(group) for group in batch.texts] == [4, 4, 4] and batch.texts[1] != batch.texts[2]
    assert batch.completion_mask.sum(1).max() <= 6
    last = [row[own][-1].item() for row, own in zip(batch.input_ids, batch.completion_mask, strict=True)]
    assert batch.truncated.tolist() == [token != 1 for token in last]
    lengths = batch.completion_mask.sum(1)
    assert all(int(length) == 6 for length, cut in zip(lengths, batch.truncated, strict=True) if cut)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers for it
@pytest.mark.parametrize("adapted", [False, True])
def test_first_tokens_are_drawn_from_the_policy_at_its_temperature(adapted):
    """Counts of 1200 draws against the probabilities: each within 5 standard deviations."""
    model = make_model()
    if adapted:
        peft = pytest.importorskip("peft")
        torch.manual_seed(0)
        model = peft.get_peft_model(model, lora()).eval()
    sampler = sampler_of(model, max_completion_length=1, temperature=0.7, batch_size=64)
    batch = sampler.sample(PROMPTS[:1], 1200, seed=3)
    tokens = batch.input_ids[batch.completion_mask]
    ids = make_tokenizer()("user the bus was <eos> assistant", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        chances = (model(input_ids=ids).logits[0, -1] / 0.7).softmax(-1)
    counts = torch.bincount(tokens, minlength=len(chances))
    spread = (1200 * chances * (1 - chances)).sqrt()
    assert ((counts - 1200 * chances).abs() <= 5 * spread + 1).all()


def test_it_needs_a_policy_with_an_end():
    with pytest.raises(ValueError, match="update\\(model\\) must be called"):
        BatchedSampler(make_tokenizer(), max_completion_length=4).sample(PROMPTS, 1, seed=0)
    endless = make_tokenizer(chat=False)
    endless.eos_token = None
    model = make_model()
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="names an end token"):
        BatchedSampler(endless, max_completion_length=4).update(model)


def test_a_run_samples_with_it(tmp_path):
    trainer = make_trainer(tmp_path, sampler="batched", save_strategy="no")
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert any(not torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())
