"""A head in another dtype than the body: products in the head's, as in lm_head(hidden.to(lm_head.weight.dtype))."""

import pytest
import torch
from cases import GEARS, NARROW, UNLIMITED
from tolerances import assert_within

import windkern as wk
from windkern import naive
from windkern.kernels import buffers

# (hidden, head), and the dtype of the products
PAIRS = {
    (torch.bfloat16, torch.float32): torch.float32,
    (torch.float32, torch.bfloat16): torch.bfloat16,
    (torch.float16, torch.float32): torch.float32,
    (torch.bfloat16, torch.float16): torch.float16,
    (torch.float64, torch.float32): torch.float32,
    (torch.float32, torch.float64): torch.float64,
}
LEAD, HIDDEN, VOCAB = (2, 3, 4), 16, 517


def leaves(body, head, wants, *, bias_dtype=None, seed=0):
    """Return hidden, weight, bias and targets; one row in four is ignored."""
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(*size, generator=generator) for size in ((*LEAD, HIDDEN), (VOCAB, HIDDEN), (VOCAB,))]
    values[1] *= 0.5
    dtypes = body, head, bias_dtype or head
    made = [value.to(dtype).requires_grad_(want) for value, dtype, want in zip(values, dtypes, wants, strict=True)]
    targets = torch.randint(0, VOCAB, LEAD, generator=generator)
    targets.view(-1)[1::4] = -100
    return (*made, targets)


def run(function, hidden, weight, bias, targets, **options):
    """Return the value and gradients of a function that returns log-probs or a loss."""
    value = function(hidden, weight, targets, bias=bias, **options)
    value = value[0] if isinstance(value, tuple) else value
    wanted = [leaf for leaf in (hidden, weight, bias) if leaf.requires_grad]
    total = (value * torch.cos(torch.arange(value.numel(), dtype=value.dtype).view(value.shape))).sum()
    return [value.detach(), *(torch.autograd.grad(total, wanted) if wanted else [])]


def fused(module):
    return lambda *args, **kwargs: module.fused_loss(lambda logps: logps.square().sum(-1), *args, **kwargs)


OPS = {
    "token_logps": lambda module: module.token_logps,
    "sequence_logps": lambda module: module.sequence_logps,
    "fused_loss": fused,
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("gear", ["scoring", "frozen_head", "frozen_body", "trained"])
@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda pair: "-".join(str(dtype)[6:] for dtype in pair))
def test_parity(backend, op, gear, dtypes):
    """Within the error budget of the products' dtype, and gradients in the dtype of their tensors."""
    operand = PAIRS[dtypes]
    arguments = leaves(*dtypes, GEARS[gear])
    exact = leaves(*dtypes, GEARS[gear])
    exact = [value.detach().to(operand).double().requires_grad_(value.requires_grad) for value in exact[:3]]
    want = run(OPS[op](naive), *exact, arguments[3])
    plain = run(OPS[op](naive), *leaves(*dtypes, GEARS[gear]))
    for budget in (NARROW, UNLIMITED):
        got = run(OPS[op](wk), *arguments, memory_budget=budget, backend=backend)
        wanted = [leaf for leaf in arguments[:3] if leaf.requires_grad]
        assert [grad.dtype for grad in got[1:]] == [leaf.dtype for leaf in wanted]
        assert got[0].dtype == (torch.float64 if operand == torch.float64 else torch.float32)
        for place, (one, two, own) in enumerate(zip(got, want, plain, strict=True)):
            coarser = max(one.dtype, operand, key=lambda dtype: torch.finfo(dtype).eps)
            assert_within(one, two, own, coarser, f"result {place} at budget {budget}")


@pytest.mark.parametrize("gear", ["frozen_head", "trained"])
def test_blocks_of_two_dtypes_take_the_wider(backend, gear):
    """A bfloat16 base with a float32 adapter: neither block of the head loses digits."""
    wants = GEARS[gear]
    hidden, weight, bias, targets = leaves(torch.bfloat16, torch.bfloat16, wants, bias_dtype=torch.float32)
    more, adapter, _, _ = leaves(torch.float32, torch.float32, wants, seed=1)
    blocks = (hidden, more), (weight, adapter)
    given = [leaf for leaf in (hidden, more, weight, adapter, bias) if leaf.requires_grad]
    ours = wk.token_logps(*blocks, targets, bias=bias, backend=backend).logps
    wide = [tuple(block.detach().double().requires_grad_(block.requires_grad) for block in pair) for pair in blocks]
    exact_bias = bias.detach().double().requires_grad_(bias.requires_grad)
    exact = naive.token_logps(*wide, targets, bias=exact_bias)[0]
    wide = [leaf for leaf in (*wide[0], *wide[1], exact_bias) if leaf.requires_grad]
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
    upstream = torch.cos(torch.arange(24.0)).view(LEAD)
    for leaf, got, want in zip(
        given,
        torch.autograd.grad(ours, given, upstream),
        torch.autograd.grad(exact, wide, upstream.double()),
        strict=True,
    ):
        assert got.dtype == leaf.dtype
        torch.testing.assert_close(got.double(), want, rtol=2 * torch.finfo(leaf.dtype).eps, atol=1e-4)


@pytest.mark.parametrize("gear", ["scoring", "frozen_head", "frozen_body", "trained"])
@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda pair: "-".join(str(dtype)[6:] for dtype in pair))
def test_the_plan_counts_the_casts(backend, gear, dtypes):
    for lead, hidden_size, vocab, groups in (((4, 3, 25), 96, 301, True), ((60,), 24, 2003, False)):
        wants = GEARS[gear][:2]
        hidden = torch.randn(*lead, hidden_size).to(dtypes[0]).requires_grad_(wants[0])
        weight = torch.randn(vocab, hidden_size).to(dtypes[1]).requires_grad_(wants[1])
        targets = torch.randint(0, vocab, lead)
        options = {"hidden_grad": wants[0], "weight_grad": wants[1], "device": "cpu"}
        options |= {"hidden_dtype": dtypes[0], "weight_dtype": dtypes[1]}
        for budget in (NARROW, UNLIMITED):
            plan = wk.plan(targets.numel(), hidden_size, vocab, PAIRS[dtypes], memory_budget=budget, **options)
            with buffers.recording() as record:
                logps = wk.token_logps(hidden, weight, targets, memory_budget=budget, backend=backend).logps
                if gear != "scoring":
                    logps.sum().backward()
            assert record.flops == plan.flops and record.peak_bytes <= plan.peak_bytes, (record, plan)
            if not groups:
                continue
            plan = wk.plan(300, hidden_size, vocab, PAIRS[dtypes], memory_budget=budget, group_rows=75, **options)
            with buffers.recording() as record:
                loss = wk.fused_loss(
                    lambda logps: logps.square().sum(-1), hidden, weight, targets, memory_budget=budget, backend=backend
                )
            assert loss.isfinite()
            assert record.flops == plan.flops and record.peak_bytes <= plan.peak_bytes, (record, plan)


def test_autograd_saves_no_copy_of_the_rows(backend):
    """The cast happens as rows are gathered: the tensors saved between forward and backward are those given."""
    hidden = torch.randn(50, 16, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(301, 16, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        wk.token_logps(hidden, weight, torch.randint(0, 301, (50,)), memory_budget=0, backend=backend)
    assert not [tensor for tensor in saved if tensor.dtype == torch.float32 and tensor.shape == hidden.shape]


def test_float16_hidden_states_of_a_float32_head_keep_tiny_gradients(backend):
    """fused_loss keeps them scaled until the loss scale arrives, in any dtype of the products."""
    hidden = (0.5 * torch.randn(2, 2, 5, 16)).half().requires_grad_()
    weight, targets = 0.2 * torch.randn(301, 16), torch.randint(0, 301, (2, 2, 5))
    loss = wk.fused_loss(lambda logps: 1e-7 * logps.sum(-1), hidden, weight, targets, backend=backend)
    (grad,) = torch.autograd.grad(2.0**23 * loss, hidden)
    exact = hidden.detach().double().requires_grad_()
    value = naive.fused_loss(lambda logps: 1e-7 * logps.sum(-1), exact, weight.double(), targets)
    (want,) = torch.autograd.grad(2.0**23 * value, exact)
    assert_within(grad, want, want, torch.float16, "dhidden")
