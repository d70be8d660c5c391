"""Encode responses after their prompts, and decode them: find where a response begins and ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from windkern.train.data.prompts import render

_ANSWER = "windkern-answer"  # stands for an answer in a rendered conversation
_ANCHORS = ("\n", "a", "1", ".")  # put before a text so that it is not encoded as the start of one


class Turn(NamedTuple):
    """The tokens and space around an answer, as a tokenizer's chat template (if any) writes them."""

    space: str  # white space between the opened turn and the answer
    end: int | None  # id of the token that ends the answer
    ends: tuple[int, ...]  # ids of all tokens that end one


def turn_of(tokenizer: Any) -> Turn:
    """Return the tokens and space around an answer.

    The end token is the first special token that the chat template puts after an answer (Gemma's <end_of_turn>, which
    is not its eos_token), else the tokenizer's eos_token; both end an answer. None and () where there is neither.

    Raises:
        ValueError: the chat template refuses a conversation of two messages.
    """
    space, end, eos = "", None, tokenizer.eos_token_id
    if tokenizer.chat_template is not None:
        asked = [{"role": "user", "content": "question"}]
        opened = render(tokenizer, asked, open_turn=True)
        dialogue = render(tokenizer, [*asked, {"role": "assistant", "content": _ANSWER}], open_turn=False)
        before, answer, after = dialogue.rpartition(_ANSWER)
        if answer:
            gap = before.removeprefix(opened) if before.startswith(opened) else ""
            space, end = gap if gap.isspace() else "", _first_special(tokenizer, after)
    return Turn(space, eos if end is None else end, tuple(sorted({end, eos} - {None})))


def _first_special(tokenizer: Any, text: str) -> int | None:
    added = tokenizer.added_tokens_decoder
    ids = [token for token in tokenizer(text, add_special_tokens=False)["input_ids"] if token in added]
    special = [token for token in ids if added[token].special]
    visible = [token for token in ids if added[token].content.strip()]  # some models do not mark their end as special
    return next(iter(special or visible), None)


def encode_opened(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of texts that will be continued.

    A chat template has already put in special tokens; without one, the tokenizer adds those that go before a text, and
    none after it.
    """
    if tokenizer.chat_template is not None:
        return tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    # Hazard: some tokenizers put their end token after every text, and a response would follow it. Remedy: cut it off.
    bare = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [
        ids[: _place(ids, own) + len(own)] for ids, own in zip(tokenizer(list(texts))["input_ids"], bare, strict=True)
    ]


def _place(ids: list[int], part: list[int]) -> int:
    """Return where a part begins in `ids`; their length if it is empty or not in them."""
    starts = range(len(ids) - len(part) + 1) if part else ()
    return next((k for k in starts if ids[k : k + len(part)] == part), len(ids))


def encode_responses(tokenizer: Any, turn: Turn, opened: Sequence[str], texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of responses, as they follow their prompts, without an end token.

    The ids of prompt and response together are those of the joined text wherever the tokenizer does not merge letters
    of both into one token; nothing is stripped, so the space between them and the indentation of code stay.

    Args:
        tokenizer: a tokenizer of transformers.
        turn: the tokens and space that it puts around an answer.
        opened: S prompts as they are encoded, see `windkern.train.data.loading.opened_prompts`.
        texts: S responses.
    """
    spaced = [turn.space + text if _wants_space(text) else text for text in texts]
    unique = list(dict.fromkeys(opened))
    prompts = dict(zip(unique, encode_opened(tokenizer, unique), strict=True))
    joined = encode_opened(tokenizer, [prompt + text for prompt, text in zip(opened, spaced, strict=True)])
    rows = []
    for prompt, text, ids in zip(opened, spaced, joined, strict=True):
        own = prompts[prompt]
        rows.append(ids[len(own) :] if ids[: len(own)] == own else _encode_inside(tokenizer, text))
    return rows


def _encode_inside(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text that does not start a sequence.

    Hazard: SentencePiece tokenizers put a space before a text. Remedy: encode it after an anchor, and drop the anchor.
    """
    for anchor in _ANCHORS:
        before, ids = (tokenizer(each, add_special_tokens=False)["input_ids"] for each in (anchor, anchor + text))
        if ids[: len(before)] == before:
            return ids[len(before) :]
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def response_texts(
    tokenizer: Any, turn: Turn, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[Sequence[int]]]
) -> tuple[tuple[str, ...], ...]:
    """Return the texts of responses as they follow their prompts, without special tokens; nothing is stripped.

    Args:
        tokenizer: a tokenizer of transformers.
        turn: the tokens and space that it puts around an answer; its space is not part of a text.
        prompts: B token ids.
        responses: B times N token ids.
    """

    def decode(rows: list[list[int]]) -> list[str]:
        return tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    found = []
    for prompt, group in zip(prompts, responses, strict=True):
        # Reason: a tokenizer may show the space in front of a word only where something stands before it.
        before, *whole = decode([list(prompt), *([*prompt, *row] for row in group)])
        alone = decode([list(row) for row in group])
        texts = [
            text[len(before) :] if text.startswith(before) else own for text, own in zip(whole, alone, strict=True)
        ]
        bare = [text.removeprefix(turn.space) for text in texts]
        found.append(tuple(own if _wants_space(own) else text for own, text in zip(bare, texts, strict=True)))
    return tuple(found)


def _wants_space(text: str) -> bool:
    """Return whether the template's space belongs before a text: not if it is empty or starts with space."""
    return text != "" and not text[0].isspace()
