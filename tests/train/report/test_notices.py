"""Notices go to the observer, or else to Python's warnings, from one process and once per topic."""

from __future__ import annotations

import warnings

import pytest

pytest.importorskip("transformers")

from windkern.train.report.notices import Notices
from windkern.train.report.progress import Unobserved


class Reader:
    """The part of an observer that notices need."""

    def __init__(self):
        self.read: list[str] = []

    def note(self, text: str) -> None:
        self.read.append(text)


def test_an_observer_reads_and_nobody_is_warned():
    reader = Reader()
    notices = Notices(reader)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        notices("one")
        notices.once("topic", "two")
        notices.once("topic", "three")
    assert reader.read == ["one", "two"]


def test_without_an_observer_python_warns_at_the_caller():
    with pytest.warns(UserWarning, match="^one$") as caught:
        Notices(Unobserved())("one")
    assert caught[0].filename == __file__


def test_other_processes_are_silent():
    reader = Reader()
    Notices(reader, heard=False)("one")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Notices(Unobserved(), heard=False).once("topic", "one")
    assert not reader.read
