"""The check of a model that decides whether responses share a row: the models it must refuse, and its cost."""

from __future__ import annotations

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from test_groups import by_logits, groups, make  # noqa: E402
from test_hf import SMALL, VOCAB, build  # noqa: E402

from windkern import hf  # noqa: E402
from windkern.hf import call as hf_call  # noqa: E402
from windkern.hf import masks as hf_masks  # noqa: E402
from windkern.hf import shared_check  # noqa: E402

SEEN = hf_masks.seen


def reason(model: nn.Module) -> str | None:
    shared_check._seen.pop(model, None)
    return shared_check.sharing_of(hf_call.find(model)).reason


def without_mask(rows, row, query, key):
    return query >= key


def half_masked(rows, row, query, key):
    """Make each response see one token of the previous responses."""
    last = rows.position_ids == rows.position_ids.max(-1, True).values
    return SEEN(rows, row, query, key) | ((query >= key) & last[row, key])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["Llama", "Mistral", "GPT2", "Gemma2, windows"])
def test_planted_faults_are_refused(kind, dtype, monkeypatch):
    model = make(kind).to(dtype)
    assert reason(model) is None
    for fault in (without_mask, half_masked):
        monkeypatch.setattr(hf_masks, "seen", fault)
        assert "in one row differ by" in reason(model)
    monkeypatch.setattr(hf_masks, "seen", SEEN)
    inputs_of = shared_check.inputs_of

    def shifted(target, rows, form, positions):
        given, amend = inputs_of(target, rows, form, positions)
        if rows.is_shared:
            given["position_ids"] = torch.arange(rows.input_ids.shape[1])[None]
        return given, amend

    monkeypatch.setattr(shared_check, "inputs_of", shifted)
    assert "in one row differ by" in reason(model)
    monkeypatch.setattr(shared_check, "inputs_of", inputs_of)
    if (
        "windows" in kind or kind == "Mistral"
    ):  # a window that is ignored, in a model whose window is longer than the check
        monkeypatch.setattr(hf_masks, "_BOUNDS", dict.fromkeys(hf_masks._BOUNDS))
        monkeypatch.setattr(hf_masks, "bounds_of", lambda base: ("sliding_window",))
        model.config.sliding_window = 4096
        assert "in one row differ by" in reason(model)


def test_a_gradient_that_stops_is_refused():
    """Values are right, but gradients from responses to their prompt are lost."""
    model = make("Llama")

    def hook(module, args, output):
        return output if output.shape[0] > 1 else output.detach() + 0.5 * (output - output.detach())

    model.model.layers[0].self_attn.v_proj.register_forward_hook(hook)
    assert "gradients in one row differ by" in reason(model)


def test_recurrent_and_hybrid_models_are_refused_by_their_layers():
    torch.manual_seed(0)
    options = {"conv_L_cache": 3, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    config = transformers.Lfm2Config(**{**SMALL, **options})
    model = transformers.Lfm2ForCausalLM(config).eval()
    assert "it has layers of the kind conv, which carry a state from token to token" in reason(model)
    given = groups()
    torch.testing.assert_close(hf.group_logps(model, *given), by_logits(model, *given), rtol=1e-4, atol=1e-4)


def test_positions_and_attention_that_cannot_be_given_are_refused_by_name():
    torch.manual_seed(0)
    config = transformers.MptConfig(vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4, initializer_range=0.4)
    assert "it takes no position ids" in reason(transformers.MptForCausalLM(config).eval())
    model = build("Llama")
    model.config._attn_implementation = "flash_attention_2"
    said = shared_check._known_reason(hf_call.find(model), positions=True)
    assert "'flash_attention_2' takes no mask of rows" in said and "attn_implementation='sdpa'" in said
    model.config._attn_implementation = "flex_attention"
    said = shared_check._known_reason(hf_call.find(model), positions=True)
    assert "FlexAttention has no backward on the device 'cpu'" in said and "attn_implementation='sdpa'" in said


def test_a_mask_that_rounding_hides_is_refused():
    """In bfloat16, a model that barely attends to other tokens proves nothing."""
    model = make("Llama").bfloat16()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(1e-4)
    assert "would hide a row without its mask" in reason(model)


def test_a_model_is_looked_at_once_for_each_circumstance(monkeypatch):
    looks, model = [], make("Mistral")
    look = shared_check._look
    monkeypatch.setattr(shared_check, "_look", lambda target: (looks.append(1), look(target))[1])
    for _ in range(2):
        hf.group_logps(model, *groups())
    assert len(looks) == 1 and model.config.sliding_window == 4
    model.set_attn_implementation("sdpa")
    hf.group_logps(model, *groups())
    assert len(looks) == 2


def test_the_look_leaves_modes_gradients_and_random_numbers_alone():
    model = make("Llama").train()
    state = torch.get_rng_state()
    assert reason(model) is None
    assert model.training and all(each.grad is None for each in model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert not model.get_input_embeddings()._forward_hooks


def test_the_look_runs_a_few_tokens_and_few_forwards():
    model, seen = make("Qwen3"), []
    hf.hidden_and_head(model)
    model.model.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["input_ids"].numel()), with_kwargs=True
    )
    assert reason(model) is None
    assert len(seen) == 5 and max(seen) <= 36
