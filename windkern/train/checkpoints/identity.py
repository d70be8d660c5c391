"""Compare a run with the one it resumes: settings, models, prompts and weights that must match."""

from __future__ import annotations

import hashlib
import json
import os
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from windkern._files import ANEW, DamagedRecordError
from windkern.train.config import WindConfig
from windkern.train.data.loading import Demonstration
from windkern.train.data.prompts import prompt_to_json
from windkern.train.inherited import FREE, TRAINED
from windkern.train.models import public_name
from windkern.train.samplers.kinds import kind_of
from windkern.train.store import FORMAT

# Settings that may change on resume. More iterations are fine, but stretch a schedule that depends on their number.
_FREE = {*FREE, "num_iterations", "overwrite", "memory_budget", "backend", "remove_unused_columns"}
_FREE |= {"sampler_settings", "log_completions"}
_OF_A_PLACE = {
    "base_model_name_or_path",
    "inference_mode",
    "revision",
    "peft_version",
    "auto_mapping",
}  # settings of an adapter
_SAMPLES = 64  # values of a parameter that tell it from another checkpoint's
_HEAD = 60  # characters of a prompt that are kept to show where two lists differ
_SHOWN = 5  # differences that are named
_RECORDED = "recorded:"


class ResumeError(ValueError):
    """A checkpoint or sampled responses belong to another run; the message says what differs."""


def _digest(*parts: bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "big") + part)
    return found.hexdigest()[:16]


def fingerprint(model: object) -> dict[str, str]:
    """Return a digest of some values of every parameter, by name; it tells checkpoints of one architecture apart.

    Parameters without values here (on a meta device, or sharded) are left out. Anything but a model gives {}.
    """
    found = {}
    for name, value in model.named_parameters() if isinstance(model, nn.Module) else ():
        flat = (value.to_local() if hasattr(value, "to_local") else value).detach().reshape(-1)
        if flat.numel() and not flat.is_meta:
            places = torch.linspace(0, flat.numel() - 1, min(flat.numel(), _SAMPLES), dtype=torch.float64).long()
            found[name] = _digest(flat[places.to(flat.device)].double().cpu().numpy().tobytes())
    return found


def models_inside(thing: object, depth: int = 4) -> Iterator[nn.Module]:
    """Yield the models that an object such as a judge holds, in the order of its attributes."""
    if isinstance(thing, nn.Module):
        yield thing
    elif depth and hasattr(thing, "__dict__") and not isinstance(thing, (type, types.ModuleType)):
        for value in vars(thing).values():
            yield from models_inside(value, depth - 1)


def _adapters(model: nn.Module) -> dict[str, object]:
    """Return the settings of a model's adapters that differ from the defaults."""
    found = {}
    for name, adapter in (getattr(model, "peft_config", None) or {}).items():
        try:
            plain = type(adapter)().to_dict()
        except (TypeError, ValueError):  # a kind with settings that have no defaults
            plain = {}
        for key, value in adapter.to_dict().items():
            if key not in _OF_A_PLACE and (key in ("r", "lora_alpha") or value != plain.get(key)):
                found[f"peft.{name}.{key}"] = sorted(value) if isinstance(value, (set, frozenset)) else value
    return found


def name_of(model: nn.Module) -> str:
    """Return the last part of the path a model was loaded from, which stays when its folder is moved."""
    return os.path.basename(public_name(str(getattr(model.config, "_name_or_path", ""))).rstrip("/"))


def outline_of(model: nn.Module) -> dict:
    """Describe a model without reading its weights: name, dtype, counts of parameters, adapters."""
    counts = {True: 0, False: 0}
    for value in model.parameters():
        counts[value.requires_grad] += getattr(value, "ds_numel", value.numel())  # ZeRO-3 leaves no elements here
    found: dict[str, object] = {"model": name_of(model)}
    found |= {"trained_parameters": counts[True], "frozen_parameters": counts[False]}
    found["dtype"] = ", ".join(sorted({str(value.dtype).removeprefix("torch.") for value in model.parameters()}))
    found["attention"] = getattr(model.config, "_attn_implementation", None)
    return found | _adapters(model)


def _tokenizer(tokenizer: Any) -> dict:
    words = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    return {
        "vocabulary": _digest(words),
        "end token": tokenizer.eos_token_id,
        "chat template": tokenizer.chat_template,
    }


def _listed(prompts: Sequence) -> list[list[str]]:
    """Return digest and beginning of each prompt, together with its answer if it has one."""
    found = []
    for entry in prompts:
        prompt, answer = entry if isinstance(entry, Demonstration) else (entry, None)
        content = json.dumps([prompt_to_json(prompt), answer])
        shown = prompt if answer is None else f"{prompt} -> {answer}"
        found.append([_digest(content.encode()), shown[:_HEAD]])
    return found


def identity_of(
    config: WindConfig,
    model: nn.Module,
    tokenizer: Any,
    *,
    reference: nn.Module | None,
    prompts: Sequence,
    heldout: Sequence[str],
    judge: str,
    processes: int,
    weights: dict[str, dict[str, str]],
) -> dict:
    """Return everything that determines the weights at the end of a run, as JSON.

    Args:
        config: settings of the run.
        model: the policy at its start.
        tokenizer: the policy's tokenizer.
        reference: the second model, if there is one.
        prompts: strings or `Demonstration`s, whose answers count, too.
        heldout: held-out prompts.
        judge: name of the judge, and its strength if it has one.
        processes: number of processes.
        weights: `fingerprint`s by the names of the models.
    """
    settings = {name: value for name, value in config.own_settings().items() if name not in _FREE}
    settings |= settings.pop("loss_kwargs")
    if kind_of(config.sampler).server:  # its address may change
        settings["sampler"] = config.sampler.partition(":")[0]
    settings |= {name: getattr(config, name, None) for name in TRAINED}
    settings["prompts_per_step"] = config.prompts_per_step(processes)
    settings |= outline_of(model)
    settings["judge"] = judge
    settings["ref_model"] = None if reference is None else name_of(reference)
    files = {}
    for name in ("sampler", "judge"):
        source = getattr(config, name) or ""
        if source.startswith(_RECORDED):
            files[source] = _digest(Path(source.removeprefix(_RECORDED)).read_bytes())
    found = {
        "format": FORMAT,
        "settings": settings,
        "tokenizer": _tokenizer(tokenizer),
        "files": files,
        "prompts": _listed(prompts),
        "held-out prompts": _listed(heldout),
        "weights": weights,
    }
    return json.loads(json.dumps(found, default=str))


def _of_lists(name: str, there: list, here: list) -> str | None:
    if there == here:
        return None
    said = f"{name} differ: {len(there)} there, {len(here)} here, "
    place = next((k for k, (one, other) in enumerate(zip(there, here, strict=False)) if one != other), None)
    if place is None:
        return said + f"the first {min(len(there), len(here))} are the same"
    one, other = there[place][1], here[place][1]
    seen = f"{one!r} there, {other!r} here" if one != other else f"both begin with {one!r}"
    return said + f"first difference at prompt {place + 1}: {seen}"


def _of_texts(name: str, there: str | None, here: str | None) -> str:
    if there is None or here is None:
        return f"{name}: {'none' if there is None else 'one'} there, {'none' if here is None else 'one'} here"
    pairs = enumerate(zip(there, here, strict=False))
    place = next((k for k, (one, other) in pairs if one != other), min(len(there), len(here)))
    first = max(0, place - 10)
    return f"{name} differs at character {place + 1}: {there[first:][:30]!r} there, {here[first:][:30]!r} here"


def _of_weights(name: str, there: dict, here: dict) -> str | None:
    if not there or not here or there == here:  # a model that only one of the two has is a difference of settings
        return None
    if alone := next((key for key in [*there, *here] if (key in there) != (key in here)), None):
        return f"weights of the {name}: {alone} is only {'there' if alone in there else 'here'}"
    first = next(key for key in here if there[key] != here[key])
    return f"weights of the {name} differ from those when the run began, first in {first}"


def _differences(theirs: dict, ours: dict) -> list[str]:
    there, here = theirs["settings"], ours["settings"]
    names = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
    said: list[str | None] = [f"{name} {there.get(name)!r} there, {here.get(name)!r} here" for name in names]
    for name in ("prompts", "held-out prompts"):
        said.append(_of_lists(name, theirs[name], ours[name]))
    for name, value in ours["tokenizer"].items():
        if (other := theirs["tokenizer"].get(name)) != value:
            if name == "chat template":
                said.append(_of_texts(name, other, value))
            elif name == "vocabulary":
                said.append("the tokenizer has another vocabulary")
            else:
                said.append(f"tokenizer, {name}: {other!r} there, {value!r} here")
    for source, digest in ours["files"].items():
        if theirs["files"].get(source, digest) != digest:
            said.append(f"the file of {source} has changed since the run began")
    for name, digests in ours["weights"].items() if "dtype" not in names else ():  # rounded, every weight differs
        said.append(_of_weights(name, theirs["weights"].get(name, {}), digests))
    return [each for each in said if each is not None]


def check_same(theirs: object, ours: dict, where: str, file: Path) -> None:
    """Raise unless two identities are equal.

    Args:
        theirs: identity of the run that is resumed.
        ours: identity of the run that resumes it.
        where: folder of the run.
        file: file that `theirs` was read from.

    Raises:
        ResumeError: they differ; the message names what, with both values.
        DamagedRecordError: `theirs` is not an identity.
    """
    if isinstance(theirs, dict) and "settings" in theirs and theirs.get("format") != FORMAT:
        raise ResumeError(
            f"{where} was written by another release of windkern ({file} has format {theirs.get('format', 1)}, but "
            f"this release reads {FORMAT}); finish it with that release, or start another run in another output_dir"
        )
    try:
        said = _differences(cast(dict, theirs), ours)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise DamagedRecordError(file, f"{type(error).__name__}: {error}", ANEW) from error
    if said:
        more = f"; and {len(said) - _SHOWN} more" if len(said) > _SHOWN else ""
        raise ResumeError(
            f"{where} belongs to another run ({'; '.join(said[:_SHOWN])}{more}); resume with its settings, or start "
            "another run in another output_dir"
        )
