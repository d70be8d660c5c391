"""The CUDA back end on a GPU: each kernel against torch_rows on the GPU, and under compute-sanitizer.

As a program, `python tests/kernels/test_gpu_cuda.py` runs every kernel once on small shapes, for compute-sanitizer.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]

from cases import DTYPES  # noqa: E402
from cuda_cases import WIDTHS, Rows, close, close_pairs  # noqa: E402

import windkern as wk  # noqa: E402
from windkern.kernels.contract import Kept, RowState, Slab  # noqa: E402
from windkern.kernels.native import cuda as cuda_rows  # noqa: E402
from windkern.kernels.torch import rows as torch_rows  # noqa: E402
from windkern.transform import LogitTransform  # noqa: E402

REASON = wk.backends.why_not("cuda", "cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


def results(kernels, kernel, options, arguments, device="cuda"):
    """Return the outputs of one kernel of `Rows`, whose tensors are made on the GPU from the same numbers."""
    torch.manual_seed(0)
    rows = Rows(*arguments[0], **arguments[1], device=device)
    return getattr(rows, kernel)(kernels, *options)


def every_call(dtype, width, rows=9):
    """Yield arguments of `Rows`, one of its kernels and options: every flag, both alignments, in place and not."""
    own = dtype in (torch.float32, torch.float64)
    for transform, bias, entropy, shifted in (
        ("identity", False, False, False),
        ("scaled", True, True, False),
        ("softcap", True, True, True),
    ):
        arguments = ((rows, width, dtype, transform), {"bias": bias, "entropy": entropy, "shifted": shifted})
        yield arguments, "forward", (False,)
        yield arguments, "forward", (True,)
        yield from ((arguments, "unit", (alias,)) for alias in {False, own})
        yield from ((arguments, "backward", (True, False, bias)), (arguments, "backward", (False, own, bias)))
        if not entropy:
            yield from ((arguments, kernel, (alias,)) for kernel in ("exps", "again") for alias in {False, own})
            yield arguments, "sums", ()
        for options in ((False,), (True, False), (True, True)):
            yield arguments, "finish", options
        for other in DTYPES:
            yield arguments, "factors", (other, entropy)
            yield from ((arguments, "grads", (other, entropy, spreads)) for spreads in (False, True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [*WIDTHS, 16384, 32768, 40001])
def test_row_kernels(dtype, width):
    for arguments, kernel, options in every_call(dtype, width, rows=70):
        ours, plain = (results(kernels, kernel, options, arguments) for kernels in (cuda_rows, torch_rows))
        for place, (got, want) in enumerate(zip(ours, plain, strict=True)):
            if got is not None:
                scale = 70.0 if want.dim() == 1 and kernel in ("backward", "sums") else 1.0
                close(got.cpu(), want.cpu(), got.dtype, f"{kernel}{options}, output {place}", scale=scale)


def test_offsets_beyond_two_to_the_31():
    """The last rows of a slab with more than 2^31 elements are right, and so are the first."""
    rows, width = (1 << 31) // 32768 + 3, 32768
    if torch.cuda.get_device_properties(0).total_memory < 20 << 30:
        pytest.skip("needs 20 GiB")
    z = torch.zeros(rows, width, device="cuda")
    z[-1, 5], z[0, 5] = 3.0, -2.0
    state = RowState(
        torch.full((rows,), -torch.inf, device="cuda"),
        torch.zeros(rows, device="cuda"),
        torch.full((rows,), -torch.inf, device="cuda"),
        None,
    )
    targets = torch.full((rows,), 5, device="cuda")
    kept = torch.empty(rows, width, dtype=torch.bfloat16, device="cuda")
    slab = Slab(z, None, targets, 0, LogitTransform())
    cuda_rows.slab_forward(slab, state, Kept(kept, torch.empty(rows, 1, device="cuda")))
    assert state.target_logit[[0, 1, -1]].tolist() == [-2.0, 0.0, 3.0]
    torch.testing.assert_close(state.run_sum[-1].item(), 1 + 32767 * 2.718281828459045**-3, rtol=1e-5, atol=0)
    assert kept[-1, 5] == 1 and kept[0, 5] == torch.tensor(2.718281828459045**-2).bfloat16()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [1, 2, 37, 1100, 16385])
def test_pairs_and_segments(dtype, n):
    scores, rewards = torch.randn(2, 2, n, dtype=dtype, device="cuda")
    where = torch.rand(2, n, device="cuda") < 0.7
    tolerance = {"rtol": 1e-4, "atol": 1e-5 * n} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10 * n}
    for link in cuda_rows.LINKS:
        for loss in cuda_rows.PAIR_LOSSES:
            ours = cuda_rows.pair_terms(scores, None, rewards, where, link, loss)
            wide = (None if part is None else part.double() for part in (scores, None, rewards))
            close_pairs(ours, torch_rows.pair_terms(*wide, where, link, loss), scores, loss, **tolerance)
        rates = torch_rows.win_rates(None, rewards.double(), where, link)
        torch.testing.assert_close(cuda_rows.win_rates(None, rewards, where, link).double(), rates, **tolerance)
    bounds = torch.tensor([0, 0, n // 2, n], device="cuda")
    sums = torch_rows.segment_sum(scores[0].double(), bounds)
    torch.testing.assert_close(cuda_rows.segment_sum(scores[0], bounds).double(), sums, rtol=1e-5, atol=1e-5)


def test_the_same_call_gives_the_same_bits():
    for arguments, kernel, options in every_call(torch.bfloat16, 4104, rows=300):
        first, second = (results(cuda_rows, kernel, options, arguments) for _ in range(2))
        for one, two in zip(first, second, strict=True):
            assert one is None or torch.equal(one.nan_to_num(7.0), two.nan_to_num(7.0))
    scores, rewards = torch.randn(2, 3, 5000, device="cuda")
    first, second = (cuda_rows.pair_terms(scores, None, rewards, None, "step", "logistic") for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_clean_under_compute_sanitizer(tool):
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("needs compute-sanitizer on PATH")
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, __file__]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "ran every kernel" in done.stdout, (done.stdout + done.stderr)[-4000:]


def run_every_kernel() -> None:
    for width in (3, 520, 1003, 8200):
        for dtype in DTYPES:
            for arguments, kernel, options in every_call(dtype, width, rows=5):
                results(cuda_rows, kernel, options, arguments)
    scores, rewards = torch.randn(2, 2, 70, device="cuda")
    for loss in cuda_rows.PAIR_LOSSES:
        cuda_rows.pair_terms(scores, None, rewards, None, "bradley_terry", loss)
    cuda_rows.win_rates(None, rewards, None, "step")
    cuda_rows.segment_sum(scores.flatten(), torch.tensor([0, 3, 140], device="cuda"))
    torch.cuda.synchronize()
    print("ran every kernel")


if __name__ == "__main__":
    run_every_kernel()
