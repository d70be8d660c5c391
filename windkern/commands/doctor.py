"""`windkern doctor`: what this machine has, which back ends run here, why others do not, and whether they are right."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import windkern
from windkern import backends, naive
from windkern.kernels import cpu_products
from windkern.kernels.gemm import products_of
from windkern.kernels.native import cpp as cpp_rows
from windkern.ops.logprobs import token_logps
from windkern.terminal import printable

if TYPE_CHECKING:
    from windkern.display import Display

PACKAGES = (
    *("torch", "triton", "numpy", "transformers", "accelerate", "peft", "datasets", "trl", "safetensors"),
    *("rich", "matplotlib", "vaderSentiment", "liger-kernel", "cut-cross-entropy"),
)
# Relative error in norm that the self-test allows: rounding of sums in the dtype, and some.
ALLOWED = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 8e-3}
SHORT = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
QUANTITIES = ("logps", "entropy", "dhidden", "dweight")


@dataclass(frozen=True)
class Device:
    name: str  # as torch names it: cpu, cuda:0
    model: str
    detail: str
    products: dict[str, str]  # by dtype: who multiplies, and what is particular about it


@dataclass(frozen=True)
class BackendState:
    name: str
    device: str
    reason: str | None  # why it cannot run there, None where it can


@dataclass(frozen=True)
class Check:
    """One quantity of one back end beside the specification in float64."""

    backend: str
    device: str
    dtype: str
    quantity: str
    error: float | None  # relative, in norm; None where the back end raised
    allowed: float
    message: str = ""  # what it raised

    @property
    def ok(self) -> bool:
        return self.error is not None and self.error <= self.allowed


def versions() -> dict[str, str | None]:
    """Version of each package that windkern can use, None where it is not installed."""
    found: dict[str, str | None] = {"windkern": windkern.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def devices() -> list[Device]:
    """The CPU, then every GPU that torch sees."""
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} threads"
    detail = f"{threads}, torch uses {torch.backends.cpu.get_cpu_capability()}"
    found = [Device("cpu", _cpu_model(), detail, products("cpu"))]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        detail = f"capability {properties.major}.{properties.minor}, {properties.total_memory / 2**30:.1f} GiB"
        found.append(Device(f"cuda:{index}", properties.name, detail, products("cuda")))
    return found


def products(device_type: str) -> dict[str, str]:
    """Which library multiplies operands of each dtype, and what costs speed or digits there."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        chosen = products_of(device_type, dtype)
        said = chosen.said
        if device_type == "cuda" and dtype == torch.float32 and _multiplies_in_tf32():
            said += " in TF32, as a setting of torch's asks: errors are those of 10 bits, not of float32"
        found[SHORT[str(dtype).removeprefix("torch.")]] = said
    return found


def _multiplies_in_tf32() -> bool:
    """Whether torch rounds operands of float32 products; asked by multiplying, for torch has two kinds of settings."""
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
    """Every back end on every device."""
    return [
        BackendState(name, device.name, backends.why_not(name, device.name))
        for device in on
        for name in backends.BACKENDS
    ]


def cpp_extension() -> dict[str, object]:
    """The C++ extension: what it can use on this CPU, what it uses or why nothing, and how it multiplies bfloat16."""
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


def _problem(device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """hidden (S, T, H), weight (V, H), bias (V,), targets (S, T), upstream of log-probs and of entropies (S, T)."""
    generator = torch.Generator().manual_seed(0)
    rows, hidden_size, vocab = (3, 7), 48, 301  # multiples of nothing

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    hidden, weight, bias = draw(*rows, hidden_size), draw(vocab, hidden_size), draw(vocab)
    upstream, other = draw(*rows), draw(*rows)
    targets = torch.randint(vocab, rows, generator=generator)
    targets[0, :2] = -100
    leaves = [value.to(dtype).to(device).requires_grad_() for value in (hidden, weight / hidden_size**0.5, bias)]
    return (*leaves, targets.to(device), upstream.to(device), other.to(device))


def _found(function: Callable[..., tuple], leaves: list[Tensor], targets: Tensor, upstream: Tensor, other: Tensor):
    hidden, weight, bias = leaves
    logps, _, entropy = function(hidden, weight, targets, bias=bias, scale=1.2, softcap=8.0, entropy=True)
    loss = (logps * upstream).sum() + (entropy * other).sum()
    grads = torch.autograd.grad(loss, (hidden, weight))
    # Log-probs alone, as losses ask for them, take another way through backward.
    alone = torch.autograd.grad((function(hidden, weight, targets, bias=bias)[0] * upstream).sum(), (hidden, weight))
    both = (torch.stack(pair) for pair in zip(grads, alone, strict=True))
    return dict(zip(QUANTITIES, (logps, entropy, *both), strict=True))


def check_backend(name: str, device: str, dtype: torch.dtype) -> list[Check]:
    """Log-probs, entropy and gradients of a small problem, beside `windkern.naive` in float64."""
    *leaves, targets, upstream, other = _problem(device, dtype)
    exact = [value.detach().double().requires_grad_() for value in leaves]
    label = str(dtype).removeprefix("torch.")
    want = _found(naive.token_logps, exact, targets, upstream, other)
    try:
        got = _found(
            lambda *args, **options: token_logps(*args, **options, backend=name), leaves, targets, upstream, other
        )
    except Exception as error:  # whatever a broken installation raises is the finding
        return [Check(name, device, label, "logps", None, ALLOWED[dtype], f"{type(error).__name__}: {error}")]
    return [
        Check(
            name,
            device,
            label,
            quantity,
            float((got[quantity].detach().double() - want[quantity].detach()).norm() / want[quantity].detach().norm()),
            ALLOWED[dtype],
        )
        for quantity in QUANTITIES
    ]


def self_test(found: list[BackendState]) -> list[Check]:
    """Every back end that can run, in every dtype of ALLOWED that it can run on its device."""
    return [
        check
        for state in found
        if state.reason is None
        for dtype in ALLOWED
        if backends.why_not(state.name, state.device, dtype) is None
        for check in check_backend(state.name, state.device, dtype)
    ]


def as_dict(on: list[Device], found: list[BackendState], checks: list[Check]) -> dict[str, object]:
    """All of it, for programs."""
    return {
        "kind": "doctor",
        "ok": all(check.ok for check in checks),
        "versions": versions(),
        "devices": [dataclasses.asdict(device) for device in on],
        "backends": [dataclasses.asdict(state) for state in found],
        "cpp": cpp_extension(),
        "self_test": [dataclasses.asdict(check) | {"ok": check.ok} for check in checks],
    }


def run(arguments: argparse.Namespace, display: Display | None = None) -> int:
    """Print the findings; 0 if every back end that runs is right, else 1."""
    on = devices()
    found = states(on)
    if arguments.json:
        report = as_dict(on, found, self_test(found))
        if display is not None:
            display.stop()
        print(json.dumps(report, indent=1))
        return 0 if report["ok"] else 1
    from windkern.display import Display

    with display or Display(lines=False) as display:
        display.phase(0, "testing every back end")
        checks = self_test(found)
    _print(display, on, found, checks)
    return 0 if all(check.ok for check in checks) else 1


def _print(display: Display, on: list[Device], found: list[BackendState], checks: list[Check]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    def table(*headers: str) -> Table:
        made = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
        for header in headers:
            made.add_column(header, overflow="fold", no_wrap=header not in ("why not", ""))
        return made

    packages = ", ".join(f"{name} {version}" for name, version in versions().items() if version is not None)
    missing = ", ".join(name for name, version in versions().items() if version is None)
    display.print(packages)
    if missing:
        display.print((f"not installed: {missing}", "dim"))
    for device in on:
        display.print((device.name, "bold"), f": {device.model}; {device.detail}")
        told = "; ".join(f"{dtype} by {said}" for dtype, said in device.products.items())
        display.print((f"products on {device.name}", "bold"), f": {told}")
    cpp = cpp_extension()
    state = (
        f": instruction sets {', '.join(cpp['instruction_sets'])}; in use {cpp['in_use']}; bfloat16 products with "
        f"float32 sums: {cpp['bf16_product'] or 'none, operands are widened to float32'}"
        if cpp["reason"] is None
        else f": not in use: {cpp['reason']}"
    )
    display.print(("C++ extension", "bold"), state)
    available = table("device", "back end", "runs", "why not")
    for state in found:
        runs = "[green]yes[/green]" if state.reason is None else "no"
        available.add_row(state.device, state.name, runs, Text(printable(state.reason or "")))
    display.print(rich=available)
    results = table("device", "back end", "type", *QUANTITIES, "")
    groups: dict[tuple[str, str, str], list[Check]] = {}
    for check in checks:
        groups.setdefault((check.device, check.backend, check.dtype), []).append(check)
    for (device, name, dtype), group in groups.items():
        errors = {check.quantity: check for check in group}
        cells = [
            f"{errors[each].error:.1e}" if each in errors and errors[each].error is not None else ""
            for each in QUANTITIES
        ]
        wrong = [check for check in group if not check.ok]
        verdict = Text("ok", "green")
        if wrong:
            verdict = Text.assemble(("wrong", "red"), f" {printable(wrong[0].message)}".rstrip())
        results.add_row(device, name, SHORT[dtype], *cells, verdict)
    allowed = ", ".join(f"{SHORT[str(dtype)[6:]]} {error:.0e}" for dtype, error in ALLOWED.items())
    display.print(f"self-test: error in norm, relative to windkern.naive; allowed {allowed}")
    display.print(rich=results)
