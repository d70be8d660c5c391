"""Each promise of docs/concepts/numerics.md, one test per line."""

import math

import pytest
import torch
from cases import UNLIMITED
from tolerances import assert_within

import windkern as wk
from windkern import naive


def from_logits(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return hidden and weight whose logits are z (M, V): hidden @ I."""
    return z, torch.eye(z.shape[1], dtype=z.dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e1, 1e4])
def test_large_logits_are_finite_and_logps_are_not_positive(backend, dtype, size):
    z = (size * (2 * torch.rand(9, 33) - 1)).to(dtype)
    z[0], z[1], z[2, 5], z[3, 5] = size, -size, size, -size
    hidden, weight = (leaf.requires_grad_() for leaf in from_logits(z))
    targets = torch.tensor([5, 5, 5, 5, 0, 1, 2, 3, 4])
    out = wk.token_logps(hidden, weight, targets, entropy=True, backend=backend)
    assert (out.logps <= 0).all()
    exact = naive.token_logps(z.double(), weight.double(), targets, entropy=True)
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype != torch.float64 else {}
    for value, want in zip(out, exact, strict=True):
        assert value.isfinite().all()
        torch.testing.assert_close(value, want.to(value.dtype), **tolerance)
    for grad in torch.autograd.grad(sum(value.sum() for value in out), (hidden, weight)):
        assert grad.isfinite().all()


def test_logps_are_not_positive_for_many_rows(backend):
    hidden, weight = 3 * torch.randn(700, 24), torch.randn(1003, 24)
    targets = (hidden @ weight.T).argmax(-1)  # the most likely token, where rounding could give more than 0
    assert (wk.token_logps(hidden, weight, targets, backend=backend).logps <= 0).all()


def test_max_and_log_sum_are_carried_apart(backend):
    """Logits near 1e4 whose log-prob is -1e-4: one float32 of lse could not tell it from 0 (its step is 1e-3)."""
    z = torch.full((1, 2), 1e4)
    z[0, 1] -= 9.0
    out = wk.token_logps(*from_logits(z), torch.tensor([0]), backend=backend)
    assert out.logps.item() == pytest.approx(-math.log1p(math.exp(-9.0)), rel=1e-3)


@pytest.mark.parametrize("vocab", [3, 1003])
def test_all_equal_rows(backend, vocab):
    hidden, weight = torch.ones(4, 8), torch.ones(vocab, 8)
    out = wk.token_logps(hidden, weight, torch.tensor([0, 1, 2, vocab - 1]), entropy=True, backend=backend)
    for value, want in ((out.logps, -math.log(vocab)), (out.lse, 8 + math.log(vocab)), (out.entropy, math.log(vocab))):
        torch.testing.assert_close(value, torch.full((4,), want), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_hot_rows_have_the_tiny_gradient_of_the_formula(backend, dtype):
    """p = 1 - 9e-5: 1 - p comes from -expm1(logp), not from a subtraction that gives 0."""
    z = torch.zeros(1, 3)
    z[0, 0] = 10.0
    bias = torch.zeros(3, dtype=dtype, requires_grad=True)
    out = wk.token_logps(z.to(dtype), torch.eye(3, dtype=dtype), torch.tensor([0]), bias=bias, backend=backend)
    (grad,) = torch.autograd.grad(out.logps.sum(), bias)
    rest = 2 * math.exp(-10.0) / (1 + 2 * math.exp(-10.0))
    exact = torch.tensor([rest, -rest / 2, -rest / 2])
    torch.testing.assert_close(grad.float(), exact, rtol=0.01, atol=0)


@pytest.mark.parametrize("transform", [{}, {"softcap": 3.0, "scale": 2.0}, {"temperature": 0.5}])
@pytest.mark.parametrize("grads", [(True, False, False), (True, True, True)])
def test_masked_entries(backend, transform, grads):
    """-inf bias: p = 0 and all gradients 0 there; a masked target gives -inf with torch's gradient."""
    hidden = torch.randn(5, 8, dtype=torch.float64, requires_grad=grads[0])
    weight = torch.randn(21, 8, dtype=torch.float64, requires_grad=grads[1])
    bias = torch.randn(21, dtype=torch.float64)
    bias[[3, 4, 20]] = -torch.inf
    bias.requires_grad_(grads[2])
    targets = torch.tensor([0, 3, 7, 20, 11])
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf.requires_grad]
    results = []
    for function in (lambda *a, **k: wk.token_logps(*a, **k, backend=backend), naive.token_logps):
        logps, lse, entropy = function(hidden, weight, targets, bias=bias, **transform, entropy=True)
        total = logps[[0, 2, 4]].sin().sum() + 0.3 * logps[[1, 3]].sum() + lse.sum() + entropy.cos().sum()
        results.append([logps, lse, entropy, *torch.autograd.grad(total, leaves)])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)
    assert torch.equal(results[0][0][[1, 3]], torch.full((2,), -torch.inf, dtype=torch.float64))
    if grads[1]:
        assert torch.equal(results[0][4][4], torch.zeros(8, dtype=torch.float64))  # entry 4 is masked, no target


def test_an_all_masked_row_raises_on_a_cpu(backend):
    bias = torch.full((7,), -torch.inf)
    with pytest.raises(ValueError, match="bias masks every vocabulary entry of scored row 0"):
        wk.token_logps(torch.randn(2, 4), torch.randn(7, 4), torch.tensor([1, 2]), bias=bias, backend=backend)
    with pytest.raises(ValueError, match="bias masks every vocabulary entry"):
        wk.fused_loss(
            lambda logps: logps.sum(-1),
            torch.randn(1, 1, 2, 4),
            torch.randn(7, 4),
            torch.tensor([[[1, 2]]]),
            bias=bias,
            backend=backend,
        )


@pytest.mark.parametrize("grads", ["frozen", "trained"])
@pytest.mark.parametrize("masked_first", [True, False])
def test_a_slab_that_is_masked_whole(backend, grads, masked_first):
    """Slabs of 256 columns at budget 0: a slab that is all -inf must not turn max - max into NaN."""
    hidden = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1003, 8, dtype=torch.float64, requires_grad=grads == "trained")
    bias = torch.zeros(1003, dtype=torch.float64)
    bias[slice(0, 300) if masked_first else slice(700, 1003)] = -torch.inf
    targets = torch.randint(300, 700, (6,))
    leaves = [leaf for leaf in (hidden, weight) if leaf.requires_grad]
    ours = wk.token_logps(hidden, weight, targets, bias=bias, entropy=True, memory_budget=0, backend=backend)
    exact = naive.token_logps(hidden, weight, targets, bias=bias, entropy=True)
    for one, two in zip(ours, exact, strict=True):
        torch.testing.assert_close(one, two)
        for got, want in zip(
            torch.autograd.grad(one.sum(), leaves, retain_graph=True),
            torch.autograd.grad(two.sum(), leaves, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-6, 1e4])
@pytest.mark.parametrize("budget", [0, UNLIMITED])
def test_small_and_large_upstream_in_float16(backend, scale, budget):
    """Coefficients of 1e-6 next to coefficients of 1: row normalisation keeps both; 1e4 does not overflow."""
    hidden = (0.5 * torch.randn(64, 32)).half().requires_grad_()
    weight = (0.2 * torch.randn(4001, 32)).half().requires_grad_()
    targets = torch.randint(0, 4001, (64,))
    upstream = scale * torch.randn(64).abs()
    upstream[::3] = 0.0  # rows without upstream must not set the scale of the others
    results = []
    for function, leaves in (
        (lambda *a: wk.token_logps(*a, memory_budget=budget, backend=backend), (hidden, weight)),
        (naive.token_logps, tuple(leaf.detach().double().requires_grad_() for leaf in (hidden, weight))),
        (naive.token_logps, (hidden, weight)),
    ):
        logps = function(*leaves, targets)[0]
        results.append(torch.autograd.grad(logps, leaves, upstream.to(logps.dtype)))
    for name, ours, exact, plain in zip(("dhidden", "dweight"), *results, strict=True):
        if scale < 1:  # results below the smallest float16 number are lost to rounding, not an error
            exact = exact.half().double()
        assert_within(ours, exact, plain, torch.float16, name)


def test_rows_of_very_different_upstream_keep_their_digits_in_float16(backend):
    hidden = torch.randn(2, 32).half().requires_grad_()
    weight = (0.2 * torch.randn(501, 32)).half()
    logps = wk.token_logps(hidden, weight, torch.tensor([3, 4]), backend=backend).logps
    upstream = torch.tensor([1e-3, 100.0])
    (grad,) = torch.autograd.grad(logps, hidden, upstream)
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = naive.token_logps(exact_hidden, weight.double(), torch.tensor([3, 4]))[0]
    (want,) = torch.autograd.grad(exact, exact_hidden, upstream.double())
    for row in (0, 1):
        assert_within(grad[row], want[row], want[row], torch.float16, f"row {row}")


def test_bfloat16_log_probs_are_those_of_float32_logits(backend):
    """Logits are never rounded: the error is 1e-5, where bf16 logits are off by 0.1 nats."""
    hidden, weight = torch.randn(50, 64).bfloat16(), torch.randn(2003, 64).bfloat16()
    targets = torch.randint(0, 2003, (50,))
    exact = naive.token_logps(hidden.double(), weight.double(), targets)[0]
    ours = wk.token_logps(hidden, weight, targets, backend=backend).logps
    plain = naive.token_logps(hidden, weight, targets)[0]
    assert (ours - exact).abs().max() < 2e-5
    assert (plain - exact).abs().max() > 1e-2


def test_probabilities_of_all_targets_sum_to_one(backend):
    hidden, weight = torch.randn(1, 16), torch.randn(517, 16)
    logps = wk.token_logps(hidden.expand(517, 16), weight, torch.arange(517), backend=backend).logps
    assert logps.exp().sum().item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("transform", [{"scale": 64.0}, {"temperature": 0.05}])
@pytest.mark.parametrize("budget", [0, UNLIMITED])
def test_steep_transforms_do_not_overflow_float16(backend, transform, budget):
    hidden = (0.1 * torch.randn(16, 32)).half().requires_grad_()
    weight = (0.1 * torch.randn(501, 32)).half().requires_grad_()
    logps = wk.token_logps(hidden, weight, torch.arange(16), **transform, memory_budget=budget, backend=backend).logps
    ours = torch.autograd.grad(logps.sum(), (hidden, weight))
    leaves = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
    exact = wk.naive.token_logps(*leaves, torch.arange(16), **transform)[0]
    for got, want in zip(ours, torch.autograd.grad(exact.sum(), leaves), strict=True):
        assert_within(got, want, want, torch.float16, "gradient")
