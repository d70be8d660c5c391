"""On a GPU: every available back end in every gear and dtype, without synchronisation, in graphs, within the plan."""

import pytest
import torch
from cases import GEARS, NARROW, SHAPES, UNLIMITED, Problem, Shape
from tile_cases import LAYOUTS, Tiles, compare_again, compare_exps, compare_scores
from tolerances import assert_within

import windkern as wk
from windkern.kernels.native import cuda as cuda_rows

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


# Kernels that multiply themselves ------------------------------------------------------------------------------------


@pytest.fixture
def hopper():
    """Skip where the CUDA back end is missing, or the GPU is of another generation."""
    reason = wk.backends.why_not("cuda", "cuda") or cuda_rows.why_not_tiles(64, torch.bfloat16)
    if reason is not None:
        pytest.skip(reason)


# Rows, widths and inner sizes. More than 128 rows run in clusters of two blocks, whose second can be empty.
TILES = [
    (1, 1, 8),
    (5, 255, 72),
    (64, 256, 64),
    (129, 257, 136),
    (256, 1000, 520),
    (300, 5000, 4096),
    (700, 33, 1096),
    (2600, 1500, 64),
]


@pytest.mark.parametrize(("rows", "width", "inner"), TILES)
def test_tiles(hopper, rows, width, inner):
    for entropy, transform in ((False, "identity"), (True, "scaled")):
        for dtype in (torch.bfloat16, torch.float16):
            options = {"bias": entropy, "entropy": entropy, "device": "cuda"}
            compare_scores(Tiles(rows, (width,), inner, dtype, transform, **options))
        options = {"transform": transform, "bias": entropy, "device": "cuda"}
        for spread in (3.0, 60.0):
            compare_exps(Tiles(rows, (64, width), inner, spread=spread, **options))
        compare_again(Tiles(rows, (64, width), inner, **options))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiles_of_operands_anywhere_in_memory(hopper, layout):
    tiles = Tiles(300, (256, 700), 72, layout=layout, device="cuda")
    compare_scores(tiles)
    compare_exps(tiles)
    compare_again(tiles)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_tiles_with_ignored_rows_that_hold_anything(hopper, number):
    compare_exps(Tiles(300, (64, 2048), 72, lies=number, device="cuda"))
    compare_again(Tiles(300, (64, 2048), 72, lies=number, device="cuda"))


def test_tiles_give_the_same_bits_again(hopper):
    tiles = Tiles(700, (256, 5000), 520, bias=True, device="cuda")
    first, second = ([*compare_exps(tiles)[0], *compare_again(tiles), *tiles.score()] for _ in range(2))
    for one, two in zip(first, second, strict=True):
        assert (one is two is None) or torch.equal(one.nan_to_num(7.0), two.nan_to_num(7.0))


def test_a_hopper_gpu_fuses(hopper):
    """Training, a frozen head and scoring of bfloat16; and "auto" takes the back end that does."""
    for options in ({}, {"weight_grad": False}, {"hidden_grad": False, "weight_grad": False}):
        assert wk.plan(300, 4096, 5000, torch.bfloat16, device="cuda", backend="cuda", **options).walk.fused
        assert wk.plan(300, 4096, 5000, torch.bfloat16, device="cuda", **options).walk.backend == "cuda"
    assert not wk.plan(300, 4096, 5000, torch.bfloat16, device="cuda", backend="cuda", capped=True).walk.fused


@pytest.mark.parametrize("gear", ["scoring", "frozen_head", "frozen_body", "trained"])
def test_fused_walks(hopper, gear):
    """More rows than a tile has, so that clusters run; kept, recomputed, and in part."""
    problem = Problem(Shape((300,), (64,), 5003), "bias", seen=("logps",))
    exact, plain = problem.exact(torch.bfloat16, gear), problem.plain(torch.bfloat16, gear)
    for budget in (NARROW, 3 << 20, UNLIMITED):
        ours = problem.run(on_gpu(wk.token_logps, "cuda"), torch.bfloat16, gear, memory_budget=budget)
        for name, value in ours.items():
            assert_within(value, exact[name], plain[name], torch.bfloat16, name)
