"""Refuse libraries that are older than those the trainer was tested with, at import of this module.

Import it before transformers, which fails with an unrelated message if peft is too old, and trains wrongly if it is too
old itself. pip does not prevent a later installation from bringing an older release.
"""

from __future__ import annotations

import importlib.metadata

from packaging.requirements import Requirement
from packaging.version import Version


class UntriedVersionError(ImportError):
    """A library is older than the oldest release that windkern was tested with."""


def lowest(extra: str = "train") -> dict[str, str]:
    """Return the oldest release of each library of an extra, as pyproject.toml gave them when windkern was installed.

    Libraries without a lower bound are left out. The result is empty in a checkout that was never installed.

    Example:
        >>> lowest("no such extra")
        {}
    """
    try:
        lines = importlib.metadata.requires("windkern") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = {}
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        if marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""}):
            for each in requirement.specifier:
                if each.operator == ">=":
                    found[requirement.name] = each.version
    return found


def check(bounds: dict[str, str]) -> None:
    """Check that no installed library is older than its bound.

    Raises:
        UntriedVersionError: libraries are too old; the message names each, the release found and the one required.

    Example:
        >>> check({"torch": "1.0", "not-installed": "7"})
    """
    old = {}
    for name, least in bounds.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # reported where it is needed
        if Version(found) < Version(least):
            old[name] = found
    if old:
        installed = ", ".join(f"{name} {found} is installed and {bounds[name]} required" for name, found in old.items())
        wanted = " ".join(f"'{name}>={bounds[name]}'" for name in old)
        raise UntriedVersionError(
            f"older than the releases windkern was tested with: {installed}; run: python -m pip install {wanted}"
        )


check(lowest())

if __name__ == "__main__":
    print(*(f"{name}=={version}" for name, version in lowest().items()))
