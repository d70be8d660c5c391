"""The interface to servers that draw responses from given weights: their requests and their replies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from windkern.train.samplers.server import Answer, RefusedError, Server, ServerError

# Fields of a request that vLLM and SGLang know by the same names, and other servers know in part. With these values
# nothing cuts or tilts the distribution: responses are samples of the policy.
UNCUT = {
    "top_p": 1.0,
    "top_k": -1,  # every release of vLLM and SGLang takes -1, but only some take 0
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
# For requests in token ids, where stop_token_ids alone says which tokens end a response.
AS_SAID = {"stop": [], "ignore_eos": True, "skip_special_tokens": False}


class Policy(NamedTuple):
    """Weights for a server."""

    name: str  # carries the iteration and a digest of the weights, so that no two policies share a name
    digest: str
    folder: Path  # where the server reads them


class Drawn(NamedTuple):
    """One response, as a server drew it."""

    ids: tuple[int, ...]  # the end token included
    cut: bool  # it reached the length limit
    logps: tuple[float, ...] | None  # of its tokens, nats, as the server gives them


@dataclass(frozen=True)
class Draw:
    """A request for responses."""

    prompt: Sequence[int]
    count: int
    seed: int
    temperature: float
    max_completion_length: int
    ends: Sequence[int]  # ids that end a response, all of them


class AbortedError(ServerError):
    """A server aborted responses before their end; the same request may be sent again."""


class Engine(Protocol):
    """One kind of server: how requests to it are written, and how its replies are read."""

    server: Server
    several: bool  # whether one request may ask for several different responses
    named: bool  # whether each policy has its own name on the server, so that a missing one cannot pass for another

    async def push(self, client: Any, policy: Policy, *, adapter: bool) -> None:
        """Make the server serve a policy.

        Raises:
            ServerError: the server does not accept it.
        """
        ...

    async def drop(self, client: Any, policy: Policy) -> None:
        """Make the server forget a policy, if it has it."""
        ...

    async def find(self, client: Any) -> None:
        """Ask the server for what the first request needs, such as the name of its model."""
        ...

    def lacks(self, error: RefusedError) -> bool:
        """Return whether a refusal says that the server does not have the policy, as after a restart."""
        ...

    def drawing(self, policy: Policy | None, draw: Draw) -> tuple[str, dict]:
        """Return path and body of a request for responses."""
        ...

    def drawn(self, policy: Policy | None, draw: Draw, answer: Answer) -> list[Drawn]:
        """Return the responses of an answer, at most as many as were asked for.

        Raises:
            ServerError: the answer is not what was asked for; the message quotes it.
        """
        ...

    def scoring(self, policy: Policy | None, prefix: Sequence[int], token: int) -> tuple[str, dict]:
        """Return path and body of a request for the log-prob of `token` after `prefix`."""
        ...

    def score(self, answer: Answer, token: int) -> float:
        """Return the log-prob in an answer, in nats.

        Raises:
            ServerError: the answer has none.
        """
        ...


def check_ids(ids: object, draw: Draw, *, cut: bool) -> tuple[int, ...]:
    """Return the token ids of a response, after checking that it ended where it should.

    Args:
        ids: what the server sent.
        draw: what was asked for.
        cut: whether the server says that the response reached the length limit.

    Raises:
        ValueError: the ids are not those of such a response; the message is worded to precede a quotation.

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
        raise ValueError(f"a response that continues after its end token {early[0]}")
    return tuple(ids)


def check_logps(logps: Any, count: int) -> tuple[float, ...]:
    """Return log-probs as floats, after checking that they are those of `count` tokens.

    Raises:
        ValueError: there are more or fewer, or one is not finite or above zero.

    Example:
        >>> check_logps([-1, -0.5], 2)
        (-1.0, -0.5)
    """
    fits = isinstance(logps, list) and len(logps) == count
    if not fits or not all(type(each) in (int, float) and math.isfinite(each) and each <= 1e-3 for each in logps):
        raise ValueError(f"log-probs that are not those of {count} tokens")
    return tuple(map(float, logps))
