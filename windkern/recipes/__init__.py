"""Settings that come with the package. `python -m windkern.recipes` lists them; with a NAME it prints the path."""

from __future__ import annotations

import atexit
from contextlib import ExitStack
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

FOLDER = files(__name__)  # not always a path: the package can be imported from a zip archive
_unpacked = ExitStack()  # holds the temporary files of recipes in an archive
atexit.register(_unpacked.close)


def names() -> list[str]:
    """Return the names that `windkern train --config` takes besides paths.

    Example:
        >>> "lora_1gpu" in names(), "accelerate/zero3" in names()
        (True, False)
    """
    return sorted(entry.name.removesuffix(".yaml") for entry in FOLDER.iterdir() if entry.name.endswith(".yaml"))


def find(name: str | Path) -> Path:
    """Return the path of a settings file: `name` itself if it is a file, else the recipe of this name.

    If the package is in a zip archive, the path of a recipe is that of a copy, which is deleted when Python ends.

    Args:
        name: a path, or a recipe with or without ".yaml"; "accelerate/zero3" is a launcher's configuration.

    Raises:
        FileNotFoundError: there is neither; the message lists the recipes.

    Example:
        >>> find("lora_1gpu").name, find("accelerate/zero3").parent.name
        ('lora_1gpu.yaml', 'accelerate')
        >>> find("lora")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        FileNotFoundError: no file 'lora' and no recipe of this name; recipes: demo, fsdp2_8gpu, lora_1gpu, ...
    """
    if Path(name).is_file():
        return Path(name)
    return _unpacked.enter_context(as_file(_packaged(name)))


def _packaged(name: str | Path) -> Any:
    """Return the recipe of this name as a resource of the package, which can be read wherever the package is."""
    parts = Path(f"{str(name).removesuffix('.yaml')}.yaml").parts
    found = FOLDER.joinpath(*parts)
    if ".." in parts or Path(*parts).is_absolute() or not found.is_file():
        raise FileNotFoundError(f"no file {str(name)!r} and no recipe of this name; recipes: {', '.join(names())}")
    return found


def purpose(name: str) -> str:
    """Return the first line of a recipe, which says what it is for."""
    return _packaged(name).read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
