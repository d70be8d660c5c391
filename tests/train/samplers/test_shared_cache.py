"""Responses to a prompt that runs once have the same distribution and, up to rounding, the same tokens."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

import tiny_model  # noqa: E402

from windkern.train.samplers.sampler import TransformersSampler  # noqa: E402

PROMPTS = ["the day was", "a", "the bus was very good and so", "rain"]
SMALL = {
    "vocab_size": 18,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def make(family: str):
    if family == "Llama":
        return tiny_model.make_model()
    torch.manual_seed(0)
    special = {"Mistral": {"sliding_window": 3}, "Lfm2": {"layer_types": ["conv", "full_attention"]}}
    config = getattr(transformers, f"{family}Config")(**SMALL, **special[family])
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def sampler_of(model, shared: bool, **options) -> TransformersSampler:
    options = {"max_completion_length": 6, "shared_prompt": shared, **options}
    return TransformersSampler(model, tiny_model.make_tokenizer(chat=False), **options)


def widths(model) -> list[tuple[int, int]]:
    """Record (rows, tokens) of each forward pass from now on."""
    seen: list[tuple[int, int]] = []
    model.model.register_forward_pre_hook(
        lambda module, args, given: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("batch_size", [64, 5])
@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_the_tokens_are_those_of_prompts_that_run_for_each_response(family, batch_size):
    """In float64, where rounding decides no draw; prompts have different lengths, and batches split groups."""
    model = make(family).double()
    shared, apart = (
        sampler_of(model, each, batch_size=batch_size, temperature=0.8).sample(PROMPTS, 4, seed=5)
        for each in (True, False)
    )
    assert shared.texts == apart.texts
    assert torch.equal(shared.input_ids, apart.input_ids) and torch.equal(shared.completion_mask, apart.completion_mask)


def test_the_same_seed_gives_the_same_tokens_and_another_gives_others():
    sampler = sampler_of(make("Llama"), True)
    first, again, other = (sampler.sample(PROMPTS, 4, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.input_ids, again.input_ids) and first.texts != other.texts


def test_a_prompt_runs_once():
    model = make("Llama")
    seen = widths(model)
    sampler_of(model, True).sample(["the day was very good", "the bus was very bad"], 8, seed=0)
    assert seen[:2] == [(2, 4), (16, 1)] and set(seen[1:]) == {(16, 1)}


def test_frequencies_are_the_policy():
    """20000 draws of one token against the model's own probabilities: each within 5 standard deviations."""
    model, count = make("Llama"), 20000
    sampler = sampler_of(model, True, max_completion_length=1, batch_size=count, temperature=1.3)
    drawn = sampler.sample(["the day was"], count, seed=3)
    tokens = drawn.input_ids[:, -1]
    with torch.no_grad():
        chances = (model(input_ids=drawn.input_ids[:1, :-1]).logits[0, -1] / 1.3).softmax(-1).double()
    found = torch.bincount(tokens, minlength=len(chances)) / count
    assert ((found - chances).abs() <= 5 * (chances * (1 - chances) / count).sqrt() + 1e-9).all()


def test_single_tokens_and_single_responses_run_as_they_are():
    model = make("Llama")
    seen = widths(model)
    sampler_of(model, True, max_completion_length=1).sample(["rain"], 3, seed=0)
    sampler_of(model, True, max_completion_length=1).sample(["the day"], 1, seed=0)
    assert seen == [(3, 1), (1, 2)]


def test_a_cache_of_more_than_keys_and_values_is_not_copied():
    model = make("Lfm2").double()
    shared, apart = sampler_of(model, True), sampler_of(model, False)
    for seed in (1, 2):
        assert shared.sample(PROMPTS[2:3], 3, seed).texts == apart.sample(PROMPTS[2:3], 3, seed).texts
    seen = widths(model)
    shared.sample(PROMPTS[2:3], 3, seed=1)
    assert seen[0][0] == 3  # the prompt does not run again for nothing
