"""How far a result may be from float64: derived from plain PyTorch's own error in the same dtype."""

import torch

FLOAT64_BOUND = 1e-11


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


def assert_within(result: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor, dtype: torch.dtype, what: str):
    assert result.shape == exact.shape, f"{what}: shape {tuple(result.shape)}, expected {tuple(exact.shape)}"
    error, budget = relative_error(result, exact), error_budget(plain, exact, dtype)
    if not error <= budget:
        gap = (result.double() - exact.double()).abs().flatten()
        worst = int(gap.nan_to_num(torch.inf).argmax())
        raise AssertionError(
            f"{what} ({dtype}): relative error {error:.3g} over the budget {budget:.3g}; worst at flat index {worst}: "
            f"got {result.flatten()[worst]:.6g}, exact {exact.flatten()[worst]:.6g}"
        )
