"""Read the prompts that callers pass: strings, conversations, rows of a `datasets.Dataset` in TRL's formats."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from windkern.train.data.loading import Demonstration
from windkern.train.data.prompts import ChatPrompt, shown

_ANSWERS = ("completion", "answer", "response")  # columns that hold a demonstration's answer


@dataclass(frozen=True)
class PromptSets:
    """The prompts of a run.

    Attributes:
        train: training prompts, strings or `ChatPrompt`s.
        demonstrations: each training prompt with its answer; empty if the loss uses none.
        heldout: prompts for evaluations.
    """

    train: list[str]
    demonstrations: list[Demonstration]
    heldout: list[str]


def prompt_sets(train_dataset: Iterable, eval_dataset: Iterable | None, *, demonstrations: bool) -> PromptSets:
    """Read the data sets of a trainer.

    Args:
        train_dataset: rows, each a string, a list of chat messages, a `ChatPrompt`, a `Demonstration`, or a mapping
            with "prompt" (a string or messages) and, where answers are wanted, "completion" (a string, or a list of
            one message of the assistant). Other columns are ignored.
        eval_dataset: rows like these; None or empty for none.
        demonstrations: whether the loss learns from answers that are given.

    Raises:
        TypeError: a row is something else, or a data set is a mapping (of splits, say) or a string.
        ValueError: there are no training prompts, some are in both sets, one is blank, messages are malformed, or
            answers are given for some prompts only or missing where they are wanted.

    Example:
        >>> rows = [{"prompt": [{"role": "user", "content": "Why?"}]}, {"prompt": "How?"}]
        >>> prompt_sets(rows, None, demonstrations=False).train
        ['Why?', 'How?']
    """
    content = _rows("train_dataset", train_dataset)
    rows = [_row("train_dataset", place, row) for place, row in enumerate(content)]
    held_out = [] if eval_dataset is None else _rows("eval_dataset", eval_dataset)
    heldout = [_row("eval_dataset", place, row)[0] for place, row in enumerate(held_out)]
    train = [prompt for prompt, _ in rows]
    given = any(isinstance(row, Demonstration) for row in content)
    answered = sum(answer is not None for _, answer in rows)
    if (demonstrations or given) and answered != len(rows):
        raise ValueError(
            f"train_dataset must hold a prompt and a completion in each row for this loss, got completions in "
            f"{answered} of {len(rows)}"
        )
    check_prompts(train, heldout)
    shown_answers = [Demonstration(prompt, answer) for prompt, answer in rows if answer is not None]
    return PromptSets(train, shown_answers, heldout)


def check_prompts(train: Sequence[str], heldout: Sequence[str]) -> None:
    """Raise unless there are training prompts and none of them is held out.

    Raises:
        ValueError: no training prompts, or some are in both lists.
    """
    if not train:
        raise ValueError("train_dataset must hold at least one prompt, got none")
    if both := set(train) & set(heldout):
        raise ValueError(
            f"{len(both)} held-out prompts are also training prompts, e.g. {min(both)!r}; "
            "leave them out of one of the data sets"
        )


def _rows(name: str, rows: Iterable) -> list:
    """Return all rows. An iterator is read once."""
    if isinstance(rows, Mapping):  # as `datasets.load_dataset` returns without split=
        keys = ", ".join(map(repr, rows)) or "nothing"
        raise TypeError(f"{name} must hold rows, got a {type(rows).__name__} with {keys}; pass one of its splits")
    if isinstance(rows, (str, bytes)):
        raise TypeError(
            f"{name} must hold rows, got {type(rows).__name__} {shown(rows)}; put a single prompt in a list"
        )
    return list(rows)


def _row(name: str, place: int, row: object) -> tuple[str, str | None]:
    """Return (prompt, answer or None) of a row."""
    if isinstance(row, Demonstration):
        return _prompt(name, place, row.prompt), row.answer
    if isinstance(row, Mapping):
        if "prompt" not in row:
            raise ValueError(f'{name}[{place}] must have a "prompt", got {", ".join(map(repr, row)) or "nothing"}')
        answer = next((row[key] for key in _ANSWERS if row.get(key) is not None), None)
        return _prompt(name, place, row["prompt"]), None if answer is None else _answer(name, place, answer)
    return _prompt(name, place, row), None


def _prompt(name: str, place: int, value: object) -> str:
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"{name}[{place}] must have a prompt that is not blank, got {shown(value)}")
        return value
    if isinstance(value, (list, tuple)):
        try:
            return ChatPrompt(value)
        except ValueError as error:
            raise ValueError(f"{name}[{place}]: {error}") from error
    raise TypeError(
        f"{name}[{place}] must be a string, a list of chat messages or a row with a prompt, got {type(value).__name__}"
    )


def _answer(name: str, place: int, value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)) and len(value) == 1 and isinstance(value[0], Mapping):
        content = value[0].get("content")
        if value[0].get("role") == "assistant" and isinstance(content, str):
            return content
    raise TypeError(
        f'{name}[{place}]["completion"] must be a string or a list of one message of the assistant, got {shown(value)}'
    )
