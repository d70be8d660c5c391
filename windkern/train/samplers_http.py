"""Completions from a server that speaks the OpenAI protocol (vLLM, SGLang, llama.cpp, TGI ...), without its client."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from windkern._checks import check_count, check_number
from windkern.train.prompts import as_messages
from windkern.train.sampler import Completions
from windkern.train.samplers_recorded import completions_of_texts
from windkern.train.seeds import stream

RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)  # statuses that may be gone the next time
_LONGEST_ANSWER = 400  # characters of a server's answer in an error message


class ServerError(OSError):
    """A server could not be reached, refused, or answered something else than completions; the message says what."""


class HttpSampler:
    """Samples from `POST {url}/chat/completions`.

    Nothing cuts the distribution (top_p 1, no penalties), but a server may have settings of its own, and only it knows
    which weights it serves: for training it must serve the current policy. Responses are encoded anew from their text,
    see `completions_of_texts`.

    Args:
        url: up to and including /v1, such as http://127.0.0.1:8000/v1.
        model: name under which the server knows the model.
        tokenizer: of that model.
        max_new_tokens: longest response, end token included.
        temperature: divides the logits; positive.
        system: system message, for prompts that bring none of their own; None for none.
        api_key: sent as a bearer token where given.
        timeout: seconds a request may take.
        attempts: how often a request is tried; with pauses of 1, 2, 4 ... seconds, or what Retry-After says.
        concurrency: requests under way at once, one for each prompt.
        pause: called with the seconds of each pause.

    Raises:
        ValueError: an argument is out of range.
        ServerError: when sampling: no answer after `attempts`, a status that says the request itself is wrong, or an
            answer without completions.
    """

    def __init__(
        self,
        url: str,
        model: str,
        tokenizer,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        system: str | None = None,
        api_key: str | None = None,
        timeout: float = 120.0,
        attempts: int = 4,
        concurrency: int = 8,
        pause: Callable[[float], None] = time.sleep,
    ):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url must start with http:// or https://, got {url!r}")
        self.url, self.model, self.tokenizer, self.system = url.rstrip("/"), model, tokenizer, system
        self.max_new_tokens = check_count("max_new_tokens", max_new_tokens, least=1)
        self.temperature = check_number("temperature", temperature, above=0)
        self.timeout = check_number("timeout", timeout, above=0)
        self.attempts = check_count("attempts", attempts, least=1)
        self.concurrency = check_count("concurrency", concurrency, least=1)
        self.api_key, self.pause = api_key, pause

    def sample(self, prompts: Sequence[str], num_responses: int, seed: int) -> Completions:
        """`num_responses` to each prompt; the seed is passed on, and it is the server's to honour it."""
        check_count("num_responses", num_responses, least=1)
        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = [
                pool.submit(self._answers, prompt, num_responses, stream(seed, place, prompt) % 2**31)
                for place, prompt in enumerate(prompts)
            ]
            try:
                answers = [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return completions_of_texts(
            self.tokenizer,
            prompts,
            [[text for text, _ in group] for group in answers],
            system=self.system if self.tokenizer.chat_template is not None else None,
            max_new_tokens=self.max_new_tokens,
            truncated=[[cut for _, cut in group] for group in answers],
        )

    def _answers(self, prompt: str, count: int, seed: int) -> list[tuple[str, bool]]:
        """(text, cut off) of each response; servers that give one at a time are asked again."""
        found: list[tuple[str, bool]] = []
        while len(found) < count:
            body = {
                "model": self.model,
                "messages": as_messages(prompt, self.system),
                "n": count - len(found),
                "max_tokens": self.max_new_tokens,
                "temperature": self.temperature,
                "top_p": 1.0,
                "seed": seed + len(found),
            }
            answer = self._post("/chat/completions", body)
            found += self._choices(answer)[: count - len(found)]
        return found

    def _choices(self, answer: object) -> list[tuple[str, bool]]:
        try:
            choices = [
                (str(choice["message"]["content"] or ""), choice.get("finish_reason") == "length")
                for choice in answer["choices"]
            ]
        except (KeyError, TypeError, AttributeError):
            choices = []
        if not choices:
            raise ServerError(f"{self.url} answered without completions: {_short(json.dumps(answer))}")
        return choices

    def _post(self, path: str, body: dict) -> object:
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        for attempt in range(1, self.attempts + 1):
            wait = 2.0 ** (attempt - 1)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    content = answer.read()
                break
            except urllib.error.HTTPError as error:
                with error:
                    reason = f"status {error.code}: {_short(error.read().decode(errors='replace'))}"
                if error.code not in RETRIED:
                    raise ServerError(f"{self.url}{path} refused: {reason}") from None
                wait = _seconds(error.headers.get("Retry-After"), wait)
            except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            if attempt == self.attempts:
                raise ServerError(
                    f"{self.url}{path} gave no answer in {self.attempts} attempts of {self.timeout:g} s; last: {reason}"
                )
            self.pause(wait)
        try:
            return json.loads(content)
        except ValueError:
            raise ServerError(
                f"{self.url}{path} answered no JSON: {_short(content.decode(errors='replace'))}"
            ) from None


def _seconds(header: str | None, otherwise: float) -> float:
    """What Retry-After says, where it is a number of seconds (it may be a date)."""
    return float(header) if header is not None and header.isdigit() else otherwise


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_ANSWER else text[:_LONGEST_ANSWER] + " ..."
