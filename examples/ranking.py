"""Train a ranker on noisy comparisons of ten thousand items, all pairs at once, without the N x N matrix.

    python examples/ranking.py                # under a minute on two cores
    python examples/ranking.py --items 2000 --steps 80

Each item has features and a hidden worth; feedback says of every pair which item did better in one noisy observation
(so a quarter of the comparisons are wrong). A small network learns a score from them with `windkern.pair_loss`, and is
judged by the true order of items it has never seen. Rankers that order caches, adverts or candidates are trained so.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.progress import track
from torch import Tensor, nn

import windkern as wk

FEATURES, HIDDEN, TOP = 16, 64, 100
NOISE = 1.0  # as large as the spread of the worth itself: one comparison in four is wrong


@dataclass(frozen=True)
class Quality:
    """How well scores order items, against their worth."""

    tau: float  # Kendall: 1 the same order, 0 chance, -1 reversed
    ndcg: float  # of the TOP best: 1 perfect

    def __str__(self) -> str:
        return f"Kendall tau {self.tau:+.3f}   NDCG@{TOP} {self.ndcg:.3f}"


@dataclass(frozen=True)
class Cost:
    """Of one value and gradient."""

    seconds: float
    bytes: int  # growth of the process's high-water mark
    value: float


@dataclass(frozen=True)
class Result:
    wrong: float  # share of the comparisons
    feedback: Quality  # of the noisy observations themselves
    before: Quality
    after: Quality
    train_seconds: float
    ours: Cost
    plain: Cost


def make_items(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Features (N, FEATURES) and worth (N,), which is not linear in them."""
    x = torch.randn(count, FEATURES, generator=generator)
    worth = x[:, 0] + 0.8 * (2 * x[:, 1]).sin() + 0.7 * x[:, 2] * x[:, 3] + 0.5 * x[:, 4].abs()
    return x, (worth - worth.mean()) / worth.std()


def kendall_tau(scores: Tensor, worth: Tensor, rows: int = 512) -> float:
    """Share of pairs in order minus share out of order, some rows of the N x N comparison at a time."""
    total, n = 0.0, len(scores)
    for first in range(0, n, rows):
        part = slice(first, first + rows)
        gaps = (scores[part, None] - scores).sign() * (worth[part, None] - worth).sign()
        total += gaps.sum(dtype=torch.float64).item()
    return total / (n * (n - 1))


def ndcg(scores: Tensor, worth: Tensor, top: int = TOP) -> float:
    """Discounted gain of the `top` items by score, over the best possible; gains are worths, the smallest being 0."""
    top = min(top, len(scores))
    gain = worth - worth.min()
    discount = 1 / torch.arange(2, top + 2, dtype=torch.float32).log2()
    return ((gain[scores.topk(top).indices] * discount).sum() / (gain.topk(top).values * discount).sum()).item()


def quality(scores: Tensor, worth: Tensor) -> Quality:
    return Quality(kendall_tau(scores, worth), ndcg(scores, worth))


def ranking_loss(scores: Tensor, observed: Tensor) -> Tensor:
    """Logistic loss over all ordered pairs of one group, in O(N) memory: scores (N,), observed (N,) -> ()."""
    return wk.pair_loss(scores[None], rewards=observed[None], link="step", loss="logistic")


def plain_loss(scores: Tensor, observed: Tensor) -> Tensor:
    """The same as one writes it: several N x N matrices, kept for backward."""
    n = len(scores)
    won = (((observed[:, None] - observed).sign() + 1) / 2).fill_diagonal_(0)
    return (won * nn.functional.softplus(scores - scores[:, None])).sum() / (n * (n - 1))


def cost(loss: Callable[[Tensor, Tensor], Tensor], scores: Tensor, observed: Tensor) -> Cost:
    """Time and memory of one value and gradient."""
    leaf = scores.detach().requires_grad_()
    unit = 1 if sys.platform == "darwin" else 1024
    mark = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    value = loss(leaf, observed)
    value.backward()
    seconds = time.perf_counter() - start
    return Cost(seconds, unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - mark), value.item())


def run(items: int, steps: int, seed: int = 0) -> Result:
    """Train on `items` items, judge on as many new ones."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    x, worth = make_items(items, generator)
    new_x, new_worth = make_items(items, generator)
    observed = worth + NOISE * torch.randn(items, generator=generator)
    layers = [nn.Linear(FEATURES, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, 1)]
    scorer = nn.Sequential(*layers)

    @torch.no_grad()
    def judged() -> Quality:
        return quality(scorer(new_x).squeeze(-1), new_worth)

    before = judged()
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=1e-2, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    start = time.perf_counter()
    for _ in track(range(steps), description=f"training on {items * (items - 1):,} ordered pairs", transient=True):
        optimizer.zero_grad()
        ranking_loss(scorer(x).squeeze(-1), observed).backward()
        optimizer.step()
        schedule.step()
    train_seconds = time.perf_counter() - start
    after = judged()

    with torch.no_grad():
        scores = scorer(x).squeeze(-1)
    ours = cost(ranking_loss, scores, observed)  # first: the high-water mark only rises
    plain = cost(plain_loss, scores, observed)
    feedback = quality(observed, worth)
    return Result((1 - feedback.tau) / 2, feedback, before, after, train_seconds, ours, plain)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=10_000, help="in the one group (default: 10000)")
    parser.add_argument("--steps", type=int, default=60, help="of AdamW (default: 60)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    result = run(options.items, options.steps, options.seed)
    pairs = options.items * (options.items - 1)
    print(f"{options.items} items in one group, {pairs:,} ordered pairs, {result.wrong:.0%} of them judged wrong")
    print(f"{options.steps} steps in {result.train_seconds:.1f} s\n")
    print(f"feedback itself      {result.feedback}")
    print(f"new items, before    {result.before}")
    print(f"new items, after     {result.after}\n")
    print("one value and gradient:")
    for name, measured in (("windkern.pair_loss", result.ours), ("N x N expression", result.plain)):
        size = f"{measured.bytes / 2**20:8.1f} MiB"
        print(f"{name:<20} {1e3 * measured.seconds:8.1f} ms   {size} beyond training   loss {measured.value:.6f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
