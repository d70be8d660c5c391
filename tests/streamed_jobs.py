"""Streamed heads of FSDP2: run in processes like tests/sharding_jobs.py."""

from __future__ import annotations

import datetime
import functools
import itertools
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from cases import GEARS, NARROW, SHAPES, UNLIMITED, VARIANTS, Problem
from sharding_jobs import DTYPES, Checks, assert_caught, assert_raises, fuzzed
from tolerances import assert_within
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import windkern as wk
from windkern.ops import walk
from windkern.sharding import passing
from windkern.sharding.ranks import Ranks


@dataclass
class Streamed:
    """Calls an op on this rank's rows of a problem, with the head sharded over all ranks, and gathers the results."""

    mesh: DeviceMesh
    keep: tuple[int, ...]  # rows of each rank, of the flattened targets

    @property
    def mine(self) -> slice:
        rank = dist.get_rank()
        return slice(sum(self.keep[:rank]), sum(self.keep[: rank + 1]))

    def __call__(self, hidden, weight, targets, *, bias=None, **options):
        single = not isinstance(weight, tuple)
        blocks = (weight,) if single else weight
        cut = tuple(self.cut(block) for block in blocks)
        shards = tuple(wk.sharding.streamed(block) for block in cut)
        states = (hidden,) if single else hidden
        states = tuple(block.reshape(-1, block.shape[-1])[self.mine] for block in states)
        bias = None if bias is None else self.cut(bias)
        return self.whole(
            wk.token_logps(
                states[0] if single else states,
                shards[0] if single else shards,
                targets.reshape(-1)[self.mine],
                bias=bias,
                **options,
            ),
            targets.shape,
        )

    def cut(self, leaf: Tensor) -> Tensor:
        """Return a DTensor of a whole leaf, whose gradient, a mean over n ranks, returns to the leaf times n."""
        return _Cut.apply(leaf, self.mesh)

    def whole(self, results, shape):
        return tuple(None if part is None else _Joined.apply(part, self.keep).view(shape) for part in results)


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, leaf, mesh):
        return distribute_tensor(leaf.detach(), mesh, [Shard(0)])

    @staticmethod
    def backward(ctx, grad):
        return grad.full_tensor() * dist.get_world_size(), None


class _Joined(torch.autograd.Function):
    """Joins the results of all ranks; each rank receives the gradient of its own result."""

    @staticmethod
    def forward(ctx, part, keep):
        rank = dist.get_rank()
        ctx.mine = slice(sum(keep[:rank]), sum(keep[: rank + 1]))
        parts = [part.new_empty(rows) for rows in keep]
        for owner, each in enumerate(parts):
            each.copy_(part.detach() if owner == rank else each)
            dist.broadcast(each, owner)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.mine], None


def parity(
    problem: Problem, dtype: torch.dtype, gear: str, call: Streamed, *, few_rows: bool = False, **options
) -> None:
    """Values and gradients of all ranks together, like the check of tests/ops/test_logprobs.py.

    `few_rows`: libraries add in sequence to multiply a single row, while plain torch has all rows of the problem.
    """
    ours = problem.run(call, dtype, gear, **options)
    for name, value in ours.items():
        if name.startswith("dhidden"):
            dist.all_reduce(value)
    exact, plain = problem.exact(dtype, gear), problem.plain(dtype, gear)
    apart = 1 + float(exact["entropy"].max()) if gear == "frozen_head" and "entropy" in exact else 1.0
    for name, value in ours.items():
        cancellation = 4.0 if few_rows else 1.0
        if name.startswith("dhidden") and dtype == torch.float32:
            cancellation *= apart
        assert_within(value, exact[name], plain[name], dtype, name, cancellation=cancellation)


def gears(checks: Checks, mesh: DeviceMesh, dtypes: tuple[torch.dtype, ...]) -> None:
    world = dist.get_world_size()
    for variant in VARIANTS:
        for gear in GEARS:
            if gear == "bias_only" and not VARIANTS[variant]["bias"]:
                continue
            shape = SHAPES["blocks" if variant in ("plain", "all") else "odd"]
            rows = torch.Size(shape.lead).numel()
            for k, dtype in enumerate(dtypes):
                problem = Problem(shape, variant)
                budget = (NARROW, problem.middle_budget(dtype, gear), UNLIMITED)[(k + checks.count) % 3]
                keeps = (rows - 5, *[0] * (world - 2), 5), (*[0] * (world - 1), rows)
                for n, keep in enumerate(keeps if len(dtypes) > 1 else keeps[:1]):
                    some = replace(problem, seen=problem.seen if (n + checks.count) % 2 else ("logps",))
                    name = f"{variant} {gear} {dtype} {budget} {keep} {some.seen}"
                    checks.run(name, parity, some, dtype, gear, Streamed(mesh, keep), memory_budget=budget)


VOCAB, WIDTH = 37, 6


class Toy(nn.Module):
    """A body and a head; tied, the head is the embedding."""

    def __init__(self, *, tied: bool = False, bias: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=bias)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.body(self.embed(ids))


def batch(rank: int) -> tuple[Tensor, Tensor]:
    """Return the ids (r + 1, 5) and targets of rank r."""
    random = torch.Generator().manual_seed(rank)
    ids = torch.randint(VOCAB, (rank + 1, 6), generator=random)
    targets = ids[:, 1:].clone()
    targets[:, 0] = -100
    return ids[:, :-1], targets


def trained(kind: str) -> dict[str, Tensor]:
    """Return the loss and whole gradients of two accumulated backward passes of an FSDP2 model and head of `kind`."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    toy = Toy(tied="tied" in kind, bias="bias" in kind).double()
    policy = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)} if "mixed" in kind else {}
    toy = toy.float() if policy else toy
    if "frozen" in kind:
        toy.head.requires_grad_(False)
    fully_shard(toy.body, **policy)
    if "tied" in kind:
        fully_shard(toy, reshard_after_forward=True, **policy)
    else:
        fully_shard(toy.head, **policy)
        fully_shard(toy, **policy)
    losses = []
    for step in range(2):
        ids, targets = batch(dist.get_rank() + step)
        hidden = toy(ids)
        if "gathered" in kind:
            with wk.sharding.gathered(wk.Head(toy.head.weight, toy.head.bias)) as head:
                loss = -wk.token_logps(hidden, head, targets).logps.mean()
        else:
            head = wk.Head(wk.sharding.streamed(toy.head if policy else toy.head.weight), toy.head.bias)
            loss = -wk.token_logps(hidden, head, targets).logps.mean()
        loss.backward()
        losses.append(loss.detach())
    assert toy.head.weight.to_local().shape[0] < VOCAB
    grads = {name: p.grad for name, p in toy.named_parameters() if p.requires_grad}
    assert all(type(grad).__name__ == "DTensor" and grad.placements[0].is_shard(0) for grad in grads.values())
    return {"loss": torch.stack(losses), **{name: grad.full_tensor() for name, grad in grads.items()}}


def as_fsdp2(kind: str) -> None:
    """The results of a gathered head, with its gradients where FSDP2 puts them."""
    ours, whole = trained(f"{kind} streamed"), trained(f"{kind} gathered")
    assert ours.keys() == whole.keys() and ("tied" in kind or "frozen" in kind or "head.weight" in ours)
    for name, value in ours.items():
        # There the gathered head is multiplied in float32, the streamed one in the bfloat16 of the policy.
        rounding = {"rtol": 0.05, "atol": 0.01} if "mixed" in kind else {"rtol": 1e-9, "atol": 1e-12}
        torch.testing.assert_close(value, whole[name], **rounding)
    if "mixed" in kind:
        assert not torch.equal(ours["loss"], whole["loss"])


def fused(mesh: DeviceMesh, groups: tuple[int, ...]) -> None:
    """Ranks with different numbers of groups: in one chunk and in many, with ignored rows, bias and softcap."""
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(sum(groups), 3, 5, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(203, WIDTH, generator=generator, dtype=torch.float64)
    bias = torch.randn(203, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 203, hidden.shape[:3], generator=generator)
    targets[::2, :, :2] = -100
    mine = slice(sum(groups[:rank]), sum(groups[: rank + 1]))

    def loss_fn(logps):
        return logps.softmax(-1).square().sum(-1)

    whole = [each.clone().requires_grad_() for each in (hidden, weight, bias)]
    exact = wk.naive.fused_loss(loss_fn, whole[0], whole[1], targets, bias=whole[2], softcap=7.0, reduction="sum")
    wanted = torch.autograd.grad(exact, whole)
    for budget in (0, 60_000, None):
        for bound in (None, 15):
            leaves = [hidden[mine].clone().requires_grad_()]
            leaves += [nn.Parameter(distribute_tensor(each, mesh, [Shard(0)])) for each in (weight, bias)]
            head = wk.Head(wk.sharding.streamed(leaves[1]), leaves[2], softcap=7.0)
            options = {"memory_budget": budget, "reduction": "sum"}
            if bound is not None:
                options["max_scored"] = bound * max(1, mine.stop - mine.start)
            loss = wk.fused_loss(loss_fn, leaves[0], head, targets[mine], **options)
            loss.backward()
            total = loss.detach()
            dist.all_reduce(total)
            torch.testing.assert_close(total, exact.detach())
            torch.testing.assert_close(leaves[0].grad, wanted[0][mine])
            for leaf, want in zip(leaves[1:], wanted[1:], strict=True):
                torch.testing.assert_close(leaf.grad.full_tensor() * world, want)


def batch_invariant(mesh: DeviceMesh) -> None:
    """Ranks with different numbers of row blocks: a row's bits are those of the whole head."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(4)
    hidden, weight = torch.randn(300, WIDTH, generator=generator), torch.randn(203, WIDTH, generator=generator)
    targets = torch.randint(0, 203, (300,), generator=generator)
    mine = slice(0, 7) if rank == 0 else slice(7, 300 if rank == 1 else 7)
    for gear in ("scoring", "frozen_head", "trained"):
        states = hidden[mine].clone().requires_grad_(gear != "scoring")
        cut = nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]), requires_grad=gear == "trained")
        whole = wk.token_logps(hidden, weight, targets, batch_invariant=True).logps[mine]
        ours = wk.token_logps(states, wk.sharding.streamed(cut), targets[mine], batch_invariant=True).logps
        assert torch.equal(ours.detach(), whole)
        if gear != "scoring":
            ours.sum().backward()


def refusals(checks: Checks, mesh: DeviceMesh) -> None:
    rank = dist.get_rank()
    weight = nn.Parameter(distribute_tensor(torch.randn(9, 4), mesh, [Shard(0)]))
    head, hidden, targets = wk.sharding.streamed(weight), torch.randn(3, 4), torch.tensor([0, 1, 8])

    def call(**options):
        return wk.token_logps(hidden, head, targets, **options)

    def scores_on_one_rank():
        with torch.set_grad_enabled(rank == 0):
            call()

    def another_op():
        return (
            call()
            if rank
            else wk.fused_loss(lambda logps: logps.sum(-1), hidden[None, None], head, targets[None, None])
        )

    zero3 = torch.zeros(0)
    zero3.ds_id = 7
    wide = init_device_mesh("cpu", (1, dist.get_world_size()))
    two = distribute_tensor(torch.randn(9, 4), wide, [Shard(0), Shard(0)])
    columns = distribute_tensor(torch.randn(9, 4), mesh, [Shard(1)])
    wrong = {
        "must be a DTensor sharded by FSDP2, got a plain tensor": (TypeError, lambda: wk.sharding.streamed(hidden)),
        "only windkern.sharding.gathered supports that": (TypeError, lambda: wk.sharding.streamed(zero3)),
        "or an FSDP2 unit, got Linear": (TypeError, lambda: wk.sharding.streamed(nn.Linear(2, 2))),
        "one-dimensional mesh": (ValueError, lambda: wk.sharding.streamed(two)),
        "placements (Shard(dim=0),)": (TypeError, lambda: wk.sharding.streamed(columns)),
        "a gradient of weight[0] (0 and 1)": (ValueError, scores_on_one_rank),
        "entropy (0 and 1)": (ValueError, lambda: call(entropy=rank == 0)),
        "memory_budget (1000 and 1001)": (ValueError, lambda: call(memory_budget=1000 + (rank == 0))),
        "fused_loss (0 and 1)": (ValueError, another_op),
        "targets": (ValueError, lambda: wk.token_logps(hidden, head, targets + (rank == 0))),
        "bias must have shape (9,)": (ValueError, lambda: call(bias=torch.zeros(5))),
    }
    for words, (kind, function) in wrong.items():
        checks.run(words, assert_raises, kind, words, function)


def absent() -> None:
    """Only rank 0 calls an op: it waits for the group's timeout."""
    world, rank = dist.get_world_size(), dist.get_rank()
    # Nothing else of this group may wait for a rank that has no turn.
    group = dist.new_group(list(range(world)), timeout=datetime.timedelta(seconds=1))
    mesh = DeviceMesh.from_group(group, "cpu")
    weight = DTensor.from_local(torch.randn(4, 4), mesh, [Shard(0)], run_check=False)
    head = wk.sharding.streamed(weight)
    if rank == 0:
        call = functools.partial(wk.token_logps, torch.randn(3, 4), head, torch.tensor([0, 1, 7]))
        assert_raises(wk.sharding.RanksError, "all ranks of the group must make the same calls", call)
    dist.barrier()


def unsharded_unit() -> None:
    """A head in the whole model's unit, which FSDP2 leaves gathered after a forward: the error gives the remedy."""
    from torch.distributed.fsdp import fully_shard

    toy = Toy()
    fully_shard(toy)
    toy(batch(0)[0])
    assert_raises(TypeError, "fully_shard(model.lm_head, ...)", lambda: wk.sharding.streamed(toy.head.weight))


def memory(mesh: DeviceMesh, gear: str) -> None:
    """Besides the parts of weight and gradient: the plan's bytes, two slabs in transit forward and two back."""
    from windkern.kernels import buffers

    rows, size, vocab = 96, 32, 4001
    weight = nn.Parameter(
        distribute_tensor(torch.randn(vocab, size), mesh, [Shard(0)]), requires_grad=gear == "trained"
    )
    hidden = torch.randn(rows, size, requires_grad=True)
    head, targets = wk.sharding.streamed(weight), torch.randint(0, vocab, (rows,))
    flags = {"hidden_grad": True, "weight_grad": gear == "trained", "device": "cpu"}
    for budget in (0, 1 << 20):
        plan = wk.plan(rows, size, vocab, torch.float32, memory_budget=budget, total_rows=rows + 1, **flags)
        with buffers.recording() as record:
            wk.token_logps(hidden, head, targets, memory_budget=budget).logps.sum().backward()
        slab = 4 * plan.slab_width * size
        bound = plan.peak_bytes + 2 * slab * (1 + (gear == "trained")) + (gear == "frozen_head") * 4 * rows * size
        assert record.peak_bytes <= bound, (record.peak_bytes, bound, record.by_name)
        assert record.peak_bytes < 4 * rows * vocab + 4 * vocab * size
        assert 2 * slab < 4 * vocab * size // 2, "the head is too small for this test"


def orders(mesh: DeviceMesh, count: int) -> None:
    """Ranks arrive in random order, with random rows, gears and ops."""
    rank, weight = dist.get_rank(), torch.randn(203, 4, generator=torch.Generator().manual_seed(5))
    for trial in range(count):
        common, own = torch.Generator().manual_seed(trial), torch.Generator().manual_seed(1000 * trial + rank)
        time.sleep(0.02 * float(torch.rand((), generator=own)))
        frozen, several = torch.randint(0, 2, (2,), generator=common).tolist()
        cut = nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]), requires_grad=not frozen)
        groups = int(torch.randint(0, 4, (), generator=own))
        hidden = torch.randn(groups, 2, 3, 4, generator=own).requires_grad_()
        targets = torch.randint(0, 203, (groups, 2, 3), generator=own)
        head = wk.sharding.streamed(cut)
        if several:
            total = wk.fused_loss(lambda logps: logps.sum(-1), hidden, head, targets, reduction="sum", memory_budget=0)
        else:
            total = wk.token_logps(hidden, head, targets, memory_budget=0).logps.sum()
        time.sleep(0.01 * float(torch.rand((), generator=own)))
        total.backward()
        exact = hidden.detach().requires_grad_()
        wk.naive.token_logps(exact, weight, targets)[0].sum().backward()
        torch.testing.assert_close(hidden.grad, exact.grad, rtol=1e-4, atol=1e-5)


def fuzz(checks: Checks, mesh: DeviceMesh, trials: range) -> None:
    world = dist.get_world_size()
    for trial in trials:
        problem, dtype, gear, options, generator = fuzzed(trial)
        rows = problem.targets.numel()
        bounds = [0, *sorted(torch.randint(0, rows + 1, (world - 1,), generator=generator).tolist()), rows]
        keep = tuple(stop - start for start, stop in itertools.pairwise(bounds))
        checks.run(
            f"fuzz {trial}: {keep}", parity, problem, dtype, gear, Streamed(mesh, keep), few_rows=True, **options
        )


def teeth(folder: Path) -> dict:
    """Planted faults: each must fail the comparison that the real code passes, on at least one rank."""
    checks, mesh = Checks(), init_device_mesh("cpu", (dist.get_world_size(),))
    call = Streamed(mesh, (20, 13))

    def summed(original, self, place, mine, divisor):
        return original(self, place, mine, 1)

    def own_rows_only(original, self, values, owner, what):
        return lambda: None

    def one_buffer(original, self, index):
        return original(self, 0)

    plants = {
        "a sum where FSDP2 takes the mean": (passing.CollectedRows, "_taking", summed, "trained"),
        "the gradient of one rank": (Ranks, "begin_collect", own_rows_only, "trained"),
        "one buffer for all slabs": (passing.PassedRows, "_buffer", one_buffer, "frozen_head"),
        "no rows of the targets": (walk._Writer, "_find_targets", lambda *_: None, "frozen_head"),
    }
    for name, (owner, attribute, broken, gear) in plants.items():
        original = getattr(owner, attribute)
        problem = Problem(SHAPES["odd"], "plain", seen=("logps",))
        setattr(owner, attribute, functools.partialmethod(_planted, original, broken))
        caught = torch.zeros(())
        try:
            parity(problem, torch.float32, gear, call, memory_budget=NARROW)
        except AssertionError:
            caught += 1
        finally:
            setattr(owner, attribute, original)
        dist.all_reduce(caught)
        checks.run(name, assert_caught, float(caught))
    return checks.report()


def _planted(self, original, broken, *args):
    return broken(original, self, *args)


def streamed(folder: Path, kind: str) -> dict:
    """Run the checks; `kind` is "some" or "all" of the slow ones."""
    checks, world = Checks(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    gears(checks, mesh, DTYPES if kind == "all" else (torch.bfloat16,))
    for setup in ("plain", "bias", "frozen", "mixed", "tied"):
        checks.run(f"FSDP2, {setup}", as_fsdp2, setup)
    for groups in ((3, *[1] * (world - 1)), (*[0] * (world - 1), 4)):
        checks.run(f"fused_loss, {groups}", fused, mesh, groups)
    for gear in ("frozen_head", "trained"):
        checks.run(f"memory, {gear}", memory, mesh, gear)
    half_kept = Problem(SHAPES["odd"], "bias", seen=("logps",))
    call = Streamed(mesh, (25, *[0] * (world - 2), 8))
    checks.run("bias, half kept", parity, half_kept, torch.float32, "bias_only", call, memory_budget=140_000)
    checks.run("batch_invariant", batch_invariant, mesh)
    checks.run("unsharded", unsharded_unit)
    checks.run("absent", absent)
    checks.run("orders", orders, mesh, 50 if kind == "all" else 3)
    fuzz(checks, mesh, range(100 if kind == "all" else 5))
    refusals(checks, mesh)
    return checks.report()
