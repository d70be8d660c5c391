"""PairRM: a DeBERTa that reads a prompt with two responses and says which is better."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DebertaV2Model, DebertaV2PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from windkern._checks import check_count
from windkern.train.data.prompts import as_messages, shown
from windkern.train.judges.classifiers import Classifier, check_whole

MARKERS = ("<|source|>", "<|candidate1|>", "<|candidate2|>")
_LONGEST = 1224 + 2 * 412  # tokens of a source and two candidates
# The spelling is llm-blender's.
_INSTRUCTION = "Finish the following coversation in each i-th turn by filling in <Response i> with your response."


class PairRMModel(DebertaV2PreTrainedModel):
    """The network of PairRM.

        s_k = v . tanh(W [h_source; h_k] + b) + c,    logit = mean over tasks of s_1 - s_2

    with h the last hidden states at the three marker tokens.

    Source:
        Jiang, Ren, Lin 2023, "LLM-Blender", arXiv 2306.02561; `DebertaV2PairRM` of llm-blender 0.0.2.
    """

    def __init__(self, config):
        super().__init__(config)
        width, drop = config.hidden_size, getattr(config, "drop_out", 0.0)
        self.pretrained_model = DebertaV2Model(config)
        self.head_layer = nn.Sequential(
            nn.Dropout(drop),
            nn.Linear(2 * width, width),
            nn.Tanh(),
            nn.Dropout(drop),
            nn.Linear(width, getattr(config, "n_tasks", 1)),
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.pretrained_model.get_input_embeddings()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, places: Tensor) -> SequenceClassifierOutput:
        """Return (S, 1) logits of (S, L) ids and mask, padded on the right, with (S, 3) columns of the markers."""
        hidden = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        source, first, second = hidden[torch.arange(len(places), device=places.device)[:, None], places].unbind(1)
        one, other = (self.head_layer(torch.cat([source, each], -1)) for each in (first, second))  # (S, tasks)
        return SequenceClassifierOutput(logits=(one - other).mean(-1, keepdim=True))


def load_pairrm(name: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """Return (model in eval mode, tokenizer) of a PairRM checkpoint, from a folder or the hub.

    Raises:
        ValueError: weights of the model are not in the checkpoint, or weights of the checkpoint are not in the model.
        OSError: the folder or the hub id cannot be read.
    """
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    loaded: Any = PairRMModel.from_pretrained(name, dtype=dtype, output_loading_info=True)
    model, found = loaded
    check_whole(name, "PairRM", set(found["missing_keys"]), set(found["unexpected_keys"]))
    return model.to(device).eval(), tokenizer


class PairRM:
    """A preference function made from PairRM, for `PairJudge`, which asks in both orders.

        P(first beats second) = sigmoid(logit)

    The source is the prompt. For a conversation it is the instruction and the user's turns, as llm-blender's
    `compare_conversations` writes them, and the assistant's earlier turns are part of both candidates. A system message
    is put in front of the user's next turn. Each of the three texts is encoded separately, after its marker; the source
    is cut to `source_length` tokens, and the two candidates share the remainder of 2048.

    Args:
        model, tokenizer: from `load_pairrm`.
        batch_size: pairs at a time.
        source_length: longest source, in tokens.

    Raises:
        ValueError: a number is out of range, or the tokenizer lacks a marker; when reading, the turns of a prompt
            do not alternate between user and assistant.

    Source:
        llm-blender 0.0.2, `tokenize_pair` and `get_pair_from_conv`.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 16, source_length: int = 1224):
        model.config.num_labels = 1
        self.classifier = Classifier(model, tokenizer, batch_size=batch_size)
        self.source_length = check_count("source_length", source_length, least=8)
        if self.source_length > _LONGEST - 16:
            raise ValueError(f"source_length must be at most {_LONGEST - 16}, got {source_length}")
        known = tokenizer.get_vocab()
        if missing := [marker for marker in MARKERS if marker not in known]:
            raise ValueError(f"the tokenizer of PairRM must know {', '.join(MARKERS)}, but lacks {missing}")
        self.markers = [known[marker] for marker in MARKERS]

    def __call__(self, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]) -> list[float]:
        rows = [self.encode(*entry) for entry in zip(prompts, firsts, seconds, strict=True)]
        return self.classifier(rows)[:, 0].sigmoid().tolist()

    def encode(self, prompt: str, first: str, second: str) -> dict[str, list[int]]:
        """Return the model inputs of a prompt with two responses."""
        source, before = pair_texts(prompt)
        ids = self._part(0, source, self.source_length)
        places = [self._place(ids, 0)]
        room = (_LONGEST - len(ids)) // 2
        for k, text in enumerate((first, second), 1):
            part = self._part(k, before + text, room)
            places.append(len(ids) + self._place(part, k))
            ids += part
        return {"input_ids": ids, "places": places}

    def _part(self, marker: int, text: str, longest: int) -> list[int]:
        tokenizer = self.classifier.tokenizer
        return tokenizer(MARKERS[marker] + text, truncation=True, max_length=longest, verbose=False)["input_ids"]

    def _place(self, ids: list[int], marker: int) -> int:
        """Return the column of a marker. Reason: a text may contain a marker as well; the first one is ours."""
        return ids.index(self.markers[marker])


def pair_texts(prompt: str) -> tuple[str, str]:
    """Return (the source of a prompt, the text in front of both candidates).

    Raises:
        ValueError: user and assistant do not alternate in it.

    Example:
        >>> pair_texts("Why?")
        ('Why?', '')
        >>> from windkern.train.data.prompts import ChatPrompt
        >>> turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "Why?")]
        >>> source, before = pair_texts(ChatPrompt([{"role": role, "content": text} for role, text in turns]))
        >>> print(source.partition("response.")[2])
        USER: Hi
        Assistant: <Response 1>
        USER: Why?
        Assistant: <Response 2>
        >>> before.splitlines()
        ['<Response 1>: Hello', '<Response 2>: ']
    """
    asked: list[str] = []
    answered: list[str] = []
    pending = ""
    for message in as_messages(prompt):
        role, content = message["role"], message["content"]
        if role == "assistant" and len(answered) < len(asked) and not pending:
            answered.append(content)
        elif role == "user" and len(asked) == len(answered):
            asked.append(pending + content)
            pending = ""
        elif role not in ("user", "assistant") and len(asked) == len(answered):
            pending += content + "\n\n"
        else:
            asked = []
            break
    if len(asked) != len(answered) + 1 or pending:
        raise ValueError(
            "PairRM reads prompts whose turns alternate between user and assistant, the user's last, got "
            f"{shown(prompt)}"
        )
    if not answered:
        return asked[0], ""
    source = "\n".join(f"USER: {text}\nAssistant: <Response {k}>" for k, text in enumerate(asked, 1))
    before = "".join(f"<Response {k}>: {text}\n" for k, text in enumerate(answered, 1))
    return _INSTRUCTION + source, f"{before}<Response {len(asked)}>: "
