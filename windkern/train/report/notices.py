"""Give notices to whoever watches a run."""

from __future__ import annotations

import warnings
from typing import Protocol

from windkern.train.report.progress import Unobserved


class Reads(Protocol):
    """The part of an observer that notices need."""

    def note(self, text: str) -> None:
        """Show a reader of the log one line."""
        ...


class Notices:
    """Passes notices to the observer of a run, or to Python's warnings if nobody observes it.

    Args:
        observer: observer of the run.
        heard: whether this process speaks; only one of several should.

    Example:
        >>> class Reader:
        ...     def note(self, text):
        ...         print(text)
        >>> Notices(Reader())("checkpoint-3 is damaged")
        checkpoint-3 is damaged
    """

    def __init__(self, observer: Reads, *, heard: bool = True):
        self.observer, self.heard = observer, heard
        self._said: set[str] = set()

    def __call__(self, line: str) -> None:
        """Pass on one line."""
        if not self.heard:
            return
        if isinstance(self.observer, Unobserved):
            warnings.warn(line, stacklevel=2)
        else:
            self.observer.note(line)

    def once(self, topic: str, line: str) -> None:
        """Pass on one line, unless another one on the same topic has been passed on."""
        if topic not in self._said:
            self._said.add(topic)
            self(line)
