"""Peers whose kernels need a GPU, called as a user calls them."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import exact
from benchmarks.cases import Problem
from benchmarks.provider import MEAN_LOSS, PER_TOKEN, TRL_NEEDS, WIND_LOSS, Provider, Step, differentiated, needs

_GPU = ("cuda",)


def _build_compiled(problem: Problem) -> Step:
    """Build plain logits with a softmax that inductor fuses."""

    @torch.compile
    def logps(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(hidden, weight).float()
        return logits.gather(-1, problem.targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)

    return Step(differentiated(problem, logps, problem.upstream))


def _build_cce(problem: Problem, filter_eps: float | str | None) -> Step:
    from cut_cross_entropy import linear_cross_entropy

    def nll(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, problem.targets, filter_eps=filter_eps, reduction="none")

    return Step(differentiated(problem, nll, problem.upstream, negate=True))


def _build_liger_mean(problem: Problem) -> Step:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss_module = LigerFusedLinearCrossEntropyLoss()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return loss_module(weight, hidden, problem.targets)

    return Step(differentiated(problem, loss, None))


def _build_cce_mean(problem: Problem) -> Step:
    from cut_cross_entropy import linear_cross_entropy

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, problem.targets)

    return Step(differentiated(problem, loss, None))


def _build_plain_wind(problem: Problem) -> Step:
    shape = problem.case.shape
    constants = exact.wind_constants(shape, problem.case.device)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(hidden, weight).float()
        logps = logits.log_softmax(-1).gather(-1, problem.targets.unsqueeze(-1)).squeeze(-1)
        return exact.wind_loss(shape, logps, constants)

    return Step(differentiated(problem, loss, None))


def _build_trl(problem: Problem) -> Step:
    from trl.trainer.utils import selective_log_softmax

    def logps(hidden: Tensor, weight: Tensor) -> Tensor:
        return selective_log_softmax(F.linear(hidden, weight).unsqueeze(0), problem.targets.unsqueeze(0)).squeeze(0)

    return Step(differentiated(problem, logps, problem.upstream))


def gpu_peers() -> list[Provider]:
    """Return the peers: kernels of cut-cross-entropy and Liger, TRL's log-softmax, and torch.compile."""
    cce = {"package": "cut-cross-entropy", "module": "cut_cross_entropy", "devices": _GPU, "dtypes": ("bf16",)}
    liger = {"package": "liger-kernel", "module": "liger_kernel", "devices": _GPU}
    cut = f"cut_cross_entropy.linear_cross_entropy(filter_eps={{!r}}, reduction='none'); {PER_TOKEN}"
    return [
        Provider(
            "plain-compile",
            "plain logits, torch.compile",
            f"full logits, softmax fused by inductor; {PER_TOKEN}",
            "tokens",
            _build_compiled,
            devices=_GPU,
            compiles=True,
        ),
        Provider(
            "cce-exact",
            "CCE exact",
            cut.format(None),
            "tokens",
            functools.partial(_build_cce, filter_eps=None),
            **cce,
        ),
        Provider(
            "cce-filtered",
            "CCE (drops small gradients)",
            cut.format("high"),
            "tokens",
            functools.partial(_build_cce, filter_eps="high"),
            **cce,
        ),
        Provider(
            "trl",
            "TRL selective_log_softmax",
            f"full logits, trl.trainer.utils.selective_log_softmax; {PER_TOKEN}",
            "tokens",
            _build_trl,
            package="trl",
            module="trl",
            devices=_GPU,
            why_not_case=needs("datasets", what=TRL_NEEDS),
        ),
        Provider(
            "plain-wind",
            "plain logits, WIND loss",
            f"full logits and autograd: {WIND_LOSS}",
            "wind",
            _build_plain_wind,
            modes=("trained", "frozen"),
            devices=_GPU,
        ),
        Provider(
            "liger-flce",
            "Liger fused CE",
            f"LigerFusedLinearCrossEntropyLoss: {MEAN_LOSS}",
            "mean",
            _build_liger_mean,
            modes=("trained", "frozen"),
            **liger,
        ),
        Provider(
            "cce-mean",
            "CCE, mean NLL",
            "cut_cross_entropy, reduction='mean'; recomputes in backward",
            "mean",
            _build_cce_mean,
            modes=("trained", "frozen"),
            **cce,
        ),
    ]
