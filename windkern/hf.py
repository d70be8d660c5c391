"""Log-probs of any transformers causal LM from its hidden states and head, without the logits.

Nothing here imports transformers: a model is asked for its decoder, its head and its configuration.
"""

from __future__ import annotations

import dataclasses
import inspect
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from windkern._checks import check_integer, check_same_device, check_shape, check_tensor, shape_of
from windkern.hf_head import UnsupportedModelError, blocks, check_adapters, linear_of
from windkern.ops.inputs import Blocks
from windkern.ops.logprobs import token_logps
from windkern.ops.sequence import sequence_logps as _sequence_logps
from windkern.transform import LogitTransform

IGNORE_INDEX = -100
_CHECKED_TOKENS = 8
_verdicts: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # base model -> LogitTransform that was verified

# Configuration fields that scale the logits before any softcap.
_SCALES = {
    "logit_scale": lambda value: float(value),  # Cohere
    "logits_scaling": lambda value: 1.0 / float(value),  # Granite
    "lm_head_multiplier": lambda value: float(value),  # Falcon-H1
}


@dataclasses.dataclass(frozen=True)
class CausalLM:
    """A causal LM taken apart for the fused ops: `logits = transform(hidden(ids, mask) @ weight.T + bias)`.

    A head that PEFT changed adds a block of a few columns for each LoRA adapter; `blocks` gives them all.
    """

    hidden: Callable[[Tensor, Tensor], Tensor]  # input_ids (S, L), attention_mask (S, L) -> (S, L, H)
    head: nn.Module  # what the model calls on hidden states: an nn.Linear, or the layer of PEFT around one
    transform: LogitTransform
    decoder: nn.Module  # what `hidden` calls

    @property
    def weight(self) -> Tensor:
        """(V, H), the parameter that the head uses now, without adapters."""
        return linear_of(self.head).weight

    @property
    def bias(self) -> Tensor | None:
        """(V,), the parameter that the head uses now."""
        return linear_of(self.head).bias

    def blocks(self, hidden: Tensor) -> tuple[Blocks, Blocks]:
        """What the fused ops take as `hidden` and `weight`, with the adapters as they are at the time of the call.

            logits = transform(sum_k hidden[k] @ weight[k].T + bias)
            with LoRA on the head: hidden = (h, s * (dropout(h) @ A.T), ...), weight = (W, B, ...)

        Dropout of the adapters is drawn in training mode, once a call and in the order in which PEFT draws it.

        Args:
            hidden: (..., H), the decoder's.

        Returns:
            (hidden, weight) for a plain head, for `modules_to_save` and where adapters are disabled or merged; else two
            tuples, one more block of r columns for each active adapter. Gradients reach W, A and B. Outside autocast
            the blocks of adapters are cast to the dtype of `hidden`.

        Raises:
            UnsupportedModelError: an active adapter is DoRA or another variant, or has a bias (`lora_bias`).

        Memory:
            r numbers per token and adapter; a copy of B (V, r) where its dtype is not that of `hidden`.
        """
        return blocks(self.head, hidden)

    def at_temperature(self, temperature: float) -> CausalLM:
        """The same model with its logits divided by `temperature` last, as a tempered sampler draws from them."""
        return dataclasses.replace(self, transform=dataclasses.replace(self.transform, temperature=temperature))


def _base_model(model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a transformers causal LM (a torch module), got {type(model).__name__}")
    if not hasattr(model, "config") and isinstance(getattr(model, "module", None), nn.Module):
        raise UnsupportedModelError(f"model is wrapped in {type(model).__name__}; pass model.module")
    if hasattr(model, "active_peft_config"):
        if getattr(model.active_peft_config, "is_prompt_learning", False):
            raise UnsupportedModelError(
                "model uses prompt-learning PEFT, which changes the input; LoRA and the like, which live inside the "
                "layers, work"
            )
        model = model.get_base_model()
    if not (hasattr(model, "get_output_embeddings") and hasattr(model, "config")):
        raise UnsupportedModelError(
            "model must be a transformers causal LM, "
            f"got {type(model).__name__} without get_output_embeddings and config"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder; only decoder-only models are supported"
        )
    return model


def _head(model: nn.Module) -> nn.Linear:
    head = model.get_output_embeddings()
    if head is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no output embeddings; load it with AutoModelForCausalLM, not AutoModel"
        )
    linear_of(head)
    return head


def _decoder(model: nn.Module, head: nn.Module) -> nn.Module:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else getattr(model, "base_model", model)
    if decoder is model or decoder is head or not isinstance(decoder, nn.Module):
        raise UnsupportedModelError(
            f"{type(model).__name__} names no decoder (get_decoder() gave {type(decoder).__name__}); compute hidden "
            "states yourself and call windkern.sequence_logps"
        )
    return decoder


def _transform(config: object) -> LogitTransform:
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    scale = 1.0
    for field, reading in _SCALES.items():
        value = getattr(config, field, None)
        if value is not None:
            scale *= reading(value)
    return LogitTransform(scale=scale, softcap=getattr(config, "final_logit_softcapping", None))


def _hidden_states(decoder: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    accepted = inspect.signature(decoder.forward).parameters

    def hidden(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        options: dict[str, object] = {"use_cache": False} if "use_cache" in accepted else {}
        if "position_ids" in accepted:
            # Hazard: with left padding a learned position table would see other positions than generation does.
            options["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        out = decoder(input_ids=input_ids, attention_mask=attention_mask.long(), **options)
        return out[0] if isinstance(out, tuple) else out.last_hidden_state

    return hidden


def hidden_and_head(model: nn.Module) -> CausalLM:
    """Take a transformers causal LM apart into hidden states, head weight, bias and logit transform.

        model(ids, mask).logits == transform(hidden(ids, mask) @ weight.T + bias)

    The first time a model is seen, its log-probs are compared with its own logits on a few tokens; the first time an
    adapter is seen on its head, its block is compared with the head's own output, with random numbers in the adapter's
    place. Both verdicts are kept for as long as the model lives.

    Args:
        model: a decoder-only transformers model with a plain nn.Linear head, or a PEFT model around one: adapters of
            any kind inside the layers, LoRA or `modules_to_save` on the head. The scale of Cohere, Granite and
            Falcon-H1 and the softcap of Gemma are read from `model.config`.

    Returns:
        CausalLM(hidden, head, transform, decoder) with the properties weight and bias, the model's own parameters, so
        gradients reach them, and a tied embedding gets both of its gradients; and the method blocks, which the fused
        ops need where LoRA is on the head.

    Raises:
        TypeError: `model` is no torch module.
        UnsupportedModelError: no decoder, no plain head, an encoder-decoder, a wrapper such as DDP, prompt-learning
            PEFT, another adapter on the head (DoRA, `lora_bias`, IA3, ...), or the log-probs do not match the model's
            own logits (the message gives the numbers).

    Memory:
        The check holds logits of 8 tokens, once.

    Source:
        The check is ours; where the pieces live is the convention of transformers.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2, num_key_value_heads=2)
        >>> parts = hidden_and_head(LlamaForCausalLM(config))
        >>> tuple(parts.weight.shape), parts.bias is None, parts.transform.is_identity
        ((32, 16), True, True)
    """
    base = _base_model(model)
    head = _head(base)
    transform = _transform(base.config)
    decoder = _decoder(base, head)
    parts = CausalLM(_hidden_states(decoder), head, transform, decoder)
    check_adapters(head)
    if _verdicts.get(base) != transform:
        _compare_with_logits(base, parts)
        _verdicts[base] = transform
    return parts


@torch.no_grad()
def _compare_with_logits(model: nn.Module, parts: CausalLM) -> None:
    """Raise unless the fused log-probs of a few tokens are those of the model's own logits."""
    vocab = parts.weight.shape[0]
    steps = torch.arange(_CHECKED_TOKENS + 1, device=parts.weight.device)
    ids = (1 + steps * max(1, (vocab - 2) // (_CHECKED_TOKENS + 1))).clamp(max=vocab - 1)[
        None
    ]  # spread, no padding id 0
    mask = torch.ones_like(ids)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # dropout would make the two passes differ
    try:
        logits = model(input_ids=ids, attention_mask=mask).logits
        states, weights = parts.blocks(parts.hidden(ids, mask)[:, :-1])
    finally:
        for module, mode in modes:
            module.training = mode
    if shape_of(logits) != (1, ids.shape[1], vocab):
        raise UnsupportedModelError(
            f"{type(model).__name__} returned logits {shape_of(logits)} for {ids.shape[1]} tokens, expected "
            f"{(1, ids.shape[1], vocab)} from its head"
        )
    targets = ids[:, 1:]
    ours = token_logps(states, weights, targets, bias=parts.bias, transform=parts.transform).logps
    theirs = logits[:, :-1].double().log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    # Reason: the model rounds its logits to its dtype, we do not; a wrong scale or softcap is off by far more.
    allowed = 1e-5 + 4 * torch.finfo(logits.dtype).eps * float(logits.abs().max())
    error = float((ours.double() - theirs).abs().max())
    if not error <= allowed:
        pair = [[round(float(value), 4) for value in row[0, :4]] for row in (ours, theirs)]
        raise UnsupportedModelError(
            f"log-probs of {type(model).__name__} from hidden states and head miss those of its logits by {error:.3g} "
            f"nats (allowed {allowed:.3g}): {pair[0]} against {pair[1]}, with {parts.transform}. The model does "
            "something to its hidden states or logits that windkern does not know; compute hidden states yourself and "
            "call windkern.sequence_logps with the right transform"
        )


def completion_targets(input_ids: Tensor, completion_mask: Tensor) -> Tensor:
    """Targets aligned with hidden states: position t scores token t + 1 if that token belongs to the completion.

        targets[s, t] = input_ids[s, t + 1] where completion_mask[s, t + 1], else -100; the last column is -100

    Args:
        input_ids: (S, L) int64 or int32, prompt and completion, padded on either side.
        completion_mask: (S, L) bool, or integers 0 and 1; 1 for the tokens to score (the end token included).

    Returns:
        (S, L) int64.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: shapes or devices do not fit, or the first column is scored, which has no token before it.

    Example:
        >>> ids = torch.tensor([[5, 6, 7, 8]])
        >>> completion_targets(ids, torch.tensor([[0, 0, 1, 1]]))
        tensor([[-100,    7,    8, -100]])
    """
    check_shape("input_ids", check_integer("input_ids", input_ids), ("S", "L"))
    mask = _as_bool("completion_mask", completion_mask, input_ids)
    if input_ids.device.type == "cpu" and input_ids.shape[1] and bool(mask[:, 0].any()):
        raise ValueError(
            "completion_mask must be 0 in the first column: its token has no token before it to predict it"
        )
    targets = torch.full_like(input_ids, IGNORE_INDEX, dtype=torch.int64)
    targets[:, :-1] = torch.where(mask[:, 1:], input_ids[:, 1:].long(), IGNORE_INDEX)
    return targets


def _as_bool(name: str, mask: object, input_ids: Tensor) -> Tensor:
    tensor = check_tensor(name, mask)
    if tensor.dtype not in (torch.bool, torch.int64, torch.int32):
        raise TypeError(f"{name} must be bool, int64 or int32, got {tensor.dtype}")
    check_shape(name, tensor, shape_of(input_ids))
    check_same_device(name, tensor, "input_ids", input_ids)
    return tensor.bool()


def sequence_logps(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_mask: Tensor,
    *,
    temperature: float = 1.0,
    normalize: str = "sum",
    num_scored: int | None = None,
    memory_budget: int | None = None,
    deterministic: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Return the log-prob of each completion under a transformers causal LM, without the logits.

        logps[s] = sum_t completion_mask[s, t] * log p(input_ids[s, t] | input_ids[s, :t])

    Differentiable with respect to every parameter that requires a gradient; under torch.no_grad only one slab of the
    vocabulary exists at a time.

    Args:
        model: as `hidden_and_head`.
        input_ids: (S, L) int64 or int32, prompt and completion, padded on either side.
        attention_mask: (S, L) bool or 0 and 1; 0 for padding.
        completion_mask: (S, L) bool or 0 and 1; 1 for the tokens to score (the end token included). Never 1 in the
            first column, nor where attention_mask is 0.
        temperature: divides the logits last, so that completions drawn at that temperature are scored as drawn.
        normalize, num_scored, memory_budget, deterministic, backend: see `windkern.sequence_logps`.

    Returns:
        (S,) nats, float32 (float64 for a float64 model).

    Raises:
        TypeError, UnsupportedModelError: as `hidden_and_head`; a mask or `input_ids` has a dtype that does not fit.
        ValueError: shapes, devices or values do not fit.
        BackendUnavailableError: the named back end cannot run here.

    Memory:
        The decoder's own, and what `windkern.plan` gives for the scored tokens.

    Source:
        `windkern.sequence_logps`.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)).eval()
        >>> ids = torch.tensor([[0, 4, 5, 6], [7, 8, 9, 10]])
        >>> attention, completion = torch.ones_like(ids), torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0]])
        >>> attention[0, 0] = 0
        >>> sequence_logps(model, ids, attention, completion).shape
        torch.Size([2])
    """
    targets = completion_targets(input_ids, completion_mask)
    attended = _as_bool("attention_mask", attention_mask, input_ids)
    if input_ids.device.type == "cpu" and bool((completion_mask.bool() & ~attended).any()):
        raise ValueError("completion_mask must be 0 wherever attention_mask is 0, got a scored padding token")
    parts = hidden_and_head(model).at_temperature(temperature)
    hidden, weight = parts.blocks(parts.hidden(input_ids, attended))
    return _sequence_logps(
        hidden,
        weight,
        targets,
        bias=parts.bias,
        transform=parts.transform,
        normalize=normalize,
        num_scored=num_scored,
        memory_budget=memory_budget,
        deterministic=deterministic,
        backend=backend,
    )
