"""Fused heads of other trainers on a GPU (TRL, Liger for Hopper, verl, QuACK), called as their authors do."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import Case, Problem
from benchmarks.provider import MEAN_LOSS, PER_TOKEN, TRL_NEEDS, Provider, Step, differentiated, needs

_GPU = ("cuda",)
TRL_COLUMNS = 32768  # of the vocabulary at a time, as in TRL's trainers
_CUTLASS = "nvidia-cutlass-dsl[cu13], whose libraries are a binary wheel of 92 MB"


def _build_trl(problem: Problem) -> Step:
    from trl.kernels import ChunkedLogProbFunction

    def logps(hidden: Tensor, weight: Tensor) -> Tensor:
        # Arguments: hidden, weight, bias, targets, temperature, columns, softcap, scale, further outputs.
        return ChunkedLogProbFunction.apply(
            hidden, weight, None, problem.targets, 1.0, TRL_COLUMNS, None, 1.0, ("log_probs",)
        )[0]

    return Step(differentiated(problem, logps, problem.upstream))


def _build_liger_scaled(problem: Problem) -> Step:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    def nll(hidden: Tensor, weight: Tensor) -> Tensor:
        return LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, problem.targets)

    return Step(differentiated(problem, nll, problem.upstream, negate=True))


def _why_not_liger_scaled(case: Case) -> tuple[str, str] | None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0):
        return "cannot", "its kernels are for compute capability 9.0; elsewhere it is a loop in plain PyTorch"
    return needs("cutlass", what=_CUTLASS)(case)


def _verl_head() -> Callable[..., tuple[Tensor, Tensor]]:
    """Return verl's function without running the `__init__` of its packages, which need Ray; the kernels do not."""
    for name in ("verl", "verl.utils"):
        if name not in sys.modules:
            sys.modules[name] = importlib.util.module_from_spec(importlib.util.find_spec(name))
    return importlib.import_module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy


def _build_verl(problem: Problem) -> Step:
    head = _verl_head()

    def logps(hidden: Tensor, weight: Tensor) -> Tensor:
        return head(hidden, weight, problem.targets, 1.0, "none")[0]

    return Step(differentiated(problem, logps, problem.upstream))


def _why_not_verl(case: Case) -> tuple[str, str] | None:
    return None if case.shape.hidden % 128 == 0 else ("cannot", "its hidden size must be a multiple of 128")


def _build_quack(problem: Problem) -> Step:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return chunked_linear_cross_entropy(hidden, weight, problem.targets)

    return Step(differentiated(problem, loss, None))


def gpu_heads() -> list[Provider]:
    """Return the chunked and fused heads of other trainers; some need further packages for their kernel language."""
    return [
        Provider(
            "trl-chunked",
            "TRL chunked log-probs",
            f"trl.kernels.ChunkedLogProbFunction, what TRL's trainers use; tiles of 4096 x {TRL_COLUMNS} logits in the "
            f"input dtype, recomputed in backward; {PER_TOKEN}",
            "tokens",
            _build_trl,
            package="trl",
            module="trl",
            devices=_GPU,
            why_not_case=needs("datasets", what=TRL_NEEDS),
        ),
        Provider(
            "liger-scaled",
            "Liger scaled CE, Hopper",
            f"LigerFusedLinearScaledCrossEntropyFunction, CuTe kernels; {PER_TOKEN}",
            "tokens",
            _build_liger_scaled,
            package="liger-kernel",
            module="liger_kernel",
            dtypes=("bf16",),
            devices=_GPU,
            compiles=True,
            why_not_case=_why_not_liger_scaled,
        ),
        Provider(
            "verl",
            "verl fused CE",
            f"verl.utils.kernel.linear_cross_entropy(reduction='none'), Triton; always computes the entropy and the "
            f"gradient of the weight; {PER_TOKEN}",
            "tokens",
            _build_verl,
            package="verl",
            module="verl",
            devices=_GPU,
            why_not_case=_why_not_verl,
        ),
        Provider(
            "quack-mean",
            "QuACK, mean NLL",
            f"quack.linear_cross_entropy.chunked_linear_cross_entropy: {MEAN_LOSS}",
            "mean",
            _build_quack,
            package="quack-kernels",
            module="quack",
            modes=("trained", "frozen"),
            dtypes=("bf16",),
            devices=_GPU,
            compiles=True,
            why_not_case=needs("cutlass", "tvm_ffi", what=f"apache-tvm-ffi, torch-c-dlpack-ext and {_CUTLASS}"),
        ),
    ]
