"""Settings that come with the package. `python -m windkern.recipes` lists them; with a NAME it prints the path."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Return the names that `windkern train --config` takes besides paths.

    Example:
        >>> "lora_1gpu" in names(), "accelerate/zero3" in names()
        (True, False)
    """
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find(name: str | Path) -> Path:
    """Return the path of a settings file: `name` itself if it is a file, else the recipe of this name.

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
    packaged = FOLDER / f"{str(name).removesuffix('.yaml')}.yaml"
    if packaged.is_file() and packaged.resolve().is_relative_to(FOLDER.resolve()):
        return packaged
    raise FileNotFoundError(f"no file {str(name)!r} and no recipe of this name; recipes: {', '.join(names())}")


def purpose(name: str) -> str:
    """Return the first line of a recipe, which says what it is for."""
    return find(name).read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
