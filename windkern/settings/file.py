"""Read settings from a YAML file, with `key=value` of a command line on top.

Reason: the scalars of YAML 1.2 are five patterns on top of PyYAML, which transformers brings. ruamel.yaml is one more
dependency and keeps less: it reads 1_000 as a number and 2024-01-02 as a date, which YAML 1.2 does not, and takes
`use_rslora: no` for a string without a warning.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml

from windkern.settings.fields import WORDS, shown
from windkern.train.data.files import decoded
from windkern.train.errors import one_line


class _Loader(yaml.SafeLoader):
    """Reads plain scalars by YAML 1.2, in which 1e-5 is a number and `no` a string; refuses a key given twice.

    Reason: a field's annotation says whether `no` is a string or a boolean. Values inside nested mappings have no
    annotation, so there these words are refused.
    """

    yaml_implicit_resolvers: ClassVar[dict] = {}  # type: ignore[misc]  # PyYAML reads it from the class
    top: yaml.Node | None = None  # the mapping whose values have annotations

    def construct_mapping(self, node, deep=False):
        lines: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise ValueError(f"line {line}: key {key.value!r} is given twice, first in line {lines[key.value]}")
            lines[key.value] = line
            if node is not self.top:
                for scalar in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    _refuse_word(scalar, f"line {line}: {key.value}")
        return super().construct_mapping(node, deep)


for _kind, _pattern, _first in (
    ("null", "(~|null|Null|NULL|)", ["~", "n", "N", ""]),
    ("bool", "(true|True|TRUE|false|False|FALSE)", list("tTfF")),
    ("int", "[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    (
        "float",
        r"([-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))",
        list("-+.0123456789"),
    ),
    ("merge", "<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(_pattern + r"\Z"), _first)


def _refuse_word(node: yaml.Node, place: str) -> None:
    if isinstance(node, yaml.ScalarNode) and node.style is None and node.value.lower() in WORDS:
        meant = str(WORDS[node.value.lower()]).lower()
        raise ValueError(f"{place}: write {meant}, or quote it if it is a string, got {node.value}")


def _parse(text: str, source: str, nested: bool = False) -> object:
    """Return the content of a YAML document; `nested` says that it becomes a value inside a mapping."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if nested:
            _refuse_word(node, "value")
        else:
            loader.top = node
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = "" if mark is None else f", line {mark.line + 1}"
        raise ValueError(f"{source}{where}: not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: not YAML: {one_line(error)}") from None
    except RecursionError:
        raise ValueError(f"{source}: nested too deeply to be read") from None
    except ValueError as error:
        raise ValueError(f"{source}, {error}") from None
    finally:
        if loader is not None:
            loader.dispose()


def read_settings(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the mapping that a YAML file holds, with some of its entries changed.

    Scalars are read by the rules of YAML 1.2: `1e-5` is a number, `010` and `1:30` are strings, only `true` and `false`
    are booleans. `yes`, `no`, `on` and `off` are strings, which `build` turns into booleans for fields that are; inside
    nested mappings, whose values have no annotation, they are refused.

    Args:
        path: UTF-8 file; an empty one has no entries.
        overrides: `key=value`, the value in YAML; dots in the key lead into nested mappings, which are created if
            they are missing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8, not YAML or not a mapping, a key is given twice or is not a string, an
            override has no `=` or leads into something that is not a mapping; the message names file and line, or the
            override.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        ...     _ = file.write("learning_rate: 1e-5\\npeft: {r: 16}\\n")
        ...     file.flush()
        ...     read_settings(file.name, ["peft.r=8", "peft.lora_alpha=32", "eta=3"])
        {'learning_rate': 1e-05, 'peft': {'r': 8, 'lora_alpha': 32}, 'eta': 3}
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"settings file {path} does not exist")
    content = _parse(decoded(path.read_bytes(), str(path)), str(path))
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold keys and values, got {shown(content)}")
    if odd := [key for key in content if not isinstance(key, str)]:
        raise ValueError(f"{path}: keys must be strings, got {shown(odd[0])}")
    for entry in overrides:
        _override(content, entry)
    return content


def _override(content: dict[str, Any], entry: str) -> None:
    key, equals, text = entry.partition("=")
    *outer, last = key.strip().split(".")
    if not equals or not last or not all(outer):
        raise ValueError(f"--override must be key=value, such as seed=5 or peft.r=8, got {entry!r}")
    value, inside = _parse(text, f"--override {entry}", nested=bool(outer)), content
    for depth, name in enumerate(outer, start=1):
        if inside.get(name) is None:
            inside[name] = {}
        inside = inside[name]
        if not isinstance(inside, dict):
            place = ".".join(outer[:depth])
            raise ValueError(f"--override {entry}: {place} must be keys and values, got {shown(inside)}")
    inside[last] = value
