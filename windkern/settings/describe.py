"""Explain the keys of a settings file: as a list for a terminal, as data, and as a settings file to start from."""

from __future__ import annotations

import dataclasses
import enum
import json
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from windkern._checks import check_choice
from windkern.settings.fields import WORDS, known_fields, own_fields, shown, type_name
from windkern.settings.run import classes_of
from windkern.train.models import PACKAGED

# The inherited settings that most files set.
OFTEN = ("output_dir", "seed", "gradient_accumulation_steps", "bf16", "eval_strategy", "save_steps", "report_to")
INDENT = 4
WIDEST = 100  # columns of prose
# The keys that a new settings file sets; the others are comments in it, with their defaults.
_STARTERS: dict[str, dict[str, object]] = {
    "wind": {
        "model": PACKAGED,
        "train_dataset": "demo",
        "eval_dataset": "demo",
        "output_dir": "runs/mine",
        "judge": "vader",
    },
    "value": {
        "method": "value",
        "base_model": "Qwen/Qwen3-8B",
        "value_model": "Qwen/Qwen3-0.6B",
        "train_demonstrations": "demonstrations.jsonl",
        "output_dir": "runs/value",
    },
}


@dataclass(frozen=True)
class Described:
    """A key of a settings file."""

    name: str
    type: str  # its annotation, as it is written
    required: bool
    default: object  # as a settings file would say it; None if the key is required
    help: str  # one line


@dataclass(frozen=True)
class Section:
    """The keys of one dataclass."""

    title: str
    fields: list[Described]


def describe(cls: type, names: Iterable[str]) -> list[Described]:
    """Return descriptions of fields of a dataclass, in the order of `names`.

    Raises:
        ValueError: a field does not exist, or cannot be set.
    """
    known, found = known_fields(cls), []
    for name in names:
        check_choice("name", name, known)
        entry = known[name]
        default = None if entry.required else entry.default
        default = default.value if isinstance(default, enum.Enum) else default
        help = " ".join(entry.field.metadata.get("help", "").split())
        found.append(Described(name, type_name(entry.kind), entry.required, default, help))
    return found


def sections(run: type, config: type, *, everything: bool = False) -> list[Section]:
    """Return the keys of a settings file: those of the run, then those of the trainer's configuration.

    Args:
        run, config: dataclasses, see `windkern.settings.run.classes_of`.
        everything: also the inherited keys of `transformers.TrainingArguments` that few files have.
    """
    own = own_fields(config)
    names = [name for name in OFTEN if name not in own] + own
    if everything:
        names += [name for name in known_fields(config) if name not in names]
    return [Section(each.__name__, describe(each, keys)) for each, keys in ((run, own_fields(run)), (config, names))]


def listing(found: Sequence[Section], width: int) -> Any:
    """Return the keys as text for a terminal: name, type and default in a line, the meaning below it.

    Args:
        found: see `sections`.
        width: columns of the terminal.

    Returns:
        A `rich.text.Text`.
    """
    from rich.text import Text

    text = Text()
    for section in found:
        text.append(f"{section.title}\n", "bold underline")
        for field in section.fields:
            default = "required" if field.required else f"default {shown(field.default)}"
            text.append(field.name, "bold")
            rest = f"{field.type}, {default}"
            if INDENT + len(field.name) + len(rest) <= width:
                text.append(f"  {rest}\n", "dim")
            else:
                text.append("\n" + _block(rest, width), "dim")
            text.append(_block(field.help, width))
        text.append("\n")
    return text


def _block(prose: str, width: int) -> str:
    indent = " " * INDENT
    lines = textwrap.wrap(prose, min(width, WIDEST), initial_indent=indent, subsequent_indent=indent)
    return "".join(f"{line}\n" for line in lines)


def as_dicts(found: Sequence[Section]) -> list[dict[str, object]]:
    """Return the keys for programs: a list of dictionaries with section, name, type, required, default and help."""
    return [
        {"section": section.title, **_plain(dataclasses.asdict(field))} for section in found for field in section.fields
    ]


def _plain(content: dict[str, object]) -> dict[str, object]:
    return json.loads(json.dumps(content, default=str))


def template(method: str) -> str:
    """Return a settings file for a method that runs as it is, with every other key as a comment.

    Prose begins with "# "; a line that begins with "#key:" is a key with its default.

    Args:
        method: see `windkern.settings.run.METHODS`.

    Raises:
        ValueError: there is no such method.

    Example:
        >>> print(template("wind")[:39])
        # Settings of windkern train, method wi
    """
    run, config = classes_of(method)
    starter, lines = _STARTERS[method], [f"# Settings of windkern train, method {method}. Each key stands below its"]
    lines += ["# meaning; those that begin with # are left out, and show the default.", "#"]
    lines += ["# Run: windkern train --config THIS_FILE", ""]
    for section in sections(run, config):
        for field in section.fields:
            lines += textwrap.wrap(field.help, 100, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)
            value = starter.get(field.name, field.default)
            sign = "" if field.name in starter or field.required else "#"
            lines += [f"{sign}{field.name}: {_as_yaml(value)}", ""]
    return "\n".join(lines)


def _as_yaml(value: object) -> str:
    """Return a value as a settings file holds it; JSON is YAML 1.2, and a plain word needs no quotes."""
    words = {*WORDS, "true", "false", "null"}
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w./-]*", value) and value.lower() not in words:
        return value
    return json.dumps(value, default=str, ensure_ascii=False)
