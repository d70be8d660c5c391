"""Tiny bases and value models, batches for them, and the plain sum of their logits."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from windkern.value.model import ValueModel

VOCAB = 18  # size of the tiny tokenizer's vocabulary


def llama(seed: int, hidden: int = 16, vocab: int = VOCAB, family: str = "Llama", **options) -> nn.Module:
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        **({"initializer_range": 0.3} | options),
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    if getattr(model.lm_head, "bias", None) is not None:
        nn.init.normal_(model.lm_head.bias)  # zeros would hide a missing bias
    return model


def pair(dtype: torch.dtype = torch.float32) -> ValueModel:
    return ValueModel(llama(1, hidden=24).to(dtype), llama(2).to(dtype))


def batch(vocab: int = VOCAB) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return three sequences: padded left, padded right, not padded."""
    ids = torch.randint(2, vocab, (3, 7), generator=torch.Generator().manual_seed(0))
    attention, scored = torch.ones_like(ids), torch.zeros_like(ids)
    attention[0, :3], attention[1, 5:] = 0, 0
    scored[0, 5:], scored[1, 2:5], scored[2, 1:] = 1, 1, 1
    return ids, attention, scored


def summed_logits(model: ValueModel, ids: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    """Return the summed logits (S, L, V) from the models' own forward passes."""
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    given = {"input_ids": ids, "attention_mask": attention, "position_ids": positions}
    return model.base(**given).logits + model.value(**given).logits


def brute_force(model: ValueModel, ids, attention, scored) -> torch.Tensor:
    logps = summed_logits(model, ids, attention)[:, :-1].log_softmax(-1)
    return torch.where(scored[:, 1:].bool(), logps.gather(-1, ids[:, 1:, None]).squeeze(-1), 0.0).sum(-1)
