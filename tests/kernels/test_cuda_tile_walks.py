"""Walks whose kernels multiply and take exponentials at once, under the emulator, against float64."""

import shutil
import sys
from collections import Counter
from dataclasses import dataclass, replace
from types import SimpleNamespace

import cuda_tools
import pytest
import torch
from cases import GEARS, NARROW, SHAPES, UNLIMITED, Problem, Shape
from test_fused_loss import WANTS, Groups
from test_ignored_rows import poisoned, same_bits
from test_logprobs import check
from tolerances import assert_within

import windkern as wk
from windkern import naive
from windkern.kernels import buffers
from windkern.kernels.gemm import Products, products_of
from windkern.kernels.native import cuda as cuda_rows
from windkern.ops import inputs

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
TILES = ("tile_forward", "tile_exps_forward", "tile_exps_backward")
KERNELS = (*TILES, "slab_forward", "slab_forward_unit", "slab_backward", "exps_forward", "exps_backward")
FUSED_GEARS = ("scoring", "frozen_head", "frozen_body", "trained")
LOGPS = ("logps",)
on_both_plans = pytest.mark.parametrize("planned_for", ["cpu", "cuda"], indirect=True)


@dataclass(frozen=True)
class FloatSums(Products):
    """Products of 16-bit operands with float32 sums, as a GPU has them."""

    def writes(self, out_dtype):
        return True

    def _mm(self, left, right, out):
        return out.copy_(left.float() @ right.float())

    def _addmm(self, total, left, right):
        return total.add_(left.float() @ right.float())


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return cuda_tools.emulated_module(tmp_path_factory)


@pytest.fixture
def planned_for(request):
    """The device type whose plan decides on slabs, and how many of them a product takes."""
    return getattr(request, "param", "cuda")


@pytest.fixture(autouse=True)
def used(monkeypatch, emulated, planned_for):
    """Return the number of calls of each kernel, on a machine whose back end fuses."""
    cuda_tools.install(monkeypatch, emulated, tiles=True)
    calls = Counter()

    def counting(name, kernel):
        def call(*arguments, **options):
            calls[name] += 1
            return kernel(*arguments, **options)

        return call

    for name in KERNELS:
        monkeypatch.setattr(cuda_rows, name, counting(name, getattr(cuda_rows, name)))

    def products(device_type, operand):
        narrow = operand in (torch.bfloat16, torch.float16)
        return FloatSums(planned_for, operand) if narrow else products_of(device_type, operand)

    for name in ("windkern.plan", "windkern.ops.walk"):
        monkeypatch.setattr(sys.modules[name], "products_of", products)
    return calls


def plan_of(problem, gear, budget, *, dtype=torch.bfloat16, **options):
    wants, rows = GEARS[gear], int((problem.targets != -100).sum())
    return wk.plan(
        rows,
        problem.shape.hidden,
        problem.shape.vocab,
        dtype,
        hidden_grad=wants[0],
        weight_grad=wants[1],
        bias_grad=wants[2] and problem.bias is not None,
        entropy=problem.options["entropy"],
        memory_budget=budget,
        device="cpu",
        total_rows=problem.targets.numel(),
        capped="softcap" in problem.options,
        backend="cuda",
        **options,
    )


def budgets(problem, gear):
    """Return budgets for nothing, for a part where a gear keeps something, for several slabs at once, and for all."""
    least, most = (plan_of(problem, gear, budget).peak_bytes for budget in (NARROW, UNLIMITED))
    found = {}
    for budget in range(least, 3 * most, max(1, (3 * most - least) // 64)):
        plan = plan_of(problem, gear, budget)
        if 0 < plan.slabs_kept < plan.num_slabs:
            found.setdefault("part", budget)
        if plan.walk.slabs_at_once > 1:
            found.setdefault("several", budget)
    return NARROW, *sorted(found.values()), UNLIMITED


@on_both_plans
@pytest.mark.parametrize("gear", FUSED_GEARS)
@pytest.mark.parametrize("variant", ["plain", "bias", "scaled"])
def test_walk(used, planned_for, variant, gear):
    """No kernel reads logits; an upstream on lse as well writes dz from what is kept, or from slabs of logits."""
    problem = replace(Problem(SHAPES["odd"], variant), seen=LOGPS)
    kept, at_once = set(), set()
    for budget in budgets(problem, gear):
        plan = plan_of(problem, gear, budget)
        assert plan.walk.fused
        kept.add(plan.slabs_kept / plan.num_slabs)
        at_once.add(plan.walk.slabs_at_once)
        used.clear()
        check(problem, torch.bfloat16, gear, memory_budget=budget, backend="cuda")
        assert used.keys() <= set(TILES)
        if gear in ("trained", "frozen_body"):
            assert bool(used["tile_exps_backward"]) == (plan.slabs_kept < plan.num_slabs)
            used.clear()
            check(Problem(SHAPES["odd"], variant), torch.bfloat16, gear, memory_budget=budget, backend="cuda")
            assert used["slab_backward"] == plan.num_slabs and not used["tile_exps_backward"]
        elif gear == "frozen_head":
            assert used == {"tile_exps_forward": -(-plan.num_slabs // plan.walk.slabs_at_once)}
            check(Problem(SHAPES["odd"], variant), torch.bfloat16, gear, memory_budget=budget, backend="cuda")
        else:
            assert used == {"tile_forward": 1}
    if gear in ("trained", "frozen_body"):
        assert {0.0, 1.0} < kept  # and one between
    assert len(at_once) > 1 or planned_for == "cpu" or gear == "scoring"


def test_dbias_alone(used):
    problem = replace(Problem(SHAPES["odd"], "bias"), seen=LOGPS)
    for budget in (NARROW, UNLIMITED):
        check(problem, torch.bfloat16, "bias_only", memory_budget=budget, backend="cuda")
    assert used.keys() == set(TILES)


@pytest.mark.parametrize("variant", ["plain", "entropy", "scaled"])
def test_scoring_in_both_dtypes(used, variant):
    for dtype in (torch.bfloat16, torch.float16):
        used.clear()
        problem = Problem(SHAPES["odd"], variant)
        check(problem, dtype, "scoring", memory_budget=None, backend="cuda")
        assert used == {"tile_forward": 1}


@pytest.mark.parametrize(
    ("shape", "variant", "dtype", "gear"),
    [
        ("odd", "entropy", torch.bfloat16, "trained"),
        ("odd", "softcap", torch.bfloat16, "trained"),
        ("odd", "softcap", torch.bfloat16, "scoring"),
        ("blocks", "plain", torch.bfloat16, "trained"),
        ("odd", "plain", torch.float16, "trained"),
        ("odd", "plain", torch.float32, "trained"),
    ],
)
def test_what_is_not_fused_walks_slabs(used, shape, variant, dtype, gear):
    problem = replace(Problem(SHAPES[shape], variant), seen=("logps", "entropy"))
    for budget in (NARROW, UNLIMITED):
        assert not plan_of(problem, gear, budget, dtype=dtype).walk.fused
        check(problem, dtype, gear, memory_budget=budget, backend="cuda")
    assert not used.keys() & set(TILES)


@on_both_plans
@pytest.mark.parametrize("gear", FUSED_GEARS)
def test_the_plan_is_obeyed(gear):
    """FLOPs exactly, bytes as a bound; there is no slab of logits unless dz is written."""
    outputs = (LOGPS, ("logps", "lse")) if gear in ("trained", "frozen_body") else (LOGPS,)
    for shape, variant in ((Shape((4, 40), (8,), 131), "bias"), (Shape((5,), (64,), 1501), "plain")):
        problem = Problem(shape, variant)
        for budget in budgets(problem, gear):
            plan = plan_of(problem, gear, budget)
            for seen in outputs:
                with buffers.recording() as record:
                    replace(problem, seen=seen).run(
                        wk.token_logps, torch.bfloat16, gear, memory_budget=budget, backend="cuda"
                    )
                place = shape, plan.walk, seen, record.by_name
                assert record.flops + tile_flops(problem, plan, seen) == plan.flops, place
                assert record.peak_bytes <= plan.peak_bytes, place
                assert seen != LOGPS or "slab" not in record.by_name


def tile_flops(problem, plan, seen):
    """Return what kernels multiply themselves: all logits of forward, and those of backward unless dz is written."""
    inner, vocab = problem.shape.hidden[0], problem.shape.vocab
    columns = vocab
    if plan.gear in ("trained", "frozen_body") and seen == LOGPS:
        columns += vocab - plan.walk.kept_columns(vocab)
    return 2 * plan.rows * inner * columns


@pytest.mark.parametrize("gear", ["frozen_head", "trained"])
def test_retain_graph(gear):
    """A second backward finds what forward kept as the first did."""
    problem = Problem(SHAPES["odd"], "bias")
    for budget in budgets(problem, gear):
        wants = GEARS[gear]
        leaves = [
            value.bfloat16().requires_grad_(want)
            for value, want in zip((problem.hidden[0], problem.weight[0], problem.bias), wants, strict=True)
        ]
        options = {"bias": leaves[2], "memory_budget": budget, "backend": "cuda"}
        loss = wk.token_logps(leaves[0], leaves[1], problem.targets, **options).logps.sin().sum()
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        first = torch.autograd.grad(loss, wanted, retain_graph=True)
        second = torch.autograd.grad(loss, wanted)
        assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize("gear", WANTS)
def test_fused_loss(used, gear):
    groups = Groups(groups=3)
    exact = groups.run(naive.fused_loss, torch.float64, WANTS[gear], rounded_to=torch.bfloat16)
    plain = groups.run(naive.fused_loss, torch.bfloat16, WANTS[gear])
    for budget in (0, 200_000, None):
        ours = groups.run(wk.fused_loss, torch.bfloat16, WANTS[gear], memory_budget=budget, backend="cuda")
        for place, (value, want, own) in enumerate(zip(ours, exact, plain, strict=True)):
            assert_within(value, want, own, torch.bfloat16, f"result {place} at budget {budget}")
    assert used and used.keys() <= set(TILES)


def compare_with_rounded(hidden, weight, targets, wanted, run):
    """Compare log-probs and gradients with those of the specification for operands rounded to bfloat16."""
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        pair = [value.detach().bfloat16().to(dtype).requires_grad_() for value in (hidden, weight)]
        results.append(gradients(naive.token_logps(*pair, targets)[0], pair[:wanted]))
    exact, plain = results
    for place, (got, want, own) in enumerate(zip(run(), exact, plain, strict=True)):
        assert_within(got, want, own, torch.bfloat16, f"result {place}")


def gradients(logps, leaves):
    upstream = torch.cos(torch.arange(logps.numel(), dtype=logps.dtype))
    return [logps.detach(), *torch.autograd.grad((logps * upstream).sum(), leaves)]


@pytest.mark.parametrize("wanted", [1, 2])
def test_a_float32_head_under_autocast_is_cast_slab_by_slab(used, wanted):
    hidden, weight = torch.randn(33, 24), 0.5 * torch.randn(1003, 24)
    targets = torch.randint(0, 1003, (33,))
    leaves = [hidden.requires_grad_(), weight.requires_grad_(wanted == 2)]
    for budget in (NARROW, UNLIMITED):
        plan = wk.plan(
            33,
            24,
            1003,
            torch.bfloat16,
            weight_grad=wanted == 2,
            hidden_dtype=torch.float32,
            weight_dtype=torch.float32,
            memory_budget=budget,
            device="cpu",
            backend="cuda",
        )

        def run(budget=budget):
            with torch.autocast("cpu", torch.bfloat16):
                out = wk.token_logps(*leaves, targets, memory_budget=budget, backend="cuda")
            return gradients(out.logps, leaves[:wanted])

        used.clear()
        with buffers.recording() as record:
            compare_with_rounded(hidden, weight, targets, wanted, run)
        assert plan.walk.fused and used["tile_exps_forward"] + used["tile_forward"] == plan.num_slabs
        assert used.keys() <= set(TILES)
        assert record.peak_bytes <= plan.peak_bytes


@pytest.mark.parametrize("layout", ["transposed", "every other row"])
@pytest.mark.parametrize("wanted", [1, 2])
def test_a_head_the_copy_engine_cannot_read(used, wanted, layout):
    """A transposed head is copied slab by slab; every other row of a longer one is read in place."""
    hidden, targets = torch.randn(33, 24).bfloat16(), torch.randint(0, 1003, (33,))
    weight = 0.5 * torch.randn(1003, 24)
    weight = (weight.t().bfloat16().t() if layout == "transposed" else weight.repeat(2, 1).bfloat16()[::2]).detach()
    leaves = [hidden.requires_grad_(), weight.requires_grad_(wanted == 2)]
    for budget in (NARROW, UNLIMITED):

        def run(budget=budget):
            out = wk.token_logps(*leaves, targets, memory_budget=budget, backend="cuda")
            return gradients(out.logps, leaves[:wanted])

        compare_with_rounded(hidden, weight, targets, wanted, run)
    assert used and used.keys() <= set(TILES)


@pytest.mark.parametrize("gear", ["scoring", "frozen_head"])
def test_the_plan_is_obeyed_where_the_head_is_copied(gear):
    """As a view into a flat parameter can be, whose rows are not aligned to 16 bytes."""
    weight, targets = torch.randn(1003 * 24 + 1).bfloat16()[1:].view(1003, 24), torch.randint(0, 1003, (8,))
    hidden = torch.randn(8, 24).bfloat16().requires_grad_(gear == "frozen_head")
    plan = wk.plan(
        8,
        24,
        1003,
        torch.bfloat16,
        hidden_grad=gear == "frozen_head",
        weight_grad=False,
        memory_budget=100_000,
        device="cpu",
        head_in_place=False,
        backend="cuda",
    )
    with buffers.recording() as record:
        logps = wk.token_logps(hidden, weight, targets, memory_budget=100_000, backend="cuda").logps
        if logps.requires_grad:
            logps.sum().backward()
    assert record.peak_bytes <= plan.peak_bytes, (record.peak_bytes, plan.peak_bytes, record.by_name)


@pytest.mark.parametrize(
    ("rows", "vocab", "gear", "narrow", "ignored"),
    [
        (64, 33000, "frozen_head", "weight", 0),  # several slabs of the head in one product
        (64, 40000, "scoring", "weight", 0),
        (1024, 3000, "scoring", "hidden", 1),
    ],
)
def test_the_plan_is_obeyed_where_operands_are_cast(used, rows, vocab, gear, narrow, ignored):
    """Under autocast a float32 head is cast slab by slab, and hidden states as their rows are copied."""
    dtypes = {f"{name}_dtype": torch.float32 if name == narrow else torch.bfloat16 for name in ("hidden", "weight")}
    hidden, weight = torch.zeros(rows, 64, dtype=dtypes["hidden_dtype"]), torch.zeros(vocab, 64)
    weight = weight.to(dtypes["weight_dtype"])
    targets = torch.zeros(rows, dtype=torch.int64)
    targets[:ignored] = -100
    with buffers.recording() as record, torch.autocast("cpu", torch.bfloat16):
        hidden.requires_grad_(gear == "frozen_head")
        logps = wk.token_logps(hidden, weight, targets, backend="cuda").logps
        if logps.requires_grad:
            logps.sum().backward()
    sizes = rows - ignored, 64, vocab, torch.bfloat16
    grads = {"hidden_grad": gear == "frozen_head", "weight_grad": False}
    plan = wk.plan(*sizes, **grads, **dtypes, total_rows=rows, device="cpu", backend="cuda")
    assert used.keys() <= set(TILES) and plan.walk.fused
    assert record.peak_bytes <= plan.peak_bytes, (record.peak_bytes, plan.peak_bytes, record.by_name)


def test_hidden_states_that_are_copied_are_copied_once():
    """The kernels of both directions read one copy of rows that are not aligned, and the op's plan counts it."""
    hidden = torch.randn(512 * 64 + 1).bfloat16()[1:].view(512, 64).requires_grad_()
    weight, targets = torch.randn(3000, 64).bfloat16().requires_grad_(), torch.zeros(512, dtype=torch.int64)
    with buffers.recording() as record:
        logps = wk.token_logps(hidden, weight, targets, memory_budget=0, backend="cuda").logps
        logps.sum().backward()
    plan = wk.plan(512, 64, 3000, torch.bfloat16, total_rows=513, memory_budget=0, device="cpu", backend="cuda")
    assert record.peak_bytes <= plan.peak_bytes
    assert "cast" not in record.by_name and record.by_name["compact"] == 512 * 64 * 2


@pytest.mark.parametrize(("cut", "in_place"), [(None, False), ("vocab_parallel", True), ("streamed", False)])
def test_ranks_plan_alike_whatever_the_addresses_of_their_parts(cut, in_place):
    """A streamed head is read slab by slab; nothing else depends on where a rank's part lies."""
    weight = [torch.zeros(3 * 8 + 1).bfloat16()[1:].view(3, 8)]
    given = SimpleNamespace(streams=cut == "streamed")
    found = SimpleNamespace(weight=weight, backend="cuda", cut=None if cut is None else given, streams=given.streams)
    assert inputs.Inputs.head_in_place.fget(found) is in_place
    found.weight = [torch.zeros(3, 8).bfloat16()]
    assert inputs.Inputs.head_in_place.fget(found) is (in_place or cut is None)


@pytest.mark.parametrize("gear", ["scoring", "frozen_head", "trained"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_ignored_rows_that_are_kept(monkeypatch, gear, poison):
    """As in a compiler: what they hold reaches no result, bit for bit."""
    monkeypatch.setattr(inputs, "must_keep_rows", lambda targets: True)
    clean = replace(Problem(Shape((33,), (24,), 1003), "bias"), seen=LOGPS)
    for budget in (NARROW, UNLIMITED):
        options = {"memory_budget": budget, "backend": "cuda"}
        got = replace(poisoned(clean, poison), seen=LOGPS)
        broken = clean.targets == -100
        got.hidden[0][broken] = torch.where(torch.arange(24) == 3, poison, 0.5).double()
        same_bits(
            got.run(wk.token_logps, torch.bfloat16, gear, **options),
            clean.run(wk.token_logps, torch.bfloat16, gear, **options),
        )


@pytest.mark.parametrize("gear", FUSED_GEARS)
def test_nothing_scored_and_no_rows(gear):
    for lead in ((0,), (2, 3)):
        problem = Problem(Shape(lead, (8,), 37), "bias")
        problem.targets.fill_(-100)
        for max_scored in (None, 3):
            results = problem.run(wk.token_logps, torch.bfloat16, gear, max_scored=max_scored, backend="cuda")
            assert all(torch.equal(value, torch.zeros_like(value)) for value in results.values())


@pytest.mark.parametrize("gear", ["frozen_head", "trained"])
def test_logits_far_apart(gear):
    """Pivots move between slabs and at the end of forward."""
    problem = replace(Problem(Shape((24,), (48,), 1003), "plain"), seen=LOGPS)
    problem.hidden = [12.0 * block for block in problem.hidden]
    for budget in budgets(problem, gear):
        check(problem, torch.bfloat16, gear, memory_budget=budget, backend="cuda")
