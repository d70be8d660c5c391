"""The providers of windkern: each back end, with the default and an unlimited budget, as log-probs and fused losses."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import windkern as wk
from benchmarks import exact
from benchmarks.cases import BETA, Case, Problem
from benchmarks.provider import MEAN_LOSS, PER_TOKEN, WIND_LOSS, Provider, Step, differentiated

UNLIMITED = 1 << 50


def _plan(case: Case, budget: int | None, backend: str = "auto") -> wk.Plan:
    return wk.plan(
        case.shape.rows,
        case.shape.hidden,
        case.shape.vocab,
        case.dtype,
        hidden_grad=case.wants_hidden,
        weight_grad=case.wants_weight,
        memory_budget=budget,
        device=case.device,
        backend=backend,
    )


def _build_token_logps(problem: Problem, backend: str, budget: int | None) -> Step:
    def logps(hidden: Tensor, weight: Tensor) -> Tensor:
        return wk.token_logps(hidden, weight, problem.targets, memory_budget=budget, backend=backend).logps

    made = _plan(problem.case, budget, backend)
    detail = (
        f"{made.units:g} units, {made.slabs_kept} of {made.num_slabs} slabs of {made.slab_width} columns kept, "
        f"plan {made.peak_bytes / 2**20:.0f} MiB" + (", logits stay in registers" if made.walk.fused else "")
    )
    return Step(differentiated(problem, logps, problem.upstream), detail=detail)


def _build_fused_loss(problem: Problem, backend: str) -> Step:
    shape = problem.case.shape
    lead = (shape.pairs, 2, shape.tokens)
    reference = torch.zeros(shape.pairs, 2, device=problem.case.device)
    targets, constants = problem.targets.view(lead), {"ref_logps": reference}
    loss_fn = functools.partial(wk.losses.dpo, beta=BETA, reduction="none")

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        grouped = hidden.view(*lead, shape.hidden)
        return wk.fused_loss(loss_fn, grouped, weight, targets, per_group=constants, backend=backend)

    return Step(differentiated(problem, loss, None))


def _build_wind_loss(problem: Problem, backend: str) -> Step:
    shape = problem.case.shape
    lead = (-1, exact.RESPONSES, exact.RESPONSE_TOKENS)
    constants = exact.wind_constants(shape, problem.case.device)
    loss_fn = functools.partial(wk.losses.wind, reduction="none", **exact.WIND)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        grouped = hidden.view(*lead, shape.hidden)
        targets = problem.targets.view(lead)
        return wk.fused_loss(loss_fn, grouped, weight, targets, per_group=constants, backend=backend)

    return Step(differentiated(problem, loss, None))


def _build_mean_loss(problem: Problem, backend: str) -> Step:
    shape = problem.case.shape
    lead = (shape.pairs, 2, shape.tokens)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        grouped = hidden.view(*lead, shape.hidden)
        total = wk.fused_loss(
            lambda logps: -logps.sum(-1), grouped, weight, problem.targets.view(lead), reduction="sum", backend=backend
        )
        return total / shape.rows

    return Step(differentiated(problem, loss, None))


def _same_plan(case: Case) -> tuple[str, str] | None:
    default, unlimited = _plan(case, None), _plan(case, UNLIMITED)
    same = (default.slab_width, default.slabs_kept) == (unlimited.slab_width, unlimited.slabs_kept)
    return ("same", "the default budget makes the same plan: there is nothing more to keep") if same else None


def our_providers(backend: str, *, preferred: bool) -> list[Provider]:
    """Return the providers of one back end; one that is not `preferred` runs only its log-probs by default."""
    common = {"package": "windkern", "module": "windkern"}
    return [
        Provider(
            f"windkern-{backend}",
            f"windkern ({backend})",
            f"token_logps, default memory_budget; {PER_TOKEN}",
            "tokens",
            functools.partial(_build_token_logps, backend=backend, budget=None),
            **common,
        ),
        Provider(
            f"windkern-{backend}-all",
            f"windkern ({backend}), all kept",
            f"token_logps, memory_budget large enough to recompute nothing; {PER_TOKEN}",
            "tokens",
            functools.partial(_build_token_logps, backend=backend, budget=UNLIMITED),
            why_not_case=_same_plan,
            by_default=preferred,
            **common,
        ),
        Provider(
            f"windkern-{backend}-loss",
            f"windkern ({backend}), DPO loss",
            "fused_loss with losses.dpo, the same pair loss as Liger's; gradients finished in forward",
            "loss",
            functools.partial(_build_fused_loss, backend=backend),
            modes=("trained", "frozen"),
            by_default=preferred,
            **common,
        ),
        Provider(
            f"windkern-{backend}-mean",
            f"windkern ({backend}), mean NLL",
            f"fused_loss with the mean over tokens: {MEAN_LOSS}",
            "mean",
            functools.partial(_build_mean_loss, backend=backend),
            modes=("trained", "frozen"),
            devices=("cuda",),  # no peer to compare with on a CPU
            by_default=preferred,
            **common,
        ),
        Provider(
            f"windkern-{backend}-wind",
            f"windkern ({backend}), WIND loss",
            f"fused_loss with losses.wind: {WIND_LOSS}",
            "wind",
            functools.partial(_build_wind_loss, backend=backend),
            modes=("trained", "frozen"),
            devices=("cuda",),
            by_default=preferred,
            **common,
        ),
        *(
            Provider(
                f"windkern-{backend}-{budget >> 20}mib",
                f"windkern ({backend}), {budget >> 20} MiB",
                f"token_logps, memory_budget {budget >> 20} MiB; {PER_TOKEN}",
                "tokens",
                functools.partial(_build_token_logps, backend=backend, budget=budget),
                modes=("trained",),
                devices=("cuda",),
                by_default=preferred,
                **common,
            )
            for budget in (0, 512 << 20, 768 << 20, 2 << 30)
        ),
    ]
