"""Check every back end in every gear against float64 on a few small heads, one line each, before anything is timed.

python -m benchmarks.smoke [--device cuda] [--seconds 50]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import windkern as wk
from windkern.kernels.gemm import products_of
from windkern.testing import allowed_error

# Rows, hidden, vocabulary: one slab; a vocabulary that is not divisible by 8; several slabs; rows of several blocks.
SHAPES = ((64, 64, 512), (300, 128, 5003), (1024, 512, 40000), (40, 128, 50257))
# Whether hidden and weight require gradients.
GEARS = {"trained": (True, True), "frozen head": (True, False), "frozen body": (False, True), "scoring": (False, False)}
DTYPE = torch.bfloat16
BUDGET = 16 << 20


def _values(shape: tuple[int, int, int], device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, inner, vocab = shape
    made = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    hidden = torch.randn(rows, inner, **made).to(DTYPE)
    weight = torch.randn(vocab, inner, **made).mul_(2.5 / inner**0.5).to(DTYPE)
    return hidden, weight, torch.randint(0, vocab, (rows,), **made), torch.randn(rows, **made)


def _results(function, hidden, weight, targets, upstream, wanted) -> dict[str, Tensor]:
    leaves = [value.detach().requires_grad_(flag) for value, flag in zip((hidden, weight), wanted, strict=True)]
    logps = function(*leaves, targets)
    named = {name: leaf for name, leaf in zip(("dhidden", "dweight"), leaves, strict=True) if leaf.requires_grad}
    grads = torch.autograd.grad(logps, list(named.values()), upstream.to(logps.dtype)) if named else ()
    return {"logps": logps.detach(), **dict(zip(named, grads, strict=True))}


def _plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _error(got: Tensor, exact: Tensor) -> float:
    """Return the relative norm of the difference."""
    return float((got.double() - exact).norm() / exact.norm())


def _allowed(name: str, plain: float) -> float:
    """Return the allowed error: log-probs are not rounded to 16 bits; gradients are, and have the tests' budget."""
    return plain / 2 if name == "logps" else allowed_error(plain, DTYPE)


def check(backend: str, device: str) -> Iterator[tuple[str, bool]]:
    """Yield a line for each gear and shape, and whether the results are right."""
    for shape in SHAPES:
        values = _values(shape, device)
        wide = [value.double() if value.is_floating_point() else value for value in values]
        for gear, wanted in GEARS.items():
            name = f"{backend:7s} {gear:12s} {' x '.join(map(str, shape)):18s}"

            def ours(hidden, weight, targets):
                return wk.token_logps(hidden, weight, targets, memory_budget=BUDGET, backend=backend).logps

            try:
                got = _results(ours, *values, wanted)
            except Exception as error:  # the next line may be right
                yield f"{name} {type(error).__name__}: {error}", False
                continue
            exact, plain = _results(_plain, *wide, wanted), _results(_plain, *values, wanted)
            errors = {key: (_error(got[key], exact[key]), _error(plain[key], exact[key])) for key in exact}
            right = all(mine <= _allowed(key, theirs) for key, (mine, theirs) in errors.items())
            told = ", ".join(f"{key} {mine:.1e} (plain {theirs:.1e})" for key, (mine, theirs) in errors.items())
            yield f"{name} {'ok   ' if right else 'WRONG'} {told}", right


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smoke", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--seconds", type=float, default=50.0, help="start no further line after this many seconds")
    chosen = parser.parse_args(arguments)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can use, and there is none")
    for name in wk.backends.BACKENDS:
        reason = wk.backends.why_not(name, chosen.device, DTYPE)
        print(f"{name:7s} {'runs' if reason is None else reason}", flush=True)
    gemm = products_of(chosen.device, DTYPE)
    facts = {name: getattr(gemm, name) for name in dir(type(gemm)) if isinstance(getattr(type(gemm), name), property)}
    print("products:", ", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    started, wrong, lines = time.monotonic(), 0, 0
    for backend in wk.backends.available(chosen.device, DTYPE):
        for line, right in check(backend, chosen.device):
            print(line, flush=True)
            wrong, lines = wrong + (not right), lines + 1
            if time.monotonic() - started > chosen.seconds:
                print("out of time")
                return 1
    print(f"{lines} checks, {wrong} wrong")
    return int(wrong > 0 or lines == 0)


if __name__ == "__main__":
    sys.exit(main())
