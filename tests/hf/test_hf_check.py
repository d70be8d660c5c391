"""The check of windkern.hf: the input and output of a model's head, and the transform of its logits."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from test_hf import SMALL, VOCAB, batch, build, by_logits  # noqa: E402

from windkern import hf  # noqa: E402
from windkern.hf import check as hf_check  # noqa: E402
from windkern.transform import LogitTransform  # noqa: E402


class Changed(transformers.LlamaForCausalLM):
    """A Llama that changes its logits."""

    def forward(self, *args, **given):
        out = super().forward(*args, **given)
        out.logits = self.change(out.logits)
        return out


def changed(change, **options) -> nn.Module:
    torch.manual_seed(0)
    model = Changed(transformers.LlamaConfig(**SMALL, **options)).eval()
    model.change = change
    return model


def write(value: float, *columns: int):
    def change(logits):
        logits = logits.clone()
        logits[..., list(columns)] = torch.finfo(logits.dtype).min if value is None else value
        return logits

    return change


def assert_as_own_logits(model: nn.Module, *given) -> None:
    """Assert the values and gradients of the model's own logits, for every parameter."""
    given = given or batch()
    upstream = torch.linspace(-1, 2, given[0].shape[0])
    ours, theirs = hf.sequence_logps(model, *given), by_logits(model, *given)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    parameters = list(model.parameters())
    got, want = (torch.autograd.grad((each * upstream).sum(), parameters) for each in (ours, theirs))
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()) + 1e-7)


@pytest.mark.parametrize("value", [None, -torch.inf, -1e9], ids=["finfo.min", "-inf", "-1e9"])
def test_masked_columns_have_no_probability(value):
    columns = [column for column in range(VOCAB) if column % 4 == 0 and column not in batch()[0]]
    model = changed(write(value, *columns))
    parts = hf.hidden_and_head(model)
    assert parts.masked.nonzero().flatten().tolist() == columns and parts.transform.is_identity
    assert_as_own_logits(model)
    free = changed(lambda logits: logits)
    assert not torch.allclose(hf.sequence_logps(free, *batch()), hf.sequence_logps(model, *batch()), atol=0.05)


def test_a_mask_is_added_to_the_bias_of_the_head():
    model = changed(write(-torch.inf, 0, 1))
    model.lm_head.bias = nn.Parameter(torch.randn(VOCAB))
    assert_as_own_logits(model)
    assert torch.equal(hf.hidden_and_head(model).bias[2:], model.lm_head.bias[2:])


def test_columns_that_are_cut_off_have_no_probability():
    model = changed(lambda logits: logits[..., : VOCAB - 5])
    ids, attention, completion = batch()
    assert_as_own_logits(model, ids.clamp(max=VOCAB - 6), attention, completion)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_else_happens_to_columns_is_refused(dtype):
    """A tolerance that grows with the largest logit would let all of these pass."""
    cases = {
        r"multiplies the output of its head by 0\.5, ": lambda logits: write(-torch.inf, 3)(0.5 * logits),
        r"replaces 2 of its 61 logits by constants \(token 3 has 2\.5\)": write(2.5, 3, 4),
        "transforms the output of its head": lambda logits: logits + torch.arange(VOCAB),
        "NaN": lambda logits: torch.full_like(logits, torch.nan),
        "of real tokens differently from other numbers": lambda logits: (
            logits * (1 + (logits.amax((1, 2), True) < 100))
        ),
        "transforms .* which its configuration does not explain": lambda logits: logits.log_softmax(-1),
    }
    for message, change in cases.items():
        with pytest.raises(hf.UnsupportedModelError, match=message):
            hf.hidden_and_head(changed(change).to(dtype))
    capped = changed(lambda logits: write(-torch.inf, 3)(7 * (logits / 7).tanh()), softcap=7.0).to(dtype)
    with pytest.raises(hf.UnsupportedModelError, match="caps its logits and then masks 1"):
        hf.hidden_and_head(capped)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scale_and_cap_are_found_under_any_name(dtype):
    """In short formats as well, and for logits of any size, because the head returns numbers chosen by the check."""
    cases = [
        (lambda logits: logits * 0.3, {"mup": 0.3}, LogitTransform(scale=0.3)),
        (lambda logits: logits / 7, {"mup_scale": 7}, LogitTransform(scale=1 / 7)),
        (lambda logits: 30 * (logits / 30).tanh(), {"bound": 30.0}, LogitTransform(softcap=30.0)),
        (lambda logits: 9 * (logits * 0.3 / 9).tanh(), {"a": 9.0, "b": 0.3}, LogitTransform(scale=0.3, softcap=9.0)),
        (lambda logits: logits.float(), {}, LogitTransform()),
    ]
    for change, numbers, transform in cases:
        model = changed(change, **numbers).to(dtype)
        with torch.no_grad():
            model.lm_head.weight.mul_(0.01)  # logits so small that they do not reveal a cap
        assert hf.hidden_and_head(model).transform == transform
        model.config.__dict__.update(dict.fromkeys(numbers, 0.77))
        if numbers:
            with pytest.raises(hf.UnsupportedModelError, match="configuration does not explain"):
                hf.hidden_and_head(model)


def test_a_cap_under_another_name_holds_when_the_weights_grow():
    torch.manual_seed(0)
    sizes = {key: value for key, value in SMALL.items() if key not in ("initializer_range",)}
    config = transformers.RecurrentGemmaConfig(**sizes | {"num_hidden_layers": 3}, lru_width=32)
    model = transformers.RecurrentGemmaForCausalLM(config).bfloat16().eval()
    ids, attention, completion = batch()
    attention[0] = 1  # left padding is tested elsewhere
    hf.sequence_logps(model, ids, attention, completion)
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=3)
    ours, theirs = hf.sequence_logps(model, ids, attention, completion), by_logits(model, ids, attention, completion)
    uncapped = hf.hidden_and_head(model)
    assert uncapped.transform.softcap == config.logits_soft_cap == 30.0
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.5)


def test_a_check_is_repeated_when_what_it_saw_has_changed(monkeypatch):
    model, looks = build("Gemma2").eval(), []
    look = hf_check._look
    monkeypatch.setattr(hf_check, "_look", lambda target: (looks.append(target), look(target))[1])

    def seen() -> int:
        hf.hidden_and_head(model)
        return len(looks)

    assert seen() == 1
    with torch.no_grad():
        model.lm_head.weight.normal_()
    assert seen() == 1  # the check does not depend on weights
    model.config.final_logit_softcapping = 5.0
    assert seen() == 2 and hf.hidden_and_head(model).transform.softcap == 5.0
    with torch.autocast("cpu", torch.bfloat16):
        assert seen() == 3
    assert seen() == 3  # both are remembered
    model.bfloat16()
    assert seen() == 4
    model.set_output_embeddings(nn.Linear(32, VOCAB, bias=False).bfloat16())
    assert seen() == 5
    model.resize_token_embeddings(VOCAB + 3)
    assert seen() == 6 and hf.hidden_and_head(model).weight.shape[0] == VOCAB + 3
    handle = model.get_output_embeddings().register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(hf.UnsupportedModelError, match="transforms the output of its head"):
        hf.hidden_and_head(model)
    handle.remove()
    assert seen() == 7


def test_a_claim_of_a_text_part_is_the_business_of_the_model_around_it():
    class Text(transformers.LlamaConfig):
        def get_text_config(self, *args, **given):
            return transformers.LlamaConfig(logit_scale=0.25)

    torch.manual_seed(0)
    ignoring = Changed(Text(**SMALL)).eval()
    ignoring.change = lambda logits: logits
    assert hf.hidden_and_head(ignoring).transform.is_identity
    assert_as_own_logits(ignoring)
    ignoring.change = lambda logits: 0.25 * logits
    ignoring.lm_head = nn.Linear(32, VOCAB, bias=False)
    assert hf.hidden_and_head(ignoring).transform.scale == 0.25


@pytest.mark.parametrize("dtype, factor", [(torch.float32, 1 + 1e-5), (torch.bfloat16, 1.01)])
def test_a_head_whose_forward_was_replaced_is_refused(dtype, factor):
    """A difference slightly above rounding is detected, in short formats as well."""
    model = build("Llama").to(dtype).eval()
    model.lm_head.forward = lambda hidden: factor * nn.functional.linear(hidden, model.lm_head.weight)
    with pytest.raises(hf.UnsupportedModelError, match=r"output .* differs from the product with its weight by"):
        hf.hidden_and_head(model)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(hf.UnsupportedModelError, match="has NaN or infinity in its hidden states or its head"):
        hf.hidden_and_head(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_short_products_of_torch_are_no_fault_of_the_model(dtype, monkeypatch):
    """A product with more rounding stands for TF32 on a GPU and bfloat16 in oneDNN, by torch's newer settings."""
    # torch cannot report its rounding once its newer settings have been used.
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: pytest.fail("asked"))
    model, product = build("Gemma2").to(dtype).eval(), nn.functional.linear

    def rounded(hidden, weight, bias=None):
        short = hidden.dtype == torch.float32 and weight.shape[0] == VOCAB
        return product(*(each.bfloat16().float() if short else each for each in (hidden, weight)), bias)

    monkeypatch.setattr(nn.functional, "linear", rounded)
    assert hf.hidden_and_head(model).transform.softcap == 4.0


@pytest.mark.parametrize("body, head", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_head_of_another_dtype_than_the_body(body, head):
    model = build("Phi").to(body).eval()
    model.lm_head.to(head)
    seen = []
    handle = model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0]) or (args[0].to(head),))
    with torch.no_grad():
        model(input_ids=batch()[0][1:], attention_mask=batch()[1][1:])
    handle.remove()
    ids, attention, completion = (each[1:] for each in batch())
    ours = hf.sequence_logps(model, ids, attention, completion)
    logits = nn.functional.linear(seen[0].to(head).double(), *(each.double() for each in model.lm_head.parameters()))
    tokens = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    wanted = torch.where(completion[:, 1:].bool(), tokens, 0.0).sum(-1).float()
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
    gradients = torch.autograd.grad(ours.sum(), [model.lm_head.weight, model.get_input_embeddings().weight])
    assert [each.dtype for each in gradients] == [head, body] and all(bool(each.any()) for each in gradients)


def test_models_that_see_later_tokens_or_padding_say_so():
    sizes = {"vocab_size": VOCAB, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16}
    later = transformers.XLNetLMHeadModel(transformers.XLNetConfig(**sizes, initializer_range=0.4)).eval()
    with pytest.warns(UserWarning, match="XLNetLMHeadModel change with later tokens"):
        hf.hidden_and_head(later)
    sizes = {"vocab_size": VOCAB, "d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2}
    bart = transformers.BartForCausalLM(transformers.BartConfig(**sizes, is_encoder_decoder=False)).eval()
    ids, attention, completion = batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf.sequence_logps(bart, ids[1:], attention[1:], completion[1:])
    with pytest.warns(UserWarning, match="BartForCausalLM change with padding on the left"):
        ours = hf.sequence_logps(bart, ids, attention, completion)
    logits = bart(input_ids=ids, attention_mask=attention).logits[:, :-1]
    tokens = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(ours, torch.where(completion[:, 1:].bool(), tokens, 0.0).sum(-1), rtol=1e-5, atol=1e-5)


def test_a_model_that_cannot_run_on_text_alone_says_why():
    def fail(logits):
        raise KeyError("pixel_values")

    with pytest.raises(hf.UnsupportedModelError, match="forward of Changed on 9 tokens of text failed: KeyError"):
        hf.hidden_and_head(changed(fail))
    model = build("Llama").eval()
    model.lm_head.forward, model.forward = None, lambda **given: model.model(**given)  # never called
    with pytest.raises(hf.UnsupportedModelError, match="does not call its head, the Linear of"):
        hf.hidden_and_head(model)


def test_values_of_a_configuration_that_mean_nothing_do_no_harm():
    sizes = {"vocab_size": VOCAB, "d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 16}
    for scale in (None, "inv_sqrt_d_model"):
        config = transformers.MptConfig(**sizes, logit_scale=scale)
        assert hf.hidden_and_head(transformers.MptForCausalLM(config).eval()).transform.is_identity
    model = build("Gemma2").eval()
    model.config.final_logit_softcapping = 0.0  # all logits are 0 then
    with pytest.raises(hf.UnsupportedModelError, match="constants"):
        hf.hidden_and_head(model)
