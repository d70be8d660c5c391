"""A random PairRM of a few words for tests, with its tokenizer."""

from __future__ import annotations

import torch
from tiny_model import WORDS

from windkern.train.judges.pairrm import MARKERS, PairRMModel

NAMES = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "USER:", "Assistant:", *WORDS)


def make_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({name: k for k, name in enumerate(NAMES)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.add_tokens(list(MARKERS))
    return fast


def make_pairrm(**changes) -> PairRMModel:
    from transformers import DebertaV2Config

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    kind = {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"]}
    config = DebertaV2Config(
        vocab_size=len(NAMES) + len(MARKERS),
        type_vocab_size=0,
        initializer_range=0.5,
        pad_token_id=0,
        max_position_embeddings=32,
        **sizes | kind,
    )
    config.n_tasks, config.drop_out = 1, 0.05
    for name, value in changes.items():
        setattr(config, name, value)
    return PairRMModel(config).eval()
