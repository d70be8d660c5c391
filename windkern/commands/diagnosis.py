"""Find what `windkern doctor` shows: devices, the back ends that run here, why others do not, and their errors."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
from dataclasses import dataclass
from typing import Any

import torch

import windkern
from windkern import backends
from windkern.kernels import cpu_products
from windkern.kernels.gemm import products_of
from windkern.kernels.native import cpp as cpp_rows
from windkern.kernels.native import cuda as cuda_rows
from windkern.ops.logprobs import token_logps
from windkern.testing import Problem, Shape, error_budget, relative_error

PACKAGES = (
    *("torch", "triton", "numpy", "transformers", "accelerate", "peft", "datasets", "trl", "safetensors"),
    *("rich", "matplotlib", "vaderSentiment", "liger-kernel", "cut-cross-entropy"),
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16)  # that the self-test computes in
SHORT = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
QUANTITIES = ("logps", "entropy", "dhidden", "dweight")


@dataclass(frozen=True)
class Device:
    name: str  # as torch names it: cpu, cuda:0
    model: str
    detail: str
    products: dict[str, str]  # by dtype: which library multiplies, and its peculiarities


@dataclass(frozen=True)
class BackendState:
    name: str
    device: str
    reason: str | None  # why it cannot run there, None if it can


@dataclass(frozen=True)
class Check:
    """One quantity of one back end, compared with the specification in float64."""

    backend: str
    device: str
    dtype: str
    quantity: str
    error: float | None  # relative, in norm; None if the back end raised
    allowed: float
    message: str = ""  # what it raised

    @property
    def ok(self) -> bool:
        return self.error is not None and self.error <= self.allowed


def versions() -> dict[str, str | None]:
    """Return the version of each package that windkern can use, None if it is not installed."""
    found: dict[str, str | None] = {"windkern": windkern.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def devices() -> list[Device]:
    """Return the CPU, then every GPU that torch sees."""
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} threads"
    detail = f"{threads}, torch uses {torch.backends.cpu.get_cpu_capability()}"
    found = [Device("cpu", _cpu_model(), detail, products("cpu"))]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        with torch.cuda.device(index):
            reason = cuda_rows.why_not_tiles(64, torch.bfloat16)
        logits = "16-bit logits stay in registers" if reason is None else f"logits pass through memory: {reason}"
        memory = f"{properties.total_memory / 2**30:.1f} GiB"
        detail = f"capability {properties.major}.{properties.minor}, {memory}; {logits}"
        found.append(Device(f"cuda:{index}", properties.name, detail, products("cuda")))
    return found


def products(device_type: str) -> dict[str, str]:
    """Return which library multiplies operands of each dtype, and what costs speed or digits there."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        chosen = products_of(device_type, dtype)
        said = chosen.said
        if device_type == "cuda" and dtype == torch.float32 and _multiplies_in_tf32():
            said += " in TF32, as a setting of torch asks: errors are those of 10 bits, not of float32"
        found[SHORT[str(dtype).removeprefix("torch.")]] = said
    return found


def _multiplies_in_tf32() -> bool:
    """Return whether torch rounds operands of float32 products.

    Reason: torch has two kinds of settings for it, so a product is tried.
    """
    left = torch.full((64, 64), 1 + 2.0**-18, device="cuda")
    return bool((torch.mm(left, torch.eye(64, device="cuda")) != left).any())


def _cpu_model() -> str:
    if platform.system() == "Linux":
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def states(on: list[Device]) -> list[BackendState]:
    """Return the state of every back end on every device."""
    return [
        BackendState(name, device.name, backends.why_not(name, device.name))
        for device in on
        for name in backends.BACKENDS
    ]


def cpp_extension() -> dict[str, Any]:
    """Describe the C++ extension: what it can use on this CPU, what it uses, why not, and its bfloat16 products."""
    sets = [] if cpp_rows._cpp is None else list(cpp_rows._cpp.instruction_sets())
    reason = cpp_rows.why_not(torch.device("cpu"), torch.float32)
    chosen = os.environ.get("WINDKERN_CPP_ISA") or (sets[0] if sets else None)
    return {
        "built": cpp_rows._cpp is not None,
        "instruction_sets": sets,
        "in_use": chosen if reason is None else None,
        "reason": reason,
        "bf16_product": cpu_products.PRODUCT,
    }


# Entropies take a slower path through backward than log-probs alone, so there is a problem for each path.
PROBLEMS = (
    Problem(Shape((3, 7), (48,), 301), "all"),  # sizes that are multiples of no tile
    Problem(Shape((3, 7), (48,), 301), "bias", seed=1, seen=("logps",)),
)


def check_backend(name: str, device: str, dtype: torch.dtype) -> list[Check]:
    """Compare log-probs, entropy and gradients of small problems with `windkern.naive` in float64.

    What is allowed follows from the error of plain PyTorch on the same device, see `windkern.testing.allowed_error`.
    """
    label = str(dtype).removeprefix("torch.")
    worst: dict[str, Check] = {}
    shares: dict[str, float] = {}  # error over what is allowed
    for problem in PROBLEMS:
        exact, plain = problem.exact(dtype, "trained"), problem.plain(dtype, "trained", device)
        try:
            got = problem.run(token_logps, dtype, "trained", device=device, backend=name)
        except Exception as error:  # whatever a broken installation raises is the finding
            return [Check(name, device, label, "logps", None, 0.0, f"{type(error).__name__}: {error}")]
        for quantity in QUANTITIES:
            key = quantity + "0" if quantity.startswith("d") else quantity
            if key in exact:
                found, allowed = relative_error(got[key], exact[key]), error_budget(plain[key], exact[key], dtype)
                if quantity not in worst or not found / allowed <= shares[quantity]:
                    shares[quantity] = found / allowed
                    worst[quantity] = Check(name, device, label, quantity, found, allowed)
    return [worst[quantity] for quantity in QUANTITIES]


def self_test(found: list[BackendState]) -> list[Check]:
    """Check every back end that can run, in every dtype of DTYPES that it can run on its device."""
    return [
        check
        for state in found
        if state.reason is None
        for dtype in DTYPES
        if backends.why_not(state.name, state.device, dtype) is None
        for check in check_backend(state.name, state.device, dtype)
    ]


def as_dict(on: list[Device], found: list[BackendState], checks: list[Check]) -> dict[str, object]:
    """Return all findings, for programs."""
    return {
        "kind": "doctor",
        "ok": all(check.ok for check in checks),
        "versions": versions(),
        "devices": [dataclasses.asdict(device) for device in on],
        "backends": [dataclasses.asdict(state) for state in found],
        "cpp": cpp_extension(),
        "self_test": [dataclasses.asdict(check) | {"ok": check.ok} for check in checks],
    }
