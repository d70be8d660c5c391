"""Prompts and demonstrations: from files and the hub, put into the chat template, batched with padding on the left."""

from __future__ import annotations

import importlib.resources
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from windkern._checks import check_choice
from windkern.train.models import require
from windkern.train.prompts import ChatPrompt, as_messages, prompt_from_json, render, shown, split_dialogue
from windkern.train.turns import encode_opened

HUB = "hub:"
ANSWERS = ("answer", "completion", "response")  # keys of a demonstration's answer
_Parsed = TypeVar("_Parsed")
_Rows = Iterable[tuple[str, object]]  # (place for error messages, record)


class PromptBatch(NamedTuple):
    """Encoded prompts, padded on the left so that every completion starts in the same column."""

    input_ids: Tensor  # (B, P) int64
    attention_mask: Tensor  # (B, P) int64, 0 for padding


class Demonstration(NamedTuple):
    """A prompt with an answer to imitate."""

    prompt: str  # or ChatPrompt
    answer: str


def _json_lines(lines: Iterable[str], name: str) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield f"{name}, line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f'{name}, line {number}: not JSON ({error.msg}); expected {{"prompt": "..."}}') from None


def _json_list(text: str, name: str) -> Iterator[tuple[str, object]]:
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}, line {error.lineno}: not JSON ({error.msg})") from None
    if not isinstance(entries, list):
        raise ValueError(f"{name} must hold a list, one entry a prompt, got {shown(entries)}; JSON lines end in .jsonl")
    for number, entry in enumerate(entries, start=1):
        yield f"{name}, entry {number}", {"prompt": entry} if isinstance(entry, (str, list)) else entry


def _file_rows(path: Path, what: str) -> _Rows:
    name = str(path)
    if not path.is_file():
        raise FileNotFoundError(f"{what} file {name} does not exist; a data set of the hub is written {HUB}NAME")
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a byte-order mark first
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} must be UTF-8, got byte {error.start} that is not ({error.reason})") from None
    if path.suffix == ".json":
        return _json_list(text, name)
    lines = text.split("\n")  # not splitlines, which also cuts at characters that JSON strings may hold
    if path.suffix == ".jsonl":
        return _json_lines(lines, name)
    if what != "prompts":
        raise ValueError(f"{what} must come from .jsonl, .json or {HUB}NAME, got {name}")
    return ((f"{name}, line {k}", {"prompt": line.strip()}) for k, line in enumerate(lines, start=1) if line.strip())


def _hub_rows(source: str) -> _Rows:
    parts = re.split(r":(?![^\[]*\])", source.removeprefix(HUB))  # at colons that are not of a slice, train[:100]
    name, split, column = (*parts, *[""] * (3 - len(parts)))[:3]
    if not name or len(parts) > 3:
        raise ValueError(f"expected {HUB}NAME, {HUB}NAME:SPLIT or {HUB}NAME:SPLIT:COLUMN, got {source!r}")
    require("datasets")
    import datasets

    try:
        data = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{source} cannot be loaded: {error}") from error
    if not set(data.column_names) & ({column} if column else {"prompt", "messages"}):
        raise ValueError(
            f"{source} must have the column {column or 'prompt or messages'}, it has {', '.join(data.column_names)}; "
            f"another one can be named: {HUB}{name}:{split or 'train'}:COLUMN"
        )
    known = (column,) if column else ("prompt", "messages", *ANSWERS)
    return _data_set_rows(data.select_columns([each for each in data.column_names if each in known]), source, column)


def _data_set_rows(data, source: str, column: str) -> Iterator[tuple[str, object]]:
    for number, row in enumerate(data):
        if column and column != "prompt":
            # Reason: a list in a column of another name, such as chosen, is a whole dialogue.
            row = {"messages" if isinstance(row[column], list) else "prompt": row[column]}
        yield f"{source}, row {number}", row


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


def _parsed(rows: _Rows, name: str, what: str, parse: Callable[[object], _Parsed]) -> list[_Parsed]:
    found = []
    for place, record in rows:
        try:
            found.append(parse(record))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
    if not found:
        raise ValueError(f"{name} holds no {what}")
    return found


def _load(source: str | Path, what: str, parse: Callable[[object], _Parsed]) -> list[_Parsed]:
    name = str(source)
    rows = _hub_rows(name) if name.startswith(HUB) else _file_rows(Path(source), what)
    return _parsed(rows, name, what, parse)


def load_prompts(source: str | Path) -> list[str]:
    """Return the prompts of a file or of a data set of the hub: plain strings, and `ChatPrompt` for chat messages.

        FILE.jsonl                   an object a line, {"prompt": ...} or {"messages": [...]}
        FILE.json                    a list of such objects, or of prompts
        any other file               one prompt a line
        hub:NAME[:SPLIT[:COLUMN]]    what datasets.load_dataset(NAME, split=SPLIT) has, a folder's name included

    "prompt" is a string, or a list of {"role": ..., "content": ...} of which the last is not the assistant's.
    "messages", read where there is no "prompt", are a whole dialogue: an answer of the assistant at its end is left
    out. A COLUMN of the hub holds strings or dialogues. A prompt that comes twice is returned twice: how often it is
    answered is the source's to say.

    Args:
        source: UTF-8 file, in which empty lines are skipped, or a string that starts with hub:. SPLIT is train where
            it is left out and may be a slice such as train[:100]; COLUMN is prompt, else messages.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an entry is no prompt (the message names its line or row), or there is none at all.
        OSError: the data set cannot be had.
        MissingPackageError: a source of the hub, and datasets is not installed.
    """
    return _load(source, "prompts", _prompt)


def load_demonstrations(source: str | Path) -> list[Demonstration]:
    """Return the prompts of a source with the answers that come with them.

        {"prompt": ..., "answer": "..."}    "completion" and "response" do as well as "answer"
        {"messages": [...]}                 a dialogue; its last message, the assistant's, is the answer

    Args:
        source: as for `load_prompts`, but no plain text. A COLUMN of the hub holds whole dialogues.

    Raises:
        FileNotFoundError, ValueError, OSError, MissingPackageError: as `load_prompts`.
    """
    return _load(source, "demonstrations", _demonstration)


def demo_prompts(split: str) -> list[str]:
    """Return the demo's own prompts, "train" (96) or "heldout" (48); no prompt is in both.

    Example:
        >>> len(demo_prompts("train")), len(demo_prompts("heldout"))
        (96, 48)
    """
    check_choice("split", split, ("train", "heldout"))
    name = f"demo_prompts_{split}.jsonl"
    text = importlib.resources.files("windkern.data").joinpath(name).read_text(encoding="utf-8")
    return _parsed(_json_lines(text.split("\n"), name), name, "prompts", _prompt)


def opened_prompts(tokenizer, prompts: Sequence[str], *, system: str | None = None) -> list[str]:
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


def encode_prompts(tokenizer, prompts: Sequence[str], *, system: str | None = None) -> PromptBatch:
    """Return the token ids of prompts as the model expects a user's turn, padded on the left.

    Args:
        tokenizer: of transformers. With a chat template the prompt becomes the user's message, or the messages of a
            `ChatPrompt` stay as they are, and the assistant's turn is opened; without one the prompt is encoded as it
            is, which a conversation cannot be, and no end token follows it.
        prompts: user messages or conversations.
        system: system message, for prompts that bring none of their own; None leaves it to the template. A tokenizer
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


def padding_id(tokenizer) -> int:
    """An id to fill with; which one does not matter, because every reader of the ids has a mask."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return candidate
    return 0
