"""The measured cases: head shapes of real models, three modes, dtypes, and inputs from fixed seeds."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

SEED = 20241027
# Standard deviation of the logits, about that of a trained language model.
LOGIT_STD = 2.5
# beta of the pair loss: margins of summed log-probs times beta stay near 1, so that no pair is saturated.
BETA = 0.02
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Matrix products of M * H * V multiply-adds that a mode requires.
PRODUCTS = {
    "trained": 3,  # logits, gradient of hidden, gradient of weight
    "frozen": 2,  # logits, gradient of hidden: the head is not trained (LoRA on the body)
    "scoring": 1,  # logits: old and reference log-probs, no gradient
}


@dataclass(frozen=True)
class Shape:
    """A head and the tokens scored at once."""

    name: str
    rows: int  # M
    hidden: int  # H
    vocab: int  # V
    tokens: int  # T of one response; rows = pairs * 2 * tokens
    source: str

    @property
    def pairs(self) -> int:
        return self.rows // (2 * self.tokens)


SHAPES = (
    Shape("2048x576x49152", 2048, 576, 49152, 256, "head of SmolLM2-135M"),
    Shape("512x896x151936", 512, 896, 151936, 128, "head of Qwen2.5-0.5B"),
    Shape("1024x2048x128256", 1024, 2048, 128256, 256, "head of Llama-3.2-1B"),
)
# Heads for GPUs, the project's main target first; each with the rows of a micro-batch up to a packed batch.
GPU_HEADS = {
    (4096, 128256): "head of Llama-3.1-8B",
    (896, 151936): "head of Qwen2.5-0.5B",
    (2048, 128256): "head of Llama-3.2-1B",
    (2304, 256000): "head of Gemma-2-2B",
}
GPU_ROWS = (8192, 2048, 512, 32768)
GPU_SHAPES = tuple(
    Shape(f"{rows}x{hidden}x{vocab}", rows, hidden, vocab, 128, source)
    for rows in GPU_ROWS
    for (hidden, vocab), source in GPU_HEADS.items()
)
# Small enough for peers whose 16-bit products run at 1 GFLOP/s, on CPUs without instructions for them.
SLOW_16_BIT = Shape("256x576x16384", 256, 576, 16384, 32, "a third of the head of SmolLM2-135M")
# For smoke tests only; never reported.
TINY = Shape("tiny", 64, 32, 515, 16, "no model: smoke tests")
# Selected by name only, not by a wildcard.
BY_NAME = (SLOW_16_BIT, TINY)


@dataclass(frozen=True)
class Case:
    """A group of rows that are compared with each other."""

    shape: Shape
    mode: str
    dtype_name: str
    device: str = "cpu"

    @property
    def name(self) -> str:
        return f"{self.shape.name}/{self.mode}/{self.dtype_name}"

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def flops(self) -> int:
        """FLOPs of the products that no implementation can avoid."""
        return 2 * self.shape.rows * self.shape.hidden * self.shape.vocab * PRODUCTS[self.mode]

    @property
    def logits_bytes(self) -> int:
        """Bytes of one copy of the logits in the case's dtype."""
        return self.shape.rows * self.shape.vocab * self.dtype.itemsize

    @property
    def wants_hidden(self) -> bool:
        return self.mode != "scoring"

    @property
    def wants_weight(self) -> bool:
        return self.mode == "trained"

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients that every provider must return, in the case's dtype."""
        shape, item = self.shape, self.dtype.itemsize
        return item * shape.hidden * (self.wants_hidden * shape.rows + self.wants_weight * shape.vocab)


def all_cases(device: str = "cpu") -> list[Case]:
    """Return all cases in the order of measurement: small heads first on a CPU, the main target first on a GPU."""
    if device == "cpu":
        common = [
            Case(shape, mode, name) for shape in (*SHAPES, TINY) for name in ("fp32", "bf16") for mode in PRODUCTS
        ]
        return common + [Case(SLOW_16_BIT, mode, name) for name in ("bf16", "fp16") for mode in PRODUCTS]
    return [Case(shape, mode, "bf16", device) for shape in (*GPU_SHAPES, TINY) for mode in PRODUCTS]


def select_cases(patterns: str = "*", device: str = "cpu") -> list[Case]:
    """Return cases matching any of the comma-separated shell patterns; those of BY_NAME only if a pattern names them.

    Raises:
        ValueError: a pattern matches nothing.
    """
    chosen: dict[str, Case] = {}
    for pattern in patterns.split(","):
        found = [
            case
            for case in all_cases(device)
            if fnmatchcase(case.name, pattern) and (case.shape not in BY_NAME or pattern.startswith(case.shape.name))
        ]
        if not found:
            example = all_cases(device)[0].name
            raise ValueError(f"no case matches {pattern!r}; cases are named SHAPE/MODE/DTYPE, such as {example}")
        chosen |= {case.name: case for case in found}
    return [case for case in all_cases(device) if case.name in chosen]


@dataclass
class Problem:
    """Inputs of a case. All values are representable in bf16, so fp32 and bf16 get the same numbers."""

    case: Case
    hidden: Tensor  # (M, H), rows ordered (pair, chosen or rejected, token)
    weight: Tensor  # (V, H)
    targets: Tensor  # (M,) int64
    upstream: Tensor  # (M,) float32: the upstream gradient of each token's log-prob

    def leaves(self) -> tuple[Tensor, Tensor]:
        """Return hidden and weight without copies, requiring the gradients of the mode."""
        hidden = self.hidden.detach().requires_grad_(self.case.wants_hidden)
        weight = self.weight.detach().requires_grad_(self.case.wants_weight)
        return hidden, weight


@functools.lru_cache(maxsize=1)
def _values(shape: Shape, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = {"generator": torch.Generator(device).manual_seed(SEED), "device": device}
    hidden = torch.randn(shape.rows, shape.hidden, **made).bfloat16()
    weight = torch.randn(shape.vocab, shape.hidden, **made).mul_(LOGIT_STD / shape.hidden**0.5).bfloat16()
    targets = torch.randint(0, shape.vocab, (shape.rows,), **made)
    upstream = torch.randn(shape.rows, **made)
    return hidden, weight, targets, upstream


def make_problem(case: Case) -> Problem:
    hidden, weight, targets, upstream = _values(case.shape, case.device)
    return Problem(case, hidden.to(case.dtype), weight.to(case.dtype), targets, upstream)
