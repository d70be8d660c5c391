"""Properties of log-probs for generated shapes, targets and budgets."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import windkern as wk

quick = settings(max_examples=25)


@st.composite
def problems(draw):
    rows, hidden_size = draw(st.integers(1, 40)), draw(st.integers(1, 20))
    vocab = draw(st.integers(1, 900))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    hidden = torch.randn(rows, hidden_size, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, hidden_size, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < draw(st.sampled_from([0.0, 0.5]))] = -100
    return hidden, weight, targets, draw(st.sampled_from([0, 50_000, None]))


def grads(hidden, weight, targets, budget, upstream, **kwargs):
    leaves = (hidden.clone().requires_grad_(), weight.clone().requires_grad_())
    logps = wk.token_logps(*leaves, targets, memory_budget=budget, **kwargs).logps
    return (logps.detach(), *torch.autograd.grad(logps, leaves, upstream))


@quick
@given(problems())
def test_any_shape_and_budget_equals_the_reference(problem):
    hidden, weight, targets, budget = problem
    upstream = torch.linspace(-1, 2, len(targets), dtype=torch.float64)
    ours = grads(hidden, weight, targets, budget, upstream)
    leaves = (hidden.clone().requires_grad_(), weight.clone().requires_grad_())
    exact = wk.naive.token_logps(*leaves, targets)[0]
    for got, want in zip(ours, (exact, *torch.autograd.grad(exact, leaves, upstream)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


@quick
@given(problems())
def test_log_probs_are_not_positive(problem):
    hidden, weight, targets, budget = problem
    out = wk.token_logps(hidden.float(), weight.float(), targets, entropy=True, memory_budget=budget)
    assert (out.logps <= 0).all()
    assert (out.entropy >= -1e-6).all()


@quick
@given(problems())
def test_shifting_all_logits_changes_nothing(problem):
    hidden, weight, targets, budget = problem
    upstream = torch.ones(len(targets), dtype=torch.float64)
    plain = grads(hidden, weight, targets, budget, upstream)
    bias = torch.full((weight.shape[0],), 3.7, dtype=torch.float64)
    shifted = grads(hidden, weight, targets, budget, upstream, bias=bias)
    for one, two in zip(plain, shifted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-10)


@quick
@given(problems(), st.floats(-5, 5))
def test_gradients_scale_with_the_upstream(problem, factor):
    """G13: backward is linear in the upstream gradient."""
    hidden, weight, targets, budget = problem
    upstream = torch.linspace(-1, 1, len(targets), dtype=torch.float64)
    once = grads(hidden, weight, targets, budget, upstream)
    scaled = grads(hidden, weight, targets, budget, factor * upstream)
    for one, two in zip(once[1:], scaled[1:], strict=True):
        torch.testing.assert_close(factor * one, two, rtol=1e-9, atol=1e-10)


@quick
@given(problems(), st.integers(0, 2**31))
def test_permuting_rows_and_vocabulary(problem, seed):
    hidden, weight, targets, budget = problem
    upstream = torch.linspace(-1, 2, len(targets), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(targets), generator=generator)
    entries = torch.randperm(weight.shape[0], generator=generator)
    place = torch.argsort(entries)
    moved = torch.where(targets >= 0, place[targets.clamp(min=0)], -100)
    plain = grads(hidden, weight, targets, budget, upstream)
    mixed = grads(hidden[rows], weight[entries], moved[rows], budget, upstream[rows])
    wanted = (plain[0][rows], plain[1][rows], plain[2][entries])
    for got, want in zip(mixed, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@quick
@given(problems())
def test_upstream_at_ignored_rows_has_no_effect(problem):
    """G14: a masked token changes nothing, bit for bit."""
    hidden, weight, targets, budget = problem
    upstream = torch.ones(len(targets), dtype=torch.float64)
    plain = grads(hidden, weight, targets, budget, upstream)
    upstream[targets < 0] = 1e6
    assert all(
        torch.equal(one, two) for one, two in zip(plain, grads(hidden, weight, targets, budget, upstream), strict=True)
    )
