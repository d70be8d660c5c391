"""Jobs of tests/kernels/test_mock_gpu.py on the mock GPU: `python tests/mock_jobs.py` runs them all and prints JSON."""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import mock_device  # isort: skip (it watches windkern register its ops)
import mock_driver
import torch

import windkern as wk

HIDDEN, VOCAB = 4096, 128256
# Ragged batches of a run: row counts between a short micro-batch and a long packed one, drawn once.
ROWS = torch.randint(300, 33000, (50,), generator=torch.Generator().manual_seed(0)).tolist()
ELSEWHERE = "cuda:1"


def head(rows: int, device: str, *, hidden_grad: bool = True, weight_grad: bool = True, hidden: int = HIDDEN):
    made = {"dtype": torch.bfloat16, "device": device}
    return (
        torch.empty(rows, hidden, **made).requires_grad_(hidden_grad),
        torch.empty(VOCAB, hidden, **made).requires_grad_(weight_grad),
        torch.zeros(rows, dtype=torch.int64, device=device),
    )


def trained(rows: int, device: str = "cuda:0", **options: Any) -> None:
    logps = wk.token_logps(*head(rows, device), max_scored=rows, backend="triton", **options).logps
    logps.sum().backward()


def frozen(rows: int, device: str = "cuda:0") -> None:
    wk.token_logps(*head(rows, device, weight_grad=False), max_scored=rows, backend="triton")


def scoring(rows: int, device: str = "cuda:0") -> None:
    with torch.no_grad():
        wk.token_logps(*head(rows, device), max_scored=rows, backend="triton")


def fused(rows: int, device: str = "cuda:0") -> None:
    hidden, weight, targets = head(4 * (rows // 4), device)
    grouped = hidden.detach().view(2, 2, -1, HIDDEN).requires_grad_()
    labels = targets.view(2, 2, -1)
    loss = wk.fused_loss(
        lambda logps: logps.sum(-1), grouped, weight, labels, max_scored=labels.numel(), backend="triton"
    )
    loss.backward()


def batch_invariant(rows: int, device: str) -> None:
    trained(rows, device, batch_invariant=True)


def with_bias_and_entropy(rows: int, device: str) -> None:
    bias = torch.zeros(VOCAB, dtype=torch.bfloat16, device=device, requires_grad=True)
    transform = {"scale": 1.3, "softcap": 5.0, "temperature": 1.7}
    outputs = wk.token_logps(
        *head(rows, device), bias=bias, **transform, entropy=True, max_scored=rows, backend="triton"
    )
    (outputs.logps + outputs.entropy).sum().backward()


def pair_loss(groups: int, device: str) -> None:
    scores = torch.zeros(groups, 3, device=device, requires_grad=True)
    wk.pair_loss(scores, rewards=scores.detach(), backend="triton").backward()


def win_rates(groups: int, device: str) -> None:
    wk.win_rates(rewards=torch.zeros(groups, 3, device=device), backend="triton")


def sequences(rows: int, device: str) -> None:
    bounds = torch.arange(0, rows + 1, rows // 4, device=device)
    wk.sequence_logps(*head(rows, device), cu_seqlens=bounds, max_scored=rows, backend="triton").sum().backward()


OPS = {
    function.__name__: function
    for function in (
        trained,
        frozen,
        scoring,
        fused,
        batch_invariant,
        with_bias_and_entropy,
        pair_loss,
        win_rates,
        sequences,
    )
}


def devices_of(op: str, *, guarded: bool) -> dict[str, Any]:
    """Return the devices of the launches of an op whose tensors are on GPU 1 while GPU 0 is current."""
    with mock_device.gpus() as devices, mock_driver.installed(lambda: devices.current, compiles=False) as driver:
        if guarded:
            with torch.cuda.device(ELSEWHERE):
                OPS[op](512, ELSEWHERE)
        else:
            OPS[op](512, ELSEWHERE)
        kernels = sorted({launch.kernel.rsplit(".", 1)[-1] for launch in driver.launches})
        return {
            "devices": sorted({launch.device for launch in driver.launches}),
            "kernels": kernels,
            "current": devices.current,
        }


def compilations(op: str) -> dict[str, int]:
    """Return the kernels compiled for ragged row counts."""
    with mock_device.gpus() as devices, mock_driver.installed(lambda: devices.current, compiles=False) as driver:
        for rows in ROWS:
            OPS[op](rows, "cuda:0")
        return dict(driver.compiled)


def grids(op: str, groups: int) -> list[tuple[int, int, int]]:
    with mock_device.gpus() as devices, mock_driver.installed(lambda: devices.current, compiles=False) as driver:
        OPS[op](groups, "cuda:0")
        return [launch.grid for launch in driver.launches]


def compiled_for_real() -> dict[str, Any]:
    """Run the same call twice: kernels go through Triton's compiler once."""
    found = []
    with mock_device.gpus() as devices, mock_driver.installed(lambda: devices.current) as driver:
        for _ in range(2):
            trained(512)
            found.append([len(driver.launches), sum(driver.compiled.values())])
    return {"launches and compilations": found}


def kinds() -> dict[str, int]:
    """Count compilations and launches over arguments that Triton compiles apart, by Triton's own launch and by ours."""
    from windkern.kernels.triton import hidden
    from windkern.kernels.triton.launcher import launch

    rows, found = torch.zeros(2), {}
    given = [
        (values.as_strided((2, 1), (stride, 1), shift), columns, targets)
        for values in (torch.zeros(4096, dtype=torch.bfloat16), torch.zeros(4096))
        for shift in (0, 1, 8)
        for stride in (64, 65, 1)
        for columns in (8, 16, 2**31)
        for targets in (torch.zeros(2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)[1:])
    ]

    def alone(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
        kernel[(programs,)](*args, **constants)

    for name, run in (("triton", alone), ("ours", launch)):
        with mock_driver.installed(compiles=False) as driver:
            for values, columns, targets in [*given, *given]:
                sizes = values.stride(0), values.stride(0), columns, 0.5
                arguments = rows, rows, targets, rows, values, values, *sizes
                run(hidden.row_factors_kernel, 2, *arguments, BLOCK=1024, num_warps=4)
            found[f"{name} compiled"], found[f"{name} launched"] = sum(driver.compiled.values()), len(driver.launches)
    return {**found, "calls": 2 * len(given)}


def host() -> dict[str, list]:
    """Return the figures of benchmarks/host.py by gear."""
    from benchmarks import host

    torch.set_num_threads(1)
    return {
        gear: host.measure(8, (1024,), host.GEARS[gear], 2, compiles=False)[0] for gear in ("frozen head", "scoring")
    }


JOBS = {
    **{f"devices {op}": lambda op=op: devices_of(op, guarded=False) for op in OPS},
    **{f"guarded {op}": lambda op=op: devices_of(op, guarded=True) for op in OPS},
    **{f"compilations {op}": lambda op=op: compilations(op) for op in ("trained", "frozen", "scoring")},
    **{f"grids {op}": lambda op=op: grids(op, 70000) for op in ("pair_loss", "win_rates")},
    "compiled": compiled_for_real,
    "kinds": kinds,
    "host": host,
}


def main(names: list[str]) -> None:
    found = {}
    for name in names or JOBS:
        try:
            found[name] = JOBS[name]()
        except Exception:
            found[name] = {"failed": traceback.format_exc()}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
