"""Samplers: the policy's own generate, servers and recorded responses; `make_sampler` picks one by a run's settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from windkern.train.samplers.kinds import KINDS, kind_of

if TYPE_CHECKING:
    from windkern.train.config import WindConfig
    from windkern.train.samplers.engine import Engine
    from windkern.train.samplers.sampler import Sampler
    from windkern.train.samplers.server import Server
    from windkern.train.samplers.transfer import NcclTransfer


def make_sampler(config: WindConfig, tokenizer: Any) -> Sampler | None:
    """Return the sampler that `config.sampler` names; None stands for the policy's own `generate`.

    Raises:
        ValueError: `config.sampler` does not name a sampler, or a setting is not one of the sampler's.
        FileNotFoundError: the file of recorded responses does not exist.
    """
    from windkern._checks import check_choice
    from windkern.train.data.prompts import without_user
    from windkern.train.samplers.recorded import RecordedSampler

    kind, _, name = config.sampler.partition(":")
    settings = dict(config.sampler_settings or {})
    common: dict[str, Any] = {
        "max_completion_length": config.max_completion_length,
        "system": config.system if tokenizer.chat_template is not None else None,
    }
    known = kind_of(config.sampler).settings
    if settings and not known:
        forms = ", ".join(each.form for each in KINDS.values() if each.settings)
        raise ValueError(f"sampler_settings are for {forms}, got sampler {without_user(config.sampler)!r}")
    for key in settings:
        check_choice("a key of sampler_settings", key, known)
    if config.sampler == "transformers":
        return None
    if config.sampler == "batched":
        from windkern.train.samplers.batched import BatchedSampler

        return BatchedSampler(
            tokenizer, temperature=config.temperature, batch_size=config.sampling_batch_size, **common
        )
    if kind == "recorded" and name:
        return RecordedSampler(name, tokenizer, **common)
    if kind == "openai" and name:
        from windkern.train.samplers.openai import OpenAISampler

        model = settings.pop("model", "policy")
        return OpenAISampler(name, model, tokenizer, temperature=config.temperature, **common, **settings)
    if kind in ("vllm", "sglang") and name:
        from windkern.train.samplers.served import ServedSampler
        from windkern.train.samplers.server import Server
        from windkern.train.samplers.sglang import Sglang
        from windkern.train.samplers.vllm import Vllm

        root = name.rstrip("/").removesuffix("/v1")
        reached = {"timeout": settings.pop("timeout", 600.0), "attempts": settings.pop("attempts", 8)}
        if kind == "vllm":
            transfer = _transfer(settings, Server(root, timeout=reached["timeout"], attempts=1))
            engine: Engine = Vllm(Server(f"{root}/v1", **reached), settings.pop("model", None), transfer)
        else:
            engine = Sglang(Server(root, **reached))
        folder = Path(settings.pop("folder", None) or Path(cast(str, config.output_dir)) / "served")
        return ServedSampler(engine, tokenizer, folder=folder, temperature=config.temperature, **common, **settings)
    *most, last = (each.form for each in KINDS.values())
    raise ValueError(f"sampler must be {', '.join(most)} or {last}, got {without_user(config.sampler)!r}")


def _transfer(settings: dict, server: Server) -> NcclTransfer | None:
    """Take `transfer` and `address` out of the settings, and return how whole weights reach a vLLM server."""
    from windkern._checks import check_choice

    kind = check_choice("transfer", settings.pop("transfer", "folder"), ("folder", "nccl"))
    if kind == "folder":
        if "address" in settings:
            raise ValueError("address needs transfer: nccl, got it without")
        return None
    from windkern.train.samplers.transfer import NcclTransfer

    return NcclTransfer(server, settings.pop("address", "127.0.0.1"))
