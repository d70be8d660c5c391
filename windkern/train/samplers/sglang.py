"""SGLang's own protocol: token ids go in and come out, and whole weights are read from a folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from windkern.train.samplers.engine import AS_SAID, UNCUT, AbortedError, Draw, Drawn, Policy, check_ids, check_logps
from windkern.train.samplers.server import Answer, RefusedError, Server, ServerError

# The server fills what a request leaves open from the model's generation_config.
# Source: SamplingParams of SGLang 0.5.
NEUTRAL = {**UNCUT, **AS_SAID, "min_new_tokens": 0}


class Sglang:
    """An SGLang server. Each request to /generate draws one response, with its own seed.

    The server reads whole weights from a folder (/update_weights_from_disk); adapters are not supported. The protocol
    follows SGLang's documentation and was tested against a stand-in, never against SGLang.

    Args:
        server: its URL ends before paths such as /generate.
    """

    several = False  # parallel samples with one seed would be equal
    named = False

    def __init__(self, server: Server):
        self.server = server

    async def find(self, client: Any) -> None:
        """Do nothing: requests do not name the model."""

    async def push(self, client: Any, policy: Policy, *, adapter: bool) -> None:
        if adapter:
            raise ServerError(
                "sampler: sglang:URL takes whole weights, but the policy is an adapter; use vllm:URL for that"
            )
        body = {"model_path": str(policy.folder), "flush_cache": True, "weight_version": policy.name}
        try:
            answer = await self.server.post(client, "/update_weights_from_disk", body)
        except RefusedError as error:
            raise ServerError(f"{self.server.url} has not accepted the policy: {error}") from error
        if not isinstance(answer.content, dict) or answer.content.get("success") is not True:
            raise ServerError(f"{self.server.url} has not accepted the policy: {answer.quoted}")

    async def drop(self, client: Any, policy: Policy) -> None:
        """Do nothing: the next policy has replaced it."""

    def lacks(self, error: RefusedError) -> bool:
        return False

    def drawing(self, policy: Policy | None, draw: Draw) -> tuple[str, dict]:
        sampling = {
            **NEUTRAL,
            "n": draw.count,
            "sampling_seed": draw.seed,
            "temperature": draw.temperature,
            "max_new_tokens": draw.max_completion_length,
            "stop_token_ids": sorted(draw.ends),
        }
        return "/generate", {"input_ids": list(draw.prompt), "sampling_params": sampling, "return_logprob": True}

    def drawn(self, policy: Policy | None, draw: Draw, answer: Answer) -> list[Drawn]:
        content = answer.content[0] if isinstance(answer.content, list) and len(answer.content) == 1 else answer.content
        try:
            if not isinstance(content, dict) or not isinstance(content.get("meta_info"), dict):
                raise ValueError("no response")
            meta = content["meta_info"]
            reason = meta.get("finish_reason")
            kind = reason.get("type") if isinstance(reason, dict) else reason
            if kind == "abort":
                raise AbortedError(f"{self.server.url} gave up a response half-way (finish_reason abort)")
            if kind not in ("stop", "length"):
                raise ValueError(f"a response that ended by {reason!r}, which the policy did not choose")
            ids = content.get("output_ids")
            cut = kind == "length" and not (isinstance(ids, list) and ids and ids[-1] in draw.ends)
            found = check_ids(ids, draw, cut=cut)
            pairs = meta.get("output_token_logprobs")
            if pairs is None:
                return [Drawn(found, cut, None)]
            return [Drawn(found, cut, _logps(pairs, found))]
        except ValueError as error:
            raise ServerError(f"{self.server.url} answered {error}: {answer.quoted}") from None

    def scoring(self, policy: Policy | None, prefix: Sequence[int], token: int) -> tuple[str, dict]:
        path, body = self.drawing(policy, Draw([*prefix, token], 1, 0, 1.0, 1, []))
        return path, {**body, "logprob_start_len": len(prefix) - 1}

    def score(self, answer: Answer, token: int) -> float:
        content = answer.content[0] if isinstance(answer.content, list) and answer.content else answer.content
        try:
            return _logps(content["meta_info"]["input_token_logprobs"][-1:], (token,))[0]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ServerError(
                f"{self.server.url} gave no log-prob of a token ({type(error).__name__}: {error}): {answer.quoted}"
            ) from None


def _logps(pairs: Any, ids: Sequence[int]) -> tuple[float, ...]:
    """Return the log-probs of [log-prob, id, text] entries, after checking that their ids are these."""
    fits = isinstance(pairs, list) and all(isinstance(pair, list) and len(pair) >= 2 for pair in pairs)
    if not fits or [pair[1] for pair in pairs] != list(ids):
        raise ValueError(f"log-probs of other tokens than {json.dumps(list(ids))[:80]}")
    return check_logps([pair[0] for pair in pairs], len(ids))
