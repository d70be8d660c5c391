"""A server of tiny models for tests, in the place of vLLM and SGLang: real weights, and faults on request."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from completion_server import Server
from nccl_group import Worker
from safetensors.torch import load_file


class PolicyServer:
    """Serves a model as "base" and adapters of it under their own names, with the protocols of vLLM and SGLang.

    Args:
        model: the first model; the server keeps a copy.
        fault: "stale" answers that it has taken weights and continues with those it had; "part" takes only some of the
            whole weights; "base" serves the first weights under every name; None works as it should.
        change: changes the content of an answer to a request for responses.
    """

    def __init__(self, model, fault: str | None = None, change=lambda path, content: content):
        self.first, self.fault, self.change = copy.deepcopy(model).eval(), fault, change
        self.forget()
        self.server = Server(route=self._route)
        self.url, self.requests, self.script = self.server.url, self.server.requests, self.server.script

    def forget(self) -> None:
        """Return to the state after a start."""
        self.whole = copy.deepcopy(self.first)
        self.adapters: dict[str, object] = {}
        self.loaded: list[str] = []  # paths, in order; "sent" for weights that were sent
        self.worker = Worker(lambda tensors: self._take("sent", tensors))

    def close(self) -> None:
        self.server.close()

    def asked(self, path: str) -> list[dict]:
        """Return the bodies of requests to a path."""
        return [body for each, body, _ in self.requests if each == path]

    def drawn(self) -> int:
        """Return how many responses were asked for, without those that were forced to one token."""
        bodies = self.asked("/v1/completions")
        return sum(body["n"] for body in bodies if body["allowed_token_ids"] is None)

    def _route(self, path: str, body: dict):
        work = {
            "/v1/models": self._models,
            "/v1/completions": self._completions,
            "/v1/load_lora_adapter": self._load,
            "/v1/unload_lora_adapter": self._unload,
            "/collective_rpc": self._reload,
            "/reset_prefix_cache": lambda body: (200, '{"success": true}', {}),
            "/generate": self._generate,
            "/update_weights_from_disk": self._update,
            **self.worker.routes,
        }.get(path)
        return None if work is None else work(body)

    # Weights.

    def _models(self, body: dict):
        names = [{"id": "base", "parent": None}, *({"id": name, "parent": "base"} for name in self.adapters)]
        return 200, json.dumps({"data": names}), {}

    def _load(self, body: dict):
        import peft

        name, folder = body["lora_name"], body["lora_path"]
        if name in self.adapters:
            return 400, _error(f"The lora adapter '{name}' has already been loaded."), {}
        if not Path(folder, "adapter_config.json").is_file():
            return 404, _error(f"Loading lora {name} failed: No adapter found for {folder}"), {}
        self.loaded.append(folder)
        if self.fault == "stale" and self.adapters:
            self.adapters[name] = list(self.adapters.values())[-1]
        elif self.fault == "base":
            self.adapters[name] = self.whole
        else:
            self.adapters[name] = peft.PeftModel.from_pretrained(copy.deepcopy(self.whole), folder).eval()
        return 200, f"Success: LoRA adapter '{name}' added successfully.", {}

    def _unload(self, body: dict):
        if body["lora_name"] not in self.adapters:
            return 404, _error(f"The lora adapter '{body['lora_name']}' cannot be found."), {}
        if self.fault != "stale":
            del self.adapters[body["lora_name"]]
        return 200, "Success", {}

    def _read(self, folder: str) -> None:
        self._take(folder, load_file(Path(folder) / "model.safetensors"))

    def _take(self, origin: str, found: dict) -> None:
        self.loaded.append(origin)
        if self.fault != "stale" or len(self.loaded) == 1:
            if self.fault == "part" and len(self.loaded) > 1:
                found = {name: value for name, value in found.items() if "layers.0" in name}
            self.whole.load_state_dict(found, strict=False)

    def _reload(self, body: dict):
        assert body["method"] == "reload_weights"
        self._read(body["kwargs"]["weights_path"])
        return 200, '{"results": [null]}', {}

    def _update(self, body: dict):
        self._read(body["model_path"])
        return 200, '{"success": true, "message": "Succeeded"}', {}

    # Responses.

    def _completions(self, body: dict):
        model = self.whole if body["model"] == "base" else self.adapters.get(body["model"])
        if model is None:
            return 404, _error(f"The model `{body['model']}` does not exist."), {}
        drawn = draw(
            model,
            body["prompt"],
            seeds=[body["seed"] + index for index in range(body["n"])],
            most=body["max_tokens"],
            ends=body["stop_token_ids"],
            temperature=body["temperature"],
            allowed=body["allowed_token_ids"],
        )
        choices = [
            {
                "index": index,
                "text": "",
                "logprobs": {"token_logprobs": logps},
                "finish_reason": "length" if cut else "stop",
                "token_ids": ids,
                "prompt_token_ids": body["prompt"],
            }
            for index, (ids, logps, cut) in enumerate(drawn)
        ]
        content = {"model": body["model"], "choices": choices}
        return 200, json.dumps(content if body["allowed_token_ids"] else self.change(body, content)), {}

    def _generate(self, body: dict):
        settings = body["sampling_params"]
        ((ids, logps, cut),) = draw(
            self.whole,
            body["input_ids"],
            seeds=[settings["sampling_seed"]],
            most=settings["max_new_tokens"],
            ends=settings["stop_token_ids"],
            temperature=settings["temperature"],
        )
        meta = {
            "finish_reason": {"type": "length" if cut else "stop"},
            "output_token_logprobs": [[each, token, None] for each, token in zip(logps, ids, strict=True)],
        }
        if (start := body.get("logprob_start_len")) is not None:
            asked = body["input_ids"]
            with torch.no_grad():
                found = self.whole(torch.tensor([asked])).logits[0].log_softmax(-1)
            meta["input_token_logprobs"] = [
                [None if t == 0 else float(found[t - 1, asked[t]]), asked[t], None] for t in range(start, len(asked))
            ]
        return 200, json.dumps({"text": "", "output_ids": ids, "meta_info": meta}), {}


def _error(message: str) -> str:
    return json.dumps({"error": {"message": message, "code": 0}})


@torch.no_grad()
def draw(model, prompt, *, seeds, most, ends, temperature, allowed=None) -> list[tuple[list[int], list[float], bool]]:
    """Return for each seed the tokens that a model draws, their log-probs before the temperature and the restriction to
    allowed tokens, and whether no end token came. Responses run in one batch, each with a generator of its own."""
    made = [torch.Generator().manual_seed(seed) for seed in seeds]
    tokens = torch.tensor([prompt] * len(seeds))
    rows: list[tuple[list[int], list[float]]] = [([], []) for _ in seeds]
    running = set(range(len(seeds)))
    while running and tokens.shape[1] < len(prompt) + most:
        logits = model(input_ids=tokens).logits[:, -1]
        chances = (logits / temperature).softmax(-1)
        if allowed is not None:
            chances = torch.zeros_like(chances).index_fill_(1, torch.tensor(allowed), 1.0)
        drawn = [int(torch.multinomial(row, 1, generator=own)) for row, own in zip(chances, made, strict=True)]
        tokens = torch.cat([tokens, torch.tensor(drawn)[:, None]], 1)
        logps = logits.log_softmax(-1)
        for k in sorted(running):
            rows[k][0].append(drawn[k])
            rows[k][1].append(float(logps[k, drawn[k]]))
            if drawn[k] in ends:
                running.discard(k)
    return [(*row, k in running) for k, row in enumerate(rows)]
