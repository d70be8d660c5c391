"""Command-line options made from the fields of a dataclass: one place for name, type, default and help.

This module imports neither torch nor transformers, so that a parser can be built before they are loaded.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from dataclasses import field
from pathlib import Path
from typing import Any, TypeVar

Filled = TypeVar("Filled")

# Options that mean the same in several commands, by their names in the trainer's configuration: help, and placeholder
# of the value.
SHARED = {
    "num_generations": ("responses to each prompt", "N"),
    "num_iterations": ("outer iterations: sample, judge, fit", "N"),
    "max_completion_length": ("length limit of a response, in tokens", "N"),
    "temperature": ("sampling temperature", "X"),
    "judge_strength": ("strength of the Bradley-Terry link per unit of reward", "X"),
    "eta": ("step size of WIND", "X"),
    "beta": ("weight of the KL to the reference", "X"),
    "system": ("system message for the chat template (default: the template's own)", "TEXT"),
    "seed": ("random seed", "N"),
}


def option(default: Any, help: str, *, metavar: str | None = None, **metadata: object) -> Any:
    """Return a field that becomes a command-line option: `max_completion_length` becomes --max-completion-length.

    Args:
        default: `dataclasses.MISSING` makes the option required. A default that is neither None nor False is added to
            the help; the help of an option without one says what happens then.
        help: a phrase without a full stop, as argparse prints it.
        metavar: placeholder of the value in the help.
        metadata: `choices` for argparse.
    """
    return field(default=default, metadata={"help": help, "metavar": metavar, **metadata})


def shared(name: str, default: Any = None) -> Any:
    """Return a field with the help that the option of this name has in every command.

    Raises:
        KeyError: SHARED has no such name.
    """
    help, metavar = SHARED[name]
    return option(default, help, metavar=metavar)


def add_options(parser: argparse.ArgumentParser, cls: type) -> None:
    """Add an option to a parser for each field of a dataclass that has a help text.

    The type follows from the annotation: bool becomes a switch, a list or a dictionary an option with several values,
    those of a dictionary written KEY=VALUE.

    Example:
        >>> @dataclasses.dataclass
        ... class Sizes:
        ...     rows: int = option(3, "number of rows", metavar="N")
        ...     wide: bool = option(False, "make it wide")
        >>> parser = argparse.ArgumentParser()
        >>> add_options(parser, Sizes)
        >>> filled(Sizes, parser.parse_args(["--wide"]))
        Sizes(rows=3, wide=True)
    """
    kinds = typing.get_type_hints(cls)
    for each in dataclasses.fields(cls):
        if "help" in each.metadata:
            flag = "--" + each.name.replace("_", "-")
            parser.add_argument(flag, **_arguments(each, kinds[each.name]))


def _arguments(each: dataclasses.Field, kind: Any) -> dict[str, Any]:
    """Return the keyword arguments of `add_argument`; an option that is not given leaves no trace in the namespace."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        (kind,) = (member for member in typing.get_args(kind) if member is not types.NoneType)
    found: dict[str, Any] = {"help": each.metadata["help"].replace("%", "%%"), "default": argparse.SUPPRESS}
    if kind is bool:
        return found | {"action": "store_true", "default": False}
    if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING:
        found["required"] = True
    elif each.default is not dataclasses.MISSING and each.default is not None:
        found["help"] += f" (default: {each.default})".replace("%", "%%")
    if typing.get_origin(kind) is list:
        found |= {"action": "extend", "nargs": "+"}
        (kind,) = typing.get_args(kind)
    elif typing.get_origin(kind) is dict:
        found |= {"action": "extend", "nargs": "+"}
        kind = _pair
    if each.metadata.get("choices"):
        found["choices"] = each.metadata["choices"]
    return found | {"type": kind, "metavar": each.metadata["metavar"]}


def _pair(entry: str) -> tuple[str, object]:
    """Return key and value of KEY=VALUE; the value is a whole number if it looks like one."""
    key, equals, text = entry.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, such as label=1, got {entry!r}")
    return key, int(text) if text.isdecimal() and text.isascii() else text


def filled(cls: type[Filled], arguments: argparse.Namespace) -> Filled:
    """Return the dataclass with the options that were given; the others have their defaults."""
    kinds = typing.get_type_hints(cls)
    values = {name: getattr(arguments, name) for name in kinds if hasattr(arguments, name)}
    return cls(**{name: dict(value) if _holds_pairs(kinds[name]) else value for name, value in values.items()})


def _holds_pairs(kind: Any) -> bool:
    return any(typing.get_origin(each) is dict for each in (kind, *typing.get_args(kind)))


def given(cls: type, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of a dataclass that were given on the command line, by name; paths as strings.

    Args:
        cls: the dataclass whose options the parser has.
        arguments: the parsed command line.
    """
    found = {}
    for each in dataclasses.fields(cls):
        if (value := getattr(arguments, each.name, False)) is not False:
            found[each.name] = str(value) if isinstance(value, Path) else value
    return found
