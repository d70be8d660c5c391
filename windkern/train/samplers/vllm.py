"""vLLM's own protocol: token ids go in and come out; adapters come from a folder, weights from one or over NCCL."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from windkern.train.samplers.engine import AS_SAID, UNCUT, AbortedError, Draw, Drawn, Policy, check_ids, check_logps
from windkern.train.samplers.server import Answer, RefusedError, Server, ServerError

if TYPE_CHECKING:
    from windkern.train.samplers.transfer import NcclTransfer

# The server fills what a request leaves open from the model's generation_config or from its own defaults.
# Source: CompletionRequest of vLLM 0.32.
NEUTRAL: dict[str, Any] = {
    **UNCUT,
    **AS_SAID,
    "length_penalty": 1.0,
    "logit_bias": None,
    "bad_words": [],
    "allowed_token_ids": None,
    "min_tokens": 0,
    "include_stop_str_in_output": False,
    "use_beam_search": False,
    "truncate_prompt_tokens": None,
    "echo": False,
    "stream": False,
}
_START = (
    "start it as docs/vllm.md says: VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora for an adapter, "
    "VLLM_SERVER_DEV_MODE=1 for whole weights, and --weight-transfer-config for transfer: nccl"
)


class Vllm:
    """A server started by `vllm serve`.

    An adapter is loaded under its own name. Whole weights keep the name of the model: the server reads them from a
    folder by the end point /collective_rpc (`reload_weights`), or is sent them, and then empties its prefix cache.

    Args:
        server: its URL ends with /v1.
        model: name under which it serves the base model; None asks the server.
        transfer: sends whole weights; None lets the server read them from the policy's folder.
    """

    several = True

    def __init__(self, server: Server, model: str | None = None, transfer: NcclTransfer | None = None):
        self.server, self.model, self.transfer, self.named = server, model, transfer, True

    async def find(self, client: Any) -> None:
        if self.model is not None:
            return
        answer = await self.server.post(client, "/models", None)
        try:
            found = [each["id"] for each in answer.content["data"] if not each.get("parent")]
        except (AttributeError, KeyError, TypeError):
            found = []
        if len(found) != 1 or not isinstance(found[0], str):
            raise ServerError(
                f"{self.server.url} must serve one base model, or sampler_settings must name one by model; it answered "
                f"{answer.quoted}"
            )
        self.model = found[0]

    async def push(self, client: Any, policy: Policy, *, adapter: bool) -> None:
        self.named = adapter
        try:
            body: dict[str, Any]
            if adapter:
                body = {"lora_name": policy.name, "lora_path": str(policy.folder)}
                # Reason: vLLM answers 500 if the adapter itself is at fault, and would again.
                await self.server.post(
                    client, "/load_lora_adapter", body, plain=True, final=lambda text: '"error"' in text
                )
            else:
                root = self.server.url.removesuffix("/v1")
                if self.transfer is not None:
                    await self.transfer.push(client, policy)
                else:
                    body = {"method": "reload_weights", "kwargs": {"weights_path": str(policy.folder)}}
                    await self.server.post(client, f"{root}/collective_rpc", body, plain=True)
                answer = await self.server.post(client, f"{root}/reset_prefix_cache", {}, plain=True)
                if isinstance(answer.content, dict) and answer.content.get("success") is False:
                    raise ServerError(
                        f"{self.server.url} keeps a prefix cache of the previous weights, because requests of "
                        "others are under way; a policy that is trained needs its own server"
                    )
        except RefusedError as error:
            if adapter and "already been loaded" in error.text:  # the same name is the same adapter
                return
            raise ServerError(f"{self.server.url} has not accepted the policy ({error}); {_START}") from error

    async def drop(self, client: Any, policy: Policy) -> None:
        if not self.named:
            return
        try:
            await self.server.post(client, "/unload_lora_adapter", {"lora_name": policy.name}, plain=True)
        except RefusedError as error:
            if not self.lacks(error):
                raise

    def lacks(self, error: RefusedError) -> bool:
        return error.status == 404 and ("does not exist" in error.text or "cannot be found" in error.text)

    def _name(self, policy: Policy | None) -> str | None:
        return policy.name if policy is not None and self.named else self.model

    def drawing(self, policy: Policy | None, draw: Draw) -> tuple[str, dict]:
        return "/completions", {
            **NEUTRAL,
            "model": self._name(policy),
            "prompt": list(draw.prompt),
            "n": draw.count,
            "seed": draw.seed,
            "temperature": draw.temperature,
            "max_tokens": draw.max_completion_length,
            "stop_token_ids": sorted(draw.ends),
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }

    def drawn(self, policy: Policy | None, draw: Draw, answer: Answer) -> list[Drawn]:
        choices = self._choices(answer)
        asked = self._name(policy)
        if isinstance(answer.content.get("model"), str) and answer.content["model"] != asked:
            raise ServerError(
                f"{self.server.url} answered as {self.server.quote(answer.content['model'])!r}, not as {asked!r}"
            )
        if len(choices) > draw.count:
            raise ServerError(
                f"{self.server.url} answered {len(choices)} completions, but {draw.count} were wanted: {answer.quoted}"
            )
        if any(isinstance(choice, dict) and choice.get("finish_reason") == "abort" for choice in choices):
            raise AbortedError(f"{self.server.url} gave up responses half-way (finish_reason abort)")
        found = []
        for choice in choices:
            try:
                found.append(read_choice(choice, draw))
            except ValueError as error:
                shown = self.server.quote(json.dumps(choice)) if _flat(choice) else type(choice).__name__
                raise ServerError(f"{self.server.url} answered {error}: {shown}") from None
        return found

    def _choices(self, answer: Answer) -> list:
        choices = answer.content.get("choices") if isinstance(answer.content, dict) else None
        if not isinstance(choices, list) or not choices:
            raise ServerError(f"{self.server.url} answered without completions: {answer.quoted}")
        return choices

    def scoring(self, policy: Policy | None, prefix: Sequence[int], token: int) -> tuple[str, dict]:
        # Reason: prompt_logprobs of a server with adapters end in an error of the engine (0.32 on a CPU: einsum over
        # the adapters of the sampled rows alone). If one token alone is allowed, its raw log-prob is returned.
        path, body = self.drawing(policy, Draw(prefix, 1, 0, 1.0, 1, []))
        return path, {**body, "allowed_token_ids": [token]}

    def score(self, answer: Answer, token: int) -> float:
        choice = self._choices(answer)[0]
        try:
            found = check_logps(choice["logprobs"]["token_logprobs"], 1)[0]
            if choice["token_ids"] != [token]:
                raise ValueError(f"another token than {token}")
        except (KeyError, TypeError, ValueError) as error:
            raise ServerError(
                f"{self.server.url} gave no log-prob of a token ({type(error).__name__}: {error}): {answer.quoted}"
            ) from None
        return found


def read_choice(choice: object, draw: Draw) -> Drawn:
    """Return the response in an entry of "choices" of vLLM's /v1/completions.

    Raises:
        ValueError: it is not one complete response; the message is worded to precede a quotation.

    Example:
        >>> draw = Draw([1], 1, 0, 1.0, 3, [2])
        >>> read_choice({"finish_reason": "stop", "token_ids": [5, 2], "prompt_token_ids": [1]}, draw)
        Drawn(ids=(5, 2), cut=False, logps=None)
    """
    if not isinstance(choice, dict) or "token_ids" not in choice:
        raise ValueError("a completion without token_ids (vLLM from 0.11 on returns them)")
    prompt = choice.get("prompt_token_ids")
    if prompt is not None and prompt != list(draw.prompt):
        raise ValueError("a response to another prompt than the one asked")
    reason = choice.get("finish_reason")
    if reason not in ("stop", "length"):
        raise ValueError(f"a completion that ended by {reason!r}, which the policy did not choose")
    ids = check_ids(choice["token_ids"], draw, cut=reason == "length" and not _ended(choice["token_ids"], draw))
    logprobs = choice.get("logprobs")
    if logprobs is None:
        return Drawn(ids, reason == "length" and ids[-1] not in draw.ends, None)
    if not isinstance(logprobs, dict):
        raise ValueError("log-probs of another form")
    logps = check_logps(logprobs.get("token_logprobs"), len(ids))
    return Drawn(ids, reason == "length" and ids[-1] not in draw.ends, logps)


def _ended(ids: object, draw: Draw) -> bool:
    return isinstance(ids, list) and bool(ids) and ids[-1] in draw.ends


def _flat(choice: object) -> bool:
    """Return whether something can be written as JSON without exhausting the stack."""
    try:
        json.dumps(choice)
    except RecursionError:
        return False
    return True
