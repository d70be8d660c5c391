"""What our docstrings say in words that mkdocstrings does not know: `Example:` is a section of examples there."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Sections(griffe.Extension):
    """Read `Example:` as `Examples:`, and keep lines under a summary that are set apart by spaces as they are."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
