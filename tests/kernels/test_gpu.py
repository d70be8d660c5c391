"""On a GPU: every available back end in every gear and dtype, without synchronisation, in graphs, within the plan."""

import pytest
import torch
from cases import GEARS, NARROW, SHAPES, UNLIMITED, Problem, Shape
from tolerances import assert_within

import windkern as wk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]


@pytest.fixture(params=wk.backends.available("cuda") if torch.cuda.is_available() else ["torch"])
def backend(request):
    return request.param


def on_gpu(function, backend, **fixed):
    """Return `function` with its tensors moved to the GPU and its outputs moved back, differentiably."""

    def move(value):
        if isinstance(value, (tuple, list)):
            return tuple(move(part) for part in value)
        return value.cuda() if isinstance(value, torch.Tensor) else value

    def call(hidden, weight, targets, **kwargs):
        kwargs = {name: move(value) for name, value in kwargs.items()}
        outputs = function(move(hidden), move(weight), move(targets), backend=backend, **fixed, **kwargs)
        return tuple(None if value is None else value.cpu() for value in outputs)

    return call


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gear", GEARS)
@pytest.mark.parametrize("shape", ["odd", "blocks"])
def test_parity(backend, dtype, gear, shape):
    if dtype == torch.float32:
        torch.backends.cuda.matmul.allow_tf32 = False
    problem = Problem(SHAPES[shape], "all")
    exact, plain = problem.exact(dtype, gear), problem.plain(dtype, gear)
    for budget in (NARROW, UNLIMITED):
        ours = problem.run(on_gpu(wk.token_logps, backend), dtype, gear, memory_budget=budget)
        for name, value in ours.items():
            assert_within(value, exact[name], plain[name], dtype, name)


@pytest.mark.parametrize("gear", ["scoring", "frozen_head", "trained"])
@pytest.mark.parametrize("spread", [1.0, 12.0])
def test_rows_wider_than_a_block(backend, gear, spread):
    """One slab of many blocks, with pivots that move inside it where logits are far apart."""
    problem = Problem(Shape((24,), (48,), 40007), "plain", seen=("logps",))
    problem.hidden = [spread * block for block in problem.hidden]
    exact, plain = problem.exact(torch.bfloat16, gear), problem.plain(torch.bfloat16, gear)
    ours = problem.run(on_gpu(wk.token_logps, backend), torch.bfloat16, gear)
    for name, value in ours.items():
        assert_within(value, exact[name], plain[name], torch.bfloat16, name)


@pytest.mark.parametrize("requires", [(True, False), (True, True)])
def test_the_gradient_of_a_sum(backend, requires):
    """Its upstream gradient is one number, expanded to all rows."""
    hidden, weight, targets = large(requires)
    targets = targets.clamp(min=0)
    leaves = [leaf for leaf in (hidden, weight) if leaf.requires_grad]
    logps = wk.token_logps(hidden, weight, targets, backend=backend).logps
    expanded = torch.autograd.grad(logps.sum(), leaves, retain_graph=True)
    for got, want in zip(expanded, torch.autograd.grad(logps, leaves, torch.ones_like(logps)), strict=True):
        assert torch.equal(got, want)


def large(requires=(True, True)):
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(512, 256, dtype=torch.bfloat16, device="cuda", generator=generator)
    weight = torch.randn(32003, 256, dtype=torch.bfloat16, device="cuda", generator=generator) * 0.1
    targets = torch.randint(0, 32003, (512,), device="cuda", generator=generator)
    targets[::4] = -100
    return hidden.requires_grad_(requires[0]), weight.requires_grad_(requires[1]), targets


@pytest.fixture
def any_kernel():
    """Allow nondeterministic kernels: the deterministic ones that conftest.py requests can read indices on the host."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("requires", [(False, False), (True, False), (True, True)])
def test_no_synchronisation_with_max_scored(backend, any_kernel, requires):
    hidden, weight, targets = large(requires)
    leaves = [leaf for leaf in (hidden, weight) if leaf.requires_grad]
    for attempt in ("warm up", "error"):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("default" if attempt == "warm up" else "error")
        try:
            logps = wk.token_logps(hidden, weight, targets, max_scored=400, backend=backend).logps
            if leaves:
                torch.autograd.grad(logps.sum(), leaves)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph(backend, any_kernel):
    hidden, weight, targets = large()

    def step():
        logps = wk.token_logps(hidden, weight, targets, max_scored=400, backend=backend).logps
        return (logps, *torch.autograd.grad(logps.sum(), (hidden, weight)))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        hidden.mul_(0.5)
    graph.replay()
    for replayed, direct in zip(captured, step(), strict=True):
        torch.testing.assert_close(replayed, direct, rtol=0.02, atol=0.02)


def test_another_stream(backend):
    hidden, weight, targets = large()
    expected = wk.token_logps(hidden, weight, targets, backend=backend).logps
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        logps = wk.token_logps(hidden, weight, targets, backend=backend).logps
    torch.cuda.current_stream().wait_stream(side)
    torch.testing.assert_close(logps, expected)


@pytest.mark.parametrize("budget", [0, 64 << 20, 512 << 20])
def test_peak_memory_is_within_the_plan(backend, budget):
    problem = Shape((4096,), (512,), 65536)
    hidden = torch.randn(4096, 512, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    weight = torch.randn(65536, 512, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    targets = torch.randint(0, problem.vocab, problem.lead, device="cuda")
    made = wk.plan(4096, 512, 65536, torch.bfloat16, memory_budget=budget, device="cuda")
    wk.token_logps(hidden[:8], weight, targets[:8], backend=backend)  # library workspaces
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    logps = wk.token_logps(hidden, weight, targets, memory_budget=budget, backend=backend).logps
    grads = torch.autograd.grad(logps.sum(), (hidden, weight))
    gradients = sum(grad.nbytes for grad in grads)
    assert torch.cuda.max_memory_allocated() - before - gradients <= 1.05 * made.peak_bytes + (8 << 20)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_fullgraph_compile(backend, compiler):
    hidden, weight, targets = large()

    def step(hidden, weight):
        return wk.token_logps(hidden * 2, weight, targets, max_scored=400, backend=backend).logps.sin().sum()

    torch._dynamo.reset()
    got = torch.compile(step, backend=compiler, fullgraph=True)(hidden, weight)
    torch.testing.assert_close(got, step(hidden, weight), rtol=1e-3, atol=1e-3)
    for one, two in zip(
        torch.autograd.grad(got, (hidden, weight)),
        torch.autograd.grad(step(hidden, weight), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=0.05, atol=0.05)
