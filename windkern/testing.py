"""Check a result, in tests, benchmarks and `windkern doctor`: a small problem, its error and its budget.

Use it to test a kernel, back end or model of your own; no test framework is needed. The specification is
`windkern.naive` in float64, and the budget is a multiple of the error of plain PyTorch in the same dtype.

Example:
    >>> import windkern as wk
    >>> problem = Problem(Shape((3, 7), (16,), 101), "bias")
    >>> got = problem.run(wk.token_logps, torch.float32, "trained")
    >>> exact, plain = problem.exact(torch.float32, "trained"), problem.plain(torch.float32, "trained")
    >>> for name in exact:
    ...     assert_within(got[name], exact[name], plain[name], torch.float32, name)
    >>> list(exact)
    ['logps', 'lse', 'dhidden0', 'dweight0', 'dbias']
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from windkern import naive
from windkern.plan import plan

FLOAT64_BOUND = 1e-11  # largest relative error of a float64 result
UNLIMITED = 1 << 40  # a memory budget that keeps everything


def relative_error(result: Tensor, exact: Tensor) -> float:
    """Return the relative Frobenius norm of the difference; the absolute one if `exact` is zero everywhere.

    Example:
        >>> relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0])) == 1 / 34**0.5
        True
    """
    difference = (result.double() - exact.double()).norm()
    size = exact.double().norm()
    return float(difference / size) if size > 0 else float(difference)


def allowed_error(plain: float, dtype: torch.dtype) -> float:
    """Return the relative error that a result may have.

        float64                   1e-11
        float32                   4 (plain + eps)
        bfloat16 and float16      max(plain / 2, eps)

    Args:
        plain: relative error of plain PyTorch in the same dtype, against float64.
        dtype: of the computation; eps is its machine epsilon.

    Example:
        >>> allowed_error(0.02, torch.bfloat16), allowed_error(0.02, torch.float64)
        (0.01, 1e-11)
    """
    if dtype == torch.float64:
        return FLOAT64_BOUND
    eps = torch.finfo(dtype).eps
    return 4 * (plain + eps) if dtype == torch.float32 else max(plain / 2, eps)


def error_budget(plain: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """Return `allowed_error` for plain PyTorch's result and the exact one."""
    return allowed_error(relative_error(plain, exact), dtype)


def assert_within(
    result: Tensor,
    exact: Tensor,
    plain: Tensor,
    dtype: torch.dtype,
    what: str,
    *,
    cancellation: float = 1.0,
) -> None:
    """Raise unless a result is within its error budget.

    Args:
        result, exact, plain: our result, that of the specification in float64, and that of plain PyTorch in `dtype`.
        dtype: of the computation.
        what: names the result in the message.
        cancellation: ratio of the size of the terms to the size of their sum.

    Raises:
        AssertionError: the shapes differ, or the error is over the budget; the message shows the worst element.
    """
    assert result.shape == exact.shape, f"{what}: shape {tuple(result.shape)}, expected {tuple(exact.shape)}"
    error, budget = relative_error(result, exact), cancellation * error_budget(plain, exact, dtype)
    if not error <= budget:
        gap = (result.double() - exact.double()).abs().flatten()
        worst = int(gap.nan_to_num(torch.inf).argmax())
        raise AssertionError(
            f"{what} ({dtype}): relative error {error:.3g} over the budget {budget:.3g}; worst at flat index {worst}: "
            f"got {result.flatten()[worst]:.6g}, exact {exact.flatten()[worst]:.6g}"
        )


def rounding_bound(operations: int, largest: float, dtype: torch.dtype) -> float:
    """Return the largest error of `operations` roundings, each of one eps of a number up to `largest` (or 1)."""
    return operations * torch.finfo(dtype).eps * max(1.0, largest)


def assert_same_but_for_rounding(got: Tensor, want: Tensor, operations: int, *inputs: Tensor) -> None:
    """Raise unless two tensors are equal up to `operations` roundings.

    Use it for one expression computed with another batch size, order or number of threads.

    Hazard: torch rounds such results differently. On a CPU, vector code takes whole vectors and scalar code the
    remainder, and sums are cut where the batch ends, so the same row has other bits in another place.

    Raises:
        AssertionError: the tensors differ by more.
    """
    largest = max(float(value.abs().max()) for value in (want, *inputs) if value.numel())
    bound = rounding_bound(operations, largest, want.dtype)
    torch.testing.assert_close(got, want, rtol=0, atol=bound)


@dataclass(frozen=True)
class Shape:
    """Sizes of a problem."""

    lead: tuple[int, ...]  # of targets
    hidden: tuple[int, ...]  # sizes of the blocks
    vocab: int


# Whether hidden, weight and bias require gradients; the flag of the bias is ignored for a variant without one.
GEARS = {
    "scoring": (False, False, False),
    "frozen_head": (True, False, False),
    "frozen_body": (False, True, False),
    "bias_only": (False, False, True),
    "trained": (True, True, True),
}

# Bias, entropy, and scale, softcap and temperature of the logits.
VARIANTS: dict[str, dict] = {
    "plain": {"bias": False, "entropy": False},
    "entropy": {"bias": False, "entropy": True},
    "bias": {"bias": True, "entropy": False},
    "scaled": {"bias": True, "entropy": False, "scale": 0.5, "temperature": 0.7},
    "softcap": {"bias": False, "entropy": False, "softcap": 4.0},
    "all": {"bias": True, "entropy": True, "scale": 1.3, "softcap": 5.0, "temperature": 1.7},
}


@dataclass
class Problem:
    """Inputs of `windkern.token_logps` in float64, drawn from a seed.

    One row in four is ignored, and a bias masks one vocabulary entry by -inf.

    Args:
        shape: of targets, hidden states and vocabulary; several hidden sizes are blocks whose logits add up.
        variant: key of VARIANTS.
        seed: of the draws.
        ignore: whether rows are ignored.
        seen: outputs that get an upstream gradient.
    """

    shape: Shape
    variant: str = "plain"
    seed: int = 0
    ignore: bool = True
    seen: tuple[str, ...] = ("logps", "lse", "entropy")
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
        """Keyword arguments of `windkern.token_logps`, without the bias."""
        return {key: value for key, value in VARIANTS[self.variant].items() if key != "bias"}

    @property
    def transform(self) -> dict[str, float]:
        """Scale, softcap and temperature, where they are not the defaults."""
        return {key: value for key, value in self.options.items() if key != "entropy"}

    def upstream(self, count: int, like: Tensor) -> list[Tensor]:
        """Return arbitrary upstream gradients, different for every row and output, from a formula."""
        places = torch.arange(like.numel(), dtype=torch.float64).view(like.shape)
        return [torch.sin(1.0 + places * (k + 1.3)).to(like.dtype) for k in range(count)]

    def run(self, function: Callable, dtype: torch.dtype, gear: str, **kwargs: Any) -> dict[str, Tensor]:
        """Return outputs and gradients by name, on the CPU: logps, lse, entropy, dhidden0, dweight0, dbias.

        Args:
            function: takes hidden, weight, targets and keyword arguments, and returns three outputs, some of them
                None, like `windkern.token_logps`.
            dtype: of the computation.
            gear: key of GEARS.
            kwargs: `rounded_to`, the dtype to which the inputs are rounded first (default `dtype`); `device` (default
                cpu); all others go to `function`.
        """
        storage, device = kwargs.pop("rounded_to", dtype), kwargs.pop("device", "cpu")
        wants = GEARS[gear]

        def leaf(value: Tensor, wanted: bool) -> Tensor:
            return value.to(storage).to(dtype).to(device).requires_grad_(wanted)

        hidden = [leaf(block, wants[0]) for block in self.hidden]
        weight = [leaf(head, wants[1]) for head in self.weight]
        bias = None if self.bias is None else leaf(self.bias, wants[2])
        single = len(hidden) == 1
        outputs = function(
            hidden[0] if single else tuple(hidden),
            weight[0] if single else tuple(weight),
            self.targets.to(device),
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
        return {name: value.detach().cpu() for name, value in results.items()}

    def exact(self, dtype: torch.dtype, gear: str) -> dict[str, Tensor]:
        """Return the results of the specification in float64, on the inputs rounded to `dtype`."""
        return self.run(naive.token_logps, torch.float64, gear, rounded_to=dtype)

    def plain(self, dtype: torch.dtype, gear: str, device: str = "cpu") -> dict[str, Tensor]:
        """Return the results of plain PyTorch in `dtype`."""
        return self.run(naive.token_logps, dtype, gear, device=device)

    def middle_budget(self, dtype: torch.dtype, gear: str) -> int:
        """Return about half of the memory for keeping everything, so that some slabs are kept and some recomputed."""
        wants = GEARS[gear]
        everything = plan(
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
