"""Imports point one way: kernels <- ops <- losses <- train; the specification imports only torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "windkern"
# Below `train`, what each part may import of the package beside what lies in its own folder.
BASE = {"_checks", "_extras", "transform", "terminal", "head"}
ALLOWED = {
    "kernels": BASE | {"_cpp", "_cuda"},
    "ops": BASE | {"kernels", "plan", "spec", "backends"},
    "losses": BASE | {"kernels", "ops", "backends"},
    "tabular": BASE | {"losses"},
    "hf": BASE | {"ops"},
    "sharding": BASE,
    "integrations": BASE | {"kernels", "ops", "plan", "backends", "losses", "hf", "sharding"},
    "recipes": BASE,
    "naive": set(),
    "head": {"transform"},
    "spec": BASE,
    "costs": BASE | {"kernels", "spec", "backends"},
    "plan": BASE | {"kernels", "backends", "costs", "spec"},
    "backends": BASE | {"kernels"},
    "transform": {"_checks"},
    "_checks": set(),
    "_extras": set(),
    "terminal": set(),
    "forecast": set(),
    "display": {"forecast", "terminal"},
}


def imported_parts(path: Path) -> set[str]:
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "windkern":
            rest = node.module.split(".")[1:]
            parts |= {rest[0]} if rest else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            parts |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("windkern.")}
    return parts


def test_imports_point_one_way():
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part in ALLOWED:
            beyond = imported_parts(path) - ALLOWED[part] - {part}
            assert not beyond, f"{path.relative_to(PACKAGE)} imports {sorted(beyond)}"


def test_the_check_sees_a_wrong_arrow(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from windkern.ops.logprobs import token_logps\nimport windkern.train\nfrom windkern import nn\n")
    assert imported_parts(wrong) == {"ops", "train", "nn"}


HEAVY = ("torch._dynamo", "transformers", "triton", "matplotlib")


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import windkern.commands.cli; windkern.commands.cli.build_parser()", ("torch", "numpy", *HEAVY)),
        ("import windkern; windkern.token_logps, windkern.losses.wind, windkern.plan", HEAVY),
    ],
)
def test_import_is_light(code, heavy):
    """The command line can say something before torch is there, and the core needs nothing beside torch."""
    code += f"; import sys; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_names_of_the_package_are_there_when_they_are_asked_for():
    code = (
        "import windkern, windkern.ops.logprobs; from windkern.plan import plan; assert windkern.plan is plan;"
        "assert all(getattr(windkern, name) is not None for name in ('Plan', 'losses', 'sharding', 'win_rates'));"
        "assert set(windkern.__all__) <= set(dir(windkern)); windkern.nothing"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.endswith("AttributeError: module 'windkern' has no attribute 'nothing'\n")


def test_files_stay_short():
    for path in [*PACKAGE.rglob("*.py"), *Path(__file__).parent.rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 450, path.name
