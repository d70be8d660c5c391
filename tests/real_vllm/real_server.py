"""A real vLLM on this machine's CPU, started and ended by a test."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

EXECUTABLE = os.environ.get("WINDKERN_VLLM", "")  # the vllm command of a separate environment
_UP = 1800  # seconds to wait for the server
_SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "OMP_NUM_THREADS": "1",
}


class RealServer:
    """`vllm serve` of a model in float32 under the name "base".

    Args:
        model: folder.
        log: file for its output.
        adapters: whether it takes them, with rank 16 at most.
    """

    def __init__(self, model: Path | str, log: Path, *, adapters: bool = True):
        self.model, self.log, self.adapters = model, log, adapters
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.start()

    def start(self) -> None:
        command = [EXECUTABLE, "serve", str(self.model), "--served-model-name", "base", "--dtype", "float32"]
        command += ["--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "16"]
        command += ["--enable-lora", "--max-lora-rank", "16"] if self.adapters else []
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | _SETTINGS
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        begun = time.monotonic()
        while not self._is_up():
            if self.process.poll() is not None or time.monotonic() - begun > _UP:
                self.close()
                raise RuntimeError(f"vLLM did not start: {self.log.read_text()[-3000:]}")
            time.sleep(1)

    def _is_up(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
