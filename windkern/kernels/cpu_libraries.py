"""Choose the library that multiplies float32 matrices on this CPU, and say when its results can be trusted.

torch.mm calls MKL. oneDNN is faster where MKL does not use all instructions of a CPU: MKL runs its AVX2 code on AMD
processors with AVX-512. The choice depends on the processor and on the variables that mask its instructions; nothing
is timed.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch

try:
    from windkern import _cpp
except ImportError:
    _cpp = None

# Values of ONEDNN_MAX_CPU_ISA that mask nothing.
_UNMASKED = ("", "ALL", "DEFAULT")


@functools.cache
def _processor() -> dict[str, str]:
    """Return the fields of the first processor in /proc/cpuinfo; empty if that file does not exist."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return {}
    lines = [line.partition(":") for line in cpuinfo.read_text().split("\n\n", 1)[0].splitlines()]
    return {name.strip(): value.strip() for name, _, value in lines}


def _onednn_may_use(*families: str) -> bool:
    """Return whether the variables that mask oneDNN's instructions allow those whose names start with `families`."""
    mask = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    return mask in _UNMASKED or mask.startswith((*families, "AVX10"))


def has_bfloat16_products() -> bool:
    """Return whether this CPU has bfloat16 product instructions (AVX512_BF16, AMX) that torch's libraries can use."""
    flags = _processor().get("flags", "").split()
    return (
        ("avx512_bf16" in flags or "amx_bf16" in flags)
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and _onednn_may_use("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX")
    )


def is_amd() -> bool:
    return _processor().get("vendor_id") == "AuthenticAMD"


def amd_avx512_family() -> int:
    """Return the family of an AMD processor with AVX-512 for oneDNN (25: Zen 4, 26: Zen 5), 0 for other processors."""
    if not (torch.backends.mkldnn.is_available() and _onednn_may_use("AVX512")):
        return 0
    processor = _processor()
    if not is_amd() or "avx512f" not in processor.get("flags", "").split():
        return 0
    return int(processor.get("cpu family", 0))


# oneDNN's AVX-512 code is 5 to 25 % faster than MKL's AVX2 code on Zen 4, which runs 512 bits in two halves, and 2.2
# times as fast on Zen 5. Its product of two transposed operands copies both, which pays off only on Zen 5. With AVX2
# alone, MKL is faster.
_FAMILY = amd_avx512_family()
ONEDNN = _FAMILY >= 25
ONEDNN_WEIGHT_GRAD = _FAMILY >= 26


@functools.cache
def _shares_openmp_with_torch() -> bool:
    """Return whether our extension and torch use one OpenMP runtime: torch must see a thread count set by ours."""
    if _cpp is None:
        return False
    before = torch.get_num_threads()
    try:
        _cpp.set_num_threads(before + 1)
        return torch.get_num_threads() == before + 1
    finally:
        _cpp.set_num_threads(before)


def onednn_is_safe() -> bool:
    """Return whether OpenMP will give the calling thread as many threads as it asks for.

    Hazard: oneDNN cuts a product into one part per requested thread and leaves some parts unwritten if the team is
    smaller (OMP_THREAD_LIMIT, OMP_DYNAMIC, a call inside a parallel region). Remedy: compute the size of the team as
    OpenMP's specification does; if it could be smaller, or is unknown, MKL runs the product.
    """
    return _shares_openmp_with_torch() and _cpp.openmp_team_is_exact()
