"""The interface of everything that is measured, and code shared by all providers.

A provider is built once for a problem and then called: the call computes the log-probs (or a loss) and, depending on
the mode, the gradients of hidden and weight for the problem's upstream, and returns them as a `Result`.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import windkern as wk
from benchmarks.cases import Case, Problem

PER_TOKEN = "returns log-probs and takes any upstream gradient per token"
MEAN_LOSS = "the mean negative log-prob; gradients finished in forward, scalar upstream"
WIND_LOSS = "the WIND loss (objective square) of groups of eight responses"
PAIR_LOSS = "the whole DPO loss of pairs without a reference; gradients finished in forward, scalar upstream"
TRL_NEEDS = "datasets, dill and multiprocess, which trl imports"


ROUNDING = 1e-5  # relative error of a product above which its operands were rounded to less than float32
LEVELS = ("tokens", "loss", "wind", "mean")  # rows are compared only within a level


class Result(NamedTuple):
    output: Tensor  # (M,) log-probs, or a () loss
    dhidden: Tensor | None = None  # (M, H)
    dweight: Tensor | None = None  # (V, H)


@dataclass
class Step:
    """A prepared call. `order[i]` is the problem's row in the provider's row i; None if the orders are the same."""

    call: Callable[[], Result]
    order: Tensor | None = None
    detail: str = ""

    def in_order(self, result: Result) -> Result:
        if self.order is None or result.dhidden is None:
            return result
        dhidden = torch.empty_like(result.dhidden)
        dhidden[self.order] = result.dhidden
        return result._replace(dhidden=dhidden)


@dataclass(frozen=True)
class Provider:
    """An implementation that is measured: one row of each case that it can run.

    `level`: "floor", "tokens" (log-probs, any upstream), "loss" (a pair loss), "wind" (the WIND loss of
    groups of eight) or "mean" (mean negative log-prob).
    """

    name: str
    label: str
    what: str
    level: str
    build: Callable[[Problem], Step]
    package: str = "torch"
    module: str = "torch"
    modes: tuple[str, ...] = ("trained", "frozen", "scoring")
    dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16")
    devices: tuple[str, ...] = ("cpu", "cuda")
    by_default: bool = True  # if False, it runs only if --peers names it
    compiles: bool = False  # its first call runs a compiler
    onednn: bool = False  # float32 products through oneDNN where torch uses MKL
    cannot: str | None = None  # why it cannot run any case of this benchmark
    why_not_case: Callable[[Case], tuple[str, str] | None] = lambda case: None

    @property
    def is_ours(self) -> bool:
        return self.package == "windkern"

    def version(self) -> str | None:
        if self.is_ours:
            return wk.__version__
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def why_not(self, case: Case) -> tuple[str, str] | None:
        """Return ("absent" | "cannot" | "same", reason), or None if the provider can be built for the case."""
        if self.cannot is not None:
            return "cannot", self.cannot
        if importlib.util.find_spec(self.module) is None:
            return "absent", f"{self.package} is not installed"
        if case.mode not in self.modes:
            return "cannot", f"computes nothing comparable in mode {case.mode}"
        if case.device not in self.devices:
            return "cannot", f"it is measured on {' and '.join(self.devices)}"
        if case.dtype_name not in self.dtypes:
            return "cannot", f"it is measured in {' and '.join(self.dtypes)}"
        if self.onednn and not torch.backends.mkldnn.is_available():
            return "absent", "this torch is built without oneDNN"
        if self.onednn and case.dtype_name == "fp32" and (error := onednn_error()) > ROUNDING:
            return "cannot", f"oneDNN rounds the operands of float32 products here (relative error {error:.2g})"
        if self.name == "gemm-mkl" and not torch.backends.mkl.is_available():
            return "absent", "this torch is built without MKL"
        return self.why_not_case(case)

    def prepare(self, problem: Problem) -> Step:
        """Build the step, with its float32 products in the library that this provider measures."""
        with quiet():
            step = self.build(problem)
        if self.onednn:
            step.call = through_onednn(step.call)
        return step


def needs(*modules: str, what: str) -> Callable[[Case], tuple[str, str] | None]:
    """Return a `why_not_case` for a peer that needs `modules` besides its own package."""

    def why_not(case: Case) -> tuple[str, str] | None:
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        return ("absent", f"{', '.join(missing)} not installed; it needs {what}") if missing else None

    return why_not


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings of peers; used around set-up and whole rounds, never inside a timed call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def through_onednn(call: Callable[[], Result]) -> Callable[[], Result]:
    """Run a call with its float32 products in oneDNN.

    Hazard: on a CPU with bf16 matrix units, "medium" rounds operands to bf16; see `onednn_error`.
    """

    def switched() -> Result:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            return call()
        finally:
            torch.set_float32_matmul_precision(before)

    return switched


@functools.cache
def onednn_error() -> float:
    """Return the relative error of a float32 product by oneDNN on this CPU."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator) for _ in range(2))
    product = through_onednn(lambda: Result(left @ right))().output
    exact = left.double() @ right.double()
    return float((product.double() - exact).norm() / exact.norm())


def differentiated(
    problem: Problem, function: Callable[[Tensor, Tensor], Tensor], upstream: Tensor | None, negate: bool = False
) -> Callable[[], Result]:
    """Return a call of `function(hidden, weight)` that also differentiates it; `negate` if it returns -logps."""
    hidden, weight = problem.leaves()
    return differentiated_at(hidden, weight, function, upstream, negate)


def differentiated_at(hidden, weight, function, upstream, negate=False) -> Callable[[], Result]:
    leaves = [leaf for leaf in (hidden, weight) if leaf.requires_grad]
    if upstream is not None and negate:
        upstream = -upstream

    def call() -> Result:
        output = function(hidden, weight)
        grads = iter(
            torch.autograd.grad(output, leaves, None if upstream is None else upstream.to(output.dtype))
            if leaves
            else ()
        )
        output = output.detach()
        return Result(
            -output if negate else output,
            next(grads) if hidden.requires_grad else None,
            next(grads) if weight.requires_grad else None,
        )

    return call
