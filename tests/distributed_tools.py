"""Launch a job of tests/distributed_jobs.py in several CPU processes by torchrun and read back what it reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import windkern

JOBS = Path(__file__).parent / "distributed_jobs.py"
SECONDS = 120  # a rank that waits for another would wait for ever


def launch(job: str, folder: Path, *options: str, processes: int = 2) -> list[dict]:
    """What each rank of `job` reported, in the order of ranks; an AssertionError with the output if one failed."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    # Hazard: a script has its own folder on its path, not ours; it would import whichever windkern is installed.
    path = os.pathsep.join(filter(None, (str(Path(windkern.__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(JOBS), job, str(folder), *options],
        env=environment,
        cwd=JOBS.parents[1],
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, f"{job} ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return [json.loads((folder / f"{job}-{rank}.json").read_text()) for rank in range(processes)]
