"""Keep a server in step with the policy: give it each new policy, then check that it serves that one."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import torch
from accelerate import PartialState
from anyio.from_thread import start_blocking_portal
from torch import nn

import windkern as wk
from windkern import hf
from windkern._files import write_text
from windkern.train.samplers.engine import Draw, Drawn, Engine, Policy
from windkern.train.samplers.server import ServerError
from windkern.train.samplers.verify import Comparison, compare
from windkern.train.samplers.weights import digest_of, is_adapter, state_of, write
from windkern.train.world import World

_PROBES, _PROBE_TOKENS = 16, 64  # responses that are kept to ask about, and tokens of each
_ASKED = 32  # tokens that a server is asked about after an update, half of them where the policies differ most
_MARKERS = 8  # of them, asked about again to see whether the server was restarted
_NAME = re.compile(r"policy-\d{4}-[0-9a-f]+(\.part)?")
_log = logging.getLogger(__name__)


class Probe(NamedTuple):
    """A response, with the log-probs that the previous policy gave its tokens."""

    prompt: list[int]
    response: list[int]
    logps: list[float] | None


class Place(NamedTuple):
    """A token whose log-prob the server is asked for."""

    prefix: list[int]
    token: int
    new: float  # log-prob by the current policy
    previous: float | None

    @property
    def moved(self) -> float:
        """How far the log-prob has moved; 0 where the previous policy was not scored."""
        return 0.0 if self.previous is None else abs(self.new - self.previous)


class Follower:
    """Gives a server one policy after another, and verifies after each which one it serves.

    The file `state.json` next to the policy holds its number, some responses with the trainer's log-probs, and
    responses that the policy drew. After the next update the server is asked for the log-probs of some of the scored
    tokens, see `windkern.train.samplers.verify.compare`; the drawn responses are scored at that time, for the update
    after it. Reason: server and trainer round differently, so the trainer must score both policies.

    Args:
        engine: writes requests to the server and reads its replies.
        folder: holds policies and state; the server must see it under the same path.
        opening: token ids of a prompt to draw from when no response has been drawn yet.

    Raises:
        ServerError: when updating: the server serves the previous policy, another model, or only part of the
            weights.
    """

    def __init__(self, engine: Engine, folder: Path, opening: Sequence[int]):
        self.engine, self.folder, self.opening = engine, Path(folder).absolute(), list(opening)
        self.policy: Policy | None = None
        self._markers: list[Place] = []
        self._adapter, self._apart = False, 0.0
        weakref.finalize(self, _remove_policies, self.folder, os.getpid())

    @property
    def _given(self) -> Policy:
        assert self.policy is not None, "no policy has been given to the server"
        return self.policy

    # Updating.

    def update(self, model: nn.Module, ends: Sequence[int]) -> None:
        """Make the server serve a policy. Every process must call this."""
        world, state = World(PartialState()), state_of(model)
        self._adapter = is_adapter(model)
        before = self.policy
        self.policy, known, fresh = world.first(lambda: self._give(model, state, ends))
        if before is not None and before.digest == self.policy.digest:
            return
        logps = token_logps(model, [*known, *fresh])
        self._markers, self._apart = world.first(lambda: self._verify(known, fresh, logps, before))

    def _give(self, model: nn.Module, state: dict, ends: Sequence[int]) -> tuple[Policy, list[Probe], list[Probe]]:
        """Give the server a policy; return it, the responses scored by the previous one, and those to score it on."""
        digest, known = digest_of(state), self._read()
        number = known["number"] if digest == known["digest"] else known["number"] + 1
        name = f"policy-{number:04d}-{digest}"
        policy = Policy(name, digest, self.folder / name)
        if not policy.folder.is_dir():
            write(model, state, policy.folder)
        self._write({**known, "number": number, "digest": digest})
        scored = [Probe(*probe) for probe in known["scored"]]
        fresh = [Probe(prompt, response, None) for prompt, response in known["drawn"]] or scored

        async def give(client: Any) -> list[Probe]:
            await self.engine.find(client)
            await self.engine.push(client, policy, adapter=self._adapter)
            return fresh or await self._draw(client, policy, ends)

        # A resumed run may hold the very policy that was scored, and then there is nothing to compare.
        return policy, scored if known["of"] != digest else [], self._talk(give)

    async def _draw(self, client: Any, policy: Policy, ends: Sequence[int]) -> list[Probe]:
        draw = Draw(self.opening, 4 if self.engine.several else 1, 0, 1.0, _PROBE_TOKENS // 2, ends)
        path, body = self.engine.drawing(policy, draw)
        drawn = self.engine.drawn(policy, draw, await self.engine.server.post(client, path, body))
        return [Probe(self.opening, list(each.ids), None) for each in drawn]

    def _talk(self, work):
        with (
            start_blocking_portal() as portal,
            portal.wrap_async_context_manager(self.engine.server.client()) as client,
        ):
            return portal.call(work, client)

    # Verifying.

    def _verify(
        self, scored: list[Probe], fresh: list[Probe], logps: list[list[float]], before: Policy | None
    ) -> tuple[list[Place], float]:
        """Verify which policy the server serves.

        Returns:
            Tokens that tell this policy from the previous one, and by how many nats; no tokens if none do.
        """
        asked = scored or [probe._replace(logps=None) for probe in fresh]
        places = _chosen(asked, logps[: len(asked)] if scored else logps[-len(fresh) :])

        async def ask(client: Any) -> list[float]:
            found = await self.scores(client, places)
            if before is not None:
                await self.engine.drop(client, before)
            return found

        served = self._talk(ask)
        previous = [place.previous for place in places if place.previous is not None] if scored else None
        usual = self._read()["gap"]
        found = compare([place.new for place in places], served, previous, usual=usual)
        self._tell(found, bool(scored), usual)
        rows = [[*probe[:2], row] for probe, row in zip(fresh, logps[-len(fresh) :], strict=True)]
        kept = {"scored": rows, "of": self._given.digest, "drawn": [], "gap": found.gap if usual is None else usual}
        self._write({**self._read(), **kept})
        _remove_policies(self.folder, os.getpid(), keep=self._given.folder)
        if found.verdict != "new":
            return [], 0.0
        order = sorted(range(len(places)), key=lambda k: -places[k].moved)[:_MARKERS]
        return [places[k]._replace(new=served[k]) for k in order], found.apart

    def _tell(self, found: Comparison, compared: bool, usual: float | None) -> None:
        url, name = self.engine.server.url, self._given.name
        if found.verdict == "stale":
            raise ServerError(
                f"{url} was given {name} but still serves the previous policy: where the two differ most, by "
                f"{found.apart:.2g} nats a token, its log-probs differ from the new one's by {found.to_new:.2g} and "
                f"from the previous one's by {found.to_previous:.2g}; restart the server, and resume the run"
            )
        if found.verdict == "other" and usual is not None:
            raise ServerError(
                f"{url} was given {name} but has not taken all of it: its log-probs differ from the trainer's by "
                f"{found.gap:.2g} nats a token, and by {usual:.2g} after the first update; restart the server "
                "(for whole weights, without --enable-lora; on a CPU, vLLM does not update a head that is tied to the "
                "embeddings), and resume the run"
            )
        if found.verdict == "other":
            raise ServerError(
                f"{url} serves a different model from the one that is trained: their log-probs differ by "
                f"{found.gap:.2g} nats a token; it must serve the base model of the run (for an adapter on a merged "
                "base, that base)"
            )
        if found.verdict == "unknown" and compared:
            _log.warning(
                "%s: %s and the previous policy cannot be told apart (they differ by %.2g nats a token where they "
                "differ most, and the server from either by %.2g), so it is not known which of them it serves",
                url,
                name,
                found.apart,
                found.noise,
            )
        else:
            _log.info("%s serves %s: %.2g nats a token from the trainer's log-probs", url, name, found.gap)

    async def scores(self, client: Any, places: Sequence[Place]) -> list[float]:
        """Return the server's log-probs of tokens, asking for 16 at a time."""
        found = [0.0] * len(places)
        gate = anyio.Semaphore(16)

        async def one(k: int) -> None:
            async with gate:
                path, body = self.engine.scoring(self.policy, places[k].prefix, places[k].token)
                answer = await self.engine.server.post(client, path, body)
                found[k] = self.engine.score(answer, places[k].token)

        try:
            async with anyio.create_task_group() as group:
                for k in range(len(places)):
                    group.start_soon(one, k)
        except BaseException as error:
            while inner := getattr(error, "exceptions", None):
                error = inner[0]
            raise error from None
        return found

    async def still(self, client: Any) -> bool:
        """Return whether the server still serves what it served after the update, as far as log-probs can tell."""
        if not self._markers:
            return True
        served = await self.scores(client, self._markers)
        gaps = [abs(now - place.new) for now, place in zip(served, self._markers, strict=True)]
        return sum(gaps) / len(gaps) <= self._apart / 2

    async def restore(self, client: Any) -> None:
        """Give the policy to a server that was restarted.

        Raises:
            ServerError: the server does not serve it afterwards.
        """
        _log.warning("%s was restarted; it is given %s again", self.engine.server.url, self._given.name)
        await self.engine.push(client, self._given, adapter=self._adapter)
        if not await self.still(client):
            raise ServerError(f"{self.engine.server.url} was given {self._given.name} again but does not serve it")

    # Remembering.

    def remember(self, prompts: Sequence[Sequence[int]], groups: Sequence[Sequence[Drawn]]) -> None:
        """Keep some responses of this policy: the next policies are scored on them."""
        if self.policy is None or not PartialState().is_main_process:
            return
        known = self._read()
        if known["drawn"] or known["of"] != self.policy.digest:
            return
        found = [
            [list(prompt), list(each.ids[:_PROBE_TOKENS])]
            for prompt, group in zip(prompts, groups, strict=True)
            for each in group[: max(1, _PROBES // len(groups))]
        ]
        self._write({**known, "drawn": found[:_PROBES]})

    def _read(self) -> dict:
        """Return the stored state; an empty one if the file is missing or damaged.

        Hazard: without the file, a stale server goes unnoticed at the next update, but only at that one.
        """
        try:
            found = json.loads((self.folder / "state.json").read_text("utf-8"))
            return {name: found[name] for name in ("number", "digest", "scored", "of", "drawn", "gap")}
        except (OSError, ValueError, KeyError, TypeError):
            return {"number": 0, "digest": None, "scored": [], "of": None, "drawn": [], "gap": None}

    def _write(self, state: dict) -> None:
        write_text(self.folder / "state.json", json.dumps(state))


@torch.no_grad()
def token_logps(model: nn.Module, probes: Sequence[Probe]) -> list[list[float]]:
    """Return the log-probs that a model in eval mode gives the tokens of each response, at temperature 1."""
    width = max(len(probe.prompt) + len(probe.response) for probe in probes)
    device = next(model.parameters()).device
    ids = torch.zeros(len(probes), width, dtype=torch.long, device=device)
    attended, own = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for k, probe in enumerate(probes):
        first, last = len(probe.prompt), len(probe.prompt) + len(probe.response)
        ids[k, :last] = torch.tensor([*probe.prompt, *probe.response])
        attended[k, :last], own[k, first:last] = True, True
    targets = hf.completion_targets(ids, own)
    was_training = model.training
    model.eval()
    try:
        found = hf.run(
            model,
            ids,
            attended,
            lambda parts, hidden: wk.token_logps(*parts.blocks(hidden), targets.to(hidden.device)).logps,
        )
    finally:
        model.train(was_training)
    rows = found.float().cpu()
    kept = (targets != hf.IGNORE_INDEX).cpu()
    return [row[keep].tolist() for row, keep in zip(rows, kept, strict=True)]


def _chosen(probes: Sequence[Probe], logps: Sequence[Sequence[float]]) -> list[Place]:
    """Choose tokens to ask about: half where the policies differ most, the others evenly spaced."""
    places = [
        Place(
            [*probe.prompt, *probe.response[:t]],
            probe.response[t],
            row[t],
            None if probe.logps is None else probe.logps[t],
        )
        for probe, row in zip(probes, logps, strict=True)
        for t in range(len(probe.response))
    ]
    if any(place.previous is None for place in places):  # then none of them was scored before
        return places[:: -(-len(places) // _ASKED)]
    order = sorted(range(len(places)), key=lambda k: -places[k].moved)
    rest = sorted(order[_ASKED // 2 :])
    others = rest[:: max(1, -(-len(rest) // (_ASKED // 2)))]
    return [places[k] for k in (*order[: _ASKED // 2], *others)]


def _remove_policies(folder: Path, process: int, keep: Path | None = None) -> None:
    """Delete the folders of all policies except `keep`."""
    if os.getpid() != process or not PartialState().is_main_process:  # a forked child has the object, too
        return
    for path in folder.glob("policy-*"):
        if path != keep and _NAME.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
