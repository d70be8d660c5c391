"""Send JSON to a server over HTTP and read its JSON, bounded in time and size."""

from __future__ import annotations

import email.utils
import json
import os
import random
import re
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import anyio
import anyio.to_thread

from windkern.train.data.prompts import without_user

try:  # which of the two is installed is up to huggingface_hub
    import httpx2 as httpx
except ImportError:
    import httpx  # type: ignore[import-not-found,no-redef]  # either name, the same API

API_KEY = "OPENAI_API_KEY"
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)  # statuses after which another attempt may succeed
LONGEST_PAUSE = 60.0  # seconds between two attempts, even if the server asks for more
LARGEST_ANSWER = 64 * 2**20  # bytes
_QUOTED = 400  # characters of a server's answer in an error message
_JITTER = 0.25  # largest share of a pause that is added to it at random, to spread the clients' attempts


class ServerError(OSError):
    """A server could not be reached, refused a request, or answered something other than what was asked."""


class RefusedError(ServerError):
    """A server refused a request, and repeating it would not help.

    Args:
        message: message for people.
        status: status of the answer.
        text: text of the answer.
    """

    def __init__(self, message: str, status: int, text: str):
        super().__init__(message)
        self.status, self.text = status, text


class Answer(NamedTuple):
    """The answer of a server."""

    content: Any  # parsed; the text itself where it is not JSON and need not be
    quoted: str  # the beginning of its text, for error messages


def check_url(url: str) -> str:
    """Return a URL without its trailing slash, after checking that paths can be appended to it.

    Raises:
        ValueError: it is not http:// or https:// with a host, it holds a user or a password, which would end up in
            records, or it has a query or a fragment.

    Example:
        >>> check_url("http://127.0.0.1:8000/v1/")
        'http://127.0.0.1:8000/v1'
    """
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        httpx.URL(url)
    except (ValueError, httpx.InvalidURL):
        known = False
    if not known:
        raise ValueError(f"url must start with http:// or https:// and name a host, got {without_user(url)!r}")
    if "@" in parts.netloc:
        raise ValueError(
            f"url must not hold a user or a password, got {without_user(url)!r}; pass a key as api_key or in the "
            f"environment variable {API_KEY}"
        )
    if parts.query or parts.fragment:
        raise ValueError(f"url must end with its path, without ? and #, got {without_user(url)!r}")
    return url.rstrip("/")


def check_key(key: str | None) -> str | None:
    """Return the key to send: the one given, else that of the environment, as OpenAI's clients do; None without one.

    Raises:
        ValueError: it has a character that a header cannot hold. The message does not show the key.
    """
    key = os.environ.get(API_KEY, "").strip() if key is None else key
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ValueError(f"api_key (or {API_KEY}) must be printable ASCII without spaces; it is not shown here")
    return key or None


def retry_after(headers: Mapping[str, str], otherwise: float) -> float:
    """Return the seconds that Retry-After asks to wait, at most `LONGEST_PAUSE`.

    Args:
        headers: headers of the answer; the entry is a whole number of seconds or a date (RFC 9110, section 10.2.3).
        otherwise: seconds if there is no such entry, or it is neither.

    Example:
        >>> retry_after({"Retry-After": "7"}, 1.0), retry_after({"Retry-After": "9" * 12}, 1.0)
        (7.0, 60.0)
        >>> retry_after({"Retry-After": "\\u00b2"}, 1.0)
        1.0
    """
    text = (headers.get("Retry-After") or "").strip()
    seconds = otherwise
    if re.fullmatch(r"[0-9]+", text):
        seconds = float(text)
    elif text.isascii():
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            seconds = otherwise
    return min(max(0.0, seconds), LONGEST_PAUSE)


class Server:
    """Sends JSON to a server and returns its JSON.

    Redirects are not followed: the key would go with them.

    Args:
        url: paths are appended to it.
        api_key: sent as a bearer token; None: OPENAI_API_KEY from the environment, if it is set; "" sends none.
        timeout: seconds a request may take, from connecting to the last byte of the answer.
        attempts: how often a request is tried, with pauses of 1, 2, 4 ... seconds, or what Retry-After says, and up to
            a quarter more at random; at most 60 seconds.
        pause: called with the seconds of each pause.

    Raises:
        ValueError: the URL or the key is not valid.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = 120.0,
        attempts: int = 4,
        pause: Callable[[float], None] = time.sleep,
    ):
        self.url, self._key = check_url(url), check_key(api_key)
        self.timeout, self.attempts, self.pause = timeout, attempts, pause

    def client(self) -> httpx.AsyncClient:
        """Return connections to the server, to be used as an asynchronous context manager."""
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        # Reason: one deadline for all of a request is set in `_send`; a time for each read would not bound their sum.
        # Certificates take 35 ms to read, and http has no use for them.
        return httpx.AsyncClient(
            headers=headers, follow_redirects=False, timeout=None, verify=self.url.startswith("https:")
        )

    async def post(
        self,
        client: httpx.AsyncClient,
        path: str,
        body: object,
        *,
        final: Callable[[str], object] = lambda text: False,
        plain: bool = False,
    ) -> Answer:
        """Return the answer to a request.

        Args:
            client: from `client()`.
            path: appended to the URL; a complete URL replaces it.
            body: sent as JSON; None sends a GET request.
            final: returns whether the text of an error means that another attempt would not help.
            plain: whether the answer may be plain text, or empty.

        Raises:
            RefusedError: the status blames the request, or is a redirect.
            ServerError: no answer after all attempts, or one that is not JSON or is too large.
        """
        where = path if "://" in path else f"{self.url}{path}"
        content = None if body is None else json.dumps(body).encode()
        for attempt in range(1, self.attempts + 1):
            wait = min(2.0 ** (attempt - 1), LONGEST_PAUSE)
            try:
                status, headers, data = await self._send(client, where, content)
            except TimeoutError:
                reason = "timed out"
            except ServerError:
                raise
            except (httpx.HTTPError, httpx.StreamError, OSError) as error:
                reason = _reason(error)
            else:
                text = data.decode(errors="replace")
                if 200 <= status < 300:
                    return self._parsed(where, data, text, plain)
                reason = f"status {status}: {self.quote(text)}"
                if 300 <= status < 400:
                    place = without_user(headers.get("Location", "")).partition("?")[0]
                    raise RefusedError(
                        f"{where} redirects to {self.quote(place)!r}, which is not followed, because the key would "
                        "go with it; if that is the server, use it as the url",
                        status,
                        text,
                    )
                if status not in RETRIED or final(text):
                    raise RefusedError(f"{where} refused: {reason}", status, text)
                wait = retry_after(headers, wait)
            if attempt < self.attempts:
                wait = min(wait * (1 + _JITTER * random.random()), LONGEST_PAUSE)
                await anyio.to_thread.run_sync(self.pause, wait, abandon_on_cancel=True)
        raise ServerError(f"{where} gave no answer in {self.attempts} attempts of {self.timeout:g} s; last: {reason}")

    async def _send(
        self, client: httpx.AsyncClient, where: str, content: bytes | None
    ) -> tuple[int, Mapping[str, str], bytes]:
        found = bytearray()
        with anyio.fail_after(self.timeout):
            async with client.stream("GET" if content is None else "POST", where, content=content) as answer:
                async for chunk in answer.aiter_bytes():
                    found += chunk
                    if len(found) > LARGEST_ANSWER:
                        raise ServerError(f"{where} answered more than {LARGEST_ANSWER >> 20} MiB")
                return answer.status_code, answer.headers, bytes(found)

    def _parsed(self, where: str, data: bytes, text: str, plain: bool) -> Answer:
        try:
            return Answer(json.loads(data), self.quote(text))
        except (ValueError, RecursionError):
            if plain:
                return Answer(text, self.quote(text))
            raise ServerError(f"{where} answered no JSON: {self.quote(text)}") from None

    def quote(self, text: str) -> str:
        """Return the beginning of a text that the server sent, in one line and without the key."""
        text = text[: 2 * _QUOTED] if self._key is None else text.replace(self._key, "***")[: 2 * _QUOTED]
        text = " ".join(text.split())
        return text if len(text) <= _QUOTED else text[:_QUOTED] + " ..."


def _reason(error: BaseException) -> str:
    """Return what went wrong: the operating system's message at the end of a chain of errors, else the first's."""
    below: BaseException | None = error
    while below is not None:
        if isinstance(below, OSError) and below.errno is not None:
            own = isinstance(below, (socket.gaierror, ssl.SSLError))  # their error numbers are their own
            return str(below.strerror) if own else os.strerror(below.errno)
        several = getattr(below, "exceptions", None)
        below = several[0] if several else below.__cause__ or below.__context__
    return str(error) or type(error).__name__
