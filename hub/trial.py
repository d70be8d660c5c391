"""Load a folder of the Kernel Hub with `kernels`, as a user does, and compare it with torch: `trial.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from kernels import get_local_kernel
from kernels._rust import Build  # the reader of build.toml that kernel-builder has

folder = Path(sys.argv[1]).resolve()
backends = Build.open(folder).general.backends
wk = get_local_kernel(folder)
hidden, weight = torch.randn(2, 7, 16, dtype=torch.float64), torch.randn(50, 16, dtype=torch.float64)
targets = torch.randint(0, 50, (2, 7))
exact = (hidden @ weight.T).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
torch.testing.assert_close(wk.token_logps(hidden, weight, targets).logps, exact)
print(f"{folder}: build.toml names {', '.join(map(str, backends))}; loaded as {wk.__name__}, equal to plain torch")
