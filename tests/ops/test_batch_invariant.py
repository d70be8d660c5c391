"""batch_invariant=True: a row's log-prob depends on the row alone. Default: the same call gives the same bits."""

import pytest
import torch
from cases import UNLIMITED

import windkern as wk

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def rows_and_head(dtype, rows=300, hidden_size=72, vocab=5003):
    hidden = torch.randn(rows, hidden_size).to(dtype)
    weight = (0.3 * torch.randn(vocab, hidden_size)).to(dtype)
    return hidden, weight, torch.randint(0, vocab, (rows,))


def logps(hidden, weight, targets, *, grads=(False, False), **kwargs):
    hidden = hidden.detach().requires_grad_(grads[0])
    weight = weight.detach().requires_grad_(grads[1])
    return wk.token_logps(hidden, weight, targets, batch_invariant=True, entropy=True, **kwargs)


def assert_same(first, second, places=slice(None)):
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one[places], two)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_keep_their_bits(backend, dtype):
    hidden, weight, targets = rows_and_head(dtype)
    whole = logps(hidden, weight, targets, backend=backend)
    for places in (slice(0, 1), slice(37, 38), slice(0, 127), slice(11, 269), torch.randperm(300)):
        assert_same(whole, logps(hidden[places], weight, targets[places], backend=backend), places)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gears_and_budgets_keep_the_bits(backend, dtype):
    hidden, weight, targets = rows_and_head(dtype)
    whole = logps(hidden, weight, targets, backend=backend)
    for grads in ((True, False), (False, True), (True, True)):
        for budget in (0, 4 << 20, UNLIMITED):
            assert_same(whole, logps(hidden, weight, targets, grads=grads, memory_budget=budget, backend=backend))


def test_neighbours_and_ignored_rows_keep_the_bits(backend):
    hidden, weight, targets = rows_and_head(torch.float32)
    whole = logps(hidden, weight, targets, backend=backend)
    changed, keep = hidden.clone(), torch.arange(300) % 3 == 0
    changed[~keep] = 100.0
    labels = torch.where(keep, targets, -100)
    mixed = logps(changed, weight, labels, backend=backend)
    bounded = logps(changed, weight, labels, max_scored=150, backend=backend)
    for result in (mixed, bounded):
        assert_same(whole, [value[keep] for value in result], keep)


def test_fused_loss_sees_the_scoring_log_probs(backend):
    """Old and policy log-probs of the same weights differ by exactly 0."""
    hidden, weight, targets = rows_and_head(torch.float32, rows=240)
    hidden, targets = hidden.view(5, 4, 12, -1), targets.view(5, 4, 12)
    with torch.no_grad():
        old = wk.sequence_logps(hidden, weight, targets, batch_invariant=True, backend=backend)
    seen = []

    def loss_fn(logps, old):
        seen.append((logps - old).detach())
        return (logps - old).sum(-1)

    for budget in (0, 1 << 20, None):
        wk.fused_loss(
            loss_fn,
            hidden.requires_grad_(),
            weight.requires_grad_(),
            targets,
            per_group={"old": old},
            memory_budget=budget,
            batch_invariant=True,
            backend=backend,
        )
    assert all(torch.equal(gap, torch.zeros_like(gap)) for gap in seen)


def test_without_it_the_same_rows_agree_closely(backend):
    hidden, weight, targets = rows_and_head(torch.float32)
    whole = wk.token_logps(hidden, weight, targets, backend=backend).logps
    part = wk.token_logps(hidden[:50], weight, targets[:50], memory_budget=0, backend=backend).logps
    assert (whole[:50] - part).abs().max() <= 1e-5


def test_the_same_call_gives_the_same_bits(backend):
    hidden, weight, targets = rows_and_head(torch.bfloat16)

    def once():
        leaves = (hidden.detach().requires_grad_(), weight.detach().requires_grad_())
        out = wk.token_logps(*leaves, targets, backend=backend).logps
        return (out, *torch.autograd.grad(out.sin().sum(), leaves))

    assert all(torch.equal(one, two) for one, two in zip(once(), once(), strict=True))


def test_gradients_are_those_of_the_default_mode(backend):
    hidden, weight, targets = rows_and_head(torch.float64, rows=150)
    grads = []
    for batch_invariant in (False, True):
        leaves = (hidden.detach().requires_grad_(), weight.detach().requires_grad_())
        out = wk.token_logps(*leaves, targets, batch_invariant=batch_invariant, memory_budget=0, backend=backend)
        grads.append(torch.autograd.grad(out.logps.sin().sum(), leaves))
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-13)
