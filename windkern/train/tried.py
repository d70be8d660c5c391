"""Refuse libraries that are older than those the trainer was tested with. Importing this module does so.

Import it before transformers, which fails with an unrelated message where peft is too old, and trains wrongly where it
is too old itself. pip does not prevent a later installation from bringing an older release.
"""

from __future__ import annotations

import importlib.metadata

from packaging.requirements import Requirement
from packaging.version import Version


class UntriedVersionError(ImportError):
    """A library is older than the oldest release that windkern was tried with."""


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
        UntriedVersionError: names every library that is too old, with the release found and the release wanted.

    Example:
        >>> check({"torch": "1.0", "not-installed": "7"})
    """
    old = {}
    for name, least in bounds.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # told where it is needed
        if Version(found) < Version(least):
            old[name] = found
    if old:
        installed = ", ".join(f"{name} {found} is installed and {bounds[name]} wanted" for name, found in old.items())
        wanted = " ".join(f"'{name}>={bounds[name]}'" for name in old)
        raise UntriedVersionError(
            f"older than what windkern was tried with: {installed}; run: python -m pip install {wanted}"
        )


check(lowest())

if __name__ == "__main__":
    print(*(f"{name}=={version}" for name, version in lowest().items()))
