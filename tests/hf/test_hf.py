"""windkern.hf against the logits of tiny models of each family."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from windkern import hf  # noqa: E402
from windkern.hf import causal_lm as hf_causal_lm  # noqa: E402
from windkern.hf import check as hf_check  # noqa: E402
from windkern.transform import LogitTransform  # noqa: E402

VOCAB = 61
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.4,  # logits of several nats, so that a wrong scale or softcap shows
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": 4},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 4.0},
    "Gemma3": {"head_dim": 8, "final_logit_softcapping": 4.0, "sliding_window": 4},
    "Cohere": {"logit_scale": 0.3},
    "Cohere2": {"logit_scale": 0.3, "sliding_window": 4},
    "Granite": {"logits_scaling": 5.0},
    "Phi": {},  # its head has a bias
    "Phi3": {},
    "Olmo": {},
    "Olmo2": {},
    "GPT2": None,
}
CONFIGURATIONS = {"Gemma3": "Gemma3TextConfig"}
TRANSFORMS = {
    "Gemma2": LogitTransform(softcap=4.0),
    "Gemma3": LogitTransform(softcap=4.0),
    "Cohere": LogitTransform(scale=0.3),
    "Cohere2": LogitTransform(scale=0.3),
    "Granite": LogitTransform(scale=0.2),
}


def build(family: str) -> nn.Module:
    torch.manual_seed(0)
    if family == "GPT2":
        config = transformers.GPT2Config(
            vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, initializer_range=0.4, bos_token_id=1, eos_token_id=2
        )
        return transformers.GPT2LMHeadModel(config)
    config = getattr(transformers, CONFIGURATIONS.get(family, f"{family}Config"))(**SMALL, **FAMILIES[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    if getattr(model.lm_head, "bias", None) is not None:
        nn.init.normal_(model.lm_head.bias)  # zeros would hide a missing bias
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def model(request) -> nn.Module:
    return build(request.param).eval()


@pytest.fixture
def llama() -> nn.Module:
    return build("Llama").eval()


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return three sequences: padded left, padded right, not padded."""
    ids = torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))
    attention, completion = torch.ones_like(ids), torch.zeros_like(ids)
    attention[0, :3] = 0
    attention[1, 7:] = 0
    completion[:, 5:] = 1
    completion[1, 7:] = 0
    return ids, attention, completion


def by_logits(model: nn.Module, ids, attention, completion, temperature: float = 1.0) -> torch.Tensor:
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=attention, position_ids=positions).logits[:, :-1].float()
    tokens = (logits / temperature).log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return torch.where(completion[:, 1:].bool(), tokens, 0.0).sum(-1)


def test_value_and_gradients_are_those_of_the_logits(model):
    upstream = torch.tensor([1.0, -2.0, 0.5])
    ours = hf.sequence_logps(model, *batch())
    theirs = by_logits(model, *batch())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    parameters = list(model.parameters())
    got = torch.autograd.grad((ours * upstream).sum(), parameters)
    want = torch.autograd.grad((theirs * upstream).sum(), parameters)
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()) + 1e-7)


def test_bfloat16_is_closer_to_the_truth_than_the_logits_are(model):
    exact = by_logits(model, *batch())
    low = build(type(model).__name__.removesuffix("ForCausalLM").removesuffix("LMHeadModel")).to(torch.bfloat16).eval()
    ours, theirs = hf.sequence_logps(low, *batch()), by_logits(low, *batch())
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() < 2 * (theirs - exact).abs().max() + 0.05


def test_the_logit_transform_is_read_from_the_configuration():
    for family in FAMILIES:
        parts = hf.hidden_and_head(build(family))
        assert parts.transform == TRANSFORMS.get(family, LogitTransform()), family
        assert (parts.bias is not None) == (family == "Phi"), family


def test_temperature_divides_last():
    model = build("Gemma2").eval()
    ours = hf.sequence_logps(model, *batch(), temperature=0.7)
    torch.testing.assert_close(ours, by_logits(model, *batch(), temperature=0.7), rtol=1e-5, atol=1e-5)


def test_the_head_never_makes_logits(llama, monkeypatch):
    hf.hidden_and_head(llama)  # the check is allowed to
    monkeypatch.setattr(llama.lm_head, "forward", lambda hidden: pytest.fail("logits were computed"))
    hf.sequence_logps(llama, *batch()).sum().backward()


def test_padding_changes_nothing(model):
    ids, attention, completion = batch()
    alone = hf.sequence_logps(model, ids[:1, 3:], attention[:1, 3:], completion[:1, 3:])
    torch.testing.assert_close(hf.sequence_logps(model, ids, attention, completion)[:1], alone, rtol=1e-4, atol=1e-4)


def test_a_model_is_checked_once(llama, monkeypatch):
    calls = []
    look = hf_check._look
    monkeypatch.setattr(hf_check, "_look", lambda target: (calls.append(target), look(target))[1])
    for _ in range(3):
        hf.sequence_logps(llama, *batch())
    assert len(calls) == 1


def test_the_check_leaves_dropout_as_it_was(llama):
    llama.train()
    llama.model.layers[0].eval()
    hf.hidden_and_head(llama)
    assert llama.training and llama.model.layers[1].training and not llama.model.layers[0].training


@pytest.mark.parametrize(
    ("field", "value"), [("final_logit_softcapping", 2.0), ("logit_scale", 0.9), ("logits_scaling", 1.1)]
)
def test_a_configuration_the_model_does_not_follow_is_refused_with_numbers(llama, field, value):
    setattr(llama.config, field, value)
    with pytest.raises(hf.UnsupportedModelError, match=r"differ from those of its logits by .* nats"):
        hf.hidden_and_head(llama)


def test_a_model_that_changes_its_logits_elsewhere_is_refused(llama):
    llama.lm_head.register_forward_hook(lambda module, args, out: out * 1.05)
    with pytest.raises(hf.UnsupportedModelError, match="compute hidden states yourself"):
        hf.hidden_and_head(llama)


class OddHead(nn.Linear):
    def forward(self, hidden):
        return 2 * super().forward(hidden)


def test_unsupported_models_say_what_would_do(llama):
    with pytest.raises(TypeError, match="causal LM"):
        hf.hidden_and_head("llama")
    with pytest.raises(hf.UnsupportedModelError, match="without get_output_embeddings"):
        hf.hidden_and_head(nn.Linear(2, 2))
    with pytest.raises(hf.UnsupportedModelError, match="AutoModelForCausalLM"):
        hf.hidden_and_head(llama.model)
    wrapped = nn.DataParallel(nn.Linear(2, 2))
    with pytest.raises(hf.UnsupportedModelError, match=r"DataParallel, which copies it .* DistributedDataParallel"):
        hf.hidden_and_head(wrapped)
    llama.lm_head = OddHead(32, VOCAB, bias=False)
    with pytest.raises(hf.UnsupportedModelError, match=r"OddHead, not a plain nn\.Linear"):
        hf.hidden_and_head(llama)


def test_encoder_decoders_are_refused():
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    with pytest.raises(hf.UnsupportedModelError, match="encoder-decoder"):
        hf.hidden_and_head(transformers.T5ForConditionalGeneration(config))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft asks transformers the old way
def test_lora_inside_the_layers_works(llama):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(llama, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)).eval()
    for name, value in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(value)
    torch.testing.assert_close(hf.sequence_logps(adapted, *batch()), by_logits(adapted, *batch()), rtol=1e-5, atol=1e-5)
    with adapted.disable_adapter():
        torch.testing.assert_close(
            hf.sequence_logps(adapted, *batch()), by_logits(adapted, *batch()), rtol=1e-5, atol=1e-5
        )


def test_masks_are_checked(llama):
    ids, attention, completion = batch()
    with pytest.raises(ValueError, match="first column"):
        hf.sequence_logps(llama, ids, attention, torch.ones_like(ids))
    with pytest.raises(ValueError, match="scored padding token"):
        hf.sequence_logps(llama, ids, torch.zeros_like(attention), completion)
    with pytest.raises(TypeError, match="completion_mask must be bool"):
        hf.sequence_logps(llama, ids, attention, completion.float())
    with pytest.raises(ValueError, match="attention_mask must have shape"):
        hf.sequence_logps(llama, ids, attention[:, 1:], completion)


@pytest.mark.parametrize("odd", [-100, 10**6])
def test_an_id_without_an_embedding_is_named(llama, odd):
    ids, attention, completion = batch()
    padded = torch.where(attention.bool(), ids, odd)
    assert not torch.equal(padded, ids)
    with pytest.raises(ValueError, match=rf"input_ids must be in \[0, .* got {odd} \(padding too needs an id"):
        hf.sequence_logps(llama, padded, attention, completion)


@pytest.mark.parametrize(
    ("kind", "given", "most"),
    [
        ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16}, 16),
        ("GPTJForCausalLM", {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16, "rotary_dim": 4}, 16),
        ("BertLMHeadModel", SMALL | {"is_decoder": True, "max_position_embeddings": 16}, 16),
        ("RobertaForCausalLM", SMALL | {"is_decoder": True, "max_position_embeddings": 17}, 16),
    ],
)
def test_more_tokens_than_positions_are_named(kind, given, most):
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**(given | {"vocab_size": VOCAB}))).eval()
    ids = torch.arange(most + 1)[None] + 4
    mask = torch.ones_like(ids)
    message = (
        f"row of {most + 1} tokens, padding included, is longer than the {most} positions of {kind}, whose forward"
    )
    with pytest.raises(ValueError, match=message) as caught:
        hf.sequence_logps(model, ids, mask, mask.index_fill(1, torch.tensor([0]), 0))
    assert isinstance(caught.value.__cause__, (IndexError, RuntimeError))
    with pytest.raises(ValueError, match=message):
        hf.group_logps(model, [ids[0, :9].tolist()], [[[*ids[0, 9:].tolist(), 5]]])  # the last token only is a target
    with pytest.raises(ValueError, match=message):
        hf.hidden_and_head(model).hidden(ids, mask)
    assert hf.group_logps(model, [ids[0, :9].tolist()], [[ids[0, 9:].tolist()]]).isfinite().all()


def test_positions_of_a_configuration_alone_refuse_nothing():
    """A rotary embedding goes on; an error of the job is not one of positions."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, max_position_embeddings=16)).eval()
    ids = torch.arange(24)[None] + 4
    assert hf.group_logps(model, [ids[0, :9].tolist()], [[ids[0, 9:].tolist()]]).isfinite().all()

    def job(parts, hidden):
        raise IndexError("of the job")

    with pytest.raises(IndexError, match="of the job"):
        hf.run(model, ids, torch.ones_like(ids), job)


def test_a_batch_of_no_tokens_is_named(llama):
    for empty in (torch.zeros(0, 4, dtype=torch.long), torch.zeros(2, 0, dtype=torch.long)):
        with pytest.raises(ValueError, match="input_ids must hold one token at least, got shape"):
            hf.sequence_logps(llama, empty, empty, empty)


def test_targets_are_shifted_once():
    ids, _, completion = batch()
    targets = hf.completion_targets(ids, completion)
    scored = targets != hf.IGNORE_INDEX
    assert torch.equal(scored[:, :-1], completion[:, 1:].bool()) and not scored[:, -1].any()
    assert torch.equal(targets[scored], ids[completion.bool()])


def test_the_examples_run():
    failed, tried = doctest.testmod(hf_causal_lm)
    assert tried and not failed
