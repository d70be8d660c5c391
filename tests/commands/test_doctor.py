"""`windkern doctor`: its findings, and that it detects a wrong back end."""

import dataclasses
import json

import pytest
import torch

import windkern as wk
from windkern import backends
from windkern.commands import diagnosis
from windkern.commands.cli import main
from windkern.kernels import cpu_products, gemm
from windkern.kernels.native import cpp as cpp_rows
from windkern.kernels.torch import rows as torch_rows

pytest.importorskip("rich")


@pytest.fixture(autouse=True)
def _without_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # slow, and tested elsewhere


def test_the_tables_name_versions_devices_back_ends_and_errors(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert f"windkern {wk.__version__}" in shown and f"torch {torch.__version__}"[:9] in shown
    assert "cpu: " in shown and "instruction sets" in shown and "bfloat16 products" in shown
    assert "it runs on NVIDIA and AMD GPUs, not on cpu" in shown
    rows = [line.split() for line in shown.splitlines() if line.split()[-1:] == ["ok"]]
    assert {(row[1], row[2]) for row in rows} == {
        (name, dtype)
        for name in wk.backends.available("cpu")
        for dtype in [diagnosis.SHORT[str(dtype)[6:]] for dtype in diagnosis.DTYPES]
    }
    assert "wrong" not in shown


def test_json_is_what_programs_read(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "doctor" and found["ok"] is True
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["devices"][0]["name"] == "cpu"
    reasons = {(entry["name"], entry["device"]): entry["reason"] for entry in found["backends"]}
    assert reasons["torch", "cpu"] is None and "GPUs" in reasons["triton", "cpu"]
    for entry in found["self_test"]:  # float64 can round like the reference, on some CPUs to the last bit
        assert (entry["error"] > 0 or entry["dtype"] == "float64") and entry["error"] <= entry["allowed"], entry
    assert {entry["quantity"] for entry in found["self_test"]} == set(diagnosis.QUANTITIES)


def test_the_instruction_set_is_the_one_in_use():
    found = diagnosis.cpp_extension()
    assert (found["reason"] is None) == (found["in_use"] in found["instruction_sets"])


def test_products_are_told_with_what_is_particular_about_them(monkeypatch):
    found = diagnosis.products("cpu")
    assert list(found) == ["fp32", "bf16", "fp16"] and "widened to float32" in found["fp16"]
    monkeypatch.setattr(gemm, "_cuda_has", lambda product: product == "mm")  # as torch 2.8 and 2.9 do
    monkeypatch.setattr(diagnosis, "_multiplies_in_tf32", lambda: True)
    found = diagnosis.products("cuda")
    assert "a temporary for each sum" in found["bf16"] and "in TF32" in found["fp32"] and "TF32" not in found["fp16"]
    monkeypatch.setattr(gemm, "_cuda_has", lambda product: False)
    assert "widened to float32" in diagnosis.products("cuda")["bf16"]


def test_a_missing_extension_is_told_with_the_reason(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(cpp_rows, "_cpp", None)
    monkeypatch.setattr(cpp_rows, "_reason", "windkern was installed without its extension _cpp", raising=False)
    monkeypatch.setattr(cpu_products, "PRODUCT", None)
    monkeypatch.setattr(backends, "BACKENDS", {name: backends.BACKENDS[name] for name in ("cpp", "torch")})
    assert main(["doctor"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    reason = "windkern was installed without its extension _cpp; reinstall windkern with a C++17 compiler"
    assert f"C++ extension: not in use: {reason}" in shown and f"cpu cpp no {reason}" in shown
    found = diagnosis.cpp_extension()
    assert not found["built"] and found["in_use"] is None and reason in found["reason"]


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_a_wrong_back_end_is_seen(part, monkeypatch, capsys):
    names = {"forward": ("slab_forward", "exps_forward"), "backward": ("slab_backward", "exps_backward")}[part]

    def wrong(right):
        def kernel(slab, *args):
            if part == "forward":
                slab.logits[:, 3] += 0.5
                return right(slab, *args)
            right(slab, *args)
            written = args[4] if right.__name__ == "slab_backward" else args[2]  # dz, or exponentials
            written.mul_(1.01)

        return kernel

    for name in names:
        monkeypatch.setattr(torch_rows, name, wrong(getattr(torch_rows, name)))
    monkeypatch.setattr(backends, "BACKENDS", {"torch": backends.BACKENDS["torch"]})
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    bad = {entry["quantity"] for entry in found["self_test"] if not entry["ok"] and entry["dtype"] == "float32"}
    assert not found["ok"] and bad == (set(diagnosis.QUANTITIES) if part == "forward" else {"dhidden", "dweight"})
    assert main(["doctor"]) == 1
    assert "wrong" in capsys.readouterr().out


def test_a_back_end_that_raises_is_a_finding(monkeypatch, capsys):
    broken = dataclasses.replace(backends.BACKENDS["torch"], module="no_such_module")
    monkeypatch.setattr(backends, "BACKENDS", {"torch": broken})
    assert main(["doctor", "--json"]) == 1
    messages = {entry["message"] for entry in json.loads(capsys.readouterr().out)["self_test"]}
    assert messages == {"ModuleNotFoundError: No module named 'no_such_module'"}
    assert main(["doctor"]) == 1
    (check, *_) = diagnosis.check_backend("torch", "cpu", torch.float32)
    assert not check.ok and check.error is None
