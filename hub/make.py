"""Make the folder of the Kernel Hub from the package: sources for kernel-builder, and variants that `kernels` loads.

    python hub/make.py build/hub

A Hub kernel is imported from anywhere, under a name of its own and beside other versions of itself. So the modules that
`hub/entry.py` needs are copied with relative imports, and their ops go into the namespace that `_ops.py` names, which
kernel-builder writes anew where it builds. Format: https://huggingface.co/docs/kernels/builder/writing-kernels
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "windkern"
NAME = "windkern"
BACKENDS = ("cpu", "cuda", "rocm")
ENTRY = "__init__.py"
DATA = ("kernels/tuned.json",)

_OPS = '''"""The namespace of this kernel's ops, as kernel-builder writes it."""

import torch


def _backend() -> str:
    if torch.version.cuda is not None:
        return "cuda"
    return "rocm" if torch.version.hip is not None else "cpu"


_OPS_NAME = f"_{name}_{{_backend()}}_{digest}"
ops = getattr(torch.ops, _OPS_NAME)


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{{_OPS_NAME}}::{{op_name}}"
'''


def modules() -> dict[str, str]:
    """Sources of the entry and of every module that it needs, by their paths in the kernel."""
    found = {ENTRY: (HERE / "entry.py").read_text(encoding="utf-8")}
    backends = re.findall(r'"(\.kernels\.[\w.]+)"', (PACKAGE / "backends.py").read_text(encoding="utf-8"))
    wanted = [*_imported(found[ENTRY]), *(each[1:] for each in backends)]
    while wanted:
        name = wanted.pop()
        path = _file_of(name)
        if path is None or path in found:
            continue
        found[path] = (PACKAGE / path).read_text(encoding="utf-8")
        wanted += _imported(found[path])
        parts = name.split(".")
        wanted += [".".join(parts[:k]) for k in range(1, len(parts))]
    return found


def _imported(source: str) -> list[str]:
    """Names below `windkern` that a module imports from; some are attributes of modules."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(each.name.split(".")[0] == NAME for each in node.names):
            raise ValueError(f"line {node.lineno}: a module of the kernel must import from {NAME}, not {NAME} itself")
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == NAME:
            inner = (node.module or "").split(".")[1:]
            found += [".".join([*inner, each.name]) for each in node.names] + ([".".join(inner)] if inner else [])
    return found


def _file_of(name: str) -> str | None:
    """The path of a module or package, relative to the package; None for what is neither."""
    path = name.replace(".", "/")
    return next((each for each in (f"{path}.py", f"{path}/{ENTRY}") if (PACKAGE / each).is_file()), None)


def portable(path: str, source: str) -> str:
    """A module's source with relative imports, and with its ops in the kernel's own namespace."""
    up = "." * (path.count("/") + 1)
    source = re.sub(rf"^(\s*)from {NAME}\.([\w.]+) import ", rf"\1from {up}\2 import ", source, flags=re.MULTILINE)
    source = re.sub(rf"^(\s*)from {NAME} import ", rf"\1from {up} import ", source, flags=re.MULTILINE)
    namespace = 'add_op_namespace_prefix("").rstrip(":")'
    spaced = source.replace(f'Library("{NAME}", "FRAGMENT")', f'Library({namespace}, "FRAGMENT")')
    spaced = re.sub(rf'"{NAME}::(\w+)"', r'add_op_namespace_prefix("\1")', spaced)
    spaced = spaced.replace(f"torch.ops.{NAME}.", "_ops.")
    if spaced != source:
        spaced = re.sub(
            r"^(from \.)",
            rf"from {up}_ops import add_op_namespace_prefix\nfrom {up}_ops import ops as _ops\n\1",
            spaced,
            count=1,
            flags=re.MULTILINE,
        )
    return spaced


def write(folder: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")


def make(folder: Path) -> None:
    """Write everything to a new folder; what was there is removed."""
    files = {path: portable(path, source) for path, source in modules().items()}
    files |= {path: (PACKAGE / path).read_text(encoding="utf-8") for path in DATA}
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:7]
    shutil.rmtree(folder, ignore_errors=True)
    write(folder / "torch-ext" / NAME, files)
    for name in ("build.toml", "flake.nix", "CARD.md"):
        shutil.copy(HERE / name, folder / name)
    for backend in BACKENDS:
        about = {
            "name": NAME,
            "id": f"_{NAME}_{backend}_{digest}",
            "version": 1,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        made = {"_ops.py": _OPS.format(name=NAME, digest=digest), "metadata.json": json.dumps(about, indent=2) + "\n"}
        write(folder / "build" / f"torch-{backend}", files | made)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
