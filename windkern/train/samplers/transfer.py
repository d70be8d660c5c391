"""Send whole weights to the workers of a vLLM server over NCCL, by vLLM's own engine for trainers."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import anyio.to_thread
import torch
from anyio.from_thread import BlockingPortal
from safetensors import safe_open
from torch import Tensor

from windkern._extras import require
from windkern.train.samplers.engine import Policy
from windkern.train.samplers.server import RefusedError, Server, ServerError

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Parameter(NamedTuple):
    """The description of a tensor that is sent before it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class Weights:
    """The tensors of a policy's folder, as vLLM's engine takes them (its protocol `WeightSource`).

    Each is read when it is sent, so the device holds one of them at a time.

    Args:
        device: device to read them to.
    """

    def __init__(self, device: torch.device):
        self.device, self.folder = device, Path()

    def metadata(self) -> list[Parameter]:
        """Return names, dtypes and shapes, in the order of iteration.

        Raises:
            ServerError: a tensor has a dtype other than float64, float32, float16 and bfloat16.
        """
        found = []
        for file, name in self._names():
            part = file.get_slice(name)
            if (dtype := part.get_dtype()) not in _DTYPES:
                raise ServerError(f"{name} of {self.folder} is {dtype}, which is not sent over NCCL")
            found.append(Parameter(name, _DTYPES[dtype], tuple(part.get_shape())))
        return found

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for file, name in self._names():
            yield name, file.get_tensor(name)

    def _names(self) -> Iterator[tuple[safe_open, str]]:
        for path in sorted(self.folder.glob("*.safetensors")):
            with safe_open(path, framework="pt", device=str(self.device)) as file:
                for name in sorted(file.keys()):
                    yield file, name


class Control:
    """The end points of a server, as vLLM's engine calls them (its protocol `VLLMWeightSyncClient`), from any thread.

    Args:
        server: tries each request once, because half a broadcast cannot be repeated.
    """

    def __init__(self, server: Server):
        self.server = server
        self.portal: BlockingPortal | None = None
        self.client: Any = None
        self.version = ""  # of the weights that are sent next

    def ask(self, path: str, body: object) -> object:
        assert self.portal is not None, "push sets it"
        return self.portal.call(self._ask, path, body)

    async def _ask(self, path: str, body: object) -> object:
        return (await self.server.post(self.client, path, body, final=lambda text: True, plain=True)).content

    def init_weight_transfer_engine(self, init_info: dict) -> None:
        self.ask("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self.ask("/start_weight_update", {})

    def update_weights(self, update_info: dict) -> None:
        self.ask("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.ask("/finish_weight_update", {"weight_version": weight_version or self.version})


class NcclTransfer:
    """Gives a vLLM server whole weights without a shared folder.

    This process is rank 0 of an NCCL group whose other ranks are the workers of the server. vLLM's
    `NCCLTrainerWeightTransferEngine` makes the group and broadcasts. The server must have been started with
    `--weight-transfer-config '{"backend": "nccl"}'` and VLLM_SERVER_DEV_MODE=1; it is driven by its end points
    /init_weight_transfer_engine, /start_weight_update, /update_weights and /finish_weight_update. On the server,
    weights have the name of their policy as version. If it is not the last one sent, the server was restarted, and a
    new group is made.

    No GPU has run it: tests speak the protocol to a stand-in and run vLLM's own class, with a mocked NCCL group.

    Hazard: NCCL waits for a server that ends in the middle of a broadcast. Remedy: none here; the run has to be ended
    and resumed.

    Args:
        server: its URL ends where paths such as /start_weight_update begin.
        address: HOST of this process as the server's workers reach it, or HOST:PORT; without a port, any free one.

    Raises:
        MissingPackageError: vllm is not installed beside windkern.
        ValueError: there is no GPU here, or the port is not a number.
        ServerError: when pushing: the server refuses, or the group fails.
    """

    def __init__(self, server: Server, address: str = "127.0.0.1"):
        require("vllm")
        self.host, colon, port = address.partition(":")
        if not self.host or (colon and not (port.isdecimal() and 0 < int(port) < 65536)):
            raise ValueError(f"address must be HOST or HOST:PORT, got {address!r}")
        self.port = int(port) if colon else None
        self.device = _gpu()
        self.control, self.weights = Control(server), Weights(self.device)
        self._engine = None

    async def push(self, client: Any, policy: Policy) -> None:
        """Send the weights of a policy's folder.

        Raises:
            ServerError: the weights have not arrived.
        """
        failed = None
        async with BlockingPortal() as portal:
            self.control.portal, self.control.client = portal, client
            try:
                await anyio.to_thread.run_sync(self._send, policy)
            except ServerError as error:  # which would leave the portal as a group of errors
                failed = error
        if failed is not None:
            raise failed

    def _send(self, policy: Policy) -> None:
        engine, self._engine = self._engine, None  # until all has gone well
        before, self.control.version = self.control.version, policy.name
        self.weights.folder = policy.folder
        try:
            with torch.cuda.device(-1 if self.device.index is None else self.device.index):
                if engine is None or self._version() != before:
                    engine = self._joined()
                engine.send_weights()
        except ServerError:
            raise
        except Exception as error:
            raise ServerError(
                f"sending {policy.name} to {self.control.server.url} failed: {type(error).__name__}: {error}"
            ) from error
        self._engine = engine

    def _version(self) -> object:
        """Return the version of the server's weights, None if it does not say."""
        try:
            found = self.control.ask("/weight_info", None)
        except RefusedError:
            return None
        return found.get("weight_version") if isinstance(found, dict) else None

    def _joined(self) -> Any:
        """Return vLLM's engine, in a group with the workers of the server."""
        try:
            from vllm.distributed.weight_transfer.nccl_engine import (
                NCCLTrainerInitInfo,
                NCCLTrainerWeightTransferEngine,
            )
        except ImportError as error:
            raise ServerError(f"transfer: nccl needs vLLM 0.32 or newer beside windkern ({error})") from error
        found = self.control.ask("/get_world_size", None)
        workers = found.get("world_size") if isinstance(found, dict) else None
        if type(workers) is not int or workers < 1:
            raise ServerError(f"{self.control.server.url} does not say how many workers it has: {found!r:.200}")
        port = self.port or _free_port(self.host)
        info = NCCLTrainerInitInfo(rank=0, master_address=self.host, master_port=port, world_size=workers + 1)
        return NCCLTrainerWeightTransferEngine.trainer_init(info, client=self.control, source=self.weights)


def _gpu() -> torch.device:
    if not torch.cuda.is_available():
        raise ValueError(
            "transfer: nccl needs a GPU for the policy; leave transfer out to pass weights through a folder"
        )
    return torch.device("cuda", torch.cuda.current_device())


def _free_port(host: str) -> int:
    with socket.socket() as found:
        found.bind((host, 0))
        return found.getsockname()[1]
