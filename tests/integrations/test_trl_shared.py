"""Rows of TRL's batches that begin with the same prompt run the body once on that prompt."""

from __future__ import annotations

import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # other libraries' deprecations
    pytest.importorskip("trl", minversion="1.16")
    from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

import test_trl  # noqa: E402
from test_trl import PAIRS, folder, inputs_of, loss_gradients_metrics, make  # noqa: E402, F401

from windkern import hf  # noqa: E402
from windkern.integrations.trl import FusedHead, use  # noqa: E402
from windkern.integrations.trl_rows import shared_batch  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL, transformers and accelerate
FIELDS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


def batch(left: bool) -> dict[str, torch.Tensor]:
    """Return two prompts with 3 and 1 rows, not adjacent; one row has a tool's answer inside, one has no labels."""
    rows = [
        ([5, 6, 7], [8, 9, 10, 11], [1, 0, 0, 1]),
        ([12, 13], [14, 15], [1, 1]),
        ([5, 6, 7], [9], [1]),
        ([5, 6, 7], [10, 11, 12], [1, 1, 0]),
        ([5, 6, 7], [4], [0]),
    ]
    width = 8
    made = {name: [] for name in ("input_ids", "attention_mask", "labels")}
    for prompt, response, scored in rows:
        before = 3 - len(prompt) if left else 0
        behind = width - before - len(prompt) - len(response)
        made["input_ids"].append([0] * before + prompt + response + [0] * behind)
        made["attention_mask"].append([0] * before + [1] * len(prompt + response) + [0] * behind)
        marks = [token if mark else -100 for token, mark in zip(response, scored, strict=True)]
        made["labels"].append([-100] * (before + len(prompt)) + marks + [-100] * behind)
    return {name: torch.tensor(value) for name, value in made.items()}


def small(family: str):
    torch.manual_seed(0)
    if family == "GPT2":
        config = transformers.GPT2Config(vocab_size=18, n_embd=16, n_layer=2, n_head=2, initializer_range=0.4)
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.LlamaConfig(
        vocab_size=18,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.4,
    )
    return transformers.LlamaForCausalLM(config).eval()


def widths(decoder) -> list[tuple[int, ...]]:
    seen: list[tuple[int, ...]] = []
    decoder.register_forward_pre_hook(
        lambda module, args, given: seen.append(tuple((args or (given["input_ids"],))[0].shape)), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_every_field_is_that_of_trl(family, left):
    model, given = small(family), batch(left)
    ours = FusedHead(
        FIELDS, 0.7, FusedCausalLMOutput, {"memory_budget": None, "batch_invariant": False, "backend": "auto"}, "always"
    )
    got = ours(model, **given)
    seen = widths(model.model if family == "Llama" else model.transformer)
    ours(model, **given)
    # Reason: TRL passes no positions, so a position table is read by column where rows are padded on the left.
    assert seen == ([(5, 8)] if left and family == "GPT2" else [(2, 7)])
    own = small(family)
    add_fused_lm_head(own, temperature=0.7, outputs=("log_probs", *FIELDS))
    want = own(**given, fused_lm_head=True)
    mask = given["labels"][:, 1:] != -100
    for name in ("log_probs", "entropy", "mean_logits", "log_sum_sq_probs"):
        mine, theirs = (torch.where(mask, getattr(each, name), 0.0) for each in (got, want))
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert torch.equal(got.is_top1 & mask, want.is_top1.bool() & mask)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-5)
    for (name, mine), theirs in zip(model.named_parameters(), own.parameters(), strict=True):
        a, b = (torch.autograd.grad(e.loss, p, retain_graph=True)[0] for e, p in ((got, mine), (want, theirs)))
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_a_trainer_sees_each_prompt_once(kind, folder, tmp_path, monkeypatch):  # noqa: F811
    options = {"num_generations": 4, "max_completion_length": 2} if kind == "grpo" else {}
    monkeypatch.setattr(test_trl, "PAIRS", [{**each, "prompt": "the day was a good day and"} for each in PAIRS])
    trainer = make(kind, folder, tmp_path, **options)
    inputs = inputs_of(trainer)
    theirs = loss_gradients_metrics(trainer, dict(inputs))
    shapes = {}
    for way in ("never", "always"):
        with use(trainer, shared_prompt=way):
            loss_gradients_metrics(trainer, dict(inputs))  # this runs the check of the model
            seen = widths(trainer.accelerator.unwrap_model(trainer.model).model)
            found = loss_gradients_metrics(trainer, dict(inputs))
        shapes[way] = sum(rows * width for rows, width in seen)
        torch.testing.assert_close(found[0], theirs[0], rtol=1e-5, atol=1e-6)
        for name, gradient in theirs[1].items():
            torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-6)
    assert shapes["always"] < shapes["never"]


def test_the_rows_of_a_batch_are_one_response_of_all_labelled_tokens():
    rows = shared_batch(**batch(left=False), rules=hf.LayoutRules(relative=True, by_cost=False)).rows
    index, targets = rows.padded()
    assert rows.longest_response == len(rows.targets) == 7
    assert torch.equal(index, rows.index[None]) and torch.equal(targets, rows.targets[None])


def test_a_batch_without_repeated_prompts_is_left_as_it_is():
    given = batch(left=False)
    given = {name: value[:2] for name, value in given.items()}
    rules = hf.LayoutRules(relative=True)
    assert shared_batch(given["input_ids"], given["attention_mask"], given["labels"], rules) is None
