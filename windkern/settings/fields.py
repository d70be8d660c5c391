"""Build dataclasses from the names and values of a settings file, checking each value against its annotation.

Reason: neither pydantic nor HfArgumentParser keeps what this file promises. pydantic takes true for the number 1 and 1
for true; in `SchedulerType | str` it prefers the string, so that a misspelt schedule gets through; and its messages do
not say what is wanted in the words of a settings file. HfArgumentParser refuses unions and converts no values.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import enum
import inspect
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from windkern._checks import check_choice
from windkern.settings.foreign import FOREIGN

_NEAR = 0.85  # similarity of a key to the one it is taken for; below it, other fields are as near as the right one
WORDS = {"yes": True, "on": True, "no": False, "off": False}  # booleans of YAML 1.1, strings of YAML 1.2


@dataclasses.dataclass(frozen=True)
class Known:
    """A field of a dataclass that can be set."""

    field: dataclasses.Field
    kind: Any  # its annotation, evaluated

    @property
    def required(self) -> bool:
        return self.field.default is dataclasses.MISSING and self.field.default_factory is dataclasses.MISSING

    @property
    def default(self) -> object:
        """The default of a field that has one."""
        factory = self.field.default_factory
        return self.field.default if factory is dataclasses.MISSING else cast(Any, factory)()


def known_fields(cls: type) -> dict[str, Known]:
    """Return the fields of a dataclass that can be set, by name."""
    kinds = typing.get_type_hints(cls)
    return {each.name: Known(each, kinds[each.name]) for each in dataclasses.fields(cls) if each.init}


def build(classes: Sequence[type], content: Mapping[str, Any], source: str) -> tuple:
    """Return an instance of each dataclass, made from the entries that are its fields.

    An entry that several of the classes have goes to all of them. Values are converted to what the annotation says: a
    whole number to float, a quoted number to a number, `yes` to a boolean, a value of an enumeration to its member.

    Args:
        classes: dataclasses.
        content: field names and values.
        source: where they come from, for messages.

    Raises:
        ValueError: no class has a field of that name, a field without default is missing, a value does not fit, or the
            class refuses it; the message begins with the source.

    Example:
        >>> @dataclasses.dataclass
        ... class Settings:
        ...     learning_rate: float = 0.1
        >>> build([Settings], {"learning_rate": "1e-5"}, "x.yaml")
        (Settings(learning_rate=1e-05),)
        >>> build([Settings], {"lerning_rate": 1}, "x.yaml")
        Traceback (most recent call last):
        ValueError: x.yaml: unknown key 'lerning_rate'; did you mean 'learning_rate'?
    """
    tables = [known_fields(cls) for cls in classes]
    names = {name for table in tables for name in table}
    for key in content:
        if key not in names:
            raise ValueError(f"{source}: unknown key {key!r}; {_hint(key, names)}")
    made = []
    for cls, table in zip(classes, tables, strict=True):
        for name, known in table.items():
            if known.required and name not in content:
                raise ValueError(f"{source}: key {name!r} is missing")
        try:
            values = {name: _value(name, content[name], known) for name, known in table.items() if name in content}
            made.append(cls(**values))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {error}") from error
    return tuple(made)


def _hint(key: str, names: Iterable[str]) -> str:
    """Name the key that is meant, if it is misspelt or has another name elsewhere."""
    meant = {name: name for name in names}
    meant |= {other: name for other, name in FOREIGN.items() if name in meant and other not in meant}
    near = difflib.get_close_matches(key, meant, n=1, cutoff=_NEAR)
    return f"did you mean {meant[near[0]]!r}?" if near else "`windkern train --fields` lists the keys"


def _value(name: str, value: object, known: Known) -> object:
    constant = known.field.metadata.get("const")  # of argparse: a value that the annotation lacks, `fsdp: true`
    if constant is not None and value is constant:
        return value
    return _fit(name, value, known.kind)


def _fit(name: str, value: object, kind: Any) -> object:
    """Return the value, converted to the type its annotation names.

    Raises:
        ValueError: the value does not fit; the message has the name, what would be right and what came.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    misfit = ValueError(f"{name} must be {_wanted(kind)}, got {shown(value)}")
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _fit_any(name, value, kind)
    if origin is typing.Literal:
        if not any(value == each and type(value) is type(each) for each in arguments):
            raise misfit
        return value
    if kind is types.NoneType:
        if value is not None:
            raise misfit
        return None
    plain = origin or kind
    if plain is list:
        if not isinstance(value, (list, tuple)):
            raise misfit
        inner = arguments[0] if arguments else Any
        return [_fit(f"{name}[{place}]", each, inner) for place, each in enumerate(value)]
    if plain is dict:
        if not isinstance(value, Mapping):
            raise misfit
        inner = arguments[1] if arguments else Any
        return {key: _fit(f"{name}.{key}", each, inner) for key, each in value.items()}
    if isinstance(plain, type) and issubclass(plain, enum.Enum):
        if isinstance(value, plain):
            return value
        check_choice(name, cast(str, value), [member.value for member in plain])
        return plain(value)
    try:
        return _CONVERT[plain](value) if plain in _CONVERT else _instance(value, plain)
    except (OverflowError, ValueError):
        raise misfit from None


def _fit_any(name: str, value: object, kind: Any) -> object:
    members = list(typing.get_args(kind))
    enums = [member for member in members if isinstance(member, type) and issubclass(member, enum.Enum)]
    if enums:
        members.remove(str)  # here a string is a value of the enumeration
    # Reason: where both are allowed, true must not become 1, nor "no" false.
    exact = [member for member in members if (typing.get_origin(member) or member) is type(value)]
    telling = exact or (enums if isinstance(value, str) else [])
    if telling:
        return _fit(name, value, telling[0])
    for member in members:
        with contextlib.suppress(ValueError):
            return _fit(name, value, member)
    raise ValueError(f"{name} must be {_wanted(kind)}, got {shown(value)}")


def _boolean(value: object) -> bool:
    if isinstance(value, str):
        value = {**WORDS, "true": True, "false": False}.get(value.lower())
    if not isinstance(value, bool):
        raise ValueError
    return value


def _integer(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError
    if isinstance(value, float):
        if not value.is_integer():
            raise ValueError
        return int(value)
    return int(value)


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)) or not math.isfinite(float(value)):
        raise ValueError
    return float(value)


def _string(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError
    return str(value)


def _path(value: object) -> Path:
    if not isinstance(value, (str, Path)):
        raise ValueError
    return Path(value)


def _instance(value: object, kind: Any) -> object:
    if not isinstance(kind, type) or not isinstance(value, kind):
        raise ValueError
    return value


_CONVERT = {bool: _boolean, int: _integer, float: _number, str: _string, Path: _path}
_WANTED = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    Path: "a path",
    list: "a list",
    dict: "keys and values",
    types.NoneType: "null",
}


def _wanted(kind: Any) -> str:
    """Say in words what an annotation accepts."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        parts = [_wanted(member) for member in arguments]
        return " or ".join([", ".join(parts[:-1]), parts[-1]])
    if origin is typing.Literal:
        return " or ".join(map(repr, arguments))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return "one of " + ", ".join(repr(member.value) for member in kind)
    plain = origin or kind
    return _WANTED.get(plain) or f"a {type_name(plain)}, which a settings file cannot hold"


def shown(value: object) -> str:
    """Return a value as a message shows it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def type_name(kind: Any) -> str:
    """Return an annotation as it is written, without the modules.

    Example:
        >>> type_name(dict[str, Any] | None)
        'dict[str, Any] | None'
    """
    text = kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
    return re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", text)


def own_fields(cls: type) -> list[str]:
    """Return the names of the fields that a dataclass declares itself, without those it only inherits.

    Example:
        >>> @dataclasses.dataclass
        ... class Base:
        ...     a: int = 0
        >>> @dataclasses.dataclass
        ... class More(Base):
        ...     b: int = 0
        >>> own_fields(More)
        ['b']
    """
    return [name for name in known_fields(cls) if name in inspect.get_annotations(cls)]
