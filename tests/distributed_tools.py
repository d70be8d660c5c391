"""Run a job of tests/distributed_jobs.py, or of a similar module, in CPU processes and read their reports."""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import windkern

SECONDS = 1200  # a rank that waits for another would wait forever, but on a busy machine two ranks can take long


def launch(job: str, folder: Path, *options: str, processes: int = 2, module: str = "distributed_jobs") -> list[dict]:
    """Return the reports of all ranks of `job`, in the order of ranks; raise AssertionError if one failed.

    The processes are forked from a server that has imported everything and run nothing, because imports take longer
    than most jobs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distributed_jobs", "trainer_cases", "windkern.train.trainer", "peft"])
    store = tempfile.mktemp(prefix="store-", dir=folder)
    given = (module, job, folder, options, processes, store, windkern.__file__)
    ranks = [context.Process(target=_run, args=(rank, *given)) for rank in range(processes)]
    with _same_imports():
        for rank in ranks:
            rank.start()
    deadline = time.monotonic() + SECONDS
    while any(rank.is_alive() for rank in ranks) and not any(rank.exitcode for rank in ranks):
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
        rank.join()
    said = "\n".join(f"rank {rank}: {_log(folder, job, rank).read_text()[-4000:]}" for rank in range(processes))
    assert codes == [0] * processes, f"{job} ended with {codes} (None: after {SECONDS} s or a failure)\n{said}"
    return [json.loads(_report(folder, job, rank).read_text()) for rank in range(processes)]


@contextmanager
def _same_imports() -> Iterator[None]:
    """Yield the environment in which a server must start.

    Hazard: its path is not ours, so it would import the installed windkern.
    """
    before = os.environ.get("PYTHONPATH")
    ours = (str(Path(windkern.__file__).parents[1]), str(Path(__file__).parent), before)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, ours))
    try:
        yield
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


def _log(folder: Path, job: str, rank: int) -> Path:
    return folder / f"{job}-{rank}.log"


def _report(folder: Path, job: str, rank: int) -> Path:
    return folder / f"{job}-{rank}.json"


def _run(
    rank: int, module: str, job: str, folder: Path, options: tuple[str, ...], processes: int, store: str, ours: str
) -> None:
    os.fsync = lambda handle: None  # as in conftest.py
    sys.stdout = sys.stderr = _log(folder, job, rank).open("w", buffering=1)
    number, count = str(rank), str(processes)
    os.environ |= {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    import torch
    import torch.distributed as dist

    assert windkern.__file__ == ours, f"{windkern.__file__} is imported, not {ours}"
    torch.set_num_threads(1)
    os.chdir(folder)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    job_of_rank = getattr(importlib.import_module(module), job)
    gc.collect()
    gc.freeze()  # as in conftest.py
    report = job_of_rank(folder, *options)
    _report(folder, job, rank).write_text(json.dumps(report))
    dist.barrier()  # a rank that ends first closes its connections
    dist.destroy_process_group()
    sys.stdout.flush()
    # Hazard: after gloo, the interpreter sometimes aborts during shutdown ("terminate called without an active
    # exception"), when all work is done. A job that failed has raised before this line.
    os._exit(0)
