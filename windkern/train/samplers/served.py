"""Sample from a server that receives the policy's weights before each iteration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from anyio.from_thread import start_blocking_portal
from torch import nn

from windkern._checks import check_count, check_number
from windkern.train.data.loading import opened_prompts
from windkern.train.data.turns import encode_opened, turn_of
from windkern.train.samplers.engine import AbortedError, Draw, Drawn, Engine
from windkern.train.samplers.following import Follower
from windkern.train.samplers.gate import TokenGate
from windkern.train.samplers.received import Received, key_of
from windkern.train.samplers.recorded import completions_of_ids
from windkern.train.samplers.sampler import Completions
from windkern.train.samplers.server import Answer, RefusedError, ServerError
from windkern.train.seeds import stream

TOKENS = 131072  # our choice: a few hundred responses of 500 tokens, about what one GPU runs at once
_STARTS = 3  # times that a server may be restarted within one call of `sample`

Listener = Callable[[Sequence[int], Sequence[Drawn]], None]  # token ids of a prompt, responses to it


class ServedSampler:
    """Samples from a server that follows the policy. Token ids go in and come out; no text is re-encoded.

    `update` gives the server the policy's weights (an adapter, or all of them) and verifies that it serves them;
    `sample` draws from it. A restarted server receives the weights again. Answers are kept on disk as they
    arrive, so that the server need not answer twice after a failure or a kill.

    Args:
        engine: writes requests and reads replies, such as `windkern.train.samplers.vllm.Vllm`.
        tokenizer: tokenizer of the policy.
        folder: holds policies and answers; the server must see it under the same path.
        max_completion_length: longest response, end token included.
        temperature: divides the logits; positive.
        system: system message for the chat template, None for the template's own.
        tokens: limit of tokens in flight, counting prompts and the longest possible responses.
        listener: called with the token ids of each prompt and its responses.

    Raises:
        ValueError: a number is out of range, or the tokenizer names no end token.
        ServerError: when updating: the server does not serve the policy. When sampling: no answer after all attempts, a
            status that blames the request, or an answer that is not what was asked for.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        *,
        folder: Path,
        max_completion_length: int,
        temperature: float = 1.0,
        system: str | None = None,
        tokens: int = TOKENS,
        listener: Listener = lambda prompt, drawn: None,
    ):
        self.engine, self.tokenizer, self.system, self.listener = engine, tokenizer, system, listener
        self.max_completion_length = check_count("max_completion_length", max_completion_length, least=1)
        self.temperature = check_number("temperature", temperature, above=0)
        self.tokens = check_count("tokens", tokens, least=1)
        self.ends = set(turn_of(tokenizer).ends)
        opening = encode_opened(tokenizer, opened_prompts(tokenizer, ["Hello"], system=system))[0]
        self.follower = Follower(engine, Path(folder) / "policies", opening)
        self.received = Received(Path(folder) / "received")
        self._keys: list[str] = []  # of the answers of the last call, which a kill may still lose

    @property
    def server(self):
        return self.engine.server

    def update(self, model: nn.Module) -> None:
        """Make the server serve the policy. Every process must call this.

        Raises:
            ServerError: the server does not serve the policy.
        """
        ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        self.ends |= set(ends if isinstance(ends, (list, tuple)) else [ends]) - {None}
        if not self.ends:
            raise ValueError("neither model.generation_config nor the tokenizer names an end token (eos_token_id)")
        self.follower.update(model, sorted(self.ends))

    def sample(self, prompts: Sequence[str], num_generations: int, seed: int) -> Completions:
        """Draw `num_generations` responses to each prompt. The server receives the seed, but need not honour it."""
        check_count("num_generations", num_generations, least=1)
        opened = encode_opened(self.tokenizer, opened_prompts(self.tokenizer, prompts, system=self.system))
        seeds = [stream(seed, place, prompt) % 2**31 for place, prompt in enumerate(prompts)]
        share = num_generations if self.engine.several else 1
        draws = [
            Draw(ids, share, own + first, self.temperature, self.max_completion_length, sorted(self.ends))
            for ids, own in zip(opened, seeds, strict=True)
            for first in range(0, num_generations, share)
        ]
        parts = self._all(draws)
        per = num_generations // share
        groups = [[each for part in parts[k : k + per] for each in part] for k in range(0, len(parts), per)]
        for ids, group in zip(opened, groups, strict=True):
            self.listener(ids, group)
        self.follower.remember(opened, groups)
        return completions_of_ids(
            self.tokenizer,
            prompts,
            [[list(each.ids) for each in group] for group in groups],
            system=self.system,
            max_completion_length=self.max_completion_length,
            truncated=[[each.cut for each in group] for group in groups],
        )

    def _all(self, draws: Sequence[Draw]) -> list[list[Drawn]]:
        """Return the responses of all draws, from a server that served the policy throughout."""
        keys: list[str] = []
        with start_blocking_portal() as portal, portal.wrap_async_context_manager(self.server.client()) as client:
            portal.call(self.engine.find, client)
            for _ in range(_STARTS):
                if not self.engine.named and not portal.call(self.follower.still, client):
                    portal.call(self.follower.restore, client)
                gate, lock = portal.call(self._locks)
                futures = [portal.start_task_soon(self._draw, client, gate, lock, draw, keys) for draw in draws]
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()
                if self.engine.named or portal.call(self.follower.still, client):
                    break
                self.received.drop(keys)
            else:
                raise ServerError(f"{self.server.url} was restarted {_STARTS} times during one call")
        self.received.drop(set(self._keys) - set(keys))
        self._keys = keys
        return [future.result() for future in futures]

    async def _locks(self) -> tuple[TokenGate, anyio.Lock]:
        return TokenGate(self.tokens), anyio.Lock()

    async def _draw(self, client: Any, gate: TokenGate, lock: anyio.Lock, draw: Draw, keys: list[str]) -> list[Drawn]:
        """Return as many responses as are wanted, asking again if the server returns fewer."""
        found: list[Drawn] = []
        while len(found) < draw.count:
            rest = dataclasses.replace(draw, count=draw.count - len(found), seed=draw.seed + len(found))
            found += await self._ask(client, gate, lock, rest, keys)
        return found

    async def _ask(self, client: Any, gate: TokenGate, lock: anyio.Lock, draw: Draw, keys: list[str]) -> list[Drawn]:
        policy = self.follower.policy
        path, body = self.engine.drawing(policy, draw)
        key = key_of(self.server.url, path, body, None if policy is None else policy.digest)
        keys.append(key)
        if (kept := self.received.get(key)) is not None:
            try:
                return self.engine.drawn(policy, draw, Answer(kept, ""))
            except ServerError:  # a damaged file, or one of another release
                self.received.drop([key])
        async with gate.hold(len(draw.prompt) + draw.count * draw.max_completion_length):
            answer, found = await self._whole(client, lock, path, body, draw)
        self.received.put(key, answer.content)
        return found

    async def _whole(
        self, client: Any, lock: anyio.Lock, path: str, body: dict, draw: Draw
    ) -> tuple[Answer, list[Drawn]]:
        """Return an answer in which no response was aborted. Reason: long responses are the likelier to be aborted."""
        attempt = 1
        while True:
            answer = await self._post(client, lock, path, body)
            try:
                return answer, self.engine.drawn(self.follower.policy, draw, answer)
            except AbortedError:
                if attempt == self.server.attempts:
                    raise
            await anyio.to_thread.run_sync(self.server.pause, float(attempt), abandon_on_cancel=True)
            attempt += 1

    async def _post(self, client: Any, lock: anyio.Lock, path: str, body: dict) -> Answer:
        try:
            return await self.server.post(client, path, body)
        except RefusedError as error:
            if self.follower.policy is None or not self.engine.lacks(error):
                raise
        async with lock:  # the first request to be refused restores the policy; the others ask again
            try:
                return await self.server.post(client, path, body)
            except RefusedError as error:
                if not self.engine.lacks(error):
                    raise
                await self.follower.restore(client)
        return await self.server.post(client, path, body)
