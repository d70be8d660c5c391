"""Imports point one way: kernels <- ops <- losses <- train; the reference imports only torch."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "windkern"
# What each part may import of the package, beside what lies in its own folder.
BASE = {"_checks", "transform"}
ALLOWED = {
    "kernels": BASE | {"_cpp", "_cuda"},
    "ops": BASE | {"kernels", "plan", "backends"},
    "losses": BASE | {"kernels", "ops", "backends"},
    "tabular": BASE | {"losses"},
    "losses_report": BASE | {"losses"},
    "hf": BASE | {"ops", "hf_head"},
    "hf_head": BASE | {"ops"},
    "integrations": BASE | {"kernels", "ops", "plan", "backends", "losses", "hf"},
    "train": BASE | {"kernels", "ops", "losses", "backends", "hf", "integrations", "recipes", "__version__"},
    "recipes": BASE,
    "reference": set(),
    "plan": BASE | {"kernels"},
    "backends": BASE | {"kernels"},
    "transform": {"_checks"},
    "_checks": set(),
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


def test_import_is_light():
    """Beside torch, `import windkern` brings in no package but itself, and not torch._dynamo, which takes a second."""
    code = (
        "import sys, torch; before = set(sys.modules); import windkern; new = set(sys.modules) - before;"
        "packages = {name.split('.')[0] for name in new} - set(sys.stdlib_module_names) - {'torch', 'windkern'};"
        "print(sorted(packages), 'torch._dynamo' in new)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[] False\n"


def test_files_stay_short():
    for path in [*PACKAGE.rglob("*.py"), *Path(__file__).parent.glob("*.py")]:
        assert len(path.read_text().splitlines()) <= 450, path.name
