"""Planted faults: each must fail the comparison that the real code passes."""

from dataclasses import replace

import pytest
import torch
from cases import NARROW, SHAPES, UNLIMITED, Problem
from test_logprobs import check
from test_numerics import test_bfloat16_log_probs_are_those_of_float32_logits

import windkern as wk
from windkern.kernels import buffers, gemm
from windkern.kernels.torch import rows as torch_rows
from windkern.ops import gradients, logprobs, rows, walk
from windkern.spec import WalkSpec


def fails(budget=NARROW, gear="trained", variant="all", dtype=torch.float32):
    with pytest.raises((AssertionError, ValueError)):
        problem = Problem(SHAPES["odd"], variant, seen=("logps",) if variant == "plain" else Problem.seen)
        check(problem, dtype, gear, memory_budget=budget, backend="torch")


@pytest.fixture
def plant(monkeypatch):
    """Replace an attribute with a function of the original."""

    def replace(owner, name, broken):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: broken(original, *args, **kwargs))

    return replace


@pytest.mark.parametrize("gear", ["frozen_head", "frozen_body", "trained"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_zero_gradient(plant, gear, dtype):
    def zero(original, *args):
        dhidden, dweight, dbias = original(*args)
        return [grad.zero_() for grad in dhidden], [grad.zero_() for grad in dweight], dbias.zero_()

    plant(torch.ops.windkern, "logprobs_bwd", zero)
    for variant in ("plain", "all"):
        fails(gear=gear, variant=variant, dtype=dtype)


@pytest.mark.parametrize(
    "kernel", ["slab_forward", "slab_backward", "slab_forward_unit", "exps_forward", "exps_backward"]
)
def test_target_off_by_one(plant, kernel):
    def shifted(original, slab, *args):
        return original(slab._replace(targets=slab.targets + (slab.targets >= 0)), *args)

    plant(torch_rows, kernel, shifted)
    variant = "plain" if kernel.startswith("exps") else "all"
    gears = ["frozen_head"] if kernel == "slab_forward_unit" else ["trained"]
    for gear in [*gears, "frozen_head"] if kernel == "exps_forward" else gears:
        fails(NARROW if kernel != "exps_forward" else UNLIMITED, gear, variant)


@pytest.mark.parametrize("gear", ["trained", "frozen_body"])
@pytest.mark.parametrize("budget", [NARROW, UNLIMITED])
def test_an_entry_of_the_target_that_is_not_put_in(plant, gear, budget):
    def forgets(original, stats, run_sum, targets, settled, rescale):
        kept = settled.kept.clone()
        original(stats, run_sum, targets, settled, rescale)
        settled.kept.copy_(kept)
        settled.entry.zero_()

    plant(torch_rows, "_settle", forgets)
    fails(budget, gear, "plain")


def test_a_unit_that_is_off_in_backward(plant):
    """The row factor is relative to the maximum instead of the pivot."""

    def forgets(original, *args):
        original(*args)
        settled = args[-1]
        if settled is not None:
            settled.total.mul_(1.01)

    plant(torch_rows, "finish_rows", forgets)
    for gear in ("trained", "frozen_head"):
        fails(UNLIMITED, gear, "plain")


@pytest.mark.parametrize("gear", ["scoring", "trained", "frozen_head"])
def test_dropped_mask_of_ignored_rows(plant, gear):
    plant(logprobs, "prepare", lambda original, *args, **kwargs: original(*args, **{**kwargs, "ignore_index": -7}))
    with pytest.raises((AssertionError, ValueError)):
        check(Problem(SHAPES["odd"], "plain"), torch.float32, gear, backend="torch")


def test_dropped_mask_of_the_vocabulary(plant):
    def unmasked(original, y, bias, transform):
        return original(y, None if bias is None else bias.nan_to_num(neginf=0.0), transform)

    plant(torch_rows, "_apply_transform", unmasked)
    fails(gear="scoring")


def test_missing_rescale_of_the_running_sum(plant):
    def forgets(original, y, targets, start, state, rows):
        before = state.run_sum[rows].clone()
        slab_max, old_factor, slab_factor = original(y, targets, start, state, rows)
        state.run_sum[rows] += before * (1 - old_factor)
        return slab_max, old_factor, slab_factor

    plant(torch_rows, "_exponentiate", forgets)
    fails(gear="scoring")


def test_missing_rescale_of_the_unit_gradient(plant):
    def forgets(original, slab, state, unit):
        original(slab, state, unit)
        unit.rescale.fill_(1.0)

    plant(torch_rows, "slab_forward_unit", forgets)
    fails(gear="frozen_head")


def test_a_slab_that_is_skipped(monkeypatch):
    slabs = WalkSpec.slabs
    monkeypatch.setattr(WalkSpec, "slabs", lambda self, vocab: slabs(self, vocab)[:-1])
    for gear in ("scoring", "trained", "frozen_head"):
        fails(gear=gear)


def test_sign_of_the_entropy_gradient(plant):
    for owner in (torch_rows, gradients):
        plant(
            owner,
            "other_slope",
            lambda original, stats, upstream: original(
                stats, upstream._replace(entropy=None if upstream.entropy is None else -upstream.entropy)
            ),
        )
    for gear in ("trained", "frozen_head"):
        fails(gear=gear)


def test_slope_of_the_transform_is_forgotten(plant):
    plant(torch_rows, "relative_slope", lambda original, y, transform, out: out.fill_(1.0))
    for gear in ("trained", "frozen_head"):
        fails(gear=gear, budget=UNLIMITED)


def test_storage_dtype_accumulation(plant, monkeypatch):
    """dhidden is summed over slabs in bfloat16 instead of float32."""

    def rounded(original, self, dz, weight, total, *, first=False):
        return original(self, dz, weight, total, first=first).bfloat16().float()

    plant(type(gemm.products_of("cpu", torch.bfloat16)), "hidden_grad", rounded)
    problem = Problem(SHAPES["odd"], "plain")
    exact, ours = problem.exact(torch.bfloat16, "trained"), None
    ours = problem.run(wk.token_logps, torch.bfloat16, "trained", memory_budget=NARROW, backend="torch")
    broken = (ours["dhidden0"].double() - exact["dhidden0"]).norm()
    monkeypatch.undo()
    right = problem.run(wk.token_logps, torch.bfloat16, "trained", memory_budget=NARROW, backend="torch")
    assert (right["dhidden0"].double() - exact["dhidden0"]).norm() < broken


def test_rounded_logits(plant):
    plant(
        type(gemm.products_of("cpu", torch.bfloat16)),
        "logits",
        lambda original, *args, **kwargs: original(*args, **kwargs).bfloat16().float(),
    )
    with pytest.raises(AssertionError):
        test_bfloat16_log_probs_are_those_of_float32_logits("torch")


def test_full_logits_are_seen_by_the_recorder(plant):
    """A walk that holds all logits at once exceeds the bound that the test of the plan checks."""

    def greedy(original, walk_, hidden, weight, bias, targets):
        logits = buffers.track("logits", hidden[0] @ weight[0].T)
        result = original(walk_, hidden, weight, bias, targets)
        del logits
        return result

    hidden, weight, targets = torch.randn(400, 8), torch.randn(4001, 8), torch.zeros(400, dtype=torch.long)
    plan = wk.plan(400, 8, 4001, torch.float32, hidden_grad=False, weight_grad=False, memory_budget=0, device="cpu")
    for broken in (False, True):
        if broken:
            plant(walk, "forward", greedy)
        with buffers.recording() as record:
            wk.token_logps(hidden, weight, targets, memory_budget=0, backend="torch")
        assert (record.peak_bytes > plan.peak_bytes) is broken
        assert (record.largest >= 4 * 400 * 4001) is broken


def test_a_fused_loss_that_recomputes_is_seen_by_the_recorder(plant):
    hidden, weight = torch.randn(4, 2, 20, 8, requires_grad=True), torch.randn(1003, 8, requires_grad=True)
    targets = torch.zeros(4, 2, 20, dtype=torch.long)
    plan = wk.plan(160, 8, 1003, torch.float32, group_rows=40, device="cpu")
    for broken in (False, True):
        if broken:  # kept results are discarded, and every logit is computed again
            plant(rows.RowBlock, "of", lambda original, spec, *args: original(replace(spec, slabs_kept=0), *args))
        with buffers.recording() as record:
            wk.fused_loss(lambda logps: logps.sum(-1), hidden, weight, targets, backend="torch")
        assert (record.flops == plan.flops) is not broken
        assert record.flops == (8 if broken else 6) * 160 * 8 * 1003


def test_a_walk_that_writes_to_what_it_kept_is_seen(monkeypatch):
    """retain_graph: kept probabilities must survive backward."""
    original = gradients._Backward._to_weight

    def vandal(self, dz, *args):
        original(self, dz, *args)
        dz.zero_()

    hidden, weight = torch.randn(9, 8, requires_grad=True), torch.randn(301, 8, requires_grad=True)
    for broken in (False, True):
        if broken:
            monkeypatch.setattr(gradients._Backward, "_to_weight", vandal)
        loss = wk.token_logps(hidden, weight, torch.arange(9), backend="torch").logps.sum()
        first = torch.autograd.grad(loss, weight, retain_graph=True)[0]
        if broken:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(loss, weight)
        else:
            assert torch.equal(first, torch.autograd.grad(loss, weight)[0])
