"""Represent prompts as strings; a prompt that is a conversation also carries its messages."""

from __future__ import annotations

import copy
import functools
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

SYSTEM_ROLES = ("system", "developer")
ROLES = (*SYSTEM_ROLES, "user", "assistant")
_LONGEST_SHOWN = 120  # characters of a wrong value in an error message


def shown(value: object) -> str:
    """Return a value as JSON, shortened for an error message."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + " ..."


def without_user(url: str) -> str:
    """Return a URL without user and password, so that it can be shown.

    Example:
        >>> without_user("https://me:secret@host/v1")
        'https://***@host/v1'
    """
    return re.sub(r"//\S*@", "//***@", url)


def loosely(text: str) -> str:
    """Return a text without surrounding space and in Unicode's NFC, as a key for lookups.

    A tokenizer may change both on the way to ids and back.

    Example:
        >>> loosely(" cafe\u0301 ") == "caf\u00e9"
        True
    """
    return unicodedata.normalize("NFC", text).strip()


def _turns(messages: object) -> tuple[tuple[str, str], ...]:
    """Return (role, content) of each message."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"messages must be a list of at least one chat message, got {shown(messages)}")
    for number, message in enumerate(messages):
        fits = isinstance(message, dict) and message.get("role") in ROLES and isinstance(message.get("content"), str)
        if not fits or message.get("tool_calls"):
            raise ValueError(
                f'messages[{number}] must be an object with "role" {", ".join(ROLES)} and a string under "content", '
                f"without tool calls, got {shown(message)}"
            )
    return tuple((str(message["role"]), str(message["content"])) for message in messages)


class ChatPrompt(str):
    r"""A prompt of chat messages, which a chat template or a server receives unchanged.

    As a string, which is what judges, dictionaries, logs and everything else see, it is

        content                                     one message, of the user
        "role: content" joined by empty lines       otherwise

    and equality and hash are those of that string; what `str` methods such as `strip` return is a plain string.
    It does not change, and it can be pickled. `json.dumps` writes the string: see `prompt_to_json`.

    Args:
        messages: {"role": ..., "content": ...} each, roles system, developer, user and assistant; the last is not the
            assistant's and not blank. Other keys are left out.

    Raises:
        ValueError: `messages` is malformed; the error names the message and the reason.

    Example:
        >>> prompt = ChatPrompt([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}])
        >>> print(prompt)
        system: Be brief.
        <BLANKLINE>
        user: Why?
        >>> prompt.messages[1]
        {'role': 'user', 'content': 'Why?'}
        >>> ChatPrompt([{"role": "user", "content": "Why?"}]) == "Why?"
        True
    """

    _turns: tuple[tuple[str, str], ...]

    def __new__(cls, messages: Sequence[dict[str, str]]) -> ChatPrompt:
        turns = _turns(messages)
        role, content = turns[-1]
        if role == "assistant" or not content.strip():
            raise ValueError(
                "the last message of a prompt must be the user's or the system's and not blank, "
                f"got {shown({'role': role, 'content': content})}"
            )
        one = len(turns) == 1 and role == "user"
        self = super().__new__(cls, content if one else "\n\n".join(f"{role}: {content}" for role, content in turns))
        self._turns = turns
        return self

    def __reduce__(self):
        return type(self), (self.messages,)

    @property
    def messages(self) -> tuple[dict[str, str], ...]:
        """A copy of the messages."""
        return tuple({"role": role, "content": content} for role, content in self._turns)

    @property
    def is_one_turn(self) -> bool:
        """Whether it is a single message of the user, so that the string is all of it."""
        return [role for role, _ in self._turns] == ["user"]


def split_dialogue(messages: Sequence[dict[str, str]]) -> tuple[ChatPrompt, str | None]:
    """Split a dialogue into its prompt and the assistant's last message, None if there is none.

    Raises:
        ValueError: `messages` is not a list of chat messages, or nothing precedes the answer.

    Example:
        >>> split_dialogue([{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}])
        ('Why?', 'Because.')
    """
    turns = _turns(messages)
    if turns[-1][0] != "assistant":
        return ChatPrompt(messages), None
    if len(turns) == 1:
        raise ValueError(f"messages must hold a prompt before the assistant's answer, got {shown(messages)}")
    return ChatPrompt(messages[:-1]), turns[-1][1]


def prompt_to_json(prompt: str) -> str | list[dict[str, str]]:
    """Return a prompt as JSON holds it: a string, or the list of its messages. `prompt_from_json` reads it back.

    Example:
        >>> prompt_to_json("Why?"), prompt_to_json(ChatPrompt([{"role": "user", "content": "Why?"}]))
        ('Why?', [{'role': 'user', 'content': 'Why?'}])
    """
    return list(prompt.messages) if isinstance(prompt, ChatPrompt) else str(prompt)


def prompt_from_json(value: object) -> str:
    """Return the prompt that `prompt_to_json` wrote: a string for a string, a `ChatPrompt` for a list of messages.

    Raises:
        ValueError: the value is neither, is blank, or its messages do not form a prompt.

    Example:
        >>> prompt_from_json([{"role": "user", "content": "Why?"}]).messages
        ({'role': 'user', 'content': 'Why?'},)
    """
    if isinstance(value, list):
        return ChatPrompt(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"a prompt must be a non-empty string or a list of chat messages, got {shown(value)}")
    return value


def as_messages(prompt: str, system: str | None = None) -> list[dict[str, str]]:
    """Return the messages of a prompt; a plain string is one of the user.

    Args:
        prompt: a string or `ChatPrompt`.
        system: content of a system message to put first, unless the prompt has one.

    Example:
        >>> as_messages("Why?", system="Be brief.")
        [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Why?'}]
    """
    messages = list(prompt.messages) if isinstance(prompt, ChatPrompt) else [{"role": "user", "content": str(prompt)}]
    if system is None or any(message["role"] in SYSTEM_ROLES for message in messages):
        return messages
    return [{"role": "system", "content": system}, *messages]


def render(tokenizer: Any, messages: Sequence[dict[str, str]], *, open_turn: bool) -> str:
    """Return the text a tokenizer's chat template makes of messages, with the assistant's turn opened or not.

    Raises:
        ValueError: the template refuses the messages, for example a system message that it does not support.
    """
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=open_turn)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"the chat template refuses messages of {roles}: {error}") from error


def with_template_arguments(tokenizer: Any, arguments: Mapping[str, object] | None) -> Any:
    """Return the tokenizer, or a copy of it whose chat template gets further arguments in every call.

    Args:
        tokenizer: a tokenizer of transformers.
        arguments: arguments by name, such as {"enable_thinking": False} for Qwen3; None or empty for none.

    Raises:
        ValueError: arguments are given, but the tokenizer has no chat template.
    """
    if not arguments:
        return tokenizer
    if tokenizer.chat_template is None:
        raise ValueError(f"chat_template_kwargs must be None for a tokenizer without a chat template, got {arguments}")
    found = copy.copy(tokenizer)
    found.apply_chat_template = functools.partial(tokenizer.apply_chat_template, **arguments)
    return found
