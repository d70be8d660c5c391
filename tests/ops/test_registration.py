"""The ops as torch sees them: schemas, fake tensors, full-graph compilation, autocast, saved tensors."""

import importlib
import warnings

import pytest
import torch
from cases import GEARS, NARROW, SHAPES, UNLIMITED, Problem

import windkern as wk
from windkern.ops.inputs import prepare
from windkern.ops.once import graph_links
from windkern.plan import plan


# Warnings of torch.compile itself while it traces an autograd.Function.
def traces(test):
    test = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")(test)
    return pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")(test)


def op_arguments(gear: str, *, entropy: bool, kept: bool, backend: str):
    """Return the arguments of logprobs_fwd for a gear; opcheck needs inputs that require no gradient."""
    problem = Problem(SHAPES["blocks"], "all")
    wants = GEARS[gear]
    inputs = prepare(
        tuple(problem.hidden),
        tuple(problem.weight),
        problem.targets,
        bias=problem.bias,
        **{"scale": 1.0, "softcap": None, "temperature": 1.0, **problem.transform},
        ignore_index=-100,
        max_scored=None,
        backend=backend,
    )
    grads = {"hidden_grad": (wants[0], wants[0]), "weight_grad": (wants[1], wants[1]), "bias_grad": wants[2]}
    sizes = inputs.num_rows, inputs.hidden_sizes, 517
    budget = UNLIMITED if kept else NARROW
    made = plan(*sizes, entropy=entropy, memory_budget=budget, **{**inputs.planned(), **grads})
    return (
        inputs.hidden,
        inputs.weight,
        inputs.bias,
        inputs.targets,
        inputs.rows,
        *made.walk.of(inputs.transform).values(),
    )


# Every pair of values of back end, entropy and what is kept occurs; the op that is checked is the same for all.
PAIRS = [("cpp", False, False), ("cpp", True, True), ("torch", False, True), ("torch", True, False)]


@pytest.mark.parametrize("gear", GEARS)
@pytest.mark.parametrize(("backend", "entropy", "kept"), PAIRS)
def test_opcheck(backend, gear, entropy, kept):
    if backend not in wk.backends.available("cpu"):
        pytest.skip("the C++ extension was not built")
    torch.use_deterministic_algorithms(False)  # opcheck compares clones of outputs; NaN is not equal to NaN
    arguments = op_arguments(gear, entropy=entropy, kept=kept, backend=backend)
    torch.library.opcheck(torch.ops.windkern.logprobs_fwd.default, arguments)
    if gear == "scoring":
        return
    logps, _, ent, *saved = torch.ops.windkern.logprobs_fwd(*arguments)
    upstream = (torch.ones_like(logps), None, torch.ones_like(logps) if entropy else None)
    backward = (*upstream, *arguments[:5], saved[0], ent, *saved[1:], *arguments[5:])
    torch.library.opcheck(torch.ops.windkern.logprobs_bwd.default, backward)


def test_opcheck_segment_sum(backend):
    importlib.import_module("windkern.ops.sequence")  # registers it, as the first use of sequence_logps does
    torch.library.opcheck(torch.ops.windkern.segment_sum.default, (torch.randn(9), torch.tensor([0, 4, 4, 9]), backend))


def token_entropy(hidden, weight, targets):
    out = wk.token_logps(hidden * 2, weight, targets, entropy=True)
    return out.logps.sin().sum() + out.lse.sum() + out.entropy.square().sum()


def token_bounded(hidden, weight, targets):
    return wk.token_logps(hidden * 2, weight, targets, max_scored=40).logps.square().sum()


def packed(hidden, weight, targets):
    bounds = torch.tensor([0, 7, 7, 40])
    logps = wk.sequence_logps(hidden.reshape(40, -1), weight, targets.reshape(-1), cu_seqlens=bounds, normalize="mean")
    return logps.sin().sum()


def padded(hidden, weight, targets):
    return wk.sequence_logps(hidden, weight, targets, memory_budget=0, backend="torch").sin().sum()


def module(hidden, weight, targets):
    return wk.nn.FusedLogProbs(weight)(hidden, targets).logps.sum()


@traces
@pytest.mark.parametrize("function", [token_entropy, token_bounded, packed, padded, module], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("graph_backend", "train_head"), [("eager", False), ("aot_eager", False), ("aot_eager", True)])
def test_fullgraph_compile(graph_backend, function, train_head):
    hidden = torch.randn(4, 2, 5, 16, requires_grad=True)
    weight = (0.2 * torch.randn(301, 16)).requires_grad_(train_head)
    targets = torch.randint(0, 301, (4, 2, 5))
    targets[0, 0, :3] = -100
    leaves = [leaf for leaf in (hidden, weight) if leaf.requires_grad]
    torch._dynamo.reset()
    wk.backends._preference.clear()  # as in a process whose first call is a compiled one
    compiled = torch.compile(function, backend=graph_backend, fullgraph=True)
    ours, plain = compiled(hidden, weight, targets), function(hidden, weight, targets)
    torch.testing.assert_close(ours, plain)
    for got, want in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(plain, leaves), strict=True):
        torch.testing.assert_close(got, want)


@traces
def test_compile_with_dynamic_sizes():
    torch._dynamo.reset()
    compiled = torch.compile(padded, backend="aot_eager", fullgraph=True, dynamic=True)
    weight = 0.2 * torch.randn(301, 16)
    for tokens in (5, 9, 2):
        hidden, targets = torch.randn(3, tokens, 16, requires_grad=True), torch.randint(0, 301, (3, tokens))
        got, want = compiled(hidden, weight, targets), padded(hidden, weight, targets)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, hidden), torch.autograd.grad(want, hidden))


@traces
def test_a_symbolic_row_count_is_planned_at_once_and_one_graph_serves_an_octave():
    """Traced symbol by symbol, the search for a plan at a real vocabulary would take minutes."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    weight = (0.2 * torch.randn(32003, 16)).requires_grad_()
    step = torch.compile(lambda *args: wk.token_logps(*args).logps, backend="aot_eager", fullgraph=True)
    for rows in (5, 7, 33, 60, 64, 65, 100):
        hidden, targets = torch.randn(rows, 16, requires_grad=True), torch.randint(0, 32003, (rows,))
        got, want = step(hidden, weight, targets), wk.token_logps(hidden, weight, targets).logps
        torch.testing.assert_close(got, want)
        for one, two in zip(
            torch.autograd.grad(got.sum(), (hidden, weight)),
            torch.autograd.grad(want.sum(), (hidden, weight)),
            strict=True,
        ):
            torch.testing.assert_close(one, two)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3  # the first size, up to 64, up to 128


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch.func's own
def test_forward_mode_is_refused():
    hidden, weight, targets = torch.randn(3, 8), torch.randn(11, 8), torch.tensor([1, 2, 3])
    with pytest.raises(RuntimeError, match="forward-mode differentiation"):
        torch.func.jvp(lambda h: wk.token_logps(h, weight, targets).logps, (hidden,), (hidden,))


@traces
def test_fused_loss_is_a_graph_break_not_a_failure():
    torch._dynamo.reset()
    hidden, weight = torch.randn(4, 2, 5, 16, requires_grad=True), 0.2 * torch.randn(301, 16)
    targets = torch.randint(0, 301, (4, 2, 5))

    def function(hidden):
        return 2 * wk.fused_loss(lambda logps: logps.square().sum(-1), hidden.sin(), weight, targets)

    got, want = torch.compile(function, backend="eager")(hidden), function(hidden)
    torch.testing.assert_close(torch.autograd.grad(got, hidden), torch.autograd.grad(want, hidden))


@pytest.mark.parametrize("frozen", [False, True])
def test_autocast_casts_operands_and_keeps_parameter_dtypes(backend, frozen):
    hidden, weight = torch.randn(30, 16, requires_grad=True), torch.randn(517, 16, requires_grad=not frozen)
    targets = torch.randint(0, 517, (30,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = wk.token_logps(hidden, weight, targets, memory_budget=0, backend=backend).logps
    low = [leaf.detach().bfloat16().requires_grad_(leaf.requires_grad) for leaf in (hidden, weight)]
    same = wk.token_logps(*low, targets, memory_budget=0, backend=backend).logps
    torch.testing.assert_close(ours, same, rtol=0, atol=1e-6)
    assert ours.dtype == torch.float32
    leaves = [leaf for leaf in (hidden, weight) if leaf.requires_grad]
    grads = torch.autograd.grad(ours.sum(), leaves)
    lows = torch.autograd.grad(same.sum(), [leaf for leaf in low if leaf.requires_grad])
    for grad, other in zip(grads, lows, strict=True):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, other.float(), rtol=0.02, atol=0.02)


def test_retain_graph_gives_the_same_gradients_twice(backend):
    hidden, weight = torch.randn(30, 16, requires_grad=True), torch.randn(517, 16, requires_grad=True)
    targets = torch.randint(0, 517, (30,))
    for budget in (NARROW, UNLIMITED):
        loss = wk.token_logps(hidden, weight, targets, memory_budget=budget, backend=backend).logps.sin().sum()
        first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        second = torch.autograd.grad(loss, (hidden, weight))
        assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def once_differentiable(backend) -> dict:
    """Return each op as a function of the tensors by which its gradient must not be differentiated."""
    targets = torch.randint(0, 11, (2, 3, 4))
    rewards = torch.randn(2, 3)

    def packed(hidden, weight):
        rows = hidden.reshape(24, 8)
        bounds = torch.tensor([0, 7, 24])
        return wk.sequence_logps(rows, weight, targets.reshape(-1), cu_seqlens=bounds, backend=backend)

    return {
        "token_logps": lambda hidden, weight: wk.token_logps(hidden, weight, targets, backend=backend).logps,
        "sequence_logps": packed,
        "fused_loss": lambda hidden, weight: wk.fused_loss(
            lambda logps: logps.square().sum(-1), hidden, weight, targets, backend=backend
        ),
        "pair_loss": lambda hidden, weight: wk.pair_loss(
            (hidden @ weight.T).sum((-1, -2)), rewards=rewards, backend=backend
        ),
    }


@pytest.mark.parametrize("op", ["token_logps", "sequence_logps", "fused_loss", "pair_loss"])
@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("leaf", [True, False])
def test_double_backward_raises_clearly(backend, op, train_head, leaf):
    """For each way to ask for a second derivative: it is never None or unused, which would be read as zero."""
    function = once_differentiable(backend)[op]
    hidden, weight = torch.randn(2, 3, 4, 8, requires_grad=True), torch.randn(11, 8, requires_grad=train_head)
    used = hidden if leaf else hidden.sin()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of create_graph with backward
        for second in (
            lambda grad: torch.autograd.grad(grad.square().sum(), hidden),
            lambda grad: torch.autograd.grad(grad.sum(), hidden, allow_unused=True),
            lambda grad: (grad.square().sum() + hidden.sum()).backward(),
            lambda grad: torch.autograd.grad(grad.sum(), weight if train_head else hidden),
        ):
            wanted = [used, weight] if train_head else [used]
            grads = torch.autograd.grad(function(used, weight).square().sum(), wanted, create_graph=True)
            for grad in grads:
                with pytest.raises(RuntimeError, match="double backward is not implemented for windkern"):
                    second(grad)


def test_a_gradient_of_the_upstream_is_refused_as_well(backend):
    """grad(loss) is linear in the upstream gradient, which can depend on something that requires a gradient."""
    function = once_differentiable(backend)["token_logps"]
    hidden, weight = torch.randn(2, 3, 4, 8, requires_grad=True), torch.randn(11, 8)
    factor = torch.ones((), requires_grad=True)
    (grad,) = torch.autograd.grad((factor * function(hidden, weight)).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not implemented"):
        torch.autograd.grad(grad.sum(), factor)


@pytest.mark.parametrize("op", ["token_logps", "fused_loss", "pair_loss"])
def test_create_graph_gives_the_same_gradients(backend, op):
    """They can be changed in place, as clipping does, and links to the graph keep no memory of the inputs alive."""
    function = once_differentiable(backend)[op]
    hidden, weight = torch.randn(2, 3, 4, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    plain = torch.autograd.grad(function(hidden, weight).sum(), (hidden, weight))
    flagged = torch.autograd.grad(function(hidden, weight).sum(), (hidden, weight), create_graph=True)
    for one, two in zip(plain, flagged, strict=True):
        assert torch.equal(one, two)
        if op != "pair_loss":
            two.mul_(0.5)
    (link,) = graph_links(hidden, None, hidden.detach())
    assert link.numel() == 0 and link.untyped_storage().nbytes() == 0 and link.requires_grad


def test_outputs_used_one_at_a_time(backend):
    """Unused outputs have no upstream gradient: the same result as with zeros."""
    problem = Problem(SHAPES["odd"], "all")
    hidden = problem.hidden[0].requires_grad_()
    out = wk.token_logps(
        hidden, problem.weight[0], problem.targets, bias=problem.bias, **problem.options, backend=backend
    )
    exact = wk.naive.token_logps(hidden, problem.weight[0], problem.targets, bias=problem.bias, **problem.options)
    for one, two in zip(out, exact, strict=True):
        torch.testing.assert_close(
            torch.autograd.grad(one.sum(), hidden, retain_graph=True),
            torch.autograd.grad(two.sum(), hidden, retain_graph=True),
            rtol=1e-10,
            atol=1e-12,
        )


@traces
def test_export_with_a_dynamic_number_of_rows():
    """The plan is for the largest number of rows that the caller names; without an upper bound there is no plan."""
    weight = torch.randn(37, 8)

    class Score(torch.nn.Module):
        def forward(self, hidden, targets):
            return wk.token_logps(hidden, weight, targets).logps

    example = torch.randn(10, 8), torch.randint(0, 37, (10,))

    def export(rows):
        return torch.export.export(Score(), example, dynamic_shapes=({0: rows}, {0: rows})).module()

    hidden, targets = torch.randn(300, 8), torch.randint(0, 37, (300,))
    targets[:7] = -100
    got = export(torch.export.Dim("rows", max=500))(hidden, targets)
    torch.testing.assert_close(got, wk.token_logps(hidden, weight, targets).logps)
    with pytest.raises(ValueError, match=r"no upper bound; give one with torch.export.Dim\(name, max=...\)"):
        export(torch.export.Dim("rows"))


def test_saved_tensors_hold_no_logits_when_nothing_is_kept(backend):
    """Counts what autograd keeps between forward and backward."""
    sizes = []
    hidden, weight = torch.randn(200, 16, requires_grad=True), torch.randn(4001, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        wk.token_logps(hidden, weight, torch.randint(0, 4001, (200,)), memory_budget=0, backend=backend)
    assert max(sizes) <= weight.numel() < 200 * 4001


@traces
@pytest.mark.parametrize("train_head", [False, True])
def test_compile_of_transposed_inputs(train_head):
    """Gradients are contiguous for any strides of the inputs, in the fake op as in the real one."""
    hidden = torch.randn(16, 30).t().requires_grad_()
    weight = torch.randn(16, 301).t().requires_grad_(train_head)
    targets = torch.randint(0, 301, (30,))
    leaves = [leaf for leaf in (hidden, weight) if leaf.requires_grad]

    def function(hidden, weight):
        return wk.token_logps(hidden, weight, targets, max_scored=33).logps.sin().sum()

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    got, want = (torch.autograd.grad(f(hidden, weight), leaves) for f in (compiled, function))
    for one, two in zip(got, want, strict=True):
        torch.testing.assert_close(one, two)


def test_the_op_itself_takes_tensors_that_require_grad(backend):
    """Called below autograd, as torch.export does, it computes and records nothing."""
    arguments = op_arguments("scoring", entropy=False, kept=False, backend=backend)
    hidden = [block.detach().requires_grad_() for block in arguments[0]]
    logps, *_ = torch.ops.windkern.logprobs_fwd(hidden, *arguments[1:])
    assert torch.equal(logps, torch.ops.windkern.logprobs_fwd(*arguments)[0])


def test_padding_may_be_nan_beside_spare_rows(backend):
    hidden, weight = torch.randn(6, 8), torch.randn(37, 8, requires_grad=True)
    hidden[0] = torch.nan
    targets = torch.tensor([-100, 1, 2, -100, 3, 4])
    for bound in (4, 6):
        logps = wk.token_logps(hidden, weight, targets, max_scored=bound, backend=backend).logps
        (grad,) = torch.autograd.grad(logps.sum(), weight)
        assert grad.isfinite().all() and logps.isfinite().all()
