"""Examples in docstrings and in the README run; public names are documented."""

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


def test_readme_snippets_run():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) >= 3
    scope = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
