"""One process at a time owns an output folder, and releases it however it ends."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import threading

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
pytest.importorskip("fcntl")

from windkern.train.checkpoints import lock
from windkern.train.checkpoints.lock import LOCK, FolderInUseError, owned

FAILED = pytest.fail


def child(work) -> int:
    """Fork a process that does `work`, and return its id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def holding(folder, sign) -> int:
    """Start a process that owns the folder until it is killed."""

    def work():
        with owned(folder, FAILED):
            sign.touch()
            signal.pause()

    pid = child(work)
    while not sign.exists():
        pass
    return pid


def ended(pid: int) -> int:
    return os.waitpid(pid, 0)[1]


def test_a_second_process_is_refused_with_the_first_ones_id(tmp_path):
    folder = tmp_path / "new" / "out"
    pid = holding(folder, tmp_path / "sign")
    try:
        with pytest.raises(FolderInUseError) as caught, owned(folder, FAILED):
            pass
        message = str(caught.value)
        assert f"process {pid} on {socket.gethostname()} has been writing into {folder} since 2" in message
        assert "another output_dir" in message and "\n" not in message and "crashed" not in message
        held = json.loads((folder / LOCK).read_text())
        (folder / LOCK).write_text(json.dumps({**held, "host": "elsewhere"}))  # as a network file system shows it
        with pytest.raises(FolderInUseError, match=rf"on elsewhere .* has crashed, .* or delete {folder / LOCK}"):
            owned(folder, FAILED).__enter__()
    finally:
        os.kill(pid, signal.SIGKILL)
        ended(pid)
    with owned(folder, FAILED):  # a killed process owns nothing
        pass


def test_a_child_of_a_killed_process_keeps_nothing(tmp_path):
    """The lock would live on in a forked child, such as a worker of a judge's."""
    reader, writer = os.pipe()

    def parent():
        with owned(tmp_path, FAILED):
            grandchild = child(signal.pause)
            os.write(writer, str(grandchild).encode())
            signal.pause()

    pid = child(parent)
    grandchild = int(os.read(reader, 16))
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    try:
        with owned(tmp_path, FAILED):
            pass
    finally:
        os.kill(grandchild, signal.SIGKILL)


def test_the_same_thread_may_own_a_folder_again_and_nobody_else(tmp_path):
    refused = []

    def other():
        try:
            with owned(tmp_path, FAILED):
                pass
        except FolderInUseError as error:
            refused.append(str(error))

    with owned(tmp_path, FAILED):
        with owned(tmp_path / ".." / tmp_path.name, FAILED):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert ended(child(other)) == 0  # a process that inherited the lock
        pid = child(lambda: owned(tmp_path, FAILED).__enter__())
        assert os.waitstatus_to_exitcode(ended(pid)) == 1
    assert len(refused) == 1 and f"process {os.getpid()} " in refused[0]
    with owned(tmp_path, FAILED):
        pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    said = []
    with owned(tmp_path, said.append):
        pass
    assert len(said) == 1 and "cannot be locked (No locks available)" in said[0]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), owned(tmp_path / "file" / "out", FAILED):
        pass
