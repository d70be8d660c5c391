"""Imports point one way and never form a cycle; the specification imports only torch."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

import windkern

PACKAGE = Path(__file__).parents[1] / "windkern"
# Below `train`, what each part may import from the package besides its own folder.
BASE = {"_checks", "_extras", "_figures", "_files", "transform", "terminal", "head", "shard"}
ALLOWED = {
    "kernels": BASE | {"_cpp", "_cuda"},
    "ops": BASE | {"kernels", "plan", "spec", "backends", "sharding"},
    "losses": BASE | {"kernels", "ops", "backends"},
    "tabular": BASE | {"losses"},
    "hf": BASE | {"ops", "sharding"},
    "sharding": BASE | {"kernels"},
    "shard": set(),
    "integrations": BASE | {"kernels", "ops", "plan", "backends", "losses", "hf", "sharding"},
    "recipes": BASE,
    "naive": set(),
    "head": {"transform", "shard"},
    "spec": BASE,
    "costs": BASE | {"kernels", "spec", "backends"},
    "plan": BASE | {"kernels", "backends", "costs", "spec"},
    "testing": {"naive", "plan"},
    "backends": BASE | {"kernels"},
    "transform": {"_checks"},
    "_checks": set(),
    "_extras": set(),
    "terminal": set(),
    "forecast": set(),
    "display": {"forecast", "terminal"},
}


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported_parts(path: Path) -> set[str]:
    parts = set()
    for node in ast.walk(tree_of(path)):
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


# Folders that compare methods by name: the losses themselves, and the study of small games.
BY_NAME = ("losses", "tabular", "commands/bandit")
METHOD = "wind"  # also the name of the training method, next to "value"


def losses_named(tree: ast.AST, names: set[str]) -> set[str]:
    """Find losses that code tells apart by name: comparisons, cases, keys, subscripts, or loss=NAME in a string."""
    found: set[str] = set()
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        parts: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            parts = [node.value]
        elif isinstance(node, ast.Dict):
            parts = [key for key in node.keys if key is not None]
        elif isinstance(node, ast.Subscript):
            parts = [node.slice]
        for part in parts:
            for each in ast.walk(part):
                if isinstance(each, ast.Constant) and each.value in names - {METHOD}:
                    found.add(each.value)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            found |= set(re.findall(r"\bloss=\W?(\w+)", node.value)) & names
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("windkern.losses"):
            found |= {alias.name for alias in node.names} & names
    return found


def test_only_the_losses_know_a_loss_by_name():
    names = set(windkern.losses.LOSSES)
    for path in PACKAGE.rglob("*.py"):
        place = path.relative_to(PACKAGE).as_posix()
        if not place.startswith(BY_NAME):
            found = losses_named(tree_of(path), names)
            assert not found, (
                f"{place} knows {sorted(found)} by name; a field of the loss's entry should say what it needs"
            )


@pytest.mark.parametrize(
    "code",
    [
        "if config.loss == 'dpo': pass",
        "fixed = name in ('dpo', 'spin')",
        "match name:\n    case 'dpo': pass",
        "counts = {'dpo': 2}",
        "entry = LOSSES['dpo']",
        "raise ValueError(f\"take loss='wind', got {x}\")",
        "help = 'how fast, for loss=bond'",
        "from windkern.losses import LOSSES, sppo",
    ],
)
def test_a_loss_known_by_name_is_seen(code):
    assert losses_named(ast.parse(code), set(windkern.losses.LOSSES))


LOADED, LATER, TYPES = range(3)  # when an import happens: with its module, in a function, for a type checker only


def module_of(path: Path, root: Path) -> str:
    parts = [root.name, *path.relative_to(root).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph(root: Path, upto: int) -> dict[str, set[str]]:
    """Return the modules of a package that each of its modules imports, by imports of the kinds LOADED to `upto`.

    `from package import name` counts as an import of the module package.name if there is one, else of the package.
    """
    modules = {module_of(path, root): path for path in root.rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found = {
            target
            for node, kind in imports_of(tree_of(path))
            if kind <= upto
            for target in targets_of(node, package, modules)
        }
        graph[name] = found - {name}
    return graph


def imports_of(tree: ast.AST, kind: int = LOADED):
    """Yield the import statements, each with its kind."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node, kind
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for part, inside in ((node.body, TYPES), (node.orelse, kind)):
                for other in part:
                    yield from imports_of(ast.Module([other], []), inside)
        else:
            deeper = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from imports_of(node, max(kind, LATER) if deeper else kind)


def targets_of(node: ast.Import | ast.ImportFrom, package: str, modules: dict[str, Path]) -> list[str]:
    """Return the modules of the package that a statement names, without the packages that contain them."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name in modules]
    above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
    base = ".".join([*above, *([node.module] if node.module else [])])
    named = [f"{base}.{alias.name}" for alias in node.names]
    return [name if name in modules else base for name in named if name in modules or base in modules]


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """Return the strongly connected modules, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: set[frozenset[str]] = set()

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in graph[name]:
            if other not in index:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == index[name]:
            place = stack.index(name)
            ring, stack[place:] = stack[place:], []
            if len(ring) > 1:
                found.add(frozenset(ring))

    for name in graph:
        if name not in index:
            visit(name)
    return found


def test_no_module_imports_itself_in_a_circle():
    """Neither on loading nor by imports inside functions, which hide a cycle but do not remove it."""
    graph = import_graph(PACKAGE, LATER)
    assert {"windkern.train.trainer", "windkern.ops.walk", "windkern.settings.run"} <= set(graph)
    assert not circles(import_graph(PACKAGE, LOADED))
    assert not circles(graph)


def test_annotations_make_no_circles():
    graph = import_graph(PACKAGE, TYPES)
    graph["windkern"] = set()  # names for type checkers; everything below imports it
    assert not circles(graph)


def test_circles_are_found(tmp_path):
    root = tmp_path / "package"
    (root / "room").mkdir(parents=True)
    files = {
        "__init__.py": "",
        "a.py": "from package import b",
        "b.py": "import package.room.c",
        "room/__init__.py": "",
        "room/c.py": "from ..a import name",
        "d.py": "def f():\n    from package.e import name",
        "e.py": "from package.d import f",
        "f.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from package.g import name",
        "g.py": "from package.f import name\nfrom package.room.c import name",
    }
    for name, text in files.items():
        (root / name).write_text(text)
    loaded = {frozenset({"package.a", "package.b", "package.room.c"})}
    later = {frozenset({"package.d", "package.e"})}
    types = {frozenset({"package.f", "package.g"})}
    assert circles(import_graph(root, LOADED)) == loaded
    assert circles(import_graph(root, LATER)) == loaded | later
    assert circles(import_graph(root, TYPES)) == loaded | later | types


HEAVY = ("torch._dynamo", "transformers", "triton", "matplotlib")


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import windkern.commands.cli; windkern.commands.cli.build_parser()", ("torch", "numpy", *HEAVY)),
        ("import windkern; windkern.token_logps, windkern.losses.wind, windkern.plan", HEAVY),
    ],
)
def test_import_is_light(code, heavy):
    """The command line can print before torch is loaded, and the core needs nothing besides torch."""
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
