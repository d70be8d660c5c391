"""Measure how far a long run with small steps ends from the same run in float32, for each way to step bfloat16 weights.

    python -m benchmarks.weight_error [--steps N ...] [--rates X ...] [--vocab N] [--hidden N] [--out FILE]

The model, its target and the choices are those of `benchmarks.master_weights`, with a constant learning rate, which is
the trainer's default. w_0 are the weights at the start, w_32 those of AdamW in float32 without autocast after the same
number of steps on the same batches. "error" is |w - w_32| / |w_0 - w_32| for the weights in products (rounded to
bfloat16 once, except in float32), "kept" is the same for the most precise copy in the optimizer, and "kl" is the
distance of the weights to the target, nats per token, computed in float32. The line "float32, rounded once" is the best
that any bfloat16 weight can do.

The second table is for one tensor of weights whose gradients become a hundred times smaller, as in a fit: the movement
of the weights and the second moment, over those in float32. With beta2 = 0.999, a second moment in bfloat16 cannot
fall: 0.999 times it is rounded to itself. Nothing is timed, so nothing is compiled.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import record
from benchmarks.master_weights import CHOICES, EXACT, NEEDS, Choice, divergence, kept_weights, make_models

BATCH, LENGTH, BATCHES = 4, 32, 64  # rows and tokens of a step; number of batches, which repeat
ROUNDED = "float32, rounded once"


class Course:
    """The run that every choice takes: a start, a target, and the same batches in the same order."""

    def __init__(self, vocab: int, hidden: int):
        self.start, target = make_models(vocab, hidden)
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randint(vocab, (BATCHES, BATCH, LENGTH), generator=generator)
        with torch.no_grad():
            self.wanted = [target(ids).logits.log_softmax(-1) for ids in self.inputs]
        self.origin = [value.detach().clone() for value in self.start.parameters()]

    def weights(self, choice: Choice, rate: float, marks: Sequence[int]) -> Iterator[list[Tensor]]:
        """Yield the most precise weights of a choice, in float32, after each number of steps in `marks`."""
        model = copy.deepcopy(self.start).to(choice.weights)
        parameters = list(model.parameters())
        optimizer = choice.optimizer(parameters, rate)
        torch.manual_seed(0)  # for stochastic rounding
        for place in range(max(marks)):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=choice.autocast):
                logits = model(self.inputs[place % BATCHES]).logits
            divergence(logits, self.wanted[place % BATCHES]).backward()
            optimizer.step()
            if place + 1 in marks:
                yield [value.clone() for value in kept_weights(optimizer, parameters)]

    @torch.no_grad()
    def kl(self, weights: Sequence[Tensor]) -> float:
        """Return the KL of the model with these weights to the target, nats per token, over all batches."""
        for value, weight in zip(self.start.parameters(), weights, strict=True):
            value.copy_(weight)
        found = sum(
            float(divergence(self.start(ids).logits, want)) for ids, want in zip(self.inputs, self.wanted, strict=True)
        )
        for value, weight in zip(self.start.parameters(), self.origin, strict=True):
            value.copy_(weight)
        return found / BATCHES


def distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Return the Euclidean distance over all weights, in float64."""
    pairs = zip(ours, theirs, strict=True)
    return sum(float((one.double() - other.double()).square().sum()) for one, other in pairs) ** 0.5


def rounded(weights: Sequence[Tensor]) -> list[Tensor]:
    return [value.bfloat16().float() for value in weights]


def run(rates: Sequence[float], marks: Sequence[int], vocab: int, hidden: int) -> list[dict[str, Any]]:
    """Run every choice at every learning rate and number of steps, and print a line for each."""
    course, rows = Course(vocab, hidden), []
    for rate in rates:
        exact = list(course.weights(CHOICES[EXACT], rate, marks))
        found = {EXACT: exact, ROUNDED: exact}
        for name, choice in CHOICES.items():
            package = NEEDS.get(choice.optimizer)
            if package is not None and importlib.util.find_spec(package) is None:
                print(f"{rate:.0e}  {name:<31} not measured: {package} is not installed", flush=True)
            elif name != EXACT:
                found[name] = list(course.weights(choice, rate, marks))
        for name, weights in found.items():
            for steps, kept, right in zip(marks, weights, exact, strict=True):
                seen = kept if name == EXACT else rounded(kept)
                moved = distance(course.origin, right)
                row = {
                    "choice": name,
                    "learning_rate": rate,
                    "steps": steps,
                    "error": distance(seen, right) / moved,
                    "error_kept": distance(kept, right) / moved,
                    "kl_start": course.kl(course.origin),
                    "kl": course.kl(seen),
                    "kl_kept": course.kl(kept),
                }
                rows.append(row)
                print(
                    f"{rate:.0e}  {steps:>5} steps  {name:<31} error {row['error']:.3f}, kept {row['error_kept']:.3f}  "
                    f"kl {row['kl_start']:.2e} -> {row['kl']:.2e}, kept {row['kl_kept']:.2e}",
                    flush=True,
                )
    return rows


def falling(choice: Choice, rate: float, steps: int) -> list[tuple[float, float]]:
    """Return the mean movement of the most precise weights and the mean second moment after each third of the steps."""
    weight = nn.Parameter(torch.full((1000,), 0.5, dtype=choice.weights))
    optimizer, found = choice.optimizer([weight], rate), []
    torch.manual_seed(0)
    for place in range(steps):
        noise = torch.randn(1000, generator=torch.Generator().manual_seed(place))
        weight.grad = ((1.0 if place < steps // 3 else 0.01) * (0.5 + noise)).to(choice.weights)
        optimizer.step()
        if (place + 1) % (steps // 3) == 0:
            (kept,) = kept_weights(optimizer, [weight])
            found.append((float((kept - 0.5).mean()), float(optimizer.state[weight]["exp_avg_sq"].float().mean())))
    return found


def run_falling(rates: Sequence[float], steps: int = 3000) -> list[dict[str, Any]]:
    """Run every optimizer at every learning rate, and print a line for each."""
    rows = []
    for rate in rates:
        exact = falling(CHOICES[EXACT], rate, steps)
        for name, choice in CHOICES.items():
            package = NEEDS.get(choice.optimizer)
            if choice.autocast or (package is not None and importlib.util.find_spec(package) is None):
                continue
            found = exact if name == EXACT else falling(choice, rate, steps)
            moved = [ours / right for (ours, _), (right, _) in zip(found, exact, strict=True)]
            second = [ours / right for (_, ours), (_, right) in zip(found, exact, strict=True)]
            rows.append({"choice": name, "learning_rate": rate, "steps": steps, "moved": moved, "second": second})
            print(f"{rate:.0e}  falling gradients  {name:<31} moved {moved[-1]:.3f}, second moment {second[-1]:.2f}")
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.weight_error", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[300, 1000, 3000], help="steps after which to compare")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-6, 1e-5], help="learning rates")
    parser.add_argument("--vocab", type=int, default=512, help="vocabulary (default: 512)")
    parser.add_argument("--hidden", type=int, default=64, help="hidden size (default: 64)")
    parser.add_argument("--out", type=Path, default=Path("out/weight_error.json"), metavar="FILE")
    chosen = parser.parse_args(argv)
    if min(chosen.steps) < 1:
        parser.error(f"--steps must be at least 1, got {min(chosen.steps)}")
    marks = sorted(set(chosen.steps))
    with torch.compiler.set_stance("force_eager"):
        falls = run_falling(chosen.rates)
        rows = run(chosen.rates, marks, chosen.vocab, chosen.hidden)
    settings = {"steps": marks, "vocab": chosen.vocab, "hidden": chosen.hidden}
    record.write_atomically(
        chosen.out, {"kind": "weight_error", **record.run_info(settings), "rows": rows, "falling": falls}
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
