"""What is kept for backward is as good as what is recomputed: entropy near a uniform distribution, small softcaps."""

import itertools

import pytest
import torch
from cases import NARROW, UNLIMITED
from tolerances import assert_within

import windkern as wk
from windkern import naive
from windkern.kernels import buffers
from windkern.spec import row_stride

ROWS, HIDDEN, VOCAB = 24, 32, 1003
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def careful(hidden, weight, targets, *, entropy=False, **transform):
    """Plain PyTorch as a careful user writes it: rounded logits, and everything after them in float32."""
    z = naive.logits(hidden, weight, **transform)
    log_p = z.to(torch.promote_types(z.dtype, torch.float32)).log_softmax(-1)
    logps = log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return logps, None, -(log_p.exp() * log_p).sum(-1) if entropy else None


def grads(function, dtype, std, wants, rounded_to=None, rows=ROWS, **options):
    """Gradients of hidden and weight of a weighted sum of log-probs, or of the entropy alone if asked for."""
    generator = torch.Generator().manual_seed(0)
    storage = rounded_to or dtype
    hidden = torch.randn(rows, HIDDEN, generator=generator).to(storage).to(dtype).requires_grad_(wants[0])
    weight = torch.randn(VOCAB, HIDDEN, generator=generator) * std / HIDDEN**0.5
    weight = weight.to(storage).to(dtype).requires_grad_(wants[1])
    targets = torch.randint(0, VOCAB, (rows,), generator=generator)
    upstream = torch.randn(rows, generator=generator, dtype=torch.float64)
    out = function(hidden, weight, targets, **options)
    result = out[2] if options.get("entropy") else out[0]
    leaves = [leaf for leaf in (hidden, weight) if leaf.requires_grad]
    return torch.autograd.grad((result * upstream.to(result.dtype)).sum(), leaves)


def check(dtype, std, wants, backend, rows=ROWS, **options):
    exact = grads(naive.token_logps, torch.float64, std, wants, rounded_to=dtype, rows=rows, **options)
    plain = grads(careful, dtype, std, wants, rows=rows, **options)
    for budget in (NARROW, 240_000, UNLIMITED) if rows == ROWS else (NARROW, UNLIMITED):
        ours = grads(wk.token_logps, dtype, std, wants, rows=rows, memory_budget=budget, backend=backend, **options)
        for place, (got, want, own) in enumerate(zip(ours, exact, plain, strict=True)):
            assert_within(got, want, own, dtype, f"gradient {place} at budget {budget}")


def check_entropy(backend, dtype, rows=ROWS):
    # The frozen head's smallest gradients are below float16's numbers, so it is held to larger logits there.
    for std in (0.3, 0.02) if dtype != torch.float16 else (0.3,):
        check(dtype, std, (True, False), backend, entropy=True, rows=rows)
    for std in (0.3, 0.02, 0.005):
        check(dtype, std, (False, True), backend, entropy=True, rows=rows)


SOFTCAPS = {
    "one over fifty": ({"softcap": 1.0, "temperature": 50.0}, 3.0),
    "a hundredth": ({"softcap": 0.01}, 1.0),
    "one over six": ({"softcap": 1.0, "temperature": 6.0}, 3.0),
    "thirty": ({"softcap": 30.0}, 8.0),
}


def check_softcap(backend, dtype, case, rows=ROWS):
    transform, std = SOFTCAPS[case]
    for wants in ((False, True), (True, True)):
        check(dtype, std, wants, backend, rows=rows, **transform)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entropy(backend, dtype):
    check_entropy(backend, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SOFTCAPS)
def test_softcap(backend, dtype, case):
    check_softcap(backend, dtype, case)


def check_saturated(backend, dtype, softcap, temperature):
    """|scale z / softcap| of 100 and more: tanh is 1, its slope is 0 exactly, in every gear and budget."""
    hidden = torch.ones(3, 4, dtype=dtype)
    weight = (1000.0 * softcap * torch.tensor([1.0, -1.0])).repeat(150).unsqueeze(1).expand(300, 4).to(dtype)
    targets = torch.tensor([0, 1, 299])
    for wants, entropy, budget in itertools.product(((True, True), (True, False)), (False, True), (NARROW, UNLIMITED)):
        leaves = [hidden.clone().requires_grad_(wants[0]), weight.clone().requires_grad_(wants[1])]
        out = wk.token_logps(
            *leaves,
            targets,
            entropy=entropy,
            softcap=softcap,
            temperature=temperature,
            memory_budget=budget,
            backend=backend,
        )
        total = sum(value.sum() for value in out if value is not None)
        for grad in torch.autograd.grad(total, [leaf for leaf in leaves if leaf.requires_grad]):
            assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_saturated_logits_have_no_gradient(backend, dtype):
    for softcap, temperature in ((0.5, 1.0), (1.0, 6.0), (30.0, 0.7)):
        check_saturated(backend, dtype, softcap, temperature)


def check_near_saturation(backend, depth, softcap, temperature=1.0, rows=ROWS):
    """float32 logits of +-depth caps, whose slope 1 - tanh^2 is 2e-2 to 5e-7: as accurate as plain autograd."""
    generator = torch.Generator().manual_seed(0)
    size = depth + 0.5 * torch.randn(rows, 331, generator=generator)
    z = softcap * size * torch.randn(rows, 331, generator=generator).sign()
    targets = torch.randint(0, 331, (rows,), generator=generator)
    options = {"softcap": softcap, "temperature": temperature}

    def gradients(function, dtype, wants, **more):
        leaves = [value.to(dtype).requires_grad_(flag) for value, flag in zip((z, torch.eye(331)), wants, strict=True)]
        out = function(*leaves, targets, **options, **more)
        result = out[2] if more.get("entropy") else out[0]
        return torch.autograd.grad(result.sum(), [leaf for leaf in leaves if leaf.requires_grad])

    for wants, entropy in itertools.product(((True, True), (True, False)), (False, True)):
        exact = gradients(naive.token_logps, torch.float64, wants, entropy=entropy)
        plain = gradients(naive.token_logps, torch.float32, wants, entropy=entropy)
        for budget in (NARROW, UNLIMITED):
            more = {"entropy": entropy, "memory_budget": budget, "backend": backend}
            ours = gradients(wk.token_logps, torch.float32, wants, **more)
            for place, (got, want, own) in enumerate(zip(ours, exact, plain, strict=True)):
                assert_within(got, want, own, torch.float32, f"gradient {place} at budget {budget}, entropy {entropy}")


@pytest.mark.parametrize(("softcap", "temperature"), [(30.0, 1.0), (1.0, 1.0), (33.0, 2.0)])
@pytest.mark.parametrize("depth", [3, 5, 8])
def test_slopes_near_saturation(backend, depth, softcap, temperature):
    check_near_saturation(backend, depth, softcap, temperature)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_entropy_keeps_logits(backend, dtype):
    """float32 logits, bit for bit those that would be recomputed, and still 6 units where all of them fit."""
    shape = (ROWS, HIDDEN, VOCAB, dtype)
    plan = wk.plan(*shape, entropy=True, memory_budget=UNLIMITED, device="cpu")
    assert (plan.units, plan.slabs_kept) == (6, plan.num_slabs)
    with buffers.recording() as record:
        kept = grads(wk.token_logps, dtype, 0.3, (True, True), entropy=True, memory_budget=UNLIMITED, backend=backend)
    assert record.flops == plan.flops and record.peak_bytes <= plan.peak_bytes
    assert record.by_name["kept"] == 4 * ROWS * row_stride(VOCAB)
    assert all(value.isfinite().all() for value in kept)
