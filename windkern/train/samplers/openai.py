"""Sample from a server that speaks the OpenAI protocol (vLLM, SGLang, llama.cpp, TGI ...), over plain HTTP."""

from __future__ import annotations

import functools
import json
import logging
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from typing import Any, NamedTuple

import anyio
from anyio.from_thread import start_blocking_portal

from windkern._checks import check_count, check_number
from windkern.train.data.loading import opened_prompts
from windkern.train.data.prompts import as_messages
from windkern.train.data.turns import encode_opened, turn_of
from windkern.train.samplers.engine import UNCUT
from windkern.train.samplers.recorded import completions_of_ids, completions_of_texts
from windkern.train.samplers.sampler import Completions
from windkern.train.samplers.server import Answer, RefusedError, Server, ServerError
from windkern.train.seeds import stream

_log = logging.getLogger(__name__)

# A server takes what a request leaves open from its own settings or from the model's generation_config (vLLM).
# Source: ChatCompletionRequest of vLLM and SGLang; the sampling fields of llama.cpp's server.
NEUTRAL = {
    **UNCUT,
    "repeat_penalty": 1.0,  # llama.cpp, and all below
    "typical_p": 1.0,
    "top_n_sigma": -1.0,
    "xtc_probability": 0.0,
    "dry_multiplier": 0.0,
    "dynatemp_range": 0.0,
    "mirostat": 0,
}
_MAY_LACK = {*NEUTRAL, "seed", "return_token_ids"}  # fields that a server may not know
_ADAPTED = (400, 422, 500, 501)  # statuses of a refusal that a smaller request may avoid
_ONE_CHOICE = re.compile(r"only one (completion )?choice|\bn\b\W{0,3}(must|should|has to|>|=|!=|is not)", re.IGNORECASE)
_ENDED = (None, "stop", "eos", "eos_token", "stop_sequence", "end_turn")  # finish_reason of a complete response
_CUT = ("length", "max_tokens")
_PARSED = ("tool_calls", "function_call")  # of a complete response that the server has parsed
_PLAIN = {"role", "content", "name", "id", "type", "object", "provider_specific_fields"}  # keys of a message


class Choice(NamedTuple):
    """One response: its text, and its tokens if the server returns them."""

    text: str
    ids: list[int] | None
    cut: bool  # it reached the length limit


class OpenAISampler:
    """Samples from `POST {url}/chat/completions`.

    Nothing cuts the distribution: every sampling field that vLLM, SGLang and llama.cpp know is sent with its neutral
    value. If a server refuses a field, the request is sent again without it; if it takes only n = 1, it is asked n
    times. The log reports both. The server receives no weights, so this sampler is for fixed policies;
    `windkern.train.samplers.served.ServedSampler` is for policies that are trained.

    An answer must be a single text that holds everything that was drawn. Separate reasoning, tool calls, refusals,
    lists of parts and any other form raise an error that quotes the answer. Token ids that a server returns (vLLM) are
    used if it read the same prompt; otherwise responses are re-encoded from their text, see `completions_of_texts`, and
    the log says so once.

    Args:
        url: up to and including /v1, such as http://127.0.0.1:8000/v1; without user and password.
        model: name under which the server knows the model.
        tokenizer: tokenizer of that model.
        max_completion_length: longest response, end token included.
        temperature: divides the logits; positive.
        system: system message, for prompts without one; None for none.
        api_key: sent as a bearer token to the server and to no other (redirects are not followed). None:
            OPENAI_API_KEY from the environment, if it is set; "" sends none.
        timeout: seconds a request may take, from connecting to the last byte of its answer.
        attempts: how often a request is tried; with pauses of 1, 2, 4 ... seconds, or what Retry-After says, at most
            60 seconds.
        concurrency: requests in flight at once, one for each prompt.
        pause: called with the seconds of each pause.

    Raises:
        ValueError: an argument is out of range, or the URL holds a password.
        ServerError: when sampling: no answer after `attempts`, a status that says the request itself is wrong, a
            redirect, or an answer that is not what was asked for.
    """

    def __init__(
        self,
        url: str,
        model: str,
        tokenizer: Any,
        *,
        max_completion_length: int,
        temperature: float = 1.0,
        system: str | None = None,
        api_key: str | None = None,
        timeout: float = 120.0,
        attempts: int = 4,
        concurrency: int = 8,
        pause: Callable[[float], None] = time.sleep,
    ):
        self.server = Server(
            url,
            api_key=api_key,
            timeout=check_number("timeout", timeout, above=0),
            attempts=check_count("attempts", attempts, least=1),
            pause=pause,
        )
        self.model, self.tokenizer, self.system = model, tokenizer, system
        self.max_completion_length = check_count("max_completion_length", max_completion_length, least=1)
        self.temperature = check_number("temperature", temperature, above=0)
        self.concurrency = check_count("concurrency", concurrency, least=1)
        self._left_out: set[str] = set()  # fields that the server refuses
        self._one_by_one = False  # whether it refuses n > 1
        self._told = False  # whether the log says that texts are re-encoded

    repeats_because = (
        "the server decodes greedily, because it ignores the temperature, or n and seed (as transformers serve does "
        "where the model's generation_config says do_sample: false)"
    )

    @property
    def keeps_weights(self) -> str:
        """See `windkern.train.samplers.sampler.Sampler`."""
        return f"the server at {self.server.url}"

    def sample(self, prompts: Sequence[str], num_generations: int, seed: int) -> Completions:
        """Draw `num_generations` responses to each prompt. The server receives the seed, but need not honour it."""
        check_count("num_generations", num_generations, least=1)
        system = self.system if self.tokenizer.chat_template is not None else None
        opened = encode_opened(self.tokenizer, opened_prompts(self.tokenizer, prompts, system=system))
        with start_blocking_portal() as portal, portal.wrap_async_context_manager(self.server.client()) as client:
            gate = portal.call(anyio.Semaphore, self.concurrency)
            futures = [
                portal.start_task_soon(
                    self._choices, client, gate, prompt, ids, num_generations, stream(seed, place, prompt) % 2**31
                )
                for place, (prompt, ids) in enumerate(zip(prompts, opened, strict=True))
            ]
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
            groups = [future.result() for future in futures]
        cut = [[choice.cut for choice in group] for group in groups]
        known = {choice.ids is not None for group in groups for choice in group}
        if len(known) > 1:
            raise ServerError(f"{self.server.url} returned token_ids with some completions and not with others")
        if known == {True}:
            ids = [[self._ended(choice.ids or [], choice.cut) for choice in group] for group in groups]
            make: Callable[..., Completions] = functools.partial(completions_of_ids, self.tokenizer, prompts, ids)
        else:
            if not self._told:
                self._told = True
                _log.warning(
                    "%s returns texts without token ids, so responses are re-encoded: where a text has several "
                    "encodings, the one that is fitted need not be the one that was drawn",
                    self.server.url,
                )
            texts = [[choice.text for choice in group] for group in groups]
            make = functools.partial(completions_of_texts, self.tokenizer, prompts, texts)
        return make(system=system, max_completion_length=self.max_completion_length, truncated=cut)

    def _ended(self, ids: list[int], cut: bool) -> list[int]:
        """Return the ids of a response with its end token, which a server may omit."""
        last = self.tokenizer.added_tokens_decoder.get(ids[-1]) if ids else None
        whole = cut or (last is not None and last.special)
        end = turn_of(self.tokenizer).end
        return ids if whole or end is None else [*ids, end]

    async def _choices(
        self, client: Any, gate: Any, prompt: str, ids: list[int], count: int, seed: int
    ) -> list[Choice]:
        """Return `count` responses to a prompt, asking again if the server returns fewer."""
        found: list[Choice] = []
        async with gate:
            while len(found) < count:
                wanted = count - len(found)
                answer = await self._ask(client, prompt, wanted, seed + len(found))
                found += self._read(answer, ids, wanted)
        return found

    async def _ask(self, client: Any, prompt: str, wanted: int, seed: int) -> Answer:
        while True:
            known = {**NEUTRAL, "seed": seed, "return_token_ids": True}
            body: dict[str, Any] = {
                "model": self.model,
                "messages": as_messages(prompt, self.system),
                "n": 1 if self._one_by_one else wanted,
                "max_tokens": self.max_completion_length,
                "temperature": self.temperature,
                **{name: value for name, value in known.items() if name not in self._left_out},
            }
            final = _ONE_CHOICE.search if body["n"] > 1 else lambda text: False
            try:
                return await self.server.post(client, "/chat/completions", body, final=final)
            except RefusedError as error:
                if error.status not in _ADAPTED or not self._adapt(error, body):
                    raise

    def _adapt(self, error: RefusedError, body: dict) -> bool:
        """Return whether to ask again with a smaller request.

        That is one without the fields that the refusal names, else for a single response, else without every field
        that a server may lack.
        """
        sent = _MAY_LACK & body.keys()
        named = {name for name in sent if re.search(rf"\b{name}\b", error.text)}
        if not named and body["n"] > 1:
            if not self._one_by_one:
                _log.warning("%s; it is asked for one response at a time", error)
            self._one_by_one = True
            return True
        refused = named or sent
        if fresh := refused - self._left_out:
            self._left_out |= fresh
            _log.warning(
                "%s; it is asked again without %s, so its own settings decide about them",
                error,
                ", ".join(sorted(fresh)),
            )
        return bool(refused)

    def _read(self, answer: Answer, ids: list[int], wanted: int) -> list[Choice]:
        """Return the responses of an answer to the prompt with these ids."""
        content = answer.content
        choices = content.get("choices") if isinstance(content, dict) else None
        if not isinstance(choices, list) or not choices:
            raise ServerError(f"{self.server.url} answered without completions: {answer.quoted}")
        if len(choices) > wanted:
            raise ServerError(
                f"{self.server.url} answered {len(choices)} completions, but {wanted} were wanted: {answer.quoted}"
            )
        asked = content.get("prompt_token_ids")
        if isinstance(asked, list) and asked != ids:
            raise ServerError(
                f"{self.server.url} read another prompt than the policy is fitted on, {self._shown(asked)}, not "
                f"{self._shown(ids)}; it must use the chat template of the tokenizer, and the same system message"
            )
        found = []
        for choice in choices:
            try:
                found.append(read_choice(choice, drawn=isinstance(asked, list)))
            except ValueError as error:
                raise ServerError(f"{self.server.url} answered {error}: {self._quoted(choice)}") from None
        return found

    def _shown(self, ids: list) -> str:
        """Return the ids that a server sent as text, valid or not."""
        whole = all(type(token) is int and 0 <= token < len(self.tokenizer) for token in ids)
        return self.server.quote(repr(self.tokenizer.decode(ids) if whole else ids))

    def _quoted(self, choice: object) -> str:
        try:
            return self.server.quote(json.dumps(choice, ensure_ascii=True))
        except RecursionError:
            return f"a {type(choice).__name__} nested too deeply to show"


def read_choice(choice: Any, *, drawn: bool = False) -> Choice:
    """Return the response of an entry of "choices".

    Args:
        choice: what the server wrote there.
        drawn: whether its token_ids, if there are any, follow on the same prompt. They are what the model drew,
            whatever the server has made of them in the message.

    Raises:
        ValueError: it is not one complete text; the message says why, worded to precede a quotation.

    Example:
        >>> read_choice({"message": {"content": "Hi"}, "finish_reason": "length"})
        Choice(text='Hi', ids=None, cut=True)
        >>> read_choice({"message": {"content": None}})
        Traceback (most recent call last):
        ValueError: a message whose content is null, not text (a refusal, a tool call, or reasoning alone)
    """
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise ValueError("a completion without a message")
    reason, ids = choice.get("finish_reason"), choice.get("token_ids")
    drawn = drawn and isinstance(ids, list)
    ends = (*_ENDED, *_CUT, *(_PARSED if drawn else ()))
    if not (reason is None or isinstance(reason, str)) or reason not in ends:
        raise ValueError(f"a completion that ended by {reason!r}, which the policy did not choose")
    if drawn:
        if not all(type(token) is int and token >= 0 for token in ids) or (reason in _CUT and not ids):
            raise ValueError("token_ids that are not those of a response")
        return Choice("", ids, reason in _CUT)
    extra = sorted(name for name, value in message.items() if name not in _PLAIN and not _is_empty(value))
    if extra:
        raise ValueError(
            f"a message with {', '.join(extra)} besides the content, which the policy drew, too (start the server "
            "without a parser of reasoning and tool calls)"
        )
    text = message.get("content")
    if not isinstance(text, str):
        kind = "null" if text is None else f"a {type(text).__name__}"
        hint = " (a refusal, a tool call, or reasoning alone)" if text is None else ""
        raise ValueError(f"a message whose content is {kind}, not text{hint}")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("a message whose content is half of a surrogate pair, not text")
    return Choice(text, None, reason in _CUT)


def _is_empty(value: object) -> bool:
    """Return whether there is nothing in a value, as in {"refusal": null}."""
    if isinstance(value, dict):
        return all(map(_is_empty, value.values()))
    return not value
