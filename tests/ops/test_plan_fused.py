"""Plans whose kernels multiply and take exponentials at once: which calls they are for, and what they save."""

import dataclasses

import pytest
import torch

import windkern as wk
from windkern import backends, costs
from windkern.kernels import tuned
from windkern.kernels.native import cuda as cuda_rows
from windkern.ops.walk import Walk
from windkern.plan import planned, planned_spec

SIZES = (512, 4096, 128256)
SCORES = {"hidden_grad": False, "weight_grad": False}
FROZEN = {"weight_grad": False}


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """Plan as on a GPU whose CUDA back end multiplies itself."""
    monkeypatch.setattr(cuda_rows, "_why_no_tiles", lambda: None)


def plan(*sizes, dtype=torch.bfloat16, **options):
    return wk.plan(*(sizes or SIZES), dtype, **{"device": "cuda", "backend": "cuda", **options})


def slabs(monkeypatch, *sizes, **options):
    """Return the plan of the same call where a walk needs slabs of logits."""
    with monkeypatch.context() as patch:
        patch.setattr(cuda_rows, "_why_no_tiles", lambda: "the test wants slabs")
        return plan(*sizes, **options)


@pytest.mark.parametrize(
    ("options", "fused"),
    [
        ({}, True),
        (FROZEN, True),
        ({"hidden_grad": False}, True),
        ({"hidden_grad": False, "weight_grad": False, "bias_grad": True}, True),
        ({"bias_grad": True}, True),
        (SCORES, True),
        ({**SCORES, "entropy": True}, True),
        ({**SCORES, "dtype": torch.float16}, True),
        ({"weight_dtype": torch.float32}, True),
        ({"hidden_dtype": torch.float32, "total_rows": 9000}, True),
        ({"group_rows": 128}, True),
        ({"entropy": True}, False),
        ({**FROZEN, "entropy": True}, False),
        ({"capped": True}, False),
        ({**SCORES, "capped": True}, False),
        ({"dtype": torch.float16}, False),
        ({**FROZEN, "dtype": torch.float16}, False),
        ({"dtype": torch.float32}, False),
        ({**SCORES, "dtype": torch.float32}, False),
        ({"batch_invariant": True}, False),
        ({**SCORES, "batch_invariant": True}, False),
        ({"backend": "triton"}, False),
        ({"backend": "torch"}, False),
        ({"device": "cpu"}, False),  # products of bfloat16 are widened there
    ],
    ids=str,
)
def test_which_calls_are_fused(monkeypatch, options, fused):
    if options.get("device") == "cpu":
        monkeypatch.setattr("windkern.kernels.cpu_products.PRODUCT", None)
    assert plan(**options).walk.fused == fused
    assert not slabs(monkeypatch, **options).walk.fused


def test_sizes_that_are_not_fused():
    assert plan(512, 4096, 1000).walk.fused and not plan(512, 4097, 1000).walk.fused
    assert not plan(512, (4096, 16), 1000).walk.fused


@pytest.mark.parametrize("options", [{}, FROZEN, SCORES], ids=["trained", "frozen head", "scoring"])
def test_no_slab_of_logits_is_planned(monkeypatch, options):
    """Wider slabs take 2 bytes more for each exponential that is multiplied next, and no others for its logit."""
    rows, more = 2048, 16384 - 256
    problem = plan(rows, 4096, 128256, **options).problem
    narrow, wide = problem.spec(256, 0), problem.spec(16384, 0)
    statistics = rows * more // 256 * 12 if options is FROZEN else 0
    exponentials = 2 * rows * more if options is FROZEN else 0
    vectors = problem.forward_bytes(wide) - problem.forward_bytes(narrow) - exponentials - statistics
    assert 0 <= vectors <= 16 * more
    if not options:
        assert 0 <= problem._exps_bytes(wide) - problem._exps_bytes(narrow) - 2 * rows * more <= 4 * 4096 * more
    without = dataclasses.replace(problem, walk=dataclasses.replace(problem.walk, fused=False))
    grown = without.forward_bytes(without.spec(16384, 0)) - without.forward_bytes(without.spec(256, 0))
    assert grown >= exponentials + 4 * rows * more


@pytest.mark.parametrize("rows", [512, 2048, 16384])
@pytest.mark.parametrize("options", [{}, FROZEN, SCORES], ids=["trained", "frozen head", "scoring"])
def test_a_fused_plan_is_the_better_one(monkeypatch, rows, options):
    for budget in (None, 1 << 40):
        fused = plan(rows, 4096, 128256, memory_budget=budget, **options)
        plain = slabs(monkeypatch, rows, 4096, 128256, memory_budget=budget, **options)
        assert fused.seconds < plain.seconds and fused.flops <= plain.flops
    # Statistics of tiles are 12 bytes for 256 logits, however small the budget.
    fused, plain = (
        plan(rows, 4096, 128256, memory_budget=0, **options),
        slabs(monkeypatch, rows, 4096, 128256, memory_budget=0, **options),
    )
    assert fused.peak_bytes <= plain.peak_bytes + 12 * rows * 502


def test_scoring_takes_one_span_however_small_the_budget(monkeypatch):
    head = torch.empty(5001, 64, dtype=torch.bfloat16)
    for budget in (0, None):
        fused = plan(300, 64, 5001, memory_budget=budget, **SCORES)
        walk = Walk(fused.walk, cuda_rows, None)
        assert walk.spans([head]) == [(0, 5001)]
        # A head that is cast, or that the copy engine cannot read, comes slab by slab.
        for other in (head.float(), head.t().contiguous().t()):
            assert walk.spans([other]) == fused.walk.slabs(5001)
    plain = Walk(slabs(monkeypatch, 300, 64, 5001, memory_budget=0, **SCORES).walk, cuda_rows, None)
    assert len(plain.spans([head])) > 1
    # Statistics of all tiles, and 18 numbers a row: a 60th of the logits.
    assert plan(4096, 4096, 128256, **SCORES).peak_bytes < 4 * 4096 * 128256 / 60


def test_a_walk_that_keeps_a_part_takes_two_spans():
    head = torch.empty(40000, 64, dtype=torch.bfloat16)
    for budget in range(0, 1 << 28, 1 << 22):
        made = plan(1024, 64, 40000, memory_budget=budget)
        kept = made.walk.kept_columns(40000)
        spans = Walk(made.walk, cuda_rows, None).spans([head])
        assert spans == [(start, stop) for start, stop in ((0, kept), (kept, 40000)) if start < stop]
        if len(spans) == 2:
            break
    assert len(spans) == 2
    assert Walk(made.walk, cuda_rows, None).spans([head.float()]) == made.walk.slabs(40000)


def test_a_head_that_is_cast_is_planned_slab_by_slab():
    """A cast copy of the whole head is never made."""
    made = plan(512, 4096, 128256, weight_dtype=torch.float32, **SCORES)
    assert made.num_slabs > 1 and made.peak_bytes < 2 * 128256 * 4096
    assert plan(512, 4096, 128256, **SCORES).num_slabs == 1


def test_budget_is_respected_whenever_it_can_be():
    for options in ({}, FROZEN, SCORES, {"bias_grad": True}, {"weight_dtype": torch.float32}):
        smallest = plan(2048, 576, 49152, memory_budget=0, **options).peak_bytes
        for budget in (smallest, smallest + (16 << 20), 256 << 20, 1 << 30):
            assert plan(2048, 576, 49152, memory_budget=budget, **options).peak_bytes <= max(smallest, budget)


def test_kept_plans_are_not_those_of_another_gpu(monkeypatch):
    """The arguments are the same, the kernels of the current GPU are not."""
    asked = {"dtype": torch.bfloat16, "device": "cuda", "backend": "cuda", "batch_invariant": False}
    found = []
    for problem in (None, "another GPU", None):
        monkeypatch.setattr(cuda_rows, "_why_no_tiles", lambda problem=problem: problem)
        made = plan(512, 64, 3000)
        assert planned_spec(512, (64,), 3000, memory_budget=None, **asked) == made.walk.values()
        assert planned(512, (64,), 3000, memory_budget=None, **asked).walk == made.walk
        found.append(made.walk.fused)
    assert found == [True, False, True]


def test_the_price_of_a_fused_walk():
    """Row kernels neither read logits nor lose time to narrow slabs."""
    fused = plan(8192, 4096, 128256)
    problem = fused.problem
    without = dataclasses.replace(problem, walk=dataclasses.replace(problem.walk, fused=False))
    for width in (2048, 16384):
        spec = problem.spec(width, 0)
        plain = without.spec(width, 0)
        saved = without.seconds(plain) - problem.seconds(spec)
        # Forward and backward read 4 bytes of each logit, and write them in products that are not counted.
        assert saved >= 2 * 4 * 8192 * 128256 / costs.GPU.bytes * 0.9


def test_calls_that_can_run_in_tiles_prefer_another_back_end():
    """On a Hopper GPU the CUDA back end multiplies 16-bit operands itself; other calls take what is best for them."""
    assert tuned.preferred("sm_90", tiles=True) == ("cuda", "triton", "torch")
    assert tuned.preferred("sm_90") == ("triton", "cuda", "torch")
    for arch in ("default", "sm_80", "gfx942"):
        assert tuned.preferred(arch, tiles=True) == tuned.preferred(arch) == ("triton", "cuda", "torch")


@pytest.mark.parametrize(
    ("changed", "fits"),
    [
        ({}, True),
        ({"blocks": 2}, False),
        ({"capped": True}, False),
        ({"batch_invariant": True}, False),
        ({"entropy": True}, False),
        ({"entropy": True, "trains": False}, True),
        ({"dtype": torch.float16}, False),
        ({"dtype": torch.float16, "trains": False}, True),
        ({"dtype": torch.float32}, False),
        ({"dtype": torch.float64, "trains": False}, False),
    ],
)
def test_calls_that_can_run_in_tiles(changed, fits):
    plain = {"blocks": 1, "dtype": torch.bfloat16, "trains": True}
    plain |= {"entropy": False, "capped": False, "batch_invariant": False}
    assert backends.may_fuse(**{**plain, **changed}) is fits


def test_an_op_and_a_plan_choose_the_same_back_end(monkeypatch):
    """What a call asks for decides, since only some can run in tiles."""
    asked = []

    def preferred(device_type, index, dtype, tiles):
        asked.append(tiles)
        return "torch"

    monkeypatch.setattr(backends, "_preferred", preferred)
    hidden, weight = torch.randn(5, 8).bfloat16(), torch.randn(11, 8).bfloat16()
    targets = torch.arange(5)
    for trains in (True, False):
        for options in ({}, {"entropy": True}, {"batch_invariant": True}, {"softcap": 3.0}):
            asked.clear()
            wk.token_logps(hidden.requires_grad_(trains), weight, targets, **options)
            capped = {"capped": "softcap" in options, "weight_grad": False, "hidden_grad": trains}
            given = {name: value for name, value in options.items() if name != "softcap"}
            wk.plan(5, 8, 11, torch.bfloat16, device="cpu", **given, **capped)
            assert len(set(asked)) == 1 and len(asked) >= 2, (trains, options, asked)


def test_without_such_a_gpu_a_plan_is_for_the_default():
    if torch.cuda.is_available():
        pytest.skip("plans for the GPU of this machine")
    assert wk.plan(*SIZES, torch.bfloat16).walk.backend == tuned.preferred(tiles=True)[0]


class Extension:
    """A fake extension that knows one GPU."""

    def __init__(self, problem):
        self.problem, self.asked = problem, []

    def tiles_problem(self, index):
        self.asked.append(index)
        return self.problem


def test_reasons_are_told(monkeypatch):
    """The dtype and the size first, then the machine; a GPU is asked once."""
    said = cuda_rows.why_not_tiles(64, torch.float32)
    assert said == "they multiply bfloat16 and float16, not torch.float32"
    said = cuda_rows.why_not_tiles(100, torch.bfloat16)
    assert said == "they need a hidden size that is a multiple of 8, got 100"
    assert cuda_rows.why_not_tiles(64, torch.float16) is None
    assert not backends.fuses("cuda", (100,), torch.bfloat16) and backends.fuses("cuda", (64,), torch.bfloat16)
    assert not backends.fuses("cuda", (64, 64), torch.bfloat16)
    assert not any(backends.fuses(name, (64,), torch.bfloat16) for name in ("cpp", "triton", "torch"))


def test_reasons_of_the_machine(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    older = "its tiles are built for compute capability 9.0, this GPU has 8.0"
    for problem, has_torch in (("", True), (older, True), ("", False)):
        extension = Extension(problem)
        monkeypatch.setattr(cuda_rows, "_cuda", extension)
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_torch=has_torch: has_torch)
        cuda_rows._tiles_problem.cache_clear()
        for _ in range(2):
            reason = cuda_rows.why_not_tiles(64, torch.bfloat16)
            if has_torch:
                assert reason == (problem or None)
            else:
                assert reason == "there is no GPU, or windkern was built without CUDA"
        assert extension.asked == ([3] if has_torch else [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda_rows, "_cuda", None)
    assert cuda_rows.why_not_tiles(64, torch.bfloat16) == "there is no GPU, or windkern was built without CUDA"
    cuda_rows._tiles_problem.cache_clear()
