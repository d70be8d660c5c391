"""The comparison that a loss must pass and a planted fault must fail, and small helpers of the loss tests."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from hypothesis import settings
from hypothesis import strategies as st
from loss_cases import Case
from torch import Tensor

seeds = st.integers(0, 2**31)
BATCH_WIDE = ("kl_gaps",)  # tensors that belong to no group


def partial_mask(case: Case, groups: int = 5, responses: int | None = None) -> Tensor:
    """Return a mask, also of tokens: row 0 is empty, row 1 has one response, row 2 all, others all or all but one."""
    shape = case.make(groups, responses)["logps"].shape
    where = torch.ones(shape, dtype=torch.bool)
    where[0] = False
    where[1, 1:] = False
    if shape[1] > case.least:
        where[3:, 1] = False
    if case.per_token:
        where[3:, 0, 1:] = False
        where[2:, -1, 0] = False
    return where


def poison(inputs: dict[str, Tensor], where: Tensor, junk: float) -> dict[str, Tensor]:
    """Put `junk` wherever a response is masked, which the losses must not read."""
    dirty = {}
    for name, value in inputs.items():
        if name in BATCH_WIDE:
            dirty[name] = value
            continue
        mask = where
        if name == "prefs":
            mask = where[:, :, None] & where[:, None, :]
        while mask.dim() > value.dim():
            mask = mask.any(-1)
        rubbish = junk if value.is_floating_point() else torch.zeros_like(value)
        dirty[name] = torch.where(mask, value, rubbish)
    return dirty


def group_of(inputs: dict[str, Tensor], b: int, keep: Tensor) -> dict[str, list]:
    """Return group b as plain lists, without masked entries."""
    sequences = keep if keep.dim() == 1 else keep.any(-1)
    group = {}
    for name, value in inputs.items():
        if name in BATCH_WIDE or value.dim() == 1:
            group[name] = (value if name in BATCH_WIDE else value[b]).tolist()
        elif name == "prefs":
            group[name] = value[b][keep][:, keep].tolist()
        elif value.dim() == 3:
            group[name] = [row[kept].tolist() for row, kept in zip(value[b], keep, strict=True) if kept.any()]
        else:
            group[name] = value[b][sequences].tolist()
    return group


def reference_values(
    case: Case, inputs: dict[str, Tensor], where: Tensor, start: dict[str, Tensor] | None = None
) -> Tensor:
    """Return the value of each group without masked responses; 0 for groups that are off."""
    sequences = where if where.dim() == 2 else where.any(-1)
    on = [b for b in range(len(where)) if sequences[b].sum() >= case.least]
    values = torch.zeros(len(where), dtype=torch.float64)
    groups = [group_of(inputs, b, where[b]) for b in on]
    if case.coupled:
        found = case.reference(groups, [group_of(start or inputs, b, where[b]) for b in on]) if on else []
    else:
        found = [case.reference(group) for group in groups]
    values[on] = torch.tensor(found, dtype=torch.float64)
    return values


def reference_gradient(case: Case, inputs: dict[str, Tensor], where: Tensor, step: float = 1e-5) -> Tensor:
    """Return central differences of the sum over groups; independent groups are moved together."""
    gradient = torch.zeros_like(inputs["logps"])
    blocks = range(gradient.shape[0]) if case.coupled else [slice(None)]
    for block, *index in itertools.product(blocks, *map(range, gradient.shape[1:])):
        place = (block, *index)
        ends = []
        for sign in (1, -1):
            moved = {**inputs, "logps": inputs["logps"].clone()}
            moved["logps"][place] += sign * step
            ends.append(reference_values(case, moved, where, inputs))
        slope = (ends[0] - ends[1]) / (2 * step)
        gradient[place] = slope.sum() if case.coupled else slope
    return torch.where(where, gradient, 0.0)


def assert_matches_reference(
    function: Callable[..., Tensor], case: Case, *, junk: float = math.nan, responses: int | None = None, seed: int = 0
) -> None:
    """Compare values per group, mean and gradients of `function` with the reference, on a masked batch with junk."""
    inputs = case.make(5, responses, seed)
    where = partial_mask(case, 5, responses)
    expected = reference_values(case, inputs, where)
    slope = reference_gradient(case, inputs, where)

    dirty = poison(inputs, where, junk)
    logps = dirty.pop("logps").requires_grad_()
    values = function(logps, **dirty, **case.options, where=where, reduction="none")
    (gradient,) = torch.autograd.grad(values.sum(), logps)
    torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, slope, rtol=1e-7, atol=1e-7)
    average = function(logps, **dirty, **case.options, where=where, reduction="mean")
    torch.testing.assert_close(average, expected.sum() / 5, rtol=1e-10, atol=1e-12)


def quick(examples: int = 25):
    return settings(max_examples=examples)


def value_and_gradient(case: Case, inputs: dict[str, Tensor], **options) -> tuple[Tensor, Tensor]:
    logps = inputs["logps"].clone().requires_grad_()
    values = case({**inputs, "logps": logps}, reduction="none", **options)
    return values.detach(), torch.autograd.grad(values.sum(), logps)[0]


def of_groups(inputs: dict[str, Tensor], groups: slice | Tensor) -> dict[str, Tensor]:
    return {name: value if name in BATCH_WIDE else value[groups] for name, value in inputs.items()}


def in_single(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}


def assert_same(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# One group of two responses, of which the first won.
WON = torch.tensor([[[0.5, 1.0], [0.0, 0.5]]], dtype=torch.float64)
