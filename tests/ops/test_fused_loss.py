"""fused_loss equals sequence_logps followed by the loss, in value and gradients, for any division into chunks."""

import functools

import pytest
import torch
from cases import DTYPES
from tolerances import assert_within

import windkern as wk
from windkern import naive
from windkern.kernels import buffers
from windkern.ops import fused_loss


def centred(logps, strength):
    """A coupled group loss with a constant per group: upstream gradients of both signs and of every size."""
    return strength * (logps - logps.mean(-1, keepdim=True)).square().sum(-1)


class Groups:
    def __init__(self, blocks=1, groups=6, responses=3, tokens=7, vocab=1003, empty_group=True):
        sizes = (24, 5)[:blocks]
        self.hidden = [torch.randn(groups, responses, tokens, size, dtype=torch.float64) for size in sizes]
        self.weight = [0.4 * torch.randn(vocab, size, dtype=torch.float64) for size in sizes]
        self.bias = torch.randn(vocab, dtype=torch.float64)
        self.targets = torch.randint(0, vocab, (groups, responses, tokens))
        self.targets[torch.rand(self.targets.shape) < 0.3] = -100
        if empty_group:
            self.targets[1] = -100
        self.strength = 1e-3 * torch.rand(groups, dtype=torch.float64)

    def run(self, function, dtype, wants=(True, True, True), rounded_to=None, **kwargs):
        def leaf(value, wanted):
            return value.to(rounded_to or dtype).to(dtype).requires_grad_(wanted)

        hidden = [leaf(block, wants[0]) for block in self.hidden]
        weight = [leaf(head, wants[1]) for head in self.weight]
        bias = leaf(self.bias, wants[2])
        constants = {"strength": self.strength.to(torch.float64 if dtype == torch.float64 else torch.float32)}
        loss = function(centred, tuple(hidden), tuple(weight), self.targets, bias=bias, per_group=constants, **kwargs)
        leaves = [leaf for leaf in (*hidden, *weight, bias) if leaf.requires_grad]
        grads = torch.autograd.grad(loss, leaves) if leaves else ()
        return [loss.detach(), *grads]


WANTS = {
    "trained": (True, True, True),
    "frozen_head": (True, False, False),
    "frozen_body": (False, True, False),
    "scoring": (False, False, False),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gear", WANTS)
@pytest.mark.parametrize("blocks", [1, 2])
def test_parity(backend, dtype, gear, blocks):
    groups = Groups(blocks)
    exact = groups.run(naive.fused_loss, torch.float64, WANTS[gear], rounded_to=dtype)
    plain = groups.run(naive.fused_loss, dtype, WANTS[gear])
    for budget in (0, 200_000, None):  # a group larger than the budget; several chunks; one chunk
        ours = groups.run(wk.fused_loss, dtype, WANTS[gear], memory_budget=budget, backend=backend)
        for place, (value, want, own) in enumerate(zip(ours, exact, plain, strict=True)):
            assert_within(value, want, own, dtype, f"result {place} at budget {budget}")


@pytest.mark.parametrize(
    "options",
    [
        {"max_scored": 126},
        {"batch_invariant": True},
        {"reduction": "sum"},
        {"softcap": 6.0, "temperature": 1.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("budget", [0, 200_000, None])
def test_options(backend, options, budget):
    groups = Groups()
    shared = {key: value for key, value in options.items() if key in ("reduction", "softcap", "temperature")}
    exact = groups.run(naive.fused_loss, torch.float64, **shared)
    ours = groups.run(wk.fused_loss, torch.float64, memory_budget=budget, backend=backend, **options)
    for place, (value, want) in enumerate(zip(ours, exact, strict=True)):
        assert_within(value, want, want, torch.float64, f"result {place}")


def test_several_chunks_are_really_used(backend):
    groups = Groups(empty_group=False)
    groups.targets.clamp_(min=0)
    plan = wk.plan(126, 24, 1003, torch.float32, group_rows=21, bias_grad=True, memory_budget=500_000, device="cpu")
    assert plan.num_chunks > 1
    assert plan.chunk_groups >= 1
    with buffers.recording() as record:
        groups.run(wk.fused_loss, torch.float32, memory_budget=500_000, backend=backend)
    assert record.flops == plan.flops
    assert plan.units == 6


def test_retain_graph_and_second_backward(backend):
    groups = Groups()
    hidden = groups.hidden[0].requires_grad_()
    weight = groups.weight[0].requires_grad_()

    def loss():
        return wk.fused_loss(
            centred, hidden, weight, groups.targets, per_group={"strength": groups.strength}, backend=backend
        )

    once = torch.autograd.grad(loss(), (hidden, weight))
    kept = loss()
    first = torch.autograd.grad(kept, (hidden, weight), torch.tensor(3.0, dtype=torch.float64), retain_graph=True)
    second = torch.autograd.grad(kept, (hidden, weight))
    for one, three, again in zip(once, first, second, strict=True):
        torch.testing.assert_close(three, 3 * one)
        torch.testing.assert_close(again, one)
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        torch.autograd.grad(kept, (hidden, weight))


def test_accumulating_backwards_add_up(backend):
    groups = Groups()
    weight = groups.weight[0].requires_grad_()
    for _ in range(2):
        loss = wk.fused_loss(
            centred, groups.hidden[0], weight, groups.targets, per_group={"strength": groups.strength}, backend=backend
        )
        loss.backward()
    twice = weight.grad.clone()
    (once,) = torch.autograd.grad(
        wk.fused_loss(centred, groups.hidden[0], weight, groups.targets, per_group={"strength": groups.strength}),
        weight,
    )
    torch.testing.assert_close(twice, 2 * once)


def test_no_groups(backend):
    hidden = torch.zeros(0, 3, 4, 8, requires_grad=True)
    loss = wk.fused_loss(
        lambda logps: logps.sum(-1), hidden, torch.zeros(5, 8), torch.zeros(0, 3, 4, dtype=torch.long), backend=backend
    )
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad.shape == hidden.shape


@pytest.mark.parametrize("bound", [None, 0, 3])
@pytest.mark.parametrize("responses", [0, 2])
def test_groups_without_tokens_have_log_prob_0(backend, responses, bound):
    """As `sequence_logps` has it: a batch whose responses are all empty must not end a run."""
    hidden, weight = torch.zeros(3, responses, 0, 8, requires_grad=True), torch.zeros(5, 8, requires_grad=True)
    targets = torch.zeros(3, responses, 0, dtype=torch.long)
    loss = wk.fused_loss(
        lambda logps: 1 + (logps - 2).square().sum(-1), hidden, weight, targets, max_scored=bound, backend=backend
    )
    loss.backward()
    assert loss.item() == 1 + 4 * responses
    assert hidden.grad.shape == hidden.shape and not weight.grad.any()


def test_a_loss_may_be_zero_on_purpose(backend):
    """A constant is refused as a detached loss; a product with 0 shows that it is intended."""
    groups = Groups()
    hidden = groups.hidden[0].requires_grad_()
    loss = wk.fused_loss(
        lambda logps: logps.new_ones(logps.shape[0]) + 0 * logps.sum(-1),
        hidden,
        groups.weight[0],
        groups.targets,
        backend=backend,
    )
    (grad,) = torch.autograd.grad(loss, hidden)
    assert loss.item() == 1
    assert torch.equal(grad, torch.zeros_like(grad))


def test_gradcheck(backend):
    groups = Groups(groups=2, responses=2, tokens=2, vocab=31, empty_group=False)
    hidden, weight = groups.hidden[0][..., :3].requires_grad_(), groups.weight[0][:, :3].requires_grad_()

    def function(hidden, weight):
        return wk.fused_loss(lambda logps: logps.square().sum(-1), hidden, weight, groups.targets, backend=backend)

    assert torch.autograd.gradcheck(function, (hidden, weight))


@pytest.mark.parametrize("other", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "scored"])
def test_the_loss_keeps_its_dtype_whatever_loss_fn_computes_in(other, trained):
    hidden, weight = torch.randn(300, 2, 1, 8).requires_grad_(trained), torch.randn(11, 8)
    targets = torch.randint(0, 11, (300, 2, 1))
    loss = wk.fused_loss(lambda logps: logps.sum(-1).to(other), hidden, weight, targets, reduction="sum")
    each = wk.sequence_logps(hidden, weight, targets).sum(-1).to(other)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, each.double().sum().float(), rtol=2e-4, atol=0)


@pytest.mark.parametrize(
    ("loss_fn", "kwargs", "match"),
    [
        (lambda logps: logps.sum(), {}, r"loss_fn must return one loss per group, shape \(6,\)"),
        (lambda logps: 3.0, {}, "loss_fn must return one loss per group"),
        (lambda logps: logps.sum(-1), {"reduction": "none"}, "reduction must be one of 'mean', 'sum', got 'none'"),
        (lambda logps, w: logps.sum(-1), {"per_group": {"w": torch.ones(5)}}, "leading dimension 6"),
        (lambda logps, w: logps.sum(-1), {"per_group": {"w": torch.ones(6, requires_grad=True)}}, "requires grad"),
    ],
)
def test_errors(loss_fn, kwargs, match):
    groups = Groups()
    hidden = groups.hidden[0].requires_grad_()
    with pytest.raises(ValueError, match=match):
        wk.fused_loss(loss_fn, hidden, groups.weight[0], groups.targets, **kwargs)


def test_a_parameter_inside_the_loss_raises():
    groups = Groups()
    temperature = torch.ones((), dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match=r"must not depend on any tensor that requires grad except logps"):
        wk.fused_loss(
            lambda logps: (logps * temperature).sum(-1),
            groups.hidden[0].requires_grad_(),
            groups.weight[0],
            groups.targets,
        )
    with pytest.raises(TypeError, match="loss_fn must be callable"):
        wk.fused_loss(None, groups.hidden[0], groups.weight[0], groups.targets)
    with pytest.raises(ValueError, match=r"targets must have shape \(B, N, T\)"):
        wk.fused_loss(centred, groups.hidden[0][0], groups.weight[0], groups.targets[0])


@pytest.mark.parametrize("gear", ["trained", "frozen_head"])
@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("bounded", [False, True])
def test_float16_gradients_of_a_tiny_loss_survive_until_the_loss_scale_comes(backend, gear, retain, bounded):
    """Coefficients near 1e-7, brought back by the upstream gradient of a loss scaler."""
    groups = Groups()
    groups.strength = groups.strength * 1e-5
    max_scored = int((groups.targets != -100).sum()) + 5 if bounded else None

    def scaled(function):
        return lambda *args, **kwargs: function(*args, **kwargs) * 2.0**23

    exact = groups.run(scaled(naive.fused_loss), torch.float64, WANTS[gear], rounded_to=torch.float16)
    plain = groups.run(scaled(naive.fused_loss), torch.float16, WANTS[gear])
    fused = groups.run(scaled(wk.fused_loss), torch.float16, WANTS[gear], backend=backend, max_scored=max_scored)
    for value, want, other in zip(fused, exact, plain, strict=True):
        assert_within(value, want, other, torch.float16, gear)
    if retain:
        groups.hidden = [groups.hidden[0][:2]]
        hidden = groups.hidden[0].half().requires_grad_()
        loss = wk.fused_loss(
            lambda logps: 1e-8 * logps.square().sum(-1),
            hidden,
            groups.weight[0].half(),
            groups.targets[:2],
            backend=backend,
        )
        first = torch.autograd.grad(loss * 2.0**20, hidden, retain_graph=True)[0]
        assert torch.equal(first, torch.autograd.grad(loss * 2.0**20, hidden)[0])
        assert first.abs().max() > 1e-3


def test_an_upstream_gradient_is_not_rounded_to_the_storage_dtype(backend):
    """1/3, as gradient accumulation makes it: bfloat16 would scale every gradient by 0.998."""
    hidden = torch.randn(1, 2, 4, 16).bfloat16().requires_grad_()
    weight = torch.randn(301, 16).bfloat16()
    targets = torch.randint(0, 301, (1, 2, 4))
    loss = wk.fused_loss(lambda logps: logps.square().sum(-1), hidden, weight, targets, backend=backend)
    whole = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    third = torch.autograd.grad(loss / 3, hidden)[0]
    assert torch.equal(third, (whole.float() / 3).bfloat16())


def test_max_scored_bounds_all_groups_together(backend):
    hidden, weight, targets = torch.randn(4, 2, 5, 8), torch.randn(301, 8), torch.randint(0, 301, (4, 2, 5))
    with pytest.raises(ValueError, match="max_scored must be at least the number of scored targets, 40, got 12"):
        wk.fused_loss(
            lambda logps: logps.sum(-1), hidden, weight, targets, max_scored=12, memory_budget=0, backend=backend
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("groups", [7, 8])
def test_several_chunks_run_the_walk_that_was_planned(backend, dtype, groups):
    """FLOPs exactly and bytes as a bound, also where the last chunk is smaller."""
    hidden = torch.randn(groups, 4, 3, 64).to(dtype).requires_grad_()
    weight, targets = torch.randn(2049, 64).to(dtype).requires_grad_(), torch.randint(0, 2049, (groups, 4, 3))
    counts = set()
    for budget in (100_000, 400_000, 700_000):
        options = {"memory_budget": budget, "backend": backend}
        plan = wk.plan(12 * groups, 64, 2049, dtype, group_rows=12, total_rows=12 * groups, device="cpu", **options)
        with buffers.recording() as record:
            wk.fused_loss(lambda logps: logps.sum(-1), hidden, weight, targets, **options)
        assert record.flops == plan.flops and record.peak_bytes <= max(plan.peak_bytes, budget), (budget, plan)
        counts.add(plan.num_chunks)
    assert max(counts) > 1


@pytest.mark.parametrize("way", ["all scored", "one ignored", "max_scored", "kept"])
def test_a_copy_of_the_rows_is_planned(backend, monkeypatch, way):
    """Also where the largest group has no ignored token, so that as many rows are planned as there are."""
    if way == "kept":
        monkeypatch.setattr(fused_loss, "must_keep_rows", lambda targets: True)
    dtype = torch.float64  # whose products have no temporaries that would hide a copy
    hidden, weight = torch.randn(3, 2, 40, 512, dtype=dtype), torch.randn(67, 512, dtype=dtype).requires_grad_()
    targets = torch.randint(0, 67, (3, 2, 40))
    if way == "one ignored":
        targets[0, 0, 0] = -100
    copies, bound = way != "all scored", 240 if way == "max_scored" else None
    for budget in (1_000_000, 1_500_000, 2_100_000):
        options = {"memory_budget": budget, "backend": backend}
        sizes = {"group_rows": 80, "total_rows": 240 + copies, "hidden_grad": False, "device": "cpu"}
        plan = wk.plan(240, 512, 67, dtype, **sizes, **options)
        with buffers.recording() as record:
            wk.fused_loss(lambda logps: logps.sum(-1), hidden, weight, targets, max_scored=bound, **options)
        assert record.peak_bytes <= max(plan.peak_bytes, budget), (record.by_name, plan)


def test_a_function_of_the_same_code_is_looked_at_again_for_other_arguments():
    """What was accepted once holds for the same names, defaults and given arguments only."""
    hidden, weight = torch.randn(2, 2, 3, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    targets, ones = torch.randint(0, 11, (2, 2, 3)), torch.ones(2)

    def made(*defaults):
        def loss(logps, share, more):
            return (logps.sum(-1) * share) + more

        loss.__defaults__ = defaults
        return loss

    def run(loss_fn, **per_group):
        return wk.fused_loss(loss_fn, hidden, weight, targets, per_group=per_group)

    run(made(0.0), share=ones)
    run(functools.partial(made(), more=0.0), share=ones)
    for loss_fn, per_group in (
        (made(), {"share": ones}),
        (made(0.0), {"shares": ones}),
        (made(0.0), {}),
        (functools.partial(made(), share=1.0), {"share": ones}),
        (functools.partial(made(0.0), None, ones), {"share": ones}),
    ):
        with pytest.raises(TypeError, match="loss_fn cannot be called with per_group's entries"):
            run(loss_fn, **per_group)
