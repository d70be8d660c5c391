"""Ignored rows never enter a sum: NaN and infinity in them give exact zeros, on every path and back end."""

import pytest
import torch
from cases import GEARS, NARROW, SHAPES, UNLIMITED, Problem, Shape

import windkern as wk
from windkern.kernels.contract import Exps, Kept, RowState, RowStats, Slab, Upstream
from windkern.ops import fused_loss, inputs
from windkern.transform import LogitTransform

POISONS = (torch.nan, torch.inf)


def same_bits(got: dict, want: dict) -> None:
    for name, value in got.items():
        assert torch.equal(value, want[name]), name


def poisoned(problem: Problem, poison: float) -> Problem:
    """Return the same problem with `poison` in all rows that are not scored; the scored rows keep their numbers."""
    other = Problem(problem.shape, problem.variant)
    ignored = other.targets == -100
    for block in other.hidden:
        block[ignored] = poison
    return other


@pytest.fixture(params=["dropped", "bounded", "spare", "room", "kept"])
def path(request, monkeypatch) -> dict:
    """Set the way in which ignored rows are left out: dropped, max_scored (or for all), or kept (in a compiler)."""
    if request.param == "kept":
        monkeypatch.setattr(inputs, "must_keep_rows", lambda targets: True)
    targets = Problem(SHAPES["blocks"]).targets
    scored = int((targets != -100).sum())
    bounds = {"bounded": scored, "spare": scored + 4, "room": targets.numel()}
    return {"max_scored": bounds[request.param]} if request.param in bounds else {}


@pytest.mark.parametrize("gear", GEARS)
@pytest.mark.parametrize("poison", POISONS)
def test_token_logps(backend, path, gear, poison):
    """With bias, softcap and entropy. The clean run takes the same path, so the bits are equal."""
    clean = Problem(SHAPES["blocks"], "all")
    for dtype in (torch.float32, torch.float16):
        for budget in (NARROW, UNLIMITED):
            options = {"memory_budget": budget, "backend": backend, **path}
            got = poisoned(clean, poison).run(wk.token_logps, dtype, gear, **options)
            same_bits(got, clean.run(wk.token_logps, dtype, gear, **options))
            ignored = clean.targets == -100
            for name in got.keys() - {"dweight0", "dweight1", "dbias"}:
                assert torch.equal(got[name][ignored], torch.zeros_like(got[name][ignored])), name


@pytest.mark.parametrize("gear", ["frozen_head", "frozen_body", "trained"])
def test_nothing_scored(backend, path, gear):
    """Where nothing is scored, not even a head full of NaN reaches a gradient."""
    problem = Problem(SHAPES["blocks"], "all")
    problem.targets.fill_(-100)
    for value in (*problem.hidden, *problem.weight, problem.bias):
        value.fill_(torch.nan)
    options = {"max_scored": 4} if path else {}
    for budget in (NARROW, UNLIMITED):
        for name, value in problem.run(
            wk.token_logps, torch.float32, gear, memory_budget=budget, backend=backend, **options
        ).items():
            assert torch.equal(value, torch.zeros_like(value)), name


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("train_head", [False, True])
def test_compiled(train_head):
    hidden, weight = torch.randn(6, 8), torch.randn(11, 8).requires_grad_(train_head)
    hidden[2], hidden[5] = torch.nan, torch.inf
    targets = torch.tensor([1, 2, -100, 3, 4, -100])
    leaves = [hidden.requires_grad_(), *([weight] if train_head else [])]

    def total(hidden):
        out = wk.token_logps(hidden, weight, targets, entropy=True)
        return out.logps.sum() + out.entropy.sum()

    torch._dynamo.reset()
    compiled = torch.compile(total, backend="aot_eager", fullgraph=True)
    got, want = (torch.autograd.grad(function(hidden), leaves) for function in (compiled, total))
    for one, two in zip(got, want, strict=True):
        torch.testing.assert_close(one, two)
    assert torch.equal(got[0][[2, 5]], torch.zeros(2, 8))


@pytest.mark.parametrize("gear", ["frozen_head", "frozen_body", "trained"])
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("way", ["dropped", "bounded", "kept"])
def test_fused_loss(backend, monkeypatch, gear, poison, way):
    """Chunks of one group, where the second group has no scored token, so there is no scored row to point at."""
    if way == "kept":
        monkeypatch.setattr(fused_loss, "must_keep_rows", lambda targets: True)
    problem = Problem(Shape((4, 2, 5), (8,), 301), "bias")
    problem.targets[1] = -100
    ignored, wants = problem.targets == -100, GEARS[gear]
    bound = int((~ignored).sum()) if way == "bounded" else None
    for dtype in (torch.float32, torch.float16):
        results = []
        for fill in (0.0, poison):
            hidden = torch.where(ignored.unsqueeze(-1), fill, problem.hidden[0]).to(dtype).requires_grad_(wants[0])
            weight, bias = (
                value.to(dtype).requires_grad_(wanted)
                for value, wanted in zip((problem.weight[0], problem.bias), wants[1:], strict=True)
            )
            loss = wk.fused_loss(
                lambda logps: logps.square().sum(-1),
                hidden,
                weight,
                problem.targets,
                bias=bias,
                max_scored=bound,
                memory_budget=0,
                backend=backend,
            )
            leaves = [leaf for leaf in (hidden, weight, bias) if leaf.requires_grad]
            results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
        for clean, dirty in zip(*results, strict=True):
            assert torch.equal(clean, dirty) and dirty.isfinite().all()
        if wants[0]:
            assert torch.equal(results[1][1][ignored], torch.zeros_like(results[1][1][ignored]))


def check_row_kernel(kernels, dtype: torch.dtype) -> None:
    """dz of an ignored row, and so its part of dbias, is 0 for any logits and statistics."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows, width = 4, 67
    z = torch.randn(rows, width, dtype=wide)
    targets = torch.tensor([3, -1, 66, -1])
    run_max, sums = z.amax(1), (z - z.amax(1, keepdim=True)).exp().sum(1)
    exponentials, offset = (z - run_max.unsqueeze(1)).exp().to(dtype), run_max.unsqueeze(1).clone()
    stats = RowStats(run_max, sums.log(), z.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1), None)
    for broken in (z, exponentials, offset, *stats[:3]):
        broken[[1, 3]] = torch.nan
    upstream = Upstream(torch.tensor([1.0, 0.0, -2.0, 0.0], dtype=wide), None, None)
    for src, kept_offset in ((z.clone(), None), (exponentials, offset)):
        dz, dbias = torch.empty(rows, width, dtype=dtype), torch.empty(width, dtype=wide)
        slab = Slab(src if kept_offset is None else None, None, targets, 0, LogitTransform())
        kept = None if kept_offset is None else Kept(src, kept_offset)
        kernels.slab_backward(slab, kept, stats, upstream, None, dz, dbias)
        assert torch.equal(dz[[1, 3]], torch.zeros(2, width, dtype=dtype))
        assert dz[[0, 2]].isfinite().all() and dbias.isfinite().all()
    state = RowState(*(torch.full((rows,), start, dtype=wide) for start in (-torch.inf, 0.0, -torch.inf)), None)
    values, pivot = torch.empty(rows, width, dtype=dtype), torch.full((rows,), -torch.inf, dtype=wide)
    slab = Slab(z.clone(), None, targets, 0, LogitTransform())
    kernels.exps_forward(slab, state, Exps(values, pivot, 0, None))
    again = torch.empty_like(values)
    kernels.exps_backward(slab._replace(logits=z.clone()), pivot, torch.ones_like(pivot), again)
    for written in (values, again):
        assert torch.equal(written[[1, 3]], torch.zeros(2, width, dtype=dtype)) and written.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_row_kernel(backend, dtype):
    check_row_kernel(wk.backends.BACKENDS[backend].kernels(), dtype)
