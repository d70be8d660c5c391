"""The tested releases are read from the metadata, and older ones are refused before transformers runs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import windkern.train
from windkern.train import config, trainer, tried
from windkern.value import trainer as value_trainer

REQUIRES = [
    "torch>=2.8",
    'triton>=3.4; platform_system == "Linux" or platform_system != "Linux"',
    'transformers>=5.18; extra == "train"',
    'peft<1,>=0.19; extra == "train"',
    'pyyaml; extra == "train"',
    'windkern[train]; extra == "demo"',
    'trl>=1.16; extra == "trl"',
]


@pytest.fixture
def installed(monkeypatch) -> dict[str, str]:
    """Fake the installed releases; packages not listed are missing. REQUIRES has windkern's own requirements."""
    found: dict[str, str] = {}

    def version(name):
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: REQUIRES)
    return found


def test_bounds_are_those_of_the_metadata(installed, monkeypatch):
    assert tried.lowest("train") == {"transformers": "5.18", "peft": "0.19"}
    assert tried.lowest("trl") == {"trl": "1.16"}

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    assert tried.lowest() == {}  # a checkout that is not installed


def test_the_installed_metadata_has_bounds_for_what_trains():
    assert {"transformers", "accelerate", "peft", "datasets"} <= set(tried.lowest())


@pytest.mark.parametrize("good", [{}, {"transformers": "5.18.0", "peft": "0.19"}, {"transformers": "6.0.dev1"}])
def test_the_oldest_and_newer_ones_are_taken(installed, good):
    installed |= good
    tried.check(tried.lowest())


def test_older_ones_are_named_with_what_is_wanted(installed):
    installed |= {"transformers": "5.5.4", "peft": "0.17.1", "pyyaml": "1"}
    with pytest.raises(tried.UntriedVersionError) as raised:
        tried.check(tried.lowest())
    assert str(raised.value) == (
        "older than the releases windkern was tested with: transformers 5.5.4 is installed and 5.18 required, peft "
        "0.17.1 is installed and 0.19 required; run: python -m pip install 'transformers>=5.18' 'peft>=0.19'"
    )


@pytest.mark.parametrize("module", [config, trainer, value_trainer])
def test_they_are_refused_before_transformers_can_fail(installed, monkeypatch, module):
    installed["transformers"] = "5.5.4"
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it now raises another ImportError
    monkeypatch.delitem(sys.modules, "windkern.train.tried")
    monkeypatch.delattr(windkern.train, "tried")
    with pytest.raises(ImportError, match=r"transformers 5\.5\.4 is installed and 5\.18 required"):
        module.__spec__.loader.exec_module(importlib.util.module_from_spec(module.__spec__))
