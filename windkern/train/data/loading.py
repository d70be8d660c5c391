"""Load prompts and demonstrations from files and the hub, and encode them with padding on the left."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from windkern._checks import check_choice
from windkern.train.data.files import ANSWERS, json_lines, load, parsed
from windkern.train.data.prompts import ChatPrompt, as_messages, prompt_from_json, render, shown, split_dialogue
from windkern.train.data.turns import encode_opened


class PromptBatch(NamedTuple):
    """Encoded prompts, padded on the left so that every completion starts in the same column."""

    input_ids: Tensor  # (B, P) int64
    attention_mask: Tensor  # (B, P) int64, 0 for padding


class Demonstration(NamedTuple):
    """A prompt with an answer to imitate."""

    prompt: str  # or ChatPrompt
    answer: str


def _prompt(record: object) -> str:
    if isinstance(record, dict):
        value = record.get("prompt")
        if value is None and record.get("messages") is not None:
            return split_dialogue(record["messages"])[0]
        if isinstance(value, list) or (isinstance(value, str) and value.strip()):
            return prompt_from_json(value)
    raise ValueError(
        'expected an object with a non-empty string under "prompt", or with chat messages there or under "messages", '
        f"got {shown(record)}"
    )


def _demonstration(record: object) -> Demonstration:
    if isinstance(record, dict):
        key = next((key for key in ANSWERS if record.get(key) is not None), None)
        if record.get("messages") is not None and (key is None or record.get("prompt") is None):
            prompt: str
            answer: object
            prompt, answer = split_dialogue(record["messages"])
        elif key is not None and record.get("prompt") is not None:
            prompt, answer = _prompt(record), record[key]
            if isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], dict):  # as TRL has completions
                answer = answer[0].get("content") if answer[0].get("role") == "assistant" else None
        else:
            answer = None
        if isinstance(answer, str) and answer.strip():
            return Demonstration(prompt, answer)
    raise ValueError(
        f'expected an object with "prompt" and a non-empty string under {", ".join(map(json.dumps, ANSWERS))}, or with '
        f'"messages" that end with an answer of the assistant, got {shown(record)}'
    )


def load_prompts(source: str | Path) -> list[str]:
    """Return the prompts of a file or of a data set of the hub: plain strings, and `ChatPrompt` for chat messages.

        .jsonl .ndjson               one object per line, {"prompt": ...} or {"messages": [...]}
        .json                        a list of such objects, or of prompts
        .csv .tsv .parquet           columns of these names; in CSV and TSV messages are JSON
        .txt .md, no ending          one prompt per line
        hub:NAME[:SPLIT[:COLUMN]]    what datasets.load_dataset(NAME, split=SPLIT) returns; NAME may be a folder

    "prompt" is a string, or a list of {"role": ..., "content": ...} of which the last is not the assistant's.
    "messages", read where there is no "prompt", are a whole dialogue: an answer of the assistant at its end is left
    out. A COLUMN of the hub holds strings or dialogues. A prompt that occurs twice is returned twice,
    so the source decides how often it is answered.

    Args:
        source: UTF-8 file, also compressed (.gz), in which empty lines are skipped, or a string that starts with hub:.
            SPLIT is train where it is left out and may be a slice such as train[:100]; COLUMN is prompt, else messages.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is of another kind or holds no prompts, or an entry is not a prompt (the message names its
            line or row).
        OSError: the data set cannot be loaded.
        MissingPackageError: a source of the hub without datasets installed, or Parquet without pyarrow.
    """
    return load(source, "prompts", _prompt, text=True)


def load_demonstrations(source: str | Path) -> list[Demonstration]:
    """Return the prompts of a source with the answers that come with them.

        {"prompt": ..., "answer": "..."}    "completion" or "response" may replace "answer"
        {"messages": [...]}                 a dialogue; its last message, the assistant's, is the answer

    Args:
        source: as for `load_prompts`, but no plain text. A COLUMN of the hub holds whole dialogues.

    Raises:
        FileNotFoundError, ValueError, OSError, MissingPackageError: as `load_prompts`.
    """
    return load(source, "demonstrations", _demonstration)


def demo_prompts(split: str) -> list[str]:
    """Return the prompts of the demo, "train" (96) or "heldout" (48); no prompt is in both.

    Example:
        >>> len(demo_prompts("train")), len(demo_prompts("heldout"))
        (96, 48)
    """
    check_choice("split", split, ("train", "heldout"))
    name = f"demo_prompts_{split}.jsonl"
    text = importlib.resources.files("windkern.data").joinpath(name).read_text(encoding="utf-8")
    return parsed(json_lines(text, name), name, "prompts", _prompt)


def opened_prompts(tokenizer: Any, prompts: Sequence[str], *, system: str | None = None) -> list[str]:
    """Return the texts of prompts up to where a response begins: with the assistant's turn opened, or as they are.

    Args, Raises:
        As `encode_prompts`, which encodes them.
    """
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, got none")
    if tokenizer.chat_template is not None:
        return [render(tokenizer, as_messages(prompt, system), open_turn=True) for prompt in prompts]
    if system is not None:
        raise ValueError("system must be None: this tokenizer has no chat template to put it in")
    for number, prompt in enumerate(prompts):
        if isinstance(prompt, ChatPrompt) and not prompt.is_one_turn:
            roles = ", ".join(message["role"] for message in prompt.messages)
            raise ValueError(
                f"prompt {number} must be one message of the user, got messages of {roles}: this tokenizer has no "
                "chat template to put them in"
            )
    return [str(prompt) for prompt in prompts]


def encode_prompts(tokenizer: Any, prompts: Sequence[str], *, system: str | None = None) -> PromptBatch:
    """Return the token ids of prompts as the model expects a user's turn, padded on the left.

    Args:
        tokenizer: a tokenizer of transformers. With a chat template, a string becomes the user's message, the messages
            of a `ChatPrompt` stay as they are, and the assistant's turn is opened. Without one, a string is encoded as
            it is and without an end token, and a conversation is refused.
        prompts: user messages or conversations.
        system: system message, for prompts without one; None leaves it to the template. A tokenizer
            without a template cannot take one.

    Returns:
        PromptBatch, (B, P) with P the longest prompt.

    Raises:
        ValueError: no prompts, an empty encoding, a system message or a conversation without a chat template, or
            messages that the template refuses.
    """
    encoded = encode_opened(tokenizer, opened_prompts(tokenizer, prompts, system=system))
    empty = next((k for k, ids in enumerate(encoded) if not ids), None)
    if empty is not None:
        raise ValueError(f"prompt {empty} encodes to no tokens: {prompts[empty]!r}")
    width = max(map(len, encoded))
    fill = padding_id(tokenizer)
    ids = torch.tensor([[fill] * (width - len(row)) + row for row in encoded])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded])
    return PromptBatch(ids, mask)


def padding_id(tokenizer: Any) -> int:
    """Return an id to pad with. Which one does not matter, because every reader of the ids has a mask."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return candidate
    return 0
