"""Jobs of the processes in tests/sharding/ (see tests/distributed_tools.py): checks that return what failed."""

from __future__ import annotations

import hashlib
import runpy
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from cases import GEARS, NARROW, SHAPES, UNLIMITED, VARIANTS, Problem, Shape
from tolerances import assert_within

import windkern as wk
from windkern.kernels import buffers


class Checks:
    """Runs checks and keeps the first lines of each failure; a rank that fails continues, as the others do."""

    def __init__(self):
        self.failed: list[str] = []
        self.count = 0

    def run(self, name: str, check: Callable[..., None], *args, **options) -> None:
        self.count += 1
        try:
            check(*args, **options)
        except Exception as error:
            self.failed.append(f"{name}: {error!r:.600} {traceback.format_exc()[-600:]}")

    def report(self) -> dict:
        return {"failed": self.failed, "count": self.count}


def assert_passed(ranks: list[dict], least: int) -> None:
    """Assert that no rank failed a check, and that one rank ran at least this many."""
    for rank, report in enumerate(ranks):
        assert not report["failed"], f"rank {rank}: " + "\n".join(report["failed"])
    assert max(report["count"] for report in ranks) >= least


def layouts(vocab: int, ranks: int) -> Iterator[list[tuple[int, int]]]:
    """Return the start and end of each rank's rows: nearly even, one rank without rows, in another order of ranks."""
    if ranks == 1:
        yield [(0, vocab)]
        return
    step = -(-vocab // ranks)
    yield [(min(vocab, r * step), min(vocab, (r + 1) * step)) for r in range(ranks)]
    first = vocab // 3
    yield [(0, 0)] * (ranks - 2) + [(first, vocab), (0, first)]


@dataclass
class Cut:
    """Calls ops on this rank's rows of a whole head and gathers the whole gradient."""

    layout: list[tuple[int, int]]
    group: dist.ProcessGroup
    op: Callable = wk.token_logps

    def head(self, weight, bias):
        start, stop = self.layout[self.group.rank()]
        single = not isinstance(weight, tuple)
        blocks = tuple(
            wk.sharding.vocab_parallel(block[start:stop], self.group, start)
            for block in ((weight,) if single else weight)
        )
        return blocks[0] if single else blocks, None if bias is None else bias[start:stop]

    def __call__(self, hidden, weight, targets, *, bias=None, **options):
        head, bias = self.head(weight, bias)
        return self.op(hidden, head, targets, bias=bias, **options)


def whole(results: dict, group: dist.ProcessGroup) -> dict:
    """Return the result with the head's gradients summed over the ranks, each of which has some of the rows."""
    for name, value in results.items():
        if name.startswith(("dweight", "dbias")):
            wide = value.double()
            dist.all_reduce(wide, group=group)
            results[name] = wide.to(value.dtype)
    return results


def digest(values: dict) -> str:
    names = [name for name in values if not name.startswith(("dweight", "dbias"))]
    return hashlib.sha256(
        b"".join(values[name].contiguous().view(torch.uint8).numpy().tobytes() for name in names)
    ).hexdigest()


def assert_one_value(value: str, group: dist.ProcessGroup) -> None:
    found = [None] * group.size()
    dist.all_gather_object(found, value, group=group)
    assert len(set(found)) == 1, "ranks differ in bits"


def parity(problem: Problem, dtype: torch.dtype, gear: str, cut: Cut, **options) -> None:
    """The check of tests/ops/test_logprobs.py, on all ranks of the group."""
    ours = whole(problem.run(cut, dtype, gear, **options), cut.group)
    assert_one_value(digest(ours), cut.group)
    exact, plain = problem.exact(dtype, gear), problem.plain(dtype, gear)
    assert ours.keys() == exact.keys()
    apart = 1 + float(exact["entropy"].max()) if gear == "frozen_head" and "entropy" in exact else 1.0
    for name, value in ours.items():
        cancellation = apart if name.startswith("dhidden") and dtype == torch.float32 else 1.0
        assert_within(value, exact[name], plain[name], dtype, name, cancellation=cancellation)


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def gears(checks: Checks, group: dist.ProcessGroup, dtypes: tuple[torch.dtype, ...]) -> None:
    """Every variant and gear; with a single dtype, layouts, budgets and choices of upstreams take turns."""
    for variant in VARIANTS:
        for gear in GEARS:
            if gear == "bias_only" and not VARIANTS[variant]["bias"]:
                continue
            shape = SHAPES["blocks" if variant in ("plain", "all") else "odd"]
            for k, dtype in enumerate(dtypes):
                problem = Problem(shape, variant)
                budget = (NARROW, problem.middle_budget(dtype, gear), UNLIMITED)[(k + checks.count) % 3]
                cases = [
                    (layout, seen)
                    for layout in layouts(shape.vocab, group.size())
                    for seen in (problem.seen, ("logps",))
                    if gear != "scoring" or seen == problem.seen
                ]
                for layout, seen in cases if len(dtypes) > 1 else [cases[checks.count % len(cases)]]:
                    some = replace(problem, seen=seen)
                    name = f"{variant} {gear} {dtype} {budget} {layout} {seen}"
                    checks.run(name, parity, some, dtype, gear, Cut(layout, group), memory_budget=budget)


def one_rank(checks: Checks, group: dist.ProcessGroup) -> None:
    """Sharded over one rank: the bits of the whole head."""
    cut = Cut([(0, SHAPES["odd"].vocab)], group)
    for variant in ("plain", "all"):
        for gear in GEARS:
            for budget in (NARROW, UNLIMITED):
                for seen in (("logps",), Problem.seen):
                    problem = Problem(SHAPES["odd"], variant, seen=seen)

                    def same(problem=problem, gear=gear, budget=budget):
                        ours = problem.run(cut, torch.bfloat16, gear, memory_budget=budget)
                        alone = problem.run(wk.token_logps, torch.bfloat16, gear, memory_budget=budget)
                        assert all(torch.equal(ours[name], alone[name]) for name in alone)

                    if gear != "bias_only" or problem.bias is not None:
                        checks.run(f"one rank, {variant} {gear} {budget} {seen}", same)


def far_apart(group: dist.ProcessGroup, dtype: torch.dtype, gap: float, gear: str, budget: int) -> None:
    """The target on a rank whose logits are all `gap` below another's, and above them."""
    problem = Problem(replace(SHAPES["odd"], vocab=301), "bias", seen=("logps",), ignore=False)
    problem.bias[100:] += gap
    problem.targets.view(-1)[::2] = 5
    problem.targets.view(-1)[1::2] = 200
    if gap > 50:  # plain torch also returns the logit of the target there
        problem.bias[1] = -30.0
    layout = [(0, 0)] * (group.size() - 2) + [(0, 100), (100, 301)]
    parity(problem, dtype, gear, Cut(layout, group), memory_budget=budget)


def pivots(checks: Checks, group: dist.ProcessGroup) -> None:
    for gap in (25.0, 39.0, 200.0, -200.0):
        for gear in ("frozen_head", "trained"):
            for dtype, budget in ((torch.float32, NARROW), (torch.bfloat16, UNLIMITED), (torch.float64, UNLIMITED)):
                name = f"gap {gap} {gear} {dtype} {budget}"
                checks.run(name, far_apart, group, dtype, gap, gear, budget)


def masked(group: dist.ProcessGroup) -> None:
    """A bias of -inf on the whole part of one rank, and on everything but the target."""
    for open_entries in (slice(150, 301), slice(200, 201)):
        problem = Problem(replace(SHAPES["odd"], vocab=301), "bias", seen=("logps",))
        mask = torch.full_like(problem.bias, -torch.inf)
        mask[open_entries] = 0.0
        problem.bias = problem.bias.nan_to_num(neginf=0.0) + mask
        problem.targets[problem.targets >= 0] = 200
        layout = [(0, 150), (150, 301)] + [(301, 301)] * (group.size() - 2)
        for gear in ("scoring", "frozen_head", "trained"):
            for budget in (NARROW, UNLIMITED):
                parity(problem, torch.float32, gear, Cut(layout, group), memory_budget=budget)


def nothing_open(group: dist.ProcessGroup) -> None:
    problem = Problem(replace(SHAPES["odd"], vocab=301), "bias")
    problem.bias.fill_(-torch.inf)
    layout = [(0, 150), (150, 301)] + [(301, 301)] * (group.size() - 2)
    assert_raises(
        ValueError,
        "bias masks every vocabulary entry",
        lambda: problem.run(Cut(layout, group), torch.float32, "trained"),
    )


def assert_raises(kind: type, words: str, call: Callable[[], object]) -> None:
    try:
        call()
    except kind as error:
        assert words in str(error), f"{words!r} is not in {error}"
    else:
        raise AssertionError(f"nothing was raised, {kind.__name__} with {words!r} was to be")


def assert_caught(ranks: float) -> None:
    assert ranks, "the fault was not seen"


def retained(group: dist.ProcessGroup) -> None:
    """Upstreams on logps, lse and logps again through one graph: both passes of logps give equal bits."""
    problem = Problem(SHAPES["odd"], "plain")
    hidden, weight = problem.hidden[0].float().requires_grad_(), problem.weight[0].float().requires_grad_()
    (layout, *_) = layouts(weight.shape[0], group.size())
    out = Cut(layout, group)(hidden, weight, problem.targets)
    passes = [torch.autograd.grad(part.sum(), (hidden, weight), retain_graph=True) for part in (out[0], out[1], out[0])]
    assert all(torch.equal(one, two) for one, two in zip(passes[0], passes[2], strict=True))
    exact = wk.naive.token_logps(hidden, weight, problem.targets)
    torch.testing.assert_close(passes[1][0], torch.autograd.grad(exact[1].sum(), hidden)[0], rtol=1e-4, atol=1e-4)


def batch_invariant(group: dist.ProcessGroup) -> None:
    problem = Problem(SHAPES["odd"], "all", ignore=False)
    (layout, *_) = layouts(problem.shape.vocab, group.size())
    cut = Cut(layout, group)
    hidden, weight = problem.hidden[0].float().flatten(0, 1), problem.weight[0].float()
    options = {**problem.options, "bias": problem.bias.float(), "batch_invariant": True}
    targets = problem.targets.flatten()
    every = cut(hidden, weight, targets, **options)
    trained = cut(hidden.clone().requires_grad_(), weight.clone().requires_grad_(), targets, **options)
    for rows in (slice(0, 1), slice(7, 30), slice(20, None)):
        some = cut(hidden[rows], weight, targets[rows], memory_budget=NARROW, **options)
        for one, two, three in zip(some, every, trained, strict=True):
            assert torch.equal(one, two[rows]) and torch.equal(one, three[rows])


def no_rows(group: dist.ProcessGroup) -> None:
    for lead in ((0,), (2, 3)):
        problem = Problem(replace(SHAPES["odd"], lead=lead, vocab=37), "all")
        problem.targets.fill_(-100)
        (layout, *_) = layouts(37, group.size())
        for gear in GEARS:
            results = problem.run(Cut(layout, group), torch.float32, gear)
            assert all(torch.equal(value, torch.zeros_like(value)) for value in results.values())


def ignored_rows_hold_nan(group: dist.ProcessGroup) -> None:
    problem = Problem(SHAPES["odd"], "all")
    (layout, *_) = layouts(problem.shape.vocab, group.size())
    ignored = problem.targets == -100
    for gear in ("frozen_head", "trained"):
        for bound in (None, problem.targets.numel()):
            before = problem.run(Cut(layout, group), torch.float32, gear, max_scored=bound)
            problem.hidden[0][ignored] = torch.nan
            after = problem.run(Cut(layout, group), torch.float32, gear, max_scored=bound)
            problem.hidden[0][ignored] = 0.0
            assert all(torch.equal(before[name], after[name]) for name in before)


def other_ops(group: dist.ProcessGroup) -> None:
    """sequence_logps and fused_loss, the head as a windkern.Head, in one chunk and in several."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(4, 3, 6, 12, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(333, 12, generator=generator, dtype=torch.float64).requires_grad_()
    bias = torch.randn(333, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.randint(0, 333, (4, 3, 6), generator=generator)
    targets[:, :, :2] = -100
    for layout in layouts(333, group.size()):
        cut = Cut(layout, group)
        part, local_bias = cut.head(weight, bias)
        head = wk.Head(part, local_bias, softcap=7.0).at_temperature(0.8)

        def loss_fn(logps):
            return logps.softmax(-1).square().sum(-1)

        given = {"bias": bias, "softcap": 7.0, "temperature": 0.8}
        exact = wk.naive.fused_loss(loss_fn, hidden, weight, targets, **given)
        wanted = torch.autograd.grad(exact, (hidden, weight, bias))
        torch.testing.assert_close(
            wk.sequence_logps(hidden, head, targets), wk.naive.sequence_logps(hidden, weight, targets, **given)
        )
        for budget in (0, 60_000, None):
            loss = wk.fused_loss(loss_fn, hidden, head, targets, memory_budget=budget)
            torch.testing.assert_close(loss, exact)
            got = torch.autograd.grad(loss, (hidden, weight, bias))
            assert_one_value(digest({"dhidden": got[0]}), group)
            dist.all_reduce(got[1], group=group), dist.all_reduce(got[2], group=group)
            for mine, other in zip(got, wanted, strict=True):
                torch.testing.assert_close(mine, other)


def lower_reduce_dtype(group: dist.ProcessGroup) -> None:
    problem = Problem(SHAPES["odd"], "plain")
    hidden, weight = problem.hidden[0].bfloat16().requires_grad_(), problem.weight[0].bfloat16()
    start, stop = next(layouts(weight.shape[0], group.size()))[group.rank()]
    gradients = []
    for dtype in (None, torch.bfloat16):
        head = wk.sharding.vocab_parallel(weight[start:stop], group, reduce_dtype=dtype)
        logps = wk.token_logps(hidden, head, problem.targets).logps
        gradients += torch.autograd.grad(logps.sum(), hidden)
    assert not torch.equal(*gradients)
    torch.testing.assert_close(*gradients, rtol=0.05, atol=0.05)


def dtensor(group: dist.ProcessGroup) -> None:
    """A DTensor, uneven and with an empty part: its gradient is a DTensor sharded in the same way."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (group.size(),))
    for vocab in (2 * group.size() - 1, 5, 1):
        generator = torch.Generator().manual_seed(vocab)
        weight = torch.randn(vocab, 6, generator=generator, dtype=torch.float64)
        hidden = torch.randn(7, 6, generator=generator, dtype=torch.float64).requires_grad_()
        bias = torch.randn(vocab, generator=generator, dtype=torch.float64)
        targets = torch.randint(0, vocab, (7,), generator=generator)
        cut = torch.nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
        cut_bias = torch.nn.Parameter(distribute_tensor(bias, mesh, [Shard(0)]))
        head = wk.sharding.vocab_parallel(cut)
        for _ in range(2):  # the object is used for more than one step
            cut.grad = cut_bias.grad = hidden.grad = None
            wk.token_logps(hidden, head, targets, bias=cut_bias).logps.square().sum().backward()
        leaves = hidden.detach().requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
        exact = wk.naive.token_logps(leaves[0], leaves[1], targets, bias=leaves[2])[0].square().sum()
        wanted = torch.autograd.grad(exact, leaves)
        got = hidden.grad, cut.grad.full_tensor(), cut_bias.grad.full_tensor()
        for mine, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(mine, other)
    whole_weight = distribute_tensor(weight.detach(), mesh, [Replicate()])
    assert_raises(TypeError, "Shard(dim=0)", lambda: wk.sharding.vocab_parallel(whole_weight))
    assert_raises(ValueError, "start must be", lambda: wk.sharding.vocab_parallel(cut, start=77))


def fuzzed(trial: int) -> tuple[Problem, torch.dtype, str, dict, torch.Generator]:
    """A random problem, the same on all ranks."""
    generator = torch.Generator().manual_seed(trial)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    variant, gear = list(VARIANTS)[draw(0, len(VARIANTS))], list(GEARS)[draw(0, len(GEARS))]
    gear = "trained" if gear == "bias_only" else gear
    shape = Shape((draw(1, 4), draw(1, 12)), tuple(draw(1, 20) for _ in range(draw(1, 3))), draw(3, 700))
    seen = (Problem.seen, ("logps",))[draw(0, 2)]
    options = {"memory_budget": (NARROW, 50_000, UNLIMITED)[draw(0, 3)], "batch_invariant": bool(draw(0, 2))}
    return Problem(shape, variant, trial, seen=seen), DTYPES[draw(0, 2)], gear, options, generator


def random_layout(vocab: int, ranks: int, generator: torch.Generator) -> list[tuple[int, int]]:
    bounds = [0, *sorted(torch.randint(0, vocab + 1, (ranks - 1,), generator=generator).tolist()), vocab]
    parts = [(bounds[k], bounds[k + 1]) for k in range(ranks)]
    return [parts[k] for k in torch.randperm(ranks, generator=generator).tolist()]


def fuzz(checks: Checks, group: dist.ProcessGroup, trials: range) -> None:
    for trial in trials:
        problem, dtype, gear, options, generator = fuzzed(trial)
        cut = Cut(random_layout(problem.shape.vocab, group.size(), generator), group)
        checks.run(f"fuzz {trial}: {problem.shape}", parity, problem, dtype, gear, cut, **options)


def back_ends(checks: Checks, group: dist.ProcessGroup) -> None:
    """Row kernels of every back end see targets that lie on another rank."""
    layout = [(0, 70), (70, 200)] + [(200, 200)] * (group.size() - 2)
    for name in wk.backends.available("cpu"):
        for variant, gear in (
            ("plain", "frozen_head"),
            ("plain", "trained"),
            ("all", "trained"),
            ("all", "frozen_head"),
        ):
            for seen in (("logps",), Problem.seen):
                for options in ({}, {"batch_invariant": True}):
                    problem = Problem(Shape((2, 5), (12,), 200), variant, seen=seen)
                    what = f"{name} {variant} {gear} {seen} {options}"
                    given = {"memory_budget": 20_000, "backend": name, **options}
                    checks.run(what, parity, problem, torch.float32, gear, Cut(layout, group), **given)


def compiled(group: dist.ProcessGroup) -> None:
    """Whole graphs of torch.compile hold the collectives."""
    start, stop = next(layouts(30, group.size()))[group.rank()]
    weight = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    head = wk.sharding.vocab_parallel(weight[start:stop].clone().requires_grad_(), group)
    hidden = torch.randn(7, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        return wk.token_logps(hidden, head, torch.arange(7) * 4).logps.sum()

    calls = loss, torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = [torch.autograd.grad(call(hidden), (hidden, head.weight)) for call in calls]
    for eager, graph in zip(*found, strict=True):
        torch.testing.assert_close(eager, graph)


def memory(group: dist.ProcessGroup) -> None:
    """A rank takes the memory in the plan of its own rows, and three numbers per row from each rank."""
    rows, size, vocab = 96, 16, 4000
    part = vocab // group.size()
    targets = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(rows, size, generator=torch.Generator().manual_seed(1)).requires_grad_()
    head = wk.sharding.vocab_parallel(torch.randn(part, size).requires_grad_(), group)
    for budget in (0, 1 << 20):
        plan = wk.plan(rows, size, part, torch.float32, device="cpu", memory_budget=budget)
        with buffers.recording() as record:
            wk.token_logps(hidden, head, targets, memory_budget=budget).logps.sum().backward()
        merging = 4 * rows * (3 * group.size() + 6)
        assert record.peak_bytes <= plan.peak_bytes + merging, (record.peak_bytes, plan.peak_bytes, record.by_name)
        assert record.peak_bytes < 4 * rows * part or budget


def vocab_parallel(folder: Path, kind: str) -> dict:
    """Run the checks; `kind` is "some" or "all" of the slow ones."""
    world, checks = dist.group.WORLD, Checks()
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    if kind == "all" or world.size() == 2:
        gears(checks, world, DTYPES if kind == "all" else (torch.bfloat16,))
        one_rank(checks, alone)
    pivots(checks, world)
    if kind == "all":
        checks.run("compiled", compiled, world)
        back_ends(checks, world)
    fuzz(checks, world, range(100 if kind == "all" else 8))
    for check in (
        masked,
        nothing_open,
        retained,
        batch_invariant,
        no_rows,
        ignored_rows_hold_nan,
        other_ops,
        lower_reduce_dtype,
        dtensor,
        memory,
    ):
        checks.run(check.__name__, check, world)
    return checks.report()


def example(folder: Path) -> dict:
    """What examples/vocab_parallel.py trains."""
    path = Path(__file__).parents[1] / "examples" / "vocab_parallel.py"
    losses, logps = runpy.run_path(str(path))["train"](steps=4)
    return {"losses": losses, "bits": digest({"logps": logps})}
