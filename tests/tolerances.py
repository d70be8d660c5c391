"""How far a result may be from float64, and how far two evaluations of one expression may part on any CPU."""

import torch

FLOAT64_BOUND = 1e-11
# Operations between the log-probs and a loss or its gradient: none of the losses is as deep.
LOSS_OPERATIONS = 64


def relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative Frobenius norm of the difference; absolute where the exact value is zero everywhere."""
    difference = (result.double() - exact.double()).norm()
    size = exact.double().norm()
    return float(difference / size) if size > 0 else float(difference)


def error_budget(plain: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> float:
    """bf16, fp16: half of plain PyTorch's error or one eps; fp32: 4 x (plain + eps); fp64: 1e-11."""
    if dtype == torch.float64:
        return FLOAT64_BOUND
    own, eps = relative_error(plain, exact), torch.finfo(dtype).eps
    return 4 * (own + eps) if dtype == torch.float32 else max(own / 2, eps)


def assert_within(
    result: torch.Tensor,
    exact: torch.Tensor,
    plain: torch.Tensor,
    dtype: torch.dtype,
    what: str,
    *,
    cancellation: float = 1.0,
) -> None:
    """`cancellation`: how much larger than their sum the terms are that the result is added up from."""
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
    """`operations` roundings, each of at most one eps of a number up to `largest` (or 1)."""
    return operations * torch.finfo(dtype).eps * max(1.0, largest)


def assert_same_but_for_rounding(got: torch.Tensor, want: torch.Tensor, operations: int, *inputs: torch.Tensor) -> None:
    """The same expression of the same numbers, in a batch of another size, order or number of threads.

    Hazard: torch rounds such results differently. The vector code of a CPU takes whole vectors, scalar code what is
    left over, and sums are cut where the batch ends, so the same row has other bits in another place.
    """
    largest = max(float(value.abs().max()) for value in (want, *inputs) if value.numel())
    bound = rounding_bound(operations, largest, want.dtype)
    torch.testing.assert_close(got, want, rtol=0, atol=bound)
