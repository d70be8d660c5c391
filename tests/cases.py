"""THE table: shapes, dtypes, gears and logit variants every back end is tested on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import windkern as wk
from windkern import naive

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NARROW = 0  # memory budgets: the smallest plan there is, about half of all, everything kept
UNLIMITED = 1 << 40


@dataclass(frozen=True)
class Shape:
    lead: tuple[int, ...]  # shape of targets
    hidden: tuple[int, ...]  # sizes of the blocks
    vocab: int


SHAPES = {
    "tiny": Shape((5,), (8,), 3),  # vocabulary below any tile
    "odd": Shape((3, 11), (24,), 1003),  # nothing a multiple of anything, several slabs at budget 0
    "blocks": Shape((2, 3, 5), (16, 7), 517),  # two blocks of logits that add up
    "one_row": Shape((1,), (40,), 2049),
}
# Vocabularies of real models (and one no tile divides); few rows keep them cheap.
VOCABULARIES = (3, 32003, 49152, 151669)

# Which of hidden, weight, bias ask for gradients; bias is dropped where a variant has none.
GEARS = {
    "scoring": (False, False, False),
    "frozen_head": (True, False, False),
    "frozen_body": (False, True, False),
    "bias_only": (False, False, True),
    "trained": (True, True, True),
}

VARIANTS = {
    "plain": {"bias": False, "entropy": False},
    "entropy": {"bias": False, "entropy": True},
    "bias": {"bias": True, "entropy": False},
    "scaled": {"bias": True, "entropy": False, "scale": 0.5, "temperature": 0.7},
    "softcap": {"bias": False, "entropy": False, "softcap": 4.0},
    "all": {"bias": True, "entropy": True, "scale": 1.3, "softcap": 5.0, "temperature": 1.7},
}


@dataclass
class Problem:
    """Inputs in float64; one ignored row in four, one vocabulary entry masked where there is a bias."""

    shape: Shape
    variant: str = "plain"
    seed: int = 0
    ignore: bool = True
    seen: tuple[str, ...] = ("logps", "lse", "entropy")  # outputs that an upstream gradient comes on
    hidden: list[Tensor] = field(init=False)
    weight: list[Tensor] = field(init=False)
    bias: Tensor | None = field(init=False)
    targets: Tensor = field(init=False)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)
        options, vocab = VARIANTS[self.variant], self.shape.vocab

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(*size, generator=generator, dtype=torch.float64)

        self.hidden = [normal(*self.shape.lead, size) for size in self.shape.hidden]
        self.weight = [normal(vocab, size, scale=0.5) for size in self.shape.hidden]
        self.bias = normal(vocab) if options["bias"] else None
        self.targets = torch.randint(0, vocab, self.shape.lead, generator=generator)
        if self.bias is not None:
            self.bias[1] = -torch.inf
            self.targets[self.targets == 1] = 0
        if self.ignore:
            self.targets.view(-1)[1::4] = -100

    @property
    def options(self) -> dict:
        return {key: value for key, value in VARIANTS[self.variant].items() if key != "bias"}

    @property
    def transform(self) -> dict[str, float]:
        """Scale, softcap and temperature, where they are not the defaults."""
        return {key: value for key, value in self.options.items() if key != "entropy"}

    def upstream(self, count: int, like: Tensor) -> list[Tensor]:
        """Arbitrary, different for every row and output, and from a formula."""
        places = torch.arange(like.numel(), dtype=torch.float64).view(like.shape)
        return [torch.sin(1.0 + places * (k + 1.3)).to(like.dtype) for k in range(count)]

    def run(self, function: Callable, dtype: torch.dtype, gear: str, **kwargs) -> dict[str, Tensor]:
        """Outputs and gradients of `function`, by name, with the problem's inputs rounded to low precision once."""
        storage = kwargs.pop("rounded_to", dtype)
        wants = GEARS[gear]

        def leaf(value: Tensor, wanted: bool) -> Tensor:
            return value.to(storage).to(dtype).requires_grad_(wanted)

        hidden = [leaf(block, wants[0]) for block in self.hidden]
        weight = [leaf(head, wants[1]) for head in self.weight]
        bias = None if self.bias is None else leaf(self.bias, wants[2])
        single = len(hidden) == 1
        outputs = function(
            hidden[0] if single else tuple(hidden),
            weight[0] if single else tuple(weight),
            self.targets,
            bias=bias,
            **self.options,
            **kwargs,
        )
        results = {
            name: value for name, value in zip(("logps", "lse", "entropy"), outputs, strict=True) if value is not None
        }
        leaves = {f"dhidden{k}": block for k, block in enumerate(hidden) if wants[0]}
        leaves |= {f"dweight{k}": head for k, head in enumerate(weight) if wants[1]}
        leaves |= {"dbias": bias} if wants[2] and bias is not None else {}
        if leaves:
            upstream = zip(results.items(), self.upstream(len(results), outputs[0]), strict=True)
            total = sum((value * c).sum() for (name, value), c in upstream if name in self.seen)
            results |= zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True)
        return {name: value.detach() for name, value in results.items()}

    def exact(self, dtype: torch.dtype, gear: str) -> dict[str, Tensor]:
        """The reference in float64 on the inputs as `dtype` holds them."""
        return self.run(naive.token_logps, torch.float64, gear, rounded_to=dtype)

    def plain(self, dtype: torch.dtype, gear: str) -> dict[str, Tensor]:
        return self.run(naive.token_logps, dtype, gear)

    def middle_budget(self, dtype: torch.dtype, gear: str) -> int:
        """About half of what keeping everything takes, so that some slabs are kept and some recomputed."""
        wants = GEARS[gear]
        everything = wk.plan(
            self.targets.numel(),
            self.shape.hidden,
            self.shape.vocab,
            dtype,
            hidden_grad=wants[0],
            weight_grad=wants[1],
            bias_grad=wants[2] and self.bias is not None,
            device="cpu",
            memory_budget=UNLIMITED,
        )
        return everything.peak_bytes // 2
