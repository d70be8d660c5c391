"""Check that an installed wheel works: run with the Python of its environment, outside the checkout.

    python tests/wheel_smoke.py [--pure]

Checks that windkern comes from site-packages with the C++ extension (--pure: without), that the command runs, that
log-probs and gradients are those of float64 logits, and that the wheel brings no OpenMP runtime besides torch's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# Hazard: Python puts this file's folder first, and so the tests' helpers. Remedy: remove it before anything else.
sys.path.pop(0)

import torch

import windkern as wk


def openmp_runtimes() -> set[str]:
    """Return the files of OpenMP runtimes that this process has mapped; empty if the system does not show them."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    paths = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
    return {path for path in paths if any(name in Path(path).name for name in ("libgomp", "libomp", "libiomp"))}


def check_values(backend: str) -> None:
    """Compare log-probs and gradients with plain float64 PyTorch."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 5, 3, 24), torch.randn(301, 24)
    targets = torch.randint(0, 301, (2, 5, 3))
    leaves = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    logits = leaves[0] @ leaves[1].T
    plain = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1).sum(-1)
    ours = [tensor.requires_grad_() for tensor in (hidden, weight)]
    found = wk.sequence_logps(*ours, targets, backend=backend)
    torch.testing.assert_close(found.double(), plain, rtol=1e-5, atol=1e-4)
    for mine, other in zip(
        torch.autograd.grad(found.square().sum(), ours), torch.autograd.grad(plain.square().sum(), leaves), strict=True
    ):
        torch.testing.assert_close(mine.double(), other, rtol=1e-4, atol=1e-2)


def main(arguments: list[str]) -> None:
    home = Path(wk.__file__).resolve().parent
    assert "site-packages" in home.parts, f"windkern comes from {home}, not from an installed wheel"
    assert (home / "py.typed").exists() and (home / "recipes" / "demo.yaml").exists()
    wanted = "torch" if "--pure" in arguments else "cpp"
    names = wk.backends.available("cpu")
    assert names[0] == wanted, (
        f"the back end of a CPU must be {wanted}, got {names}; {wk.backends.why_not('cpp', 'cpu')}"
    )
    for name in names:
        check_values(name)
    command = [sys.executable, "-m", "windkern"]
    shown = subprocess.run(
        [*command, "--version"], capture_output=True, text=True, check=True, cwd=os.path.expanduser("~")
    )
    assert shown.stdout == f"windkern {wk.__version__}\n", shown.stdout
    subprocess.run([*command, "doctor", "--json"], stdout=subprocess.DEVNULL, check=True, cwd=os.path.expanduser("~"))
    subprocess.run([*command, "losses"], stdout=subprocess.DEVNULL, check=True, cwd=os.path.expanduser("~"))
    runtimes = openmp_runtimes()
    ours = [path for path in runtimes if "windkern" in path.removeprefix(str(home.parent))]
    assert not ours, f"the wheel brings an OpenMP runtime beside torch's: {ours}"
    print(
        f"windkern {wk.__version__} from {home}: back ends {', '.join(names)}; OpenMP {', '.join(runtimes) or 'untold'}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
