"""JSON that every reader takes: no NaN, no Infinity, no half of a surrogate pair."""

from __future__ import annotations

import json
import math


def to_json(content: object, **options) -> str:
    """Return `content` as JSON of RFC 8259, in characters that UTF-8 can encode.

    What JSON has no word for becomes the nearest that it has: NaN and infinities null, half of a surrogate pair U+FFFD.
    Python's own `json.dumps` writes them as they are, and other readers, pyarrow and browsers among them, then refuse
    the whole file.

    Args:
        content: dicts, lists, tuples, strings, numbers, booleans and None.
        options: as `json.dumps`; `default` must return one of these.

    Raises:
        TypeError: it holds something else, and there is no `default`.

    Example:
        >>> to_json({"loss": float("nan"), "text": "caf\u00e9"})
        '{"loss": null, "text": "caf\u00e9"}'
    """
    try:
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, **options)
        text.encode()
    except ValueError:
        return json.dumps(_plain(content), ensure_ascii=False, **options)
    return text


def _plain(content: object) -> object:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, str):
        return content.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(content, dict):
        return {_plain(key): _plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_plain(value) for value in content]
    return content
