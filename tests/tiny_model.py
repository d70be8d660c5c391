"""A language model of a few words for tests of training, saved to a folder like a real one."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

WORDS = ("good", "bad", "day", "rain", "the", "was", "a", "bus", "and", "so", "very", "not")
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
)


def make_tokenizer(chat: bool = True):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ("<pad>", "<eos>", "<unk>", "user", "assistant", "system", *WORDS)
    tokenizer = Tokenizer(models.WordLevel({name: k for k, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="right"
    )
    if chat:
        fast.chat_template = TEMPLATE
    return fast


def make_model(seed: int = 0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=6 + len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def make_mistral(window: int | None):
    """Return a model whose heads are wide enough for compiled flex_attention, two of them for each one of keys."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=window,
        initializer_range=0.1,
    )
    return MistralForCausalLM(config).eval()


def make_classifier(kind: str = "Llama", labels: int = 1, padding: int | None = 0):
    import transformers

    torch.manual_seed(0)
    options = {
        "vocab_size": 6 + len(WORDS),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_labels": labels,
        "pad_token_id": padding,
        "initializer_range": 0.5,
    }
    configuration = getattr(transformers, f"{kind}Config")(**options)
    return getattr(transformers, f"{kind}ForSequenceClassification")(configuration).eval()


def save(folder: Path) -> Path:
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


_calls = 0


def goodness(prompts, responses) -> list[float]:
    """A reward: the share of good words minus the share of bad ones.

    With HANG_AT=n in the environment, the n-th call writes a file and never returns, so that a test can kill it there.
    """
    global _calls
    _calls += 1
    if str(_calls) == os.environ.get("HANG_AT"):
        Path(os.environ["HANG_FILE"]).touch()
        time.sleep(600)
    return [(text.split().count("good") - text.split().count("bad")) / max(1, len(text.split())) for text in responses]


def indifference(prompts, responses) -> list[float]:
    """A reward that gives nothing to learn."""
    return [0.0] * len(responses)
