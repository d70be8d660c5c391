"""The correctness gate: float64 results for all log-probs and samples of the gradients, and the allowed errors."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

import windkern as wk
from benchmarks.cases import BETA, Case, Problem, Shape, make_problem
from windkern.testing import allowed_error, relative_error

SAMPLES = 48  # compared rows of dhidden and of dweight
VOCAB_STEP = 8192


@dataclass
class Exact:
    """Float64 results: all log-probs, `rows` of dhidden, `columns` (vocabulary entries) of dweight, and the loss."""

    output: Tensor  # (M,) log-probs, or () loss
    rows: Tensor
    dhidden: Tensor  # (SAMPLES, H)
    columns: Tensor
    dweight: Tensor  # (SAMPLES, H)
    slack: float = 0.0  # relative error of the loss and its gradients that float32 log-probs alone can cause


@functools.lru_cache(maxsize=1)
def _row_statistics(shape: Shape, device: str) -> tuple[Tensor, Tensor]:
    """Return lse (M,) and logps (M,) in float64, once per shape: inputs are the same numbers in every dtype."""
    problem = make_problem(Case(shape, "scoring", "bf16", device))
    hidden = problem.hidden.double()
    lse = torch.full((shape.rows,), -torch.inf, dtype=torch.float64, device=device)
    for start in range(0, shape.vocab, VOCAB_STEP):
        z = hidden @ problem.weight[start : start + VOCAB_STEP].double().T
        lse = torch.logaddexp(lse, z.logsumexp(-1))
    target_logit = (hidden * problem.weight[problem.targets].double()).sum(-1)
    return lse, target_logit - lse


def pair_loss(shape: Shape, logps: Tensor) -> Tensor:
    """Return DPO without a reference: the mean of -log sigma(beta * (chosen - rejected)), from logps (M,) by token."""
    sums = logps.view(shape.pairs, 2, shape.tokens).sum(-1)
    return wk.losses.dpo(sums, torch.zeros_like(sums), beta=BETA)


RESPONSES, RESPONSE_TOKENS = 8, 64  # per group of the WIND rows
WIND = {"eta": 1.0, "beta": 0.1}


@functools.lru_cache(maxsize=1)
def wind_constants(shape: Shape, device: str) -> dict[str, Tensor]:
    """Return log-probs of the sampling and the reference policy near the problem's, and preferences, by group."""
    groups = shape.rows // (RESPONSES * RESPONSE_TOKENS)
    made = {"generator": torch.Generator(device).manual_seed(2), "device": device}
    old = _row_statistics(shape, device)[1].view(groups, RESPONSES, RESPONSE_TOKENS).sum(-1).float()
    old = old + 0.3 * torch.randn(groups, RESPONSES, **made)
    ref = old + 0.3 * torch.randn(groups, RESPONSES, **made)
    scores = torch.randn(groups, RESPONSES, **made)
    return {"old_logps": old, "ref_logps": ref, "prefs": torch.sigmoid(scores[:, :, None] - scores[:, None, :])}


def wind_loss(shape: Shape, logps: Tensor, constants: dict[str, Tensor]) -> Tensor:
    """Return the mean WIND loss over groups of eight responses; logps (M,) by token."""
    sums = logps.view(-1, RESPONSES, RESPONSE_TOKENS).sum(-1)
    return wk.losses.wind(sums, **constants, **WIND)


def exact_tokens(problem: Problem) -> Exact:
    """Return the exact result of a provider of log-probs, for the problem's random upstream."""
    _, logps = _row_statistics(problem.case.shape, problem.case.device)
    return _with_gradients(problem, logps, problem.upstream.double())


def exact_loss(problem: Problem) -> Exact:
    """Return the exact result of a provider of the pair loss."""
    shape = problem.case.shape
    leaf = _row_statistics(shape, problem.case.device)[1].clone().requires_grad_()
    loss = pair_loss(shape, leaf)
    (upstream,) = torch.autograd.grad(loss, leaf)
    made = _with_gradients(problem, loss.detach(), upstream)
    # Reason: one float32 rounding of each log-prob changes a margin by eps * sum |logps| and so, through beta, the loss
    # and the coefficient of all gradients of the pair.
    margin = torch.finfo(torch.float32).eps * leaf.detach().abs().view(shape.pairs, -1).sum(-1).max()
    made.slack = BETA * float(margin) / min(1.0, float(loss.detach()))
    return made


def exact_mean(problem: Problem) -> Exact:
    """Return the exact result of a provider of the mean negative log-prob."""
    _, logps = _row_statistics(problem.case.shape, problem.case.device)
    return _with_gradients(problem, -logps.mean(), torch.full_like(logps, -1 / logps.shape[0]))


def exact_wind(problem: Problem) -> Exact:
    """Return the exact result of a provider of the WIND loss."""
    shape, device = problem.case.shape, problem.case.device
    leaf = _row_statistics(shape, device)[1].clone().requires_grad_()
    constants = {name: value.double() for name, value in wind_constants(shape, device).items()}
    loss = wind_loss(shape, leaf, constants)
    (upstream,) = torch.autograd.grad(loss, leaf)
    made = _with_gradients(problem, loss.detach(), upstream)
    # Reason: one float32 rounding of each log-prob changes a residual, whose size is the root of the loss.
    moved = torch.finfo(torch.float32).eps * leaf.detach().abs().view(-1, RESPONSE_TOKENS).sum(-1).max()
    made.slack = float(2 * moved / loss.detach().sqrt())
    return made


EXACT = {"tokens": exact_tokens, "loss": exact_loss, "mean": exact_mean, "wind": exact_wind}


def _with_gradients(problem: Problem, output: Tensor, upstream: Tensor) -> Exact:
    shape = problem.case.shape
    device = problem.case.device
    lse, _ = _row_statistics(shape, device)
    made = {"generator": torch.Generator(device).manual_seed(1), "device": device}
    rows = torch.randperm(shape.rows, **made)[:SAMPLES]
    # Half of the vocabulary entries are targets of some row; the others get no one-hot term.
    columns = torch.cat(
        [
            problem.targets[torch.randperm(shape.rows, **made)[: SAMPLES // 2]],
            torch.randint(0, shape.vocab, (SAMPLES // 2,), **made),
        ]
    )
    targets, hidden = problem.targets, problem.hidden.double()

    dhidden = problem.weight[targets[rows]].double()
    for start in range(0, shape.vocab, VOCAB_STEP):
        head = problem.weight[start : start + VOCAB_STEP].double()
        dhidden -= (hidden[rows] @ head.T - lse[rows, None]).exp() @ head
    dhidden *= upstream[rows, None]

    p = (hidden @ problem.weight[columns].double().T - lse[:, None]).exp()  # (M, SAMPLES)
    dz = upstream[:, None] * ((targets[:, None] == columns[None, :]).double() - p)
    return Exact(output, rows, dhidden, columns, dz.T @ hidden)


def errors(output: Tensor, dhidden: Tensor | None, dweight: Tensor | None, exact: Exact) -> dict[str, float]:
    """Return the errors of a provider's result by name ("logps" or "loss", "dhidden", "dweight")."""
    found = {"loss" if output.dim() == 0 else "logps": relative_error(output, exact.output)}
    if dhidden is not None:
        found["dhidden"] = relative_error(dhidden[exact.rows], exact.dhidden)
    if dweight is not None:
        found["dweight"] = relative_error(dweight[exact.columns], exact.dweight)
    return found


def beyond_budget(
    found: dict[str, float], plain: dict[str, float], dtype: torch.dtype, slack: float = 0.0
) -> str | None:
    """Return why a result must not be reported, or None. `plain` holds plain PyTorch's errors for the case."""
    for name, error in found.items():
        budget = allowed_error(plain["logps" if name == "loss" else name], dtype) + slack
        if not error <= budget:
            return f"{name}: relative error {error:.3g} is over the budget {budget:.3g}"
    return None
