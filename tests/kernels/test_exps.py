"""Exponentials as operands of backward: moving pivots, masks, confident rows, upstreams in any order."""

import pytest
import torch
from cases import NARROW, UNLIMITED
from tolerances import assert_within

import windkern as wk
from windkern.kernels import buffers
from windkern.kernels.gemm import products_of

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
ROWS, HIDDEN, VOCAB = 33, 24, 1003


def budgets(dtype) -> tuple[int, int, int]:
    """Return budgets that keep no slabs, half of them, and all."""

    def kept(budget):
        return wk.plan(ROWS, HIDDEN, VOCAB, dtype, bias_grad=True, memory_budget=budget, device="cpu").slabs_kept

    return NARROW, next(budget for budget in range(0, 1 << 22, 4096) if kept(budget) == 2), UNLIMITED


def inputs(spread: float = 1.0, seed: int = 0):
    """Return float64 hidden states, head and targets whose logits have the given spread."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64) * spread / HIDDEN**0.5
    return hidden, weight, torch.randint(0, VOCAB, (ROWS,), generator=generator)


def grads(function, dtype, hidden, weight, targets, bias=None, *, storage=None, wants=(True, True, True), **options):
    """Return log-probs, and gradients of a weighted sum of them, by name."""
    given = {"dhidden": hidden, "dweight": weight, "dbias": bias}
    leaves = {
        name: value.to(storage or dtype).to(dtype).requires_grad_(wanted)
        for (name, value), wanted in zip(given.items(), wants, strict=True)
        if value is not None
    }
    logps = function(leaves["dhidden"], leaves["dweight"], targets, bias=leaves.get("dbias"), **options)[0]
    upstream = torch.sin(1.0 + torch.arange(targets.numel(), dtype=torch.float64)).to(logps.dtype)
    asked = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    found = torch.autograd.grad((logps * upstream).sum(), list(asked.values()))
    return {"logps": logps.detach(), **dict(zip(asked, found, strict=True))}


def check(dtype, backend, problem, **options):
    exact = grads(wk.naive.token_logps, torch.float64, *problem, storage=dtype, **options)
    plain = grads(wk.naive.token_logps, dtype, *problem, **options)
    for budget in budgets(dtype):
        ours = grads(wk.token_logps, dtype, *problem, memory_budget=budget, backend=backend, **options)
        for name, value in ours.items():
            assert value.isfinite().all(), (name, budget)
            assert_within(value, exact[name], plain[name], dtype, f"{name} at budget {budget}")


def test_the_case_is_what_it_says():
    for dtype in DTYPES:
        nothing, some, everything = (
            wk.plan(ROWS, HIDDEN, VOCAB, dtype, bias_grad=True, memory_budget=budget, device="cpu")
            for budget in budgets(dtype)
        )
        assert nothing.slabs_kept == 0 < some.slabs_kept < some.num_slabs == 4
        assert everything.slabs_kept == everything.num_slabs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [30.0, 100.0])
def test_wide_logits(backend, dtype, spread):
    """Pivots move by more than 40, and some of them twice."""
    hidden, weight, targets = inputs(spread)
    check(dtype, backend, (hidden, weight, targets, torch.linspace(-1, 1, VOCAB, dtype=torch.float64)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("above", [39.0, 41.0, 90.0])
def test_rows_that_are_sure_of_their_target(backend, dtype, above):
    """The target's logit is far above all others, in the first slab, in a later one, and in the last."""
    hidden, weight, targets = inputs()
    hidden[:, 0], weight[:, 0] = 1.0, 0.0
    hidden[:, 1:] /= 8
    targets = torch.tensor([3, 700, VOCAB - 1])[torch.arange(ROWS) % 3]
    weight[targets.unique(), 0] = above
    sure = targets.clone()
    targets = torch.where(torch.arange(ROWS) % 2 == 0, sure, (sure + 300) % VOCAB)  # half are confident and wrong
    check(dtype, backend, (hidden, weight, targets))
    for wants in ((True, False, False), (False, True, False)):
        check(dtype, backend, (hidden, weight, targets), wants=wants)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("upstream", [1.0, 1e-12, 1e-20])
def test_small_upstreams_where_the_pivot_lies_far_below(backend, dtype, upstream):
    """A second slab is 39 above the first: the sum of the exponentials exceeds e^39, and g must not become denormal."""
    hidden, weight, targets = inputs()
    bias = torch.zeros(VOCAB, dtype=torch.float64)
    bias[256:] = 39.0

    def scaled(function):
        return lambda *args, **options: (function(*args, **options)[0] * upstream,)

    exact = grads(scaled(wk.naive.token_logps), torch.float64, hidden, weight, targets, bias, storage=dtype)
    plain = grads(scaled(wk.naive.token_logps), dtype, hidden, weight, targets, bias)
    for budget in budgets(dtype):
        function = scaled(wk.token_logps)
        ours = grads(function, dtype, hidden, weight, targets, bias, memory_budget=budget, backend=backend)
        for name, value in ours.items():
            assert_within(value, exact[name], plain[name], dtype, f"{name} at budget {budget}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", ["the first slab", "a middle slab", "all but the target"])
def test_masks(backend, dtype, masked):
    hidden, weight, targets = inputs()
    bias = torch.randn(VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if masked == "all but the target":
        targets.fill_(900)
        bias[torch.arange(VOCAB) != 900] = -torch.inf
    else:
        first = {"the first slab": 0, "a middle slab": 256}[masked]
        bias[first : first + 256] = -torch.inf
        targets = torch.where((targets >= first) & (targets < first + 256), 600, targets)
    check(dtype, backend, (hidden, weight, targets, bias), wants=(True, True, False))
    check(dtype, backend, (hidden, weight, targets, bias), wants=(True, False, False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kept", ["nothing", "some", "everything"])
def test_upstreams_in_any_order(backend, dtype, kept):
    """With retain_graph: log-probs, then the log-sum-exp, then log-probs again, with the same bits as before."""
    hidden, weight, targets = inputs()
    budget = dict(zip(("nothing", "some", "everything"), budgets(dtype), strict=True))[kept]
    leaves = [value.to(dtype).requires_grad_() for value in (hidden, weight)]
    exact = [value.to(dtype).double().requires_grad_() for value in (hidden, weight)]
    plain = [value.to(dtype).requires_grad_() for value in (hidden, weight)]
    out = wk.token_logps(*leaves, targets, memory_budget=budget, backend=backend)
    first = torch.autograd.grad(out.logps.sum(), leaves, retain_graph=True)
    lse = torch.autograd.grad(out.lse.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(out.logps.sum(), leaves, retain_graph=True)
    both = torch.autograd.grad((out.logps - 2 * out.lse).sum(), leaves)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    for found, combine in ((lse, lambda o: o[1]), (both, lambda o: o[0] - 2 * o[1])):
        want = torch.autograd.grad(combine(wk.naive.token_logps(*exact, targets)).sum(), exact)
        own = torch.autograd.grad(combine(wk.naive.token_logps(*plain, targets)).sum(), plain)
        for place, (got, right, other) in enumerate(zip(found, want, own, strict=True)):
            assert_within(got, right, other, dtype, f"gradient {place}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("vocab", [300, 20000])
def test_backward_takes_two_products_however_many_slabs_were_kept(backend, dtype, vocab):
    """Two for as many columns as the library of this CPU multiplies at once, independent of slabs."""
    at_once = products_of("cpu", dtype).columns_at_once(700, vocab, 8)
    hidden, weight = torch.randn(700, 8, dtype=dtype), torch.randn(vocab, 8, dtype=dtype)
    plan = wk.plan(700, 8, vocab, dtype, memory_budget=UNLIMITED, device="cpu")
    assert plan.slabs_kept == plan.num_slabs == (1 if vocab == 300 else 4 if dtype == torch.float32 else 7)
    logps = wk.token_logps(
        hidden.requires_grad_(), weight.requires_grad_(), torch.arange(700) % vocab, memory_budget=UNLIMITED,
        backend=backend,
    ).logps  # fmt: skip
    with buffers.recording() as record:
        logps.sum().backward()
    assert record.products == 2 * -(-vocab // at_once)
    assert "dz" not in record.by_name and "slab" not in record.by_name


def test_entropy_softcap_and_float16_write_dz():
    def way(dtype=torch.float32, **options):
        return wk.plan(40, 24, 1003, dtype, device="cpu", **options).walk.factored

    assert way() and way(torch.bfloat16) and way(torch.float64)
    assert not (way(entropy=True) or way(capped=True) or way(torch.float16))
