"""Show errors on a command line: in one line, and from one of several processes."""

from __future__ import annotations

import os
import re

from windkern.terminal import printable

# Errors that mean a bug of ours. All others that reach the command line concern settings, files or machines.
_BUGS = (AssertionError, AttributeError, LookupError, NameError, RuntimeError, SyntaxError, ZeroDivisionError)
_NO_BUGS = (RecursionError, NotImplementedError)  # exceptions to these, which data and settings raise
_LOST = re.compile(  # what gloo and torch's store say when another process is gone
    r"connection closed by peer|connection reset|connection was likely closed|broken pipe|pair closure|failed to recv",
    re.IGNORECASE,
)
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_LONGEST = 2000  # characters of a message


class AnotherProcessError(RuntimeError):
    """Another process of the run has failed; its own message says why."""


def one_line(text: object) -> str:
    """Return a message in one line, without characters that control a terminal.

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
    """Return whether this process fails only because another process of the run has failed."""
    if isinstance(error, AnotherProcessError):
        return True
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    ours = type(error).__name__.startswith("Dist")  # torch.distributed's; NCCL's are among them
    return several and isinstance(error, RuntimeError) and (ours or bool(_LOST.search(str(error))))


def message_of(error: Exception) -> str | None:
    """Return the message for a user, in one line; None for a bug of ours, where only a traceback helps.

    Example:
        >>> message_of(ValueError("eta must be positive, got -1"))
        'eta must be positive, got -1'
        >>> message_of(KeyError("eta")) is None
        True
    """
    if ended_by_another(error):
        rank = os.environ.get("RANK", "0")
        return one_line(
            f"process {rank} ends because another process of the run has failed; its message says why ({error})"
        )
    if _out_of_memory(error):
        return one_line(
            f"out of memory: {str(error) or 'this machine has no more'}; lower per_device_train_batch_size, "
            "per_device_eval_batch_size, sampling_batch_size or max_completion_length"
        )
    ours = type(error).__module__.split(".")[0] == "windkern"  # meant to be read
    if isinstance(error, _BUGS) and not isinstance(error, _NO_BUGS) and not ours:
        return None
    return one_line(error) or type(error).__name__
