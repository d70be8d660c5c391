"""Peers of the GPU benchmarks, as far as a CPU can test them: values against float64, signs, missing packages."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import exact, gpu_heads, gpu_peers, peers  # noqa: E402
from benchmarks.cases import TINY, Case, make_problem, select_cases  # noqa: E402
from benchmarks.provider import quiet  # noqa: E402

VERL = """
import torch
def linear_cross_entropy(hidden, weight, labels, temperature=1.0, reduction="none", group=None):
    assert isinstance(temperature, float) and reduction == "none"
    logps = (hidden @ weight.T / temperature).float().log_softmax(-1)
    return logps.gather(-1, labels[:, None]).squeeze(-1), -(logps.exp() * logps).sum(-1)
"""
QUACK = """
import torch.nn.functional as F
def chunked_linear_cross_entropy(x, weight, target, chunk_size=4096, ignore_index=-100, reduction="mean"):
    return F.cross_entropy((x @ weight.T).float(), target, ignore_index=ignore_index, reduction=reduction)
"""


def errors_of(build, level: str, mode: str = "trained") -> dict[str, float]:
    problem = make_problem(Case(TINY, mode, "fp32"))
    with quiet():
        return exact.errors(*build(problem).call(), exact.EXACT[level](problem))


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes a package whose `__init__` must not run, and removes it from the imported modules afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(path: str, text: str, init: str = "raise ImportError('Ray')") -> None:
        place = tmp_path / path
        place.parent.mkdir(parents=True)
        for folder in [*place.parents][: len(Path(path).parents) - 1]:
            folder.joinpath("__init__.py").write_text(init if folder != place.parent else "")
        place.write_text(text)

    yield write
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("verl", "quack"):
            del sys.modules[name]


@pytest.mark.parametrize("mode", ["trained", "frozen", "scoring"])
@pytest.mark.parametrize(
    ("package", "build"),
    [
        ("trl", gpu_peers._build_trl),
        ("trl", gpu_heads._build_trl),
        ("liger_kernel", gpu_heads._build_liger_scaled),
    ],
)
def test_per_token_peers_are_right(package, build, mode):
    pytest.importorskip(package)
    found = errors_of(build, "tokens", mode)
    assert set(found) >= {"logps", *(("dhidden",) if mode != "scoring" else ())}
    assert ("dweight" in found) == (mode == "trained")
    for name in {"logps", "dhidden", "dweight"} & set(found):
        assert found[name] < 1e-5, name


def test_trl_is_called_as_its_trainers_call_it():
    pytest.importorskip("trl")
    with quiet():
        from trl.trainer import utils
    assert utils._CHUNKED_LOGPROB_CHUNK_SIZE == gpu_heads.TRL_COLUMNS


def test_verl_is_called_without_its_package(written):
    written("verl/utils/kernel/linear_cross_entropy.py", VERL)
    found = errors_of(gpu_heads._build_verl, "tokens")
    assert max(found["logps"], found["dhidden"], found["dweight"]) < 1e-5
    assert importlib.util.find_spec("verl") is not None  # asked again for each case


def test_quack_gives_the_mean(written):
    written("quack/linear_cross_entropy.py", QUACK)
    found = errors_of(gpu_heads._build_quack, "mean")
    assert max(found[name] for name in ("dhidden", "dweight")) < 1e-5


@pytest.mark.parametrize(
    ("name", "installed", "reason"),
    [
        ("quack-mean", {"quack"}, "cutlass, tvm_ffi not installed; it needs apache-tvm-ffi, torch-c-dlpack-ext and nv"),
        ("liger-scaled", {"liger_kernel"}, "cutlass not installed; it needs nvidia-cutlass-dsl"),
        ("trl-chunked", {"trl"}, "datasets not installed; it needs datasets, dill and multiprocess"),
        ("trl", {"trl"}, "datasets not installed; it needs"),
        ("verl", set(), "verl is not installed"),
        ("quack-mean", set(), "quack-kernels is not installed"),
    ],
)
def test_what_is_missing_is_named(monkeypatch, name, installed, reason):
    provider = next(provider for provider in peers.all_providers("cuda") if provider.name == name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name in installed or None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, found = provider.why_not(select_cases("8192x4096x128256/trained/bf16", "cuda")[0])
    assert status == "absent" and found.startswith(reason)


def test_verl_says_which_heads_it_cannot_do():
    assert gpu_heads._why_not_verl(Case(TINY, "trained", "bf16", "cuda"))[0] == "cannot"
    assert all(gpu_heads._why_not_verl(case) is None for case in select_cases("*", "cuda"))
