"""What a sampler needs to know about a server that draws from weights it is given: its requests and its replies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from windkern.train.samplers.server import Answer, RefusedError, Server, ServerError


class Policy(NamedTuple):
    """Weights that a server is to serve."""

    name: str  # carries the iteration and a digest of the weights, so that no two policies share one
    digest: str
    folder: Path  # where the server reads them


class Drawn(NamedTuple):
    """A response as a server drew it."""

    ids: tuple[int, ...]  # the end token included
    cut: bool  # it met the length limit
    logps: tuple[float, ...] | None  # of its tokens, nats, as the server gives them


class Draw(NamedTuple):
    """What is asked for."""

    prompt: Sequence[int]
    count: int
    seed: int
    temperature: float
    max_completion_length: int
    ends: Sequence[int]  # ids that end a response, all of them


class AbortedError(ServerError):
    """A server gave responses up half-way; the same request may be sent again."""


class Engine(Protocol):
    """The requests and replies of a kind of server."""

    server: Server
    several: bool  # whether one request may draw several responses that differ
    named: bool  # whether every policy has a name on the server, so that one it lacks cannot be confused with another

    async def push(self, client, policy: Policy, *, adapter: bool) -> None:
        """Let the server serve a policy.

        Raises:
            ServerError: it does not.
        """
        ...

    async def drop(self, client, policy: Policy) -> None:
        """Let the server forget a policy that it may have."""
        ...

    async def find(self, client) -> None:
        """Ask the server what has to be known before the first request."""
        ...

    def lacks(self, error: RefusedError) -> bool:
        """Whether a refusal says that the server does not have the policy, as one that was started again does."""
        ...

    def drawing(self, policy: Policy | None, draw: Draw) -> tuple[str, dict]:
        """Path and body of a request for responses."""
        ...

    def drawn(self, policy: Policy | None, draw: Draw, answer: Answer) -> list[Drawn]:
        """The responses of its answer, at most as many as were asked for.

        Raises:
            ServerError: it is not what was asked for; the message quotes it.
        """
        ...

    def scoring(self, policy: Policy | None, prefix: Sequence[int], token: int) -> tuple[str, dict]:
        """Path and body of a request for the log-prob of a token behind others."""
        ...

    def score(self, answer: Answer, token: int) -> float:
        """The log-prob of its answer, nats.

        Raises:
            ServerError: there is none.
        """
        ...


def check_ids(ids: object, draw: Draw, *, cut: bool) -> tuple[int, ...]:
    """Return the token ids of a response that ended as it must.

    Args:
        ids: what a server wrote there.
        draw: what was asked for.
        cut: whether the server says that the response met the length limit.

    Raises:
        ValueError: they are not; the message says why, to stand before a quotation.

    Example:
        >>> draw = Draw([1], 1, 0, 1.0, 3, [2])
        >>> check_ids([5, 2], draw, cut=False)
        (5, 2)
        >>> check_ids([5], draw, cut=True)
        Traceback (most recent call last):
        ValueError: a response that was cut after 1 tokens, not 3 (the server has a limit of its own)
    """
    if not isinstance(ids, list) or not ids or not all(type(token) is int and token >= 0 for token in ids):
        raise ValueError("token ids that are not those of a response")
    if len(ids) > draw.max_completion_length:
        raise ValueError(f"a response of {len(ids)} tokens, where {draw.max_completion_length} were the limit")
    if cut and len(ids) < draw.max_completion_length:
        raise ValueError(
            f"a response that was cut after {len(ids)} tokens, not {draw.max_completion_length} (the server has a "
            "limit of its own)"
        )
    if not cut and ids[-1] not in draw.ends:
        raise ValueError(f"a response that ended with token {ids[-1]}, which is not one of {list(draw.ends)}")
    early = [token for token in ids[:-1] if token in draw.ends]
    if early:
        raise ValueError(f"a response that went on behind its end token {early[0]}")
    return tuple(ids)


def check_logps(logps: object, count: int) -> tuple[float, ...]:
    """Return the log-probs of `count` tokens.

    Raises:
        ValueError: they are not.

    Example:
        >>> check_logps([-1, -0.5], 2)
        (-1.0, -0.5)
    """
    fits = isinstance(logps, list) and len(logps) == count
    if not fits or not all(type(each) in (int, float) and math.isfinite(each) and each <= 1e-3 for each in logps):
        raise ValueError(f"log-probs that are not those of {count} tokens")
    return tuple(map(float, logps))
