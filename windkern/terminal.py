"""Make text from outside safe to print: escape the characters that a terminal would obey."""

from __future__ import annotations

import re

# Control characters (C0, DEL, C1), line and paragraph separators, characters that reorder text, and surrogates, which
# cannot be encoded. Source: Unicode's Cc, Zl, Zp, Cs and Bidi_Control.
_OBEYED = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    r"""Return a text as one line without control characters: each becomes an escape, such as \x1b or \u202e.

    Use it for everything from outside (prompts, responses, names of models, judges and files, answers of servers, error
    messages) that is printed. The result must not be read as rich's markup: print it inside a `rich.text.Text`.

    Example:
        >>> print(printable("title \x1b]0;mine\x07, [bold], naïve"))
        title \x1b]0;mine\x07, [bold], naïve
    """
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), str(text))
