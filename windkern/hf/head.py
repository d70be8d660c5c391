"""Split the head of a causal LM, a plain nn.Linear or one that PEFT changed, into blocks whose logits add up.

Nothing here imports peft: a head can be one of its layers only if peft is imported already.
"""

from __future__ import annotations

import functools
import sys
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from windkern.hf.tensor_parallel import is_cut
from windkern.ops.inputs import Blocks

_CHECKED_ROWS = 8
_verified: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # LoRA layer -> names of adapters that were checked


class UnsupportedModelError(ValueError):
    """Raised if log-probs of a model cannot be computed from hidden states and a head. The message says what to do."""


def is_plain(module: nn.Module) -> bool:
    """Return whether the module is an nn.Linear whose forward is that of nn.Linear."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _is_lora(module: nn.Module) -> bool:
    """Return whether the module is peft's LoRA on a linear layer, not a quantised subclass with its own methods."""
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(module, peft.tuners.lora.Linear):
        return False
    own = peft.tuners.lora.Linear
    return type(module).forward is own.forward and type(module).merge is own.merge


def _unwrap(head: Any) -> Any:
    """Return the layer that `modules_to_save` of PEFT calls now: the active adapter's copy, or the original."""
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(head, peft.utils.ModulesToSaveWrapper):
        return head
    active = head.active_adapters
    if head.disable_adapters or not active or any(name not in head.modules_to_save for name in active):
        return head.original_module
    return head.modules_to_save[active[0]]


def _refuse(head: nn.Module, why: str, remedy: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"the head is a {type(head).__module__}.{type(head).__qualname__}, {why}; {remedy}")


def linear_of(head: nn.Module) -> nn.Linear:
    """Return the nn.Linear with the weight (V, H) and bias that the head uses now, below PEFT's layers.

    Raises:
        UnsupportedModelError: no such layer exists whose logits are the product with its weight.
    """
    layer = _unwrap(head)
    if is_plain(layer):
        return layer
    if _is_lora(layer):
        if is_plain(layer.base_layer):
            return layer.base_layer
        layer = layer.base_layer
    if type(layer).__module__.split(".")[0] == "peft":
        why = "and only LoRA on a plain nn.Linear and modules_to_save are supported there"
        raise _refuse(layer, why, _way_out(layer))
    if isinstance(layer, nn.ModuleList):
        raise _refuse(layer, f"which holds {len(layer)} heads, not one distribution", "use a model with one head")
    raise _refuse(layer, "not a plain nn.Linear whose logits are the product with its weight", _way_out(layer))


def head_shape(head: nn.Module) -> tuple[int, int]:
    """Return (V, H) of the weight, even while ZeRO-3 has it in pieces."""
    weight = linear_of(head).weight
    return tuple(getattr(weight, "ds_shape", weight.shape))


def _way_out(layer: nn.Module) -> str:
    if _is_quantised(layer):
        return "leave the head out of quantisation (llm_int8_skip_modules, modules_to_not_convert)"
    if type(layer).__name__ == "TrainableTokensWrapper":
        return (
            "it trains rows of the embedding, to which the head is tied: leave trainable_token_indices out of the "
            "configuration, or untie the head (config.tie_word_embeddings=False) before the adapter is added"
        )
    if type(layer).__module__.split(".")[0] == "peft":
        return "leave the head out of target_modules (of any adapter), or merge the adapter with merge_and_unload()"
    return "put a plain nn.Linear there, or compute logits yourself and take their log_softmax"


def _is_quantised(layer: nn.Module) -> bool:
    inner = getattr(layer, "base_layer", layer)
    weight, kind = getattr(inner, "weight", None), f"{type(inner).__module__}.{type(inner).__qualname__}".lower()
    short = isinstance(weight, Tensor) and (weight.dtype.itemsize == 1 or not weight.is_floating_point())
    return short or any(part in kind for part in ("bitsandbytes", "quant", "awq", "gptq", "hqq", "aqlm"))


def _adapters(layer: Any) -> list[str]:
    """Return the names of the adapters that peft's layer adds in its next call: none if disabled or merged."""
    if not _is_lora(layer) or layer.disable_adapters or layer.merged:
        return []
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if names and is_cut(layer.base_layer.weight):
        raise _refuse(
            layer,
            "whose weight is sharded by tensor parallelism while its adapters are not",
            "leave the head out of target_modules, or out of the tensor-parallel plan",
        )
    for name in names:
        if name in layer.lora_variant:
            variant = type(layer.lora_variant[name]).__name__
            raise _refuse(
                layer,
                f"whose adapter {name!r} is a {variant}, not a product added to the logits",
                "use plain LoRA on the head (use_dora=False and no other variant), or leave it out of target_modules",
            )
        if layer.lora_B[name].bias is not None:
            raise _refuse(
                layer,
                f"whose adapter {name!r} has its own bias",
                "set lora_bias=False, or leave the head out of target_modules",
            )
    return names


def whole(weight: Tensor) -> Tensor:
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def blocks(head: nn.Module, hidden: Tensor) -> tuple[Blocks, Blocks]:
    """Return blocks of hidden states and weights, as `head(hidden)` would use them now.

        head(hidden) == sum_k hidden[k] @ weight[k].T + bias
        with LoRA: hidden = (h, s * (dropout(h) @ A.T), ...), weight = (W, B, ...)

    Args:
        head: the module that the model calls.
        hidden: (..., H).

    Returns:
        (hidden, W) without an active adapter, else two tuples with one more block of r columns for each adapter. Blocks
        of adapters have the dtype of W, except under autocast, where the ops cast. Gradients reach W, A and B.

    Raises:
        UnsupportedModelError: the logits are not such a sum.
    """
    linear, layer = linear_of(head), _unwrap(head)
    names = _adapters(layer)
    cast = not torch.is_autocast_enabled(hidden.device.type)
    if not names:
        if _is_lora(layer) and layer.disable_adapters and layer.merged:
            layer.unmerge()  # as peft's own forward does, so that disabled means the weights below the adapters
        return hidden, linear.weight
    states, weights, x = [hidden], [linear.weight], hidden
    for name in names:
        down, up = layer.lora_A[name], layer.lora_B[name].weight
        x = layer._cast_input_dtype(x, down.weight.dtype)  # peft casts the input again for each adapter
        low = nn.functional.linear(layer.lora_dropout[name](x), whole(down.weight)) * layer.scaling[name]
        states.append(low.to(linear.weight.dtype) if cast else low)
        weights.append(up.to(linear.weight.dtype) if cast else up)
    return tuple(states), tuple(weights)


class _BothWays(nn.Module):
    """Return what the head computes, and the sum of its blocks."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        states, weights = blocks(self.head, hidden)
        products = (nn.functional.linear(part, weight) for part, weight in zip(states, weights, strict=True))
        ours = functools.reduce(torch.add, products)
        bias = linear_of(self.head).bias
        # Reason: hooks and replaced forwards are not adapters, and the model may be running them now.
        return type(self.head).forward(self.head, hidden), ours if bias is None else ours + bias


def adapter_state(head: nn.Module) -> tuple:
    """Return a value that changes with the adapters that the next call of the head adds."""
    layer = _unwrap(head)
    if not _is_lora(layer):
        return ()
    return tuple(layer.active_adapters), bool(layer.disable_adapters), tuple(layer.merged_adapters)


@torch.no_grad()
def check_adapters(head: nn.Module) -> None:
    """Raise unless the blocks of each active adapter add up to what the head computes; once for each adapter.

    Adapter weights are random during the check: a new adapter is all zeros and would match anything.
    """
    layer = _unwrap(head)
    names = _adapters(layer)
    done = _verified.get(layer, frozenset())
    if done.issuperset(names):
        return
    weight = linear_of(head).weight
    generator = torch.Generator(device=weight.device).manual_seed(0)  # Reason: leave the caller's random state alone

    def draw(like: Tensor) -> Tensor:
        drawn = torch.randn(like.shape, generator=generator, device=weight.device, dtype=torch.float32)
        return drawn.to(like.dtype)

    hidden = draw(weight.new_empty((_CHECKED_ROWS, weight.shape[1])))
    peak = 1 + float(nn.functional.linear(hidden, weight).abs().max())
    stand_ins = {}
    for name in names:
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
        stand_ins[f"head.lora_A.{name}.weight"] = draw(down) / down.shape[1] ** 0.5
        stand_ins[f"head.lora_B.{name}.weight"] = draw(up) * peak  # as large as the logits below it
    modes = [(module, module.training) for module in layer.modules()]
    layer.eval()  # two calls would draw different dropout
    try:
        theirs, ours = torch.func.functional_call(_BothWays(layer), stand_ins, (hidden,))
    finally:
        for module, mode in modes:
            module.training = mode
    error, size = float((ours.double() - theirs.double()).abs().max()), float(theirs.abs().max())
    allowed = max(1e-5, 8 * torch.finfo(theirs.dtype).eps) * size
    if not error <= allowed:
        raise _refuse(
            layer,
            f"and the blocks of its adapters {', '.join(names)} differ from its logits by {error:.3g} (allowed: "
            f"{allowed:.3g} for logits up to {size:.3g})",
            "leave the head out of target_modules",
        )
    _verified[layer] = done | set(names)
