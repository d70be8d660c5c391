"""Errors as a command line shows them: one line, and who is to say it where several processes train."""

from __future__ import annotations

import os
import re

from windkern.terminal import printable

# What a program's own mistakes raise. All else that reaches the command line is about settings, files or machines.
_BUGS = (AssertionError, AttributeError, LookupError, NameError, RuntimeError, SyntaxError, ZeroDivisionError)
_NO_BUGS = (RecursionError, NotImplementedError)  # of those, what data and settings raise
_LOST = re.compile(  # what gloo and torch's store say where another process has gone
    r"connection closed by peer|connection reset|connection was likely closed|broken pipe|pair closure|failed to recv",
    re.IGNORECASE,
)
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_LONGEST = 2000  # characters of a message


class AnotherProcessError(RuntimeError):
    """Another process of the run has failed, and says itself why."""


def one_line(text: object) -> str:
    """A message in one line of characters that a terminal shows and does not obey.

    Example:
        >>> one_line("first\\x1b[1m,\\n  second\\x07")
        'first, second\\\\x07'
    """
    words = " ".join(_COLOURS.sub("", str(text)).split())
    shown = printable(words)
    return shown if len(shown) <= _LONGEST else shown[: _LONGEST - 4] + " ..."


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's, also of a GPU


def ended_by_another(error: BaseException) -> bool:
    """Whether this process fails only because another of its run has failed."""
    if isinstance(error, AnotherProcessError):
        return True
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    ours = type(error).__name__.startswith("Dist")  # torch.distributed's; NCCL's are among them
    return several and isinstance(error, RuntimeError) and (ours or bool(_LOST.search(str(error))))


def message_of(error: Exception) -> str | None:
    """Return what a user is told, in one line; None where only a traceback helps, because it is our mistake.

    Example:
        >>> message_of(ValueError("eta must be positive, got -1"))
        'eta must be positive, got -1'
        >>> message_of(KeyError("eta")) is None
        True
    """
    if ended_by_another(error):
        rank = os.environ.get("RANK", "0")
        return one_line(f"process {rank} ends, since another of the run has failed, which says why ({error})")
    if _out_of_memory(error):
        return one_line(
            f"out of memory: {str(error) or 'this machine has no more'}; lower per_device_train_batch_size, "
            "per_device_eval_batch_size, sampling_batch_size or max_completion_length"
        )
    ours = type(error).__module__.split(".")[0] == "windkern"  # meant to be read
    if isinstance(error, _BUGS) and not isinstance(error, _NO_BUGS) and not ours:
        return None
    return one_line(error) or type(error).__name__
