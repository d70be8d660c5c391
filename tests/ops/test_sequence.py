"""sequence_logps: padded, packed, sums and means, against the reference."""

import pytest
import torch

import windkern as wk
from windkern import naive

BOUNDS = [0, 4, 4, 9, 23]  # one empty sequence


def packed_problem(dtype=torch.float64):
    hidden = torch.randn(23, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(301, 8, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, 301, (23,))
    targets[5:9] = -100
    targets[20] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("normalize", ["sum", "mean"])
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
def test_packed(backend, normalize, index_dtype):
    hidden, weight, targets = packed_problem()
    bounds = torch.tensor(BOUNDS, dtype=index_dtype)
    ours = wk.sequence_logps(hidden, weight, targets, cu_seqlens=bounds, normalize=normalize, backend=backend)
    exact = naive.sequence_logps(hidden, weight, targets, cu_seqlens=bounds, normalize=normalize)
    torch.testing.assert_close(ours, exact)
    upstream = torch.tensor([1.0, 7.0, -2.0, 0.3], dtype=torch.float64)
    leaves = (hidden, weight)
    for got, want in zip(
        torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(exact, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("normalize", ["sum", "mean"])
@pytest.mark.parametrize("lead", [(6,), (2, 6), (2, 3, 5)])
def test_padded(backend, normalize, lead):
    hidden = torch.randn(*lead, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(101, 8, dtype=torch.float64)
    targets = torch.randint(0, 101, lead)
    targets.view(-1)[::3] = -100
    targets.view(-1, lead[-1])[0] = -100  # a sequence without a scored token
    ours = wk.sequence_logps(hidden, weight, targets, normalize=normalize, backend=backend)
    exact = naive.sequence_logps(hidden, weight, targets, normalize=normalize)
    torch.testing.assert_close(ours, exact)
    got, want = (torch.autograd.grad(value.sum(), hidden)[0] for value in (ours, exact))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_gradcheck_packed(backend):
    hidden, weight, targets = packed_problem()
    bounds = torch.tensor(BOUNDS)

    def function(hidden, weight):
        return wk.sequence_logps(hidden, weight, targets, cu_seqlens=bounds, backend=backend)

    small = (hidden[:, :3].detach().requires_grad_(), weight[:31, :3].detach().requires_grad_())
    targets.clamp_(max=30)
    assert torch.autograd.gradcheck(function, small)


def test_long_sequences_keep_their_digits(backend):
    """8192 tokens: the float32 sum is exact up to its own rounding."""
    hidden, weight = torch.randn(8192, 4), torch.randn(37, 4)
    targets = torch.randint(0, 37, (8192,))
    packed = wk.sequence_logps(hidden, weight, targets, cu_seqlens=torch.tensor([0, 8192]), backend=backend)
    exact = naive.sequence_logps(hidden.double(), weight.double(), targets)
    assert abs(packed.item() - exact.item()) <= 2e-7 * abs(exact.item())


@pytest.mark.parametrize("count", [1, 5])
def test_segment_sum_of_segments(backend, count):
    kernels = wk.backends.BACKENDS[backend].kernels()
    values = torch.randn(40, dtype=torch.float32)
    bounds = torch.cat(
        [torch.zeros(1, dtype=torch.int64), torch.randint(0, 41, (count - 1,)).sort()[0], torch.tensor([40])]
    )
    torch.testing.assert_close(kernels.segment_sum(values, bounds), naive.segment_sum(values, bounds))
