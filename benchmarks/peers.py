"""Every way to get the log-probs behind one signature: bare products, plain torch, other libraries, windkern.

A provider is built once for a problem and then called: `step()` computes the log-probs (or the pair loss) and, by
mode, the gradients of hidden and weight for the problem's upstream, and returns them as a `Result`.
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
import torch.nn.functional as F
from torch import Tensor

import windkern as wk
from benchmarks.cases import BETA, Case, Problem

UNLIMITED = 1 << 50


class Result(NamedTuple):
    output: Tensor  # (M,) log-probs, or the () pair loss
    dhidden: Tensor | None = None  # (M, H)
    dweight: Tensor | None = None  # (V, H)


@dataclass
class Step:
    """A prepared call. `order[i]` is the problem's row that the provider holds as its row i, where they differ."""

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
    """One row of every case it can do. `level`: "floor", "tokens" (log-probs, any upstream) or "loss" (pair loss)."""

    name: str
    label: str
    what: str
    level: str
    build: Callable[[Problem], Step]
    package: str = "torch"
    module: str = "torch"
    modes: tuple[str, ...] = ("trained", "frozen", "scoring")
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    compiles: bool = False  # its first call runs a compiler
    onednn: bool = False  # float32 products through oneDNN, where torch would take MKL
    cannot: str | None = None  # why it can do no case of this benchmark
    why_not_case: Callable[[Case], str | None] = lambda case: None

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
        """("absent" | "cannot", reason), or None where the provider can be built for the case."""
        if self.cannot is not None:
            return "cannot", self.cannot
        if importlib.util.find_spec(self.module) is None:
            return "absent", f"{self.package} is not installed"
        if case.mode not in self.modes:
            return "cannot", f"computes nothing comparable in mode {case.mode}"
        if case.dtype_name not in self.dtypes:
            return "cannot", f"same as its {self.dtypes[0]} sibling in {case.dtype_name}"
        if self.onednn and not torch.backends.mkldnn.is_available():
            return "absent", "this torch is built without oneDNN"
        reason = self.why_not_case(case)
        return None if reason is None else ("cannot", reason)

    def prepare(self, problem: Problem) -> Step:
        """The step, with its float32 products in the library this provider is about."""
        with quiet():
            step = self.build(problem)
        if self.onednn:
            step.call = _through_onednn(step.call)
        return step


@contextmanager
def quiet() -> Iterator[None]:
    """Peers' own warnings are theirs; around set-up and whole rounds, never inside a timed call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _through_onednn(call: Callable[[], Result]) -> Callable[[], Result]:
    """Hazard: on a CPU with bf16 matrix units "medium" rounds operands to bf16; the errors of the row then show it."""

    def switched() -> Result:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            return call()
        finally:
            torch.set_float32_matmul_precision(before)

    return switched


def _differentiated(
    problem: Problem, function: Callable[[Tensor, Tensor], Tensor], upstream: Tensor | None, negate: bool = False
) -> Callable[[], Result]:
    """Call `function(hidden, weight)`, then differentiate its output; `negate` where it returns -logps."""
    hidden, weight = problem.leaves()
    return _differentiated_at(hidden, weight, function, upstream, negate)


def _differentiated_at(hidden, weight, function, upstream, negate=False) -> Callable[[], Result]:
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


# The floor ----------------------------------------------------------------------------------------------------------


def _build_products(problem: Problem) -> Step:
    """torch.mm of full shapes into buffers that exist already: nothing is allocated, nothing else is computed."""
    case, hidden, weight = problem.case, problem.hidden, problem.weight
    z = torch.empty(case.shape.rows, case.shape.vocab, dtype=case.dtype)
    dhidden = torch.empty_like(hidden) if case.wants_hidden else None
    dweight = torch.empty_like(weight) if case.wants_weight else None

    def call() -> Result:
        torch.mm(hidden, weight.t(), out=z)
        if dhidden is not None:
            torch.mm(z, weight, out=dhidden)
        if dweight is not None:
            torch.mm(z.t(), hidden, out=dweight)
        return Result(z)

    return Step(call)


@functools.cache
def _onednn_rounds() -> str | None:
    """Why oneDNN's float32 products may not serve as a floor, or None: their error must be that of float32."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator) for _ in range(2))
    product = _through_onednn(lambda: Result(left @ right))().output
    exact = left.double() @ right.double()
    error = float((product.double() - exact).norm() / exact.norm())
    return None if error < 1e-5 else f"products are rounded below float32 here (relative error {error:.2g})"


def _floor(name: str, label: str, dtypes: tuple[str, ...], onednn: bool) -> Provider:
    return Provider(
        name,
        label,
        "the matrix products alone, torch.mm at full shape into buffers that exist already: nobody can be faster",
        "floor",
        _build_products,
        dtypes=dtypes,
        onednn=onednn,
        why_not_case=lambda case: _onednn_rounds() if onednn and case.dtype_name == "fp32" else None,
    )


# Peers --------------------------------------------------------------------------------------------------------------


def _build_plain(problem: Problem) -> Step:
    def logps(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(hidden, weight)
        return logits.float().log_softmax(-1).gather(-1, problem.targets.unsqueeze(-1)).squeeze(-1)

    return Step(_differentiated(problem, logps, problem.upstream))


def _build_torch_chunked(problem: Problem, **options) -> Step:
    chosen = torch.nn.LinearCrossEntropyOptions(**options)

    def nll(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.linear_cross_entropy(hidden, weight, problem.targets, reduction="none", options=chosen)

    shape = problem.case.shape
    made = chosen._adjust(shape.rows, shape.hidden, shape.vocab, problem.case.dtype, problem.hidden.device)
    detail = f"chunks of {made.batch_chunk_size} rows, acc_policy {made.acc_policy}"
    return Step(_differentiated(problem, nll, problem.upstream, negate=True), detail=detail)


def _why_not_torch_chunked(case: Case) -> str | None:
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return f"torch {torch.__version__} has no chunked linear_cross_entropy"


def _build_cce(problem: Problem) -> Step:
    from cut_cross_entropy import linear_cross_entropy

    def nll(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, problem.targets, impl="torch_compile", reduction="none")

    return Step(_differentiated(problem, nll, problem.upstream, negate=True))


def _build_liger_dpo(problem: Problem, compiled: bool) -> Step:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    shape = problem.case.shape
    # Shape: Liger wants all chosen responses first, then all rejected ones.
    order = torch.arange(shape.rows).view(shape.pairs, 2, shape.tokens).transpose(0, 1).reshape(-1)
    hidden = problem.hidden[order].view(2 * shape.pairs, shape.tokens, shape.hidden)
    targets = problem.targets[order].view(2 * shape.pairs, shape.tokens)
    loss_module = LigerFusedLinearDPOLoss(beta=BETA, compiled=compiled, use_ref_model=False, loss_type="sigmoid")

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return loss_module(weight, hidden, targets)[0]

    weight = problem.leaves()[1]
    inner = _differentiated_at(hidden.requires_grad_(problem.case.wants_hidden), weight, loss, None)

    def call() -> Result:
        result = inner()
        return result._replace(dhidden=result.dhidden.reshape(shape.rows, shape.hidden))

    return Step(call, order=order)


_PER_TOKEN = "returns log-probs and takes any upstream gradient per token"
_PAIR_LOSS = "the whole DPO loss of pairs without a reference; gradients finished in forward, scalar upstream"
_ONE_UPSTREAM = "cannot do per-row upstream: gradients are finished in forward for one scalar loss"


def _peers() -> list[Provider]:
    cce = {"package": "cut-cross-entropy", "module": "cut_cross_entropy"}
    liger = {"package": "liger-kernel", "module": "liger_kernel"}
    plain = f"F.linear, log_softmax in float32, gather, autograd; logits in the input dtype; {_PER_TOKEN}"
    compiled = f"full logits, softmax fused by torch.compile; {_PER_TOKEN}"
    chunked = f"F.linear_cross_entropy(reduction='none', options=...): rows in chunks, recomputed; {_PER_TOKEN}"
    return [
        Provider("plain", "plain logits", plain, "tokens", _build_plain),
        Provider("plain-onednn", "plain logits, oneDNN", plain, "tokens", _build_plain, dtypes=("fp32",), onednn=True),
        Provider(
            "torch-chunked",
            "torch chunked",
            f"{chunked}; default options",
            "tokens",
            _build_torch_chunked,
            why_not_case=_why_not_torch_chunked,
        ),
        Provider(
            "torch-chunked-512",
            "torch chunked, 512 rows",
            f"{chunked}; batch_chunk_size=512",
            "tokens",
            functools.partial(_build_torch_chunked, batch_chunk_size=512),
            why_not_case=_why_not_torch_chunked,
        ),
        Provider("cce-compile", "CCE torch_compile", compiled, "tokens", _build_cce, compiles=True, **cce),
        Provider(
            "cce-compile-onednn",
            "CCE torch_compile, oneDNN",
            compiled,
            "tokens",
            _build_cce,
            dtypes=("fp32",),
            compiles=True,
            onednn=True,
            **cce,
        ),
        Provider(
            "liger-dpo",
            "Liger DPO",
            f"LigerFusedLinearDPOLoss(compiled=False), one pair at a time: {_PAIR_LOSS}",
            "loss",
            functools.partial(_build_liger_dpo, compiled=False),
            modes=("trained", "frozen"),
            **liger,
        ),
        Provider(
            "liger-dpo-compiled",
            "Liger DPO, compiled",
            f"LigerFusedLinearDPOLoss(compiled=True), one pair at a time: {_PAIR_LOSS}",
            "loss",
            functools.partial(_build_liger_dpo, compiled=True),
            modes=("trained", "frozen"),
            compiles=True,
            **liger,
        ),
        *_scalar_only(cce, liger),
    ]


def _scalar_only(cce: dict, liger: dict) -> list[Provider]:
    def never(problem: Problem) -> Step:
        raise NotImplementedError

    return [
        Provider(
            "torch-chunked-mean",
            "torch chunked, mean",
            "F.linear_cross_entropy(reduction='mean', options=...)",
            "tokens",
            never,
            cannot=_ONE_UPSTREAM,
        ),
        Provider(
            "liger-flce",
            "Liger fused CE",
            "LigerFusedLinearCrossEntropyLoss",
            "tokens",
            never,
            cannot=f"{_ONE_UPSTREAM}; and its Triton kernels need a GPU",
            **liger,
        ),
        Provider(
            "cce",
            "CCE",
            "cut_cross_entropy, impl='cce'",
            "tokens",
            never,
            cannot="its Triton kernels need a GPU; on a CPU it offers torch_compile only",
            **cce,
        ),
    ]


# Ours ---------------------------------------------------------------------------------------------------------------


def _plan(case: Case, budget: int | None) -> wk.Plan:
    return wk.plan(
        case.shape.rows,
        case.shape.hidden,
        case.shape.vocab,
        case.dtype,
        hidden_grad=case.wants_hidden,
        weight_grad=case.wants_weight,
        memory_budget=budget,
        device=case.device,
    )


def _build_token_logps(problem: Problem, backend: str, budget: int | None) -> Step:
    def logps(hidden: Tensor, weight: Tensor) -> Tensor:
        return wk.token_logps(hidden, weight, problem.targets, memory_budget=budget, backend=backend).logps

    made = _plan(problem.case, budget)
    detail = (
        f"{made.units:g} units, {made.slabs_kept} of {made.num_slabs} slabs of {made.slab_width} columns kept, "
        f"plan {made.peak_bytes / 2**20:.0f} MiB"
    )
    return Step(_differentiated(problem, logps, problem.upstream), detail=detail)


def _build_fused_loss(problem: Problem, backend: str) -> Step:
    shape = problem.case.shape
    lead = (shape.pairs, 2, shape.tokens)
    targets, constants = problem.targets.view(lead), {"ref_logps": torch.zeros(shape.pairs, 2)}
    loss_fn = functools.partial(wk.losses.dpo, beta=BETA, reduction="none")

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        grouped = hidden.view(*lead, shape.hidden)
        return wk.fused_loss(loss_fn, grouped, weight, targets, per_group=constants, backend=backend)

    return Step(_differentiated(problem, loss, None))


def _same_plan(case: Case) -> str | None:
    default, unlimited = _plan(case, None), _plan(case, UNLIMITED)
    same = (default.slab_width, default.slabs_kept) == (unlimited.slab_width, unlimited.slabs_kept)
    return "the default budget makes the same plan: there is nothing more to keep" if same else None


def _ours(backend: str) -> list[Provider]:
    common = {"package": "windkern", "module": "windkern"}
    return [
        Provider(
            f"windkern-{backend}",
            f"windkern ({backend})",
            f"token_logps, memory_budget as it comes; {_PER_TOKEN}",
            "tokens",
            functools.partial(_build_token_logps, backend=backend, budget=None),
            **common,
        ),
        Provider(
            f"windkern-{backend}-all",
            f"windkern ({backend}), all kept",
            f"token_logps, memory_budget large enough to recompute nothing; {_PER_TOKEN}",
            "tokens",
            functools.partial(_build_token_logps, backend=backend, budget=UNLIMITED),
            why_not_case=_same_plan,
            **common,
        ),
        Provider(
            f"windkern-{backend}-loss",
            f"windkern fused_loss ({backend})",
            "fused_loss with losses.dpo, the same pair loss as Liger's; gradients finished in forward",
            "loss",
            functools.partial(_build_fused_loss, backend=backend),
            modes=("trained", "frozen"),
            **common,
        ),
    ]


def all_providers(device: str = "cpu") -> list[Provider]:
    """Floors first, then peers, then windkern with each back end that can run on the device."""
    providers = [
        _floor("gemm-mkl", "bare products, MKL", ("fp32",), onednn=False),
        _floor("gemm-onednn", "bare products, oneDNN", ("fp32", "bf16"), onednn=True),
        *_peers(),
    ]
    for backend in wk.backends.available(device):
        providers += _ours(backend)
    return providers
