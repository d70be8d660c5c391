"""Prompts: read from a file, put into the chat template, batched with padding on the left."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from windkern._checks import check_choice


class PromptBatch(NamedTuple):
    """Encoded prompts, padded on the left so that every completion starts in the same column."""

    input_ids: Tensor  # (B, P) int64
    attention_mask: Tensor  # (B, P) int64, 0 for padding


def _read(lines: Iterable[str], name: str, as_json: bool) -> list[str]:
    prompts = []
    for number, line in enumerate(lines, start=1):
        line = line.strip()
        if not line:
            continue
        if as_json:
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f'{name}, line {number}: not JSON ({error.msg}); expected {{"prompt": "..."}}'
                ) from None
            line = record.get("prompt") if isinstance(record, dict) else None
            if not isinstance(line, str) or not line.strip():
                raise ValueError(f'{name}, line {number}: expected an object with a non-empty string under "prompt"')
        prompts.append(line)
    if not prompts:
        raise ValueError(f"{name} holds no prompts")
    return prompts


def load_prompts(path: str | Path) -> list[str]:
    """Return the prompts of a file: JSON lines `{"prompt": "..."}` if it ends in .jsonl, else one prompt a line.

    Args:
        path: UTF-8 file; empty lines are skipped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line is not such an object (the message names the line), or there is no prompt at all.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"prompts file {path} does not exist")
    with path.open(encoding="utf-8") as file:
        return _read(file, str(path), path.suffix == ".jsonl")


def demo_prompts(split: str) -> list[str]:
    """Return the demo's own prompts, "train" (96) or "heldout" (48); no prompt is in both.

    Example:
        >>> len(demo_prompts("train")), len(demo_prompts("heldout"))
        (96, 48)
    """
    check_choice("split", split, ("train", "heldout"))
    name = f"demo_prompts_{split}.jsonl"
    text = importlib.resources.files("windkern.data").joinpath(name).read_text(encoding="utf-8")
    return _read(text.splitlines(), name, as_json=True)


def encode_prompts(tokenizer, prompts: Sequence[str], *, system: str | None = None) -> PromptBatch:
    """Return the token ids of prompts as the model expects a user's turn, padded on the left.

    Args:
        tokenizer: of transformers. With a chat template the prompt becomes the user's message and the assistant's turn
            is opened; without one the prompt is encoded as it is.
        prompts: user messages.
        system: system message; None leaves it to the template. A tokenizer without a template cannot take one.

    Returns:
        PromptBatch, (B, P) with P the longest prompt.

    Raises:
        ValueError: no prompts, an empty encoding, or a system message without a chat template.
    """
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, got none")
    if tokenizer.chat_template is None:
        if system is not None:
            raise ValueError("system must be None: this tokenizer has no chat template to put it in")
        encoded = tokenizer(list(prompts))["input_ids"]
    else:
        opening = [] if system is None else [{"role": "system", "content": system}]
        texts = [
            tokenizer.apply_chat_template(
                [*opening, {"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            for prompt in prompts
        ]
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]  # the template has put them in
    empty = next((k for k, ids in enumerate(encoded) if not ids), None)
    if empty is not None:
        raise ValueError(f"prompt {empty} encodes to no tokens: {prompts[empty]!r}")
    width = max(map(len, encoded))
    fill = padding_id(tokenizer)
    ids = torch.tensor([[fill] * (width - len(row)) + row for row in encoded])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded])
    return PromptBatch(ids, mask)


def padding_id(tokenizer) -> int:
    """An id to fill with; which one does not matter, because every reader of the ids has a mask."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return candidate
    return 0
