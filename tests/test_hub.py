"""The folder for the Kernel Hub: made from the package, complete without it, and in the form that `kernels` loads."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Loads a kernel as `kernels` does, where windkern cannot be imported, and compares it with plain torch.
TRIAL = """
import importlib.util, json, sys
from pathlib import Path

import torch


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "windkern":
            raise ModuleNotFoundError(f"No module named {name!r}")


sys.meta_path.insert(0, Absent())
variant = Path(sys.argv[1])
about = json.loads((variant / "metadata.json").read_text())
spec = importlib.util.spec_from_file_location(about["id"], variant / "__init__.py")
wk = sys.modules[about["id"]] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(wk)
assert sorted(wk.__all__) == sorted(name for name in dir(wk) if name in wk.__all__)

torch.manual_seed(0)
hidden = torch.randn(2, 3, 5, 16, requires_grad=True)
weight, targets = torch.randn(50, 16, requires_grad=True), torch.randint(0, 50, (2, 3, 5))
exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
wanted = torch.autograd.grad(exact.square().sum(), (hidden, weight))
for backend in sys.argv[2:]:
    out = wk.token_logps(hidden, weight, targets, backend=backend)
    torch.testing.assert_close(out.logps.double(), exact, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(out.logps.square().sum(), (hidden, weight))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
torch.testing.assert_close(wk.naive.token_logps(hidden, weight, targets)[0].double(), exact, rtol=1e-5, atol=1e-5)
loss = wk.fused_loss(lambda logps: logps.square().sum(-1), hidden, weight, targets)
torch.testing.assert_close(loss.double(), exact.sum(-1).square().sum(-1).mean(), rtol=1e-5, atol=1e-5)
assert about["id"] in dir(torch.ops) and not any(name.split(".")[0] == "windkern" for name in sys.modules)
print(wk.backends.available("cpu"))
"""


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("hub_make", ROOT / "hub" / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(make, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    make.make(folder)
    return folder


@pytest.mark.slow
def test_a_variant_runs_without_the_package(folder, tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    backends = ["torch", "triton"] if importlib.util.find_spec("triton") else ["torch"]
    script = [sys.executable, "-c", TRIAL, str(folder / "build" / "torch-cpu"), *backends]
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in backends) and "cpp" not in done.stdout


def test_the_folder_is_of_the_form_that_kernels_reads(make, folder):
    """Layout and keys of kernel-builder's edition 5; `make hub` loads it with `kernels` itself."""
    text = (folder / "build.toml").read_text()
    assert re.findall(r"^\[(.+)\]$", text, re.MULTILINE) == ["general", "general.hub", "torch-noarch"]
    build = {key: json.loads(value) for key, value in re.findall(r"^([\w-]+) = (.+)$", text, re.MULTILINE)}
    backends = build["backends"]
    assert build["edition"] == 5 and build["pyext"] == ["py", "json"] and backends == list(make.BACKENDS)
    assert {path.name for path in (folder / "build").iterdir()} == {f"torch-{each}" for each in backends}
    for backend in backends:
        about = json.loads((folder / "build" / f"torch-{backend}" / "metadata.json").read_text())
        assert about["name"] == build["name"] and about["backend"] == {"type": backend}
        assert about["id"].startswith(f"_windkern_{backend}_") and about["version"] == build["version"]
    sources = folder / "torch-ext" / "windkern"
    assert (sources / "kernels" / "triton" / "rows.py").is_file() and (sources / "kernels" / "tuned.json").is_file()
    assert not any((sources / each).exists() for each in ("train", "commands", "hf"))
    assert not (sources / "_ops.py").exists()  # kernel-builder writes it


def test_sources_import_nothing_but_torch_and_triton(make, folder):
    import ast

    for path in (folder / "torch-ext" / "windkern").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            outside = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
            assert outside <= {"torch", "triton", "deepspeed"}, path  # deepspeed to gather its parameters


def test_an_absolute_import_and_an_op_are_made_portable(make):
    source = (
        'from windkern import backends\nfrom windkern.ops.once import once\n\ntorch.ops.windkern.x("windkern::x")\n'
    )
    made = make.portable("ops/rows.py", source)
    assert "from .. import backends\nfrom ..ops.once import once\n" in made and "windkern" not in made
    assert '_ops.x(add_op_namespace_prefix("x"))' in made
    with pytest.raises(ValueError, match="line 1: a module of the kernel must import from windkern"):
        make._imported("import windkern.losses\n")
