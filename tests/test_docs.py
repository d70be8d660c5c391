"""The examples in docstrings and in the README run, and public names are documented."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import windkern as wk
from windkern.transform import LogitTransform

ROOT = Path(__file__).parents[1]
NEEDS_EXTRAS = (
    "windkern.hf",
    "windkern.train",
    "windkern.commands.demo",
    "windkern.display",
    "windkern.commands.cli",
    "windkern.__main__",
    "windkern.commands.bandit",
    "windkern.commands.diagnosis",
    "windkern.settings",
)
MODULES = [
    module.name
    for module in pkgutil.walk_packages([str(ROOT / "windkern")], "windkern.")
    if not module.name.startswith(NEEDS_EXTRAS) and "triton" not in module.name and not module.name.endswith("._cpp")
]
PUBLIC = {
    "token_logps": wk.token_logps,
    "sequence_logps": wk.sequence_logps,
    "fused_loss": wk.fused_loss,
    "plan": wk.plan,
    "pair_loss": wk.pair_loss,
    "win_rates": wk.win_rates,
    "LogitTransform": LogitTransform,
    "FusedLogProbs": wk.nn.FusedLogProbs,
    "gathered": wk.sharding.gathered,
    "vocab_parallel": wk.sharding.vocab_parallel,
    "streamed": wk.sharding.streamed,
    "Game": wk.tabular.Game,
    "solve": wk.tabular.solve,
    "fit": wk.tabular.fit,
    "best_of_n": wk.tabular.best_of_n,
}


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    torch.use_deterministic_algorithms(False)
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


@pytest.mark.parametrize("name", PUBLIC)
def test_public_docstrings_say_what_they_must(name):
    text = inspect.getdoc(PUBLIC[name])
    assert ">>>" in text
    for section in ("Args:", "Raises:"):
        assert section in text, section


def snippets(path: Path) -> list[str]:
    """Return the code that runs unchanged, in blocks marked `python`; those marked `py` are fragments."""
    return re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL)


PAGES = [ROOT / "README.md", *(path for path in sorted((ROOT / "docs").rglob("*.md")) if snippets(path))]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_snippets_run(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    for block in snippets(path):
        exec(compile(block, path.name, "exec"), scope)


def test_the_readme_has_code_that_runs():
    assert len(snippets(ROOT / "README.md")) >= 2


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.md")), ids=lambda path: path.name)
def test_links_to_files_lead_somewhere(path):
    """mkdocs checks the pages of docs/; these are read in the repository itself."""
    for link in re.findall(r"\]\((?!https?:|#)([^)\s]+)\)", path.read_text()):
        target, _, anchor = link.partition("#")
        assert (ROOT / target).exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.+)$", (ROOT / target).read_text(), flags=re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in slugs, link


def public_names() -> dict[str, set[str]]:
    """Return the public names by module."""
    modules = [wk, *(value for name in wk.__all__ if inspect.ismodule(value := getattr(wk, name, None)))]
    modules.append(importlib.import_module("windkern.integrations.trl"))
    found = {}
    for module in modules:
        names = getattr(module, "__all__", None) or [
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
        ]
        found[module.__name__] = {name for name in names if not inspect.ismodule(getattr(module, name))}
    return found


def documented() -> set[str]:
    """Return the last part of each name that the reference asks mkdocstrings for, and the names of whole modules."""
    text = "".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    asked = re.findall(r"^::: ([\w.]+)$", text, flags=re.MULTILINE)
    whole = [vars(wk.naive)] if "windkern.naive" in asked else []
    return {name.rsplit(".", 1)[1] for name in asked}.union(*whole)


@pytest.mark.parametrize("module", public_names())
def test_every_public_name_is_in_the_reference(module):
    missing = public_names()[module] - documented()
    assert not missing, f"add `::: {module}.NAME` to a page in docs/reference: {sorted(missing)}"


def test_the_reference_asks_only_for_what_there_is():
    for path in (ROOT / "docs" / "reference").glob("*.md"):
        for name in re.findall(r"^::: ([\w.]+)$", path.read_text(), flags=re.MULTILINE):
            if "trl" in name or "windkern.train" in name:
                continue
            module, attribute = name.rsplit(".", 1)
            try:
                importlib.import_module(name)
            except ImportError:
                assert hasattr(importlib.import_module(module), attribute), name
