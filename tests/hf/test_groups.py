"""group_logps against each response with its own prompt, over kinds of attention, heads, dtypes and wrappers."""

from __future__ import annotations

import doctest
import logging

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

import tiny_model  # noqa: E402
from test_hf import FAMILIES, SMALL, VOCAB, build  # noqa: E402

from windkern import fused_loss, hf, losses  # noqa: E402
from windkern.hf import call as hf_call  # noqa: E402
from windkern.hf import groups as hf_groups  # noqa: E402
from windkern.hf import masks as hf_masks  # noqa: E402
from windkern.hf import shared_check  # noqa: E402
from windkern.hf.shared_check import sharing_of  # noqa: E402

# Models and the kinds of attention they test; windows and chunks are shorter than the rows.
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
LLAMA4 = {"head_dim": 8, "attention_chunk_size": 6, "intermediate_size_mlp": 48, "layer_types": None, **MOE}
KINDS = {
    "Mixtral": {**MOE, "sliding_window": 5},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "Gemma2, windows": {"head_dim": 8, "sliding_window": 5, "attn_logit_softcapping": 3.0},
    "Gemma3, windows": {"head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "Llama, multi-query": {"num_key_value_heads": 1, "tie_word_embeddings": True},
}


def make(kind: str, attention: str = "eager") -> nn.Module:
    if kind in FAMILIES:
        model = build(kind)
    else:
        family = kind.split(",")[0]
        name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
        torch.manual_seed(0)
        config = getattr(transformers, name)(**{**SMALL, **KINDS[kind]})
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.set_attn_implementation(attention)
    return model.eval()


def groups(count: int = 4, ragged: bool = True) -> tuple[list, list]:
    """Return three prompts of different lengths with `count` responses each; some are empty or one token."""
    random = torch.Generator().manual_seed(3)

    def ids(size: int) -> list[int]:
        return torch.randint(3, VOCAB, (size,), generator=random).tolist()

    sizes = [[7, 0, 3, 9], [1, 5, 2, 6], [4, 4, 8, 1]] if ragged else [[6] * 4] * 3
    prompts = [ids(size) for size in ((9, 1, 5) if ragged else (6, 6, 6))]
    return prompts, [[ids(size) for size in (row * 2)[:count]] for row in sizes]


def by_logits(model: nn.Module, prompts, completions, temperature: float = 1.0) -> torch.Tensor:
    """Return log-probs (B, N), computed response by response, without padding."""

    def one(prompt, response) -> torch.Tensor:
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0].float() / temperature
        places = torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
        return logits.log_softmax(-1)[places, torch.tensor(response, dtype=torch.int64)].sum()

    return torch.stack(
        [torch.stack([one(p, each) for each in row]) for p, row in zip(prompts, completions, strict=True)]
    )


def assert_same(model: nn.Module, got, want, tolerance: float = 1e-4) -> None:
    """Assert equal values, and equal gradients of each parameter."""
    upstream = torch.linspace(-1, 2, want.numel()).reshape(want.shape)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    parameters = [each for each in model.parameters() if each.requires_grad]
    ours, theirs = (torch.autograd.grad((each * upstream).sum(), parameters, allow_unused=True) for each in (got, want))
    for mine, other in zip(ours, theirs, strict=True):
        if other is None:
            assert mine is None
            continue
        gap = float((mine - other).norm())
        assert gap <= 10 * tolerance * float(other.norm()) + 1e-5


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", [*FAMILIES, *KINDS])
def test_values_and_gradients_are_those_of_responses_alone(kind, attention):
    if kind.startswith("Gemma2") and attention == "sdpa":
        pytest.skip("its attention has a softcap, which sdpa does not compute")
    model = make(kind, attention)
    given = groups()
    assert sharing_of(hf_call.find(model)).reason is None
    assert hf.layout_rules(model, shared_prompt="always").shared
    assert_same(model, hf.group_logps(model, *given, shared_prompt="always"), by_logits(model, *given))


@pytest.mark.filterwarnings("ignore")  # from torch and transformers about their masks, and about the eager form
@pytest.mark.parametrize("kind", ["Qwen2", "Mistral", "Gemma3, windows"])
def test_block_masks_of_flex_attention_are_the_dense_ones(kind, monkeypatch):
    """The eager form on a CPU, without a compiler and without backward."""
    monkeypatch.setattr(hf_masks, "FLEX_DEVICES", ("cpu",))
    flex, dense, given = make(kind, "flex_attention"), make(kind, "sdpa"), groups()
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        got = hf.group_logps(flex, *given, shared_prompt="always", row_tokens=64)
        torch.testing.assert_close(got, by_logits(dense, *given), rtol=1e-4, atol=1e-4)
        shared_check._seen.pop(flex)
        monkeypatch.setattr(hf_masks, "seen", lambda rows, row, query, key: query >= key)
        assert "in one row differ by" in sharing_of(hf_call.find(flex)).reason


@pytest.mark.filterwarnings("ignore")  # as above
@pytest.mark.parametrize("window", [None, 70])
def test_block_masks_over_rows_of_several_blocks(window, monkeypatch):
    """The model and the lengths of the test that compiles flex_attention on a GPU."""
    monkeypatch.setattr(hf_masks, "FLEX_DEVICES", ("cpu",))
    model, random = tiny_model.make_mistral(window), torch.Generator().manual_seed(0)
    given = [[5, 6, 7] * 40], [torch.randint(2, 512, (8, 60), generator=random).tolist()]
    model.set_attn_implementation("sdpa")
    want = by_logits(model, *given)
    assert_same(model, hf.group_logps(model, *given, shared_prompt="always"), want)
    model.set_attn_implementation("flex_attention")
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        got = hf.group_logps(model, *given, shared_prompt="always")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_n_packing_and_cuts_change_nothing(count):
    model, given = make("Qwen2", "sdpa"), groups(count)
    for options in ({}, {"row_tokens": 64}, {"mask_budget": 600}, {"shared_prompt": "never"}):
        want = by_logits(model, *given, temperature=0.7)
        assert_same(model, hf.group_logps(model, *given, temperature=0.7, **options), want)


def test_wide_attention_makes_long_rows_dearer():
    """Four heads: of size 8 in Llama, together the hidden size of 32; of size 16 here, together twice that."""
    config = transformers.Qwen3Config(**{**SMALL, "head_dim": 16})
    narrow, wide = hf.layout_rules(make("Llama")), hf.layout_rules(transformers.Qwen3ForCausalLM(config).eval())
    assert (narrow.balance, wide.balance) == (96, 48)


def test_per_token_adds_up_and_ends_in_zeros():
    model, (prompts, completions) = make("Llama"), groups()
    tokens = hf.group_logps(model, prompts, completions, per_token=True)
    assert tokens.shape == (3, 4, 9)
    sizes = torch.tensor([[len(each) for each in row] for row in completions])
    assert torch.equal(tokens != 0, torch.arange(9) < sizes[..., None])
    torch.testing.assert_close(tokens.sum(-1), hf.group_logps(model, prompts, completions), rtol=1e-5, atol=1e-5)
    alone = hf.group_logps(model, prompts, completions, per_token=True, shared_prompt="never")
    torch.testing.assert_close(tokens, alone, rtol=1e-4, atol=1e-4)


def test_all_responses_may_be_empty():
    logps = hf.group_logps(make("Llama"), [[5, 6]], [[[], []]])
    assert torch.equal(logps, torch.zeros(1, 2))


def test_the_prompt_runs_once(monkeypatch):
    model, (prompts, completions) = make("Llama"), groups(ragged=False)
    hf.layout_rules(model)
    shapes = []
    model.model.register_forward_pre_hook(
        lambda module, args, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    hf.group_logps(model, prompts, completions)
    hf.group_logps(model, prompts, completions, shared_prompt="never")
    assert shapes == [(3, 6 + 4 * 5), (12, 6 + 5)]


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Gemma3, windows"])
def test_bfloat16_shares_and_is_as_close_to_the_truth(kind):
    given = groups()
    exact = by_logits(make(kind), *given)
    model = make(kind).bfloat16()
    shared, apart = (hf.group_logps(model, *given, shared_prompt=each) for each in ("always", "never"))
    assert shared.dtype == torch.float32
    assert (shared - exact).norm() < 1.5 * (apart - exact).norm()


def test_gradient_checkpointing_and_autocast():
    model, given = make("Qwen3", "sdpa"), groups()
    want = by_logits(model, *given)
    # Reason: transformers is renaming one method to the other.
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    model.train()
    assert_same(model, hf.group_logps(model, *given, shared_prompt="always"), want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = hf.group_logps(model, *given, shared_prompt="always")
    assert (low - want).norm() < 0.1 * want.norm()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft asks transformers the old way
@pytest.mark.parametrize("modules", [["q_proj", "v_proj"], ["q_proj", "lm_head"]], ids=["layers", "head"])
def test_lora(modules):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make("Llama"), peft.LoraConfig(target_modules=modules, r=2)).eval()
    for name, value in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(value)
    given = groups()
    assert_same(model, hf.group_logps(model, *given, shared_prompt="always"), by_logits(model, *given))


@pytest.mark.slow
def test_a_compiled_model_shares_too():
    model, given = make("Llama", "sdpa"), groups()
    want = by_logits(model, *given)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(hf.group_logps(compiled, *given, shared_prompt="always"), want, rtol=1e-4, atol=1e-4)


def test_scoring_and_fitting_the_same_rows_give_the_same_bits():
    """As in a trainer: log pi_theta - log pi_t is exactly 0 before the first step."""
    model, (prompts, completions) = make("Qwen2", "sdpa"), groups()
    rules = hf.layout_rules(model)
    layout = hf.make_layout(hf.lengths_of(prompts, completions), rules)
    rows = hf.make_rows(layout, prompts, completions)
    targets = rows.padded()[1].unflatten(0, (3, 4))

    def score(parts, hidden):
        return hf_groups.sequence_logps(*parts.blocks(hidden.unflatten(0, (3, 4))), targets)

    with torch.no_grad():
        old = hf.run_rows(model, rows, score, padded=True)
    torch.testing.assert_close(old, by_logits(model, prompts, completions), rtol=1e-4, atol=1e-4)
    seen = []

    def fit(parts, hidden):
        def loss(logps, **constants):
            seen.append(logps.detach())
            return losses.wind(logps, **constants, beta=0.1, eta=0.1, reduction="none")

        constants = {"old_logps": old, "ref_logps": old, "prefs": torch.full((3, 4, 4), 0.5)}
        states, head = parts.blocks(hidden.unflatten(0, (3, 4)))
        return fused_loss(loss, states, head, targets, per_group=constants)

    hf.run_rows(model, rows, fit, padded=True).backward()
    assert torch.equal(torch.cat(seen), old)


def test_where_it_does_not_hold_the_plain_rows_run_and_the_log_says_so_once(caplog, monkeypatch):
    monkeypatch.setattr(shared_check, "_said", set())
    torch.manual_seed(0)
    config = transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.4)
    (policy, reference), given = (transformers.BloomForCausalLM(config).eval() for _ in range(2)), groups()
    with caplog.at_level(logging.WARNING, logger="windkern"):
        for model in (policy, policy, reference):
            torch.testing.assert_close(hf.group_logps(model, *given), by_logits(model, *given), rtol=1e-4, atol=1e-4)
    (line,) = (record.getMessage() for record in caplog.records)
    assert "BloomForCausalLM: responses do not share their prompt, since it takes no position ids" in line
    with pytest.raises(
        hf.UnsupportedModelError, match=r"cannot share a row in BloomForCausalLM, since .* position ids"
    ):
        hf.group_logps(model, *given, shared_prompt="always")
    rows = hf.make_rows(hf.make_layout(hf.lengths_of(*given), hf.LayoutRules()), *given)
    with pytest.raises(hf.UnsupportedModelError, match="one response each for BloomForCausalLM"):
        hf.run_rows(model, rows, lambda parts, hidden: hidden)


def test_bad_input_is_named():
    model = make("Llama")
    cases = [
        (([[5]], [[[1], [2]]]), {"shared_prompt": "yes"}, ValueError, "shared_prompt must be one of"),
        (([5], [[[1]]]), {}, TypeError, "prompt_ids must be a list of lists, one for each prompt, got int in it"),
        (([torch.tensor([5])], [[[1]]]), {}, TypeError, "prompt_ids must be a list .*, got Tensor in it"),
        ((torch.tensor([[5]]), [[[1]]]), {}, TypeError, "prompt_ids must be a list .*, got Tensor$"),
        (([[5]], [[[9999, 1], [2]]]), {}, ValueError, r"ids must be in \[0, .* has embeddings, got 9999"),
        (([[5, -100]], [[[1], [2]]]), {}, ValueError, r"ids must be in \[0, .* has embeddings, got -100"),
        (([[5], [6]], [[[1]]]), {}, ValueError, "got 1 for 2 prompts"),
        (([[5], [6]], [[[1]], [[1], [2]]]), {}, ValueError, r"number of responses to each prompt.* got \[1, 2\]"),
        (([[]], [[[1]]]), {}, ValueError, r"prompt_ids\[0\] is empty"),
        (([[5]], [[[1.5]]]), {}, TypeError, r"completion_ids\[0\] must be an integer"),
        (([[5]], [[7]]), {}, TypeError, r"completion_ids\[0\] must hold lists"),
        (([[5]], [[[1]]]), {"temperature": 0.0}, ValueError, "temperature must be greater than 0"),
    ]
    for given, options, error, message in cases:
        with pytest.raises(error, match=message):
            hf.group_logps(model, *given, **options)


def test_the_examples_run():
    failed, tried = doctest.testmod(hf_groups)
    assert tried and not failed
