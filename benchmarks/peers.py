"""The other providers: bare products as the floor, plain torch, torch's chunked op, CCE, and Liger."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

import windkern as wk
from benchmarks.cases import BETA, Case, Problem
from benchmarks.gpu_heads import gpu_heads
from benchmarks.gpu_peers import gpu_peers
from benchmarks.ours import our_providers
from benchmarks.provider import (
    PAIR_LOSS,
    PER_TOKEN,
    Provider,
    Result,
    Step,
    differentiated,
    differentiated_at,
)
from windkern.kernels.pages import in_huge_pages


def _build_products(problem: Problem, dtype: torch.dtype | None = None) -> Step:
    """Build torch.mm of full shapes into existing buffers: nothing is allocated, and nothing else is computed.

    Args:
        dtype: to which the operands are cast beforehand; None leaves them as they are.
    """
    case, hidden, weight = problem.case, problem.hidden, problem.weight
    if dtype is not None:
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    z = in_huge_pages(torch.empty(case.shape.rows, case.shape.vocab, dtype=hidden.dtype, device=case.device))
    dhidden = in_huge_pages(torch.empty_like(hidden)) if case.wants_hidden else None
    dweight = in_huge_pages(torch.empty_like(weight)) if case.wants_weight else None

    def call() -> Result:
        torch.mm(hidden, weight.t(), out=z)
        if dhidden is not None:
            torch.mm(z, weight, out=dhidden)
        if dweight is not None:
            torch.mm(z.t(), hidden, out=dweight)
        return Result(z)

    return Step(call)


def _floor(name: str, label: str, dtypes: tuple[str, ...], onednn: bool, dtype: torch.dtype | None = None) -> Provider:
    return Provider(
        name,
        label,
        "the matrix products alone, torch.mm at full shape into existing buffers: no provider can be faster",
        "floor",
        functools.partial(_build_products, dtype=dtype),
        dtypes=dtypes,
        onednn=onednn,
    )


def _build_plain(problem: Problem) -> Step:
    def logps(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(hidden, weight)
        return logits.float().log_softmax(-1).gather(-1, problem.targets.unsqueeze(-1)).squeeze(-1)

    return Step(differentiated(problem, logps, problem.upstream))


def _build_torch_chunked(problem: Problem, **options) -> Step:
    chosen = torch.nn.LinearCrossEntropyOptions(**options)

    def nll(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.linear_cross_entropy(hidden, weight, problem.targets, reduction="none", options=chosen)

    shape = problem.case.shape
    made = chosen._adjust(shape.rows, shape.hidden, shape.vocab, problem.case.dtype, problem.hidden.device)
    detail = f"chunks of {made.batch_chunk_size} rows, acc_policy {made.acc_policy}"
    return Step(differentiated(problem, nll, problem.upstream, negate=True), detail=detail)


def _why_not_torch_chunked(case: Case) -> tuple[str, str] | None:
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return "absent", f"torch {torch.__version__} has no chunked linear_cross_entropy"


def _build_cce(problem: Problem) -> Step:
    from cut_cross_entropy import linear_cross_entropy

    def nll(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, problem.targets, impl="torch_compile", reduction="none")

    return Step(differentiated(problem, nll, problem.upstream, negate=True))


def _build_liger_dpo(problem: Problem, compiled: bool) -> Step:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    shape = problem.case.shape
    # Shape: Liger takes all chosen responses first, then all rejected ones.
    order = (
        torch.arange(shape.rows, device=problem.case.device)
        .view(shape.pairs, 2, shape.tokens)
        .transpose(0, 1)
        .reshape(-1)
    )
    hidden = problem.hidden[order].view(2 * shape.pairs, shape.tokens, shape.hidden)
    targets = problem.targets[order].view(2 * shape.pairs, shape.tokens)
    loss_module = LigerFusedLinearDPOLoss(beta=BETA, compiled=compiled, use_ref_model=False, loss_type="sigmoid")

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return loss_module(weight, hidden, targets)[0]

    weight = problem.leaves()[1]
    inner = differentiated_at(hidden.requires_grad_(problem.case.wants_hidden), weight, loss, None)

    def call() -> Result:
        result = inner()
        return result._replace(dhidden=result.dhidden.reshape(shape.rows, shape.hidden))

    return Step(call, order=order)


_ONE_UPSTREAM = "cannot do per-row upstream: gradients are finished in forward for one scalar loss"


def _peers() -> list[Provider]:
    cce = {"package": "cut-cross-entropy", "module": "cut_cross_entropy"}
    liger = {"package": "liger-kernel", "module": "liger_kernel"}
    plain = f"F.linear, log_softmax in float32, gather, autograd; logits in the input dtype; {PER_TOKEN}"
    compiled = f"full logits, softmax fused by torch.compile; {PER_TOKEN}"
    chunked = f"F.linear_cross_entropy(reduction='none', options=...): rows in chunks, recomputed; {PER_TOKEN}"
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
            "Liger DPO loss",
            f"LigerFusedLinearDPOLoss(compiled=False), one pair at a time: {PAIR_LOSS}",
            "loss",
            functools.partial(_build_liger_dpo, compiled=False),
            modes=("trained", "frozen"),
            **liger,
        ),
        Provider(
            "liger-dpo-compiled",
            "Liger DPO loss, compiled",
            f"LigerFusedLinearDPOLoss(compiled=True), one pair at a time: {PAIR_LOSS}",
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
        raise RuntimeError("a provider that cannot was built")

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
            devices=("cpu",),
            cannot=f"{_ONE_UPSTREAM}; and its Triton kernels need a GPU",
            **liger,
        ),
        Provider(
            "cce",
            "CCE",
            "cut_cross_entropy, impl='cce'",
            "tokens",
            never,
            devices=("cpu",),
            cannot="its Triton kernels need a GPU; on a CPU it offers torch_compile only",
            **cce,
        ),
    ]


def all_providers(device: str = "cpu") -> list[Provider]:
    """Return floors first, then peers, then windkern with each back end that can run on the device."""
    if device == "cpu":
        floors = [
            _floor("gemm-mkl", "bare products, MKL", ("fp32",), onednn=False),
            _floor("gemm-onednn", "bare products, oneDNN", ("fp32", "bf16", "fp16"), onednn=True),
            _floor("gemm-widened", "bare products, float32", ("bf16", "fp16"), onednn=False, dtype=torch.float32),
        ]
        providers = [*floors, *_peers()]
    else:
        everybody = [provider for provider in _peers() if not provider.onednn]
        floor = _floor("gemm", "bare products", ("fp32", "bf16"), onednn=False)
        providers = [floor, *everybody, *gpu_peers(), *gpu_heads()]
    preferred = wk.backends.resolve("auto", torch.device(device), torch.bfloat16, tiles=True)
    for backend in wk.backends.available(device):
        providers += our_providers(backend, preferred=backend == preferred)
    return [provider for provider in providers if device in provider.devices]
