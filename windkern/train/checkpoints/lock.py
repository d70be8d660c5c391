"""Lock the output folder of a run: refuse a second process that wants to write there."""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

from accelerate import PartialState
from transformers import TrainingArguments

from windkern.train.world import World

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # nothing is locked there

LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # errors of a file system without locks
_held: dict[tuple[str, int], int] = {}  # (folder, thread) that owns it -> file descriptor


class FolderInUseError(OSError):
    """Another process is writing into a folder; the message says which."""


def _forget() -> None:
    """Make a forked child drop its parent's locks, so that it does not keep them when the parent has ended."""
    for descriptor in _held.values():
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _holder(descriptor: int, path: Path) -> str:
    folder = path.parent
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
        pid, host, since = found["pid"], found["host"], found["since"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"another process is writing into {folder}; wait until it ends, or use another output_dir"
    who = f"process {pid} on {host} has been writing into {folder} since {since}"
    if host == socket.gethostname():
        return f"{who}; wait until it ends, or use another output_dir"
    return (
        f"{who}; wait until it ends, or use another output_dir. (If that machine has crashed, the server of a network "
        f"file system releases its lock after some time; or delete {path})"
    )


@contextlib.contextmanager
def owned(folder: str | os.PathLike, warn: Callable[[str], None]) -> Iterator[None]:
    """Own a folder while the block runs, or until the process ends, however it ends.

    The lock is flock's on `folder/.lock`, which names its holder. The kernel releases it when the process ends, so a
    killed or requeued run can resume at once. On a network file system it holds between machines only if that file
    system's locks do: Linux NFS locks hold, and after the crash of a machine they wait for its server; mounts with
    `nolock` or `local_lock`, and Lustre without `flock`, have local locks. The same thread may own the folder again
    inside.

    Args:
        folder: created if it is missing.
        warn: called with one line if the file system has no locks.

    Raises:
        FolderInUseError: another process, or another thread of this one, owns it.
        OSError: the folder or the file cannot be written.
    """
    key = (os.path.realpath(folder), threading.get_ident())
    if key in _held or fcntl is None:
        yield
        return
    path = Path(folder) / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _take(descriptor, path, warn)
    except BaseException:
        os.close(descriptor)
        raise
    _held[key] = descriptor
    try:
        yield
    finally:
        if _held.pop(key, None) is not None:  # else a forked child, which has closed it
            os.close(descriptor)


def _take(descriptor: int, path: Path, warn: Callable[[str], None]) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FolderInUseError(_holder(descriptor, path)) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warn(f"{path} cannot be locked ({error.strerror}): make sure that no other process writes into its folder")
    started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    holder = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": started})
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, holder.encode(), 0)


@contextlib.contextmanager
def owned_by_run(args: TrainingArguments, warn: Callable[[str], None]) -> Iterator[None]:
    """Own `args.output_dir` for all processes of a run; the first one holds the lock.

    Raises:
        FolderInUseError, OSError: as `owned`, on the first process.
        AnotherProcessError: on the other processes, if the first has failed.
    """
    with contextlib.ExitStack() as stack:

        def take() -> None:
            stack.enter_context(owned(cast(str, args.output_dir), warn))  # transformers fills it in

        World(args.distributed_state or PartialState()).first(take)
        yield
