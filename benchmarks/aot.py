"""Compile every Triton kernel ahead of time, on a machine without a GPU, and inspect the machine code.

    python -m benchmarks.aot [--targets sm_80,sm_89,sm_90,sm_100,sm_120,gfx942] [--kernels PATTERN] [--json FILE]

Prints registers, stack (above 0: spills), shared memory and instructions of interest for each kernel at the block sizes
of the table. Exits with 1 if a kernel does not compile, spills, takes more shared memory than the chip has, or lacks
the instructions it was written for.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from windkern.kernels import tuned
from windkern.kernels.contract import WIDEST_ROW, WIDEST_UNIT_SLAB
from windkern.kernels.triton import backward as triton_backward
from windkern.kernels.triton import exps as triton_exps
from windkern.kernels.triton import finish as triton_finish
from windkern.kernels.triton import hidden as triton_hidden
from windkern.kernels.triton import launch as triton_launch
from windkern.kernels.triton import pairs as triton_pairs
from windkern.kernels.triton import rows as triton_rows
from windkern.kernels.triton import tile as triton_tile

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {
    "sm_80": 163 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}
MATRIX_INSTRUCTION = {"sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}  # HMMA for the others
FLOATS = {"slope", "cap_in", "cap_out", "gain", "log_gain"}


@dataclass(frozen=True)
class Case:
    """One kernel at one set of constants."""

    name: str
    kernel: object
    pointers: dict[str, str]  # argument -> element type; float32 for the others
    constants: dict[str, object]
    warps: int
    stages: int = 2
    only: tuple[str, ...] = tuple(TARGETS)
    wants: tuple[str, ...] = ()  # instructions, "matrix" for the chip's own


@dataclass
class Row:
    """The compiler's result for a case."""

    name: str
    target: str
    registers: int | None = None
    stack: int | None = None
    shared: int | None = None
    instructions: dict[str, int] = field(default_factory=dict)
    problem: str | None = None


def _flags(**given: object) -> dict[str, object]:
    return given


def cases(target: str) -> Iterator[Case]:
    """Yield every kernel with the fewest and the most flags, at the smallest and the widest blocks of the table."""
    plain = _flags(HAS_BIAS=False, CAPPED=False, ENTROPY=False)
    full = _flags(HAS_BIAS=True, CAPPED=True, ENTROPY=True)
    low = {"kept_ptr": "bf16", "unit_ptr": "bf16", "logged_ptr": "bf16", "dz_ptr": "bf16", "targets_ptr": "i64"}
    low["values_ptr"] = "bf16"
    aligned = _flags(ALIGNED=True)
    wide_loads = ("LDG.E.128",)
    for block, wide in ((2048, False), (WIDEST_ROW, False), (triton_launch.WIDE_BLOCK, True)):
        warps, walks = tuned.row_warps(block, target), _flags(WIDE=wide, BLOCK=block, **aligned)
        shown = f"{block}{' of a wide row' if wide else ''}"
        for label, flags in (("plain", plain), ("full", full)):
            for kept in (False,) if wide else (False, True):
                name = f"forward_rows[{shown},{label}{',kept' if kept else ''}]"
                constants = {**flags, **walks, "KEPT": kept}
                yield Case(name, triton_rows.forward_rows, low, constants, warps, wants=wide_loads)
        for bias in (False, True):
            constants = _flags(HAS_BIAS=bias, CAPPED=False, MOVED=bias, **walks)
            name = f"exps_rows[{shown}{',bias' if bias else ''}]"
            yield Case(name, triton_exps.exps_rows, low, constants, warps, wants=(*wide_loads, "STG.E.128"))
    for block in (2048, WIDEST_UNIT_SLAB):
        warps = tuned.row_warps(block, target)
        for label, flags in (("plain", plain), ("full", full)):
            constants = {**flags, **aligned, "WIDE": False, "BLOCK": block}
            yield Case(f"unit_rows[{block},{label}]", triton_rows.unit_rows, low, constants, warps, wants=wide_loads)
    for width in (512, 8192):
        block, warps = tuned.backward_config(width, target)
        constants = _flags(HAS_BIAS=True, CAPPED=False, BLOCK=block, **aligned)
        yield Case(f"again_rows[{block}]", triton_exps.again_rows, low, constants, warps)
        for kept in (False, True):
            for label, entropy, capped in (("plain", False, False), ("full", True, True)):
                constants = _flags(
                    KEPT=kept,
                    TILE=tuned.tile_config(target).columns if kept and entropy else 0,
                    HAS_BIAS=entropy,
                    CAPPED=capped,
                    HAS_LOGP=True,
                    HAS_LSE=entropy,
                    HAS_ENT=entropy,
                    BLOCK=block,
                    **aligned,
                )
                pointers = {**low, "src_ptr": "bf16" if kept else "fp32"}
                name = f"backward_rows[{block},{label},{'kept' if kept else 'logits'}]"
                yield Case(name, triton_backward.backward_rows, pointers, constants, warps)
    yield from _float64_cases(full)
    constants = _flags(ROWS=triton_exps.COLUMN_SUM_ROWS, WEIGHTED=True, BR=32, BC=128)
    yield Case("column_sum_parts", triton_exps.column_sum_parts, low, constants, 4)
    yield Case("rescale_kernel", triton_exps.rescale_kernel, {}, _flags(BLOCK=1024), 4)
    constants = _flags(SETTLES=True, MOVES=True, BLOCK=1024)
    yield Case("finish_kernel", triton_finish.finish_kernel, low, constants, 4)
    ends = dict.fromkeys(("hidden_ptr", "scaled_ptr", "head_ptr", "out_ptr"), "bf16")
    ends |= {"rows_ptr": "i64", "targets_ptr": "i64"}
    constants = _flags(BLOCK=triton_hidden.BLOCK)
    kernels = triton_hidden.row_factors_kernel, triton_hidden.hidden_grad_kernel
    wide = {"wants": (*wide_loads, "STG.E.128")}
    yield Case("row_factors_kernel", kernels[0], ends, constants, triton_hidden.WARPS, **wide)
    constants |= _flags(FACTOR=True, TARGET=True, SCATTERS=True, ROUNDED=tl.bfloat16)
    yield Case("hidden_grad_kernel", kernels[1], ends, constants, triton_hidden.WARPS, **wide)
    config = tuned.tile_config(target)
    sizes = _flags(BM=config.rows, BV=config.columns, BK=config.inner, GROUP=config.group, WIDEN=False)
    for described in (False, True):
        operand = "bf16"
        if described:
            operand = f"tensordesc<bf16[{config.rows},{config.inner}]>"
        for label, flags, kept in (("plain", plain, False), ("plain", plain, True), ("full", full, True)):
            pointers = {**low, "hidden": operand, "weight": operand.replace(f"[{config.rows}", f"[{config.columns}")}
            yield Case(
                f"tile_kernel[{label}{',kept' if kept else ''}{',tma' if described else ''}]",
                triton_tile.tile_kernel,
                pointers,
                {**sizes, **flags, "KEPT": kept, "DESCRIPTORS": described},
                config.warps,
                config.stages,
                only=("sm_90", "sm_100", "sm_120") if described else tuple(TARGETS),
                wants=("matrix", "UTMALDG") if described else ("matrix",),
            )
    yield Case("join_kernel", triton_tile.join_kernel, {}, _flags(ENTROPY=True, BM=16), 1)
    for link in triton_pairs.LINKS.values():
        for loss in triton_pairs.PAIR_LOSSES.values():
            constants = _flags(LINK=link, LOSS=loss, FROM_REWARDS=True, MASKED=True, TILE=triton_pairs.TILE)
            pointers = {"where_ptr": "u8"}
            yield Case(f"pair_kernel[{link},{loss}]", triton_pairs.pair_kernel, pointers, constants, triton_pairs.WARPS)
        constants = _flags(LINK=link, FROM_REWARDS=True, MASKED=True, TILE=triton_pairs.TILE)
        pointers = {"where_ptr": "u8"}
        yield Case(f"win_rate_kernel[{link}]", triton_pairs.win_rate_kernel, pointers, constants, triton_pairs.WARPS)
    yield Case("segment_kernel", triton_pairs.segment_kernel, {"bounds_ptr": "i64"}, _flags(BLOCK=1024), 4)


def _float64_cases(full: dict[str, object]) -> Iterator[Case]:
    """Yield the float64 cases, which take the transform as constants."""
    numbers = _flags(slope=1.5, cap_in=0.25, cap_out=4.0)
    wide = dict.fromkeys(
        [
            name
            for name in triton_backward.backward_rows.arg_names + triton_rows.forward_rows.arg_names
            if "ptr" in name
        ],
        "fp64",
    ) | {"targets_ptr": "i64"}
    constants = {**numbers, **full, "KEPT": True, "ALIGNED": True, "WIDE": False, "BLOCK": 1024}
    yield Case("forward_rows[1024,full,kept,fp64]", triton_rows.forward_rows, wide, constants, 4)
    flags = _flags(
        TILE=0, HAS_BIAS=True, CAPPED=True, HAS_LOGP=True, HAS_LSE=True, HAS_ENT=True, KEPT=False, ALIGNED=True
    )
    yield Case(
        "backward_rows[1024,full,logits,fp64]",
        triton_backward.backward_rows,
        wide,
        {**numbers, **flags, "BLOCK": 1024},
        4,
    )


def _source(case: Case) -> ASTSource:
    """Return the source with the signature that a launch would specialise: pointers and strides divisible by 16."""
    signature, attributes = {}, {}
    for place, name in enumerate(case.kernel.arg_names):
        if name in case.constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr") or name in ("hidden", "weight"):
            kind = case.pointers.get(name, "fp32")
            signature[name] = kind if kind.startswith("tensordesc") else f"*{kind}"
            if not kind.startswith("tensordesc"):
                attributes[(place,)] = [["tt.divisibility", 16]]
        elif name in FLOATS:
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if not case.kernel.params[place].do_not_specialize:
                attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=case.kernel, signature=signature, constexprs=case.constants, attrs=attributes)


def _cuobjdump() -> str:
    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


def _read_cubin(cubin: bytes, row: Row, wanted: tuple[str, ...]) -> None:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = ["-sass"] if wanted else []
        command = [_cuobjdump(), "--dump-resource-usage", *listing, file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    row.registers, row.stack = (int(re.search(rf"{name}:(\d+)", said)[1]) for name in ("REG", "STACK"))
    row.instructions = {name: len(re.findall(rf"\b{re.escape(name)}\b", said)) for name in wanted}


def _read_amdgcn(text: str, row: Row, wanted: tuple[str, ...]) -> None:
    row.registers = int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1])
    row.stack = int(re.search(r"\.vgpr_spill_count:\s*(\d+)", text)[1])
    row.instructions = {name: len(re.findall(name, text)) for name in wanted if name.startswith("v_")}


def compile_case(case: Case, target: str) -> Row:
    """Compile one case for one target, and check the result."""
    row = Row(case.name, target)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    if target.startswith("gfx"):
        options["num_warps"] = max(1, case.warps // 2)  # a warp has 64 threads
    try:
        compiled = triton.compile(_source(case), target=TARGETS[target], options=options)
    except Exception as error:
        row.problem = f"does not compile: {type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}"
        return row
    row.shared = compiled.metadata.shared
    wanted = tuple(MATRIX_INSTRUCTION.get(target, "HMMA") if name == "matrix" else name for name in case.wants)
    if target.startswith("gfx"):
        _read_amdgcn(compiled.asm["amdgcn"], row, wanted)
    else:
        _read_cubin(compiled.asm["cubin"], row, wanted)
    missing = [name for name, count in row.instructions.items() if count == 0]
    if row.stack > 0:
        row.problem = f"spills: {row.stack}"
    elif row.shared > SHARED_LIMIT[target]:
        row.problem = f"{row.shared} bytes of shared memory, but the chip has {SHARED_LIMIT[target]}"
    elif missing:
        row.problem = f"no {', '.join(missing)}"
    return row


def _job(place: tuple[str, str]) -> Row:
    target, name = place
    return compile_case(next(case for case in cases(target) if case.name == name), target)


def compile_all(targets: list[str], pattern: str = "*", processes: int = 2) -> list[Row]:
    """Compile all matching cases for all targets, in parallel processes."""
    jobs = [
        (target, case.name)
        for target in targets
        for case in cases(target)
        if target in case.only and fnmatchcase(case.name.split("[")[0], pattern)
    ]
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(_job, jobs))


def print_table(rows: list[Row]) -> None:
    print(f"{'kernel':<36} {'target':<8} {'regs':>5} {'stack':>6} {'shared':>7}  instructions")
    for row in rows:
        found = ", ".join(f"{count} {name}" for name, count in row.instructions.items())
        numbers = f"{row.registers!s:>5} {row.stack!s:>6} {row.shared!s:>7}"
        print(f"{row.name:<36} {row.target:<8} {numbers}  {found}{'  ** ' + row.problem if row.problem else ''}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated (default: all)")
    parser.add_argument("--kernels", default="*", metavar="PATTERN", help="shell pattern over kernel names")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    targets = arguments.targets.split(",")
    unknown = sorted(set(targets) - set(TARGETS))
    if unknown:
        parser.error(f"unknown target {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    rows = compile_all(targets, arguments.kernels, arguments.processes)
    if not rows:
        parser.error(f"no kernel matches {arguments.kernels!r}")
    print_table(rows)
    problems = [row for row in rows if row.problem]
    print(f"triton {triton.__version__}: {len(rows)} kernels compiled, {len(problems)} with a problem")
    if arguments.json:
        document = {"triton": triton.__version__, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
