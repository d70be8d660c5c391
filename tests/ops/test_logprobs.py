"""token_logps: every back end, dtype, gear, variant and budget within the error budget of float64."""

from dataclasses import replace

import pytest
import torch
from cases import DTYPES, GEARS, NARROW, SHAPES, UNLIMITED, VARIANTS, VOCABULARIES, Problem, Shape
from tolerances import assert_within

import windkern as wk


def check(problem: Problem, dtype: torch.dtype, gear: str, **kwargs) -> None:
    exact, plain = problem.exact(dtype, gear), problem.plain(dtype, gear)
    ours = problem.run(wk.token_logps, dtype, gear, **kwargs)
    assert ours.keys() == exact.keys()
    # This gear sums p (y - max y) w and p w separately. Both sums can be as large as the entropy (as max y - E y is)
    # times their difference; a library that adds in sequence, such as MKL for SSE4.2, shows the error.
    apart = 1 + float(exact["entropy"].max()) if gear == "frozen_head" and "entropy" in exact else 1.0
    for name, value in ours.items():
        cancellation = apart if name.startswith("dhidden") and dtype == torch.float32 else 1.0
        assert_within(value, exact[name], plain[name], dtype, name, cancellation=cancellation)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert value.dtype == (wide if name in ("logps", "lse", "entropy") else dtype), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gear", GEARS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_parity(backend, variant, gear, dtype):
    if gear == "bias_only" and not VARIANTS[variant]["bias"]:
        pytest.skip("this variant has no bias")
    problem = Problem(SHAPES["odd"], variant)
    for budget in (NARROW, problem.middle_budget(dtype, gear), UNLIMITED):
        check(problem, dtype, gear, memory_budget=budget, backend=backend)
        if gear != "scoring" and not VARIANTS[variant]["entropy"]:
            check(replace(problem, seen=("logps",)), dtype, gear, memory_budget=budget, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["tiny", "blocks", "one_row"])
@pytest.mark.parametrize("gear", ["frozen_head", "trained"])
def test_parity_of_other_shapes(backend, shape, gear, dtype):
    for variant in ("plain", "all"):
        problem = Problem(SHAPES[shape], variant)
        for budget in (NARROW, UNLIMITED):
            check(problem, dtype, gear, memory_budget=budget, backend=backend)
            if variant == "plain":
                check(replace(problem, seen=("logps",)), dtype, gear, memory_budget=budget, backend=backend)


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parity_at_real_vocabularies(backend, vocab, dtype):
    for variant, seen in (("entropy", ("logps", "entropy")), ("plain", ("logps",))):
        problem = Problem(Shape((6,), (24,), vocab), variant, seen=seen)
        for gear in ("frozen_head", "trained"):
            for budget in (NARROW, UNLIMITED):
                check(problem, dtype, gear, memory_budget=budget, backend=backend)


@pytest.mark.parametrize("gear", ["scoring", "frozen_head", "trained"])
def test_max_scored_gives_the_same_as_dropping(backend, gear):
    problem = Problem(SHAPES["odd"], "all")
    scored = int((problem.targets != -100).sum())
    plain = problem.run(wk.token_logps, torch.float64, gear, backend=backend)
    for bound in (scored, scored + 5, problem.targets.numel() + 3):
        bounded = problem.run(wk.token_logps, torch.float64, gear, max_scored=bound, backend=backend)
        for name, value in bounded.items():
            assert_within(value, plain[name], plain[name], torch.float64, name)


def test_rows_beyond_max_scored_are_not_a_number_where_they_cannot_raise(monkeypatch):
    problem = Problem(SHAPES["odd"], "plain")
    scored = (problem.targets != -100).view(-1)
    bound = int(scored.sum()) - 2
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # what skips the check on the host
    logps = problem.run(wk.token_logps, torch.float64, "scoring", max_scored=bound)["logps"].view(-1)
    late = scored & (scored.cumsum(0) > bound)
    assert torch.equal(logps.isnan(), late)
    assert late.sum() == 2


@pytest.mark.parametrize("gear", ["scoring", "frozen_head", "frozen_body", "trained"])
@pytest.mark.parametrize("max_scored", [None, 0, 3])
def test_no_rows_and_all_ignored(backend, gear, max_scored):
    for lead in ((0,), (2, 3)):
        problem = Problem(Shape(lead, (8,), 37), "all")
        problem.targets.fill_(-100)
        results = problem.run(wk.token_logps, torch.float32, gear, max_scored=max_scored, backend=backend)
        assert all(torch.equal(value, torch.zeros_like(value)) for value in results.values())


def test_ignored_rows_change_nothing_bitwise(backend):
    """Padding can hold anything finite: results and gradients of scored rows keep their bits."""
    problem = Problem(SHAPES["odd"], "all")
    before = problem.run(wk.token_logps, torch.float32, "trained", backend=backend)
    problem.hidden[0][problem.targets == -100] = 1e3
    after = problem.run(wk.token_logps, torch.float32, "trained", backend=backend)
    assert all(torch.equal(before[name], after[name]) for name in before)
    ignored = problem.targets == -100
    assert torch.equal(after["dhidden0"][ignored], torch.zeros_like(after["dhidden0"][ignored]))
    assert torch.equal(after["logps"][ignored], torch.zeros_like(after["logps"][ignored]))


@pytest.mark.parametrize("ignore_index", [-100, 0, -1])
def test_ignore_index_may_be_a_token(backend, ignore_index):
    hidden, weight = torch.randn(6, 8, dtype=torch.float64), torch.randn(11, 8, dtype=torch.float64)
    targets = torch.tensor([0, 1, 2, ignore_index, 3, 10])
    ours = wk.token_logps(hidden, weight, targets, ignore_index=ignore_index, backend=backend)
    exact = wk.naive.token_logps(hidden, weight, targets, ignore_index=ignore_index)
    torch.testing.assert_close(ours.logps, exact[0])


def test_non_contiguous_inputs(backend):
    hidden = torch.randn(8, 6, 5, dtype=torch.float64).permute(2, 1, 0)
    weight = torch.randn(8, 101, dtype=torch.float64).t()
    targets = torch.randint(0, 101, (6, 5)).t()
    bias = torch.randn(101, 2, dtype=torch.float64)[:, 0]
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    ours = wk.token_logps(*leaves, targets, bias=bias, backend=backend).logps
    exact = wk.naive.token_logps(*leaves, targets, bias=bias)[0]
    torch.testing.assert_close(ours, exact)
    for got, want in zip(
        torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(exact.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("gear", ["frozen_head", "trained"])
@pytest.mark.parametrize("variant", ["plain", "all"])
def test_gradcheck(backend, gear, variant):
    problem = Problem(Shape((4,), (5,), 70), variant)
    wants = GEARS[gear]
    hidden = problem.hidden[0].requires_grad_(wants[0])
    weight = problem.weight[0].requires_grad_(wants[1])

    def function(hidden, weight):
        out = wk.token_logps(
            hidden, weight, problem.targets, bias=problem.bias, **problem.options, memory_budget=NARROW, backend=backend
        )
        return tuple(value for value in out if value is not None)

    assert torch.autograd.gradcheck(function, (hidden, weight))


@pytest.mark.parametrize("adapter_only", [True, False])
def test_lora_on_the_head_equals_merged_weight(backend, adapter_only):
    """(h, s * h @ A.T), (W, B): gradients of A, B and the hidden states equal plain autograd's on W + s * B @ A."""
    rank, scale = 3, 0.7
    hidden = torch.randn(9, 12, dtype=torch.float64, requires_grad=True)
    base = torch.randn(203, 12, dtype=torch.float64, requires_grad=not adapter_only)
    down = torch.randn(rank, 12, dtype=torch.float64, requires_grad=True)
    up = torch.randn(203, rank, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 203, (9,))
    leaves = [hidden, down, up] + ([] if adapter_only else [base])
    ours = wk.token_logps((hidden, scale * hidden @ down.T), (base, up), targets, memory_budget=NARROW, backend=backend)
    exact = wk.naive.token_logps(hidden, base + scale * up @ down, targets)
    upstream = torch.sin(torch.arange(9.0, dtype=torch.float64))
    torch.testing.assert_close(ours.logps, exact[0])
    for got, want in zip(
        torch.autograd.grad(ours.logps, leaves, upstream), torch.autograd.grad(exact[0], leaves, upstream), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_a_value_head_trains_on_a_frozen_base(backend):
    problem = Problem(SHAPES["blocks"], "plain")
    hidden = [problem.hidden[0], problem.hidden[1].requires_grad_()]
    weight = [problem.weight[0], problem.weight[1].requires_grad_()]
    ours = wk.token_logps(tuple(hidden), tuple(weight), problem.targets, backend=backend).logps
    exact = wk.naive.token_logps(hidden, weight, problem.targets)[0]
    leaves = [hidden[1], weight[1]]
    for got, want in zip(
        torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(exact.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_module_shares_the_parameter_and_equals_the_function():
    lm_head = torch.nn.Linear(8, 37)
    head = wk.nn.FusedLogProbs(lm_head.weight, lm_head.bias, entropy=True, softcap=3.0)
    assert head.weight is lm_head.weight
    hidden, targets = torch.randn(2, 5, 8), torch.randint(0, 37, (2, 5))
    direct = wk.token_logps(hidden, lm_head.weight, targets, bias=lm_head.bias, entropy=True, softcap=3.0)
    for got, want in zip(head(hidden, targets), direct, strict=True):
        assert torch.equal(got, want)
    assert "softcap" in repr(head)
    frozen = wk.nn.FusedLogProbs(lm_head.weight.detach())
    assert not list(frozen.parameters())
    assert "weight" in frozen.state_dict()
