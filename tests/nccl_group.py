"""vLLM's transfer of weights without NCCL: groups are queues of this process; the engine is a short copy."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import queue
import sys
import threading
import types
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

_WAIT = 60  # seconds until a side gives up waiting for the other


class Group:
    """A trainer and one worker."""

    def __init__(self):
        self.joined, self.sent = threading.Barrier(2), queue.Queue()

    def join(self) -> None:
        self.joined.wait(_WAIT)


GROUPS: dict[tuple[str, int], Group] = defaultdict(Group)


@dataclasses.dataclass
class NCCLTrainerInitInfo:
    """The class of vLLM 0.32, without the sizes of buffers."""

    master_address: str
    master_port: int
    world_size: int
    rank: int = dataclasses.field(kw_only=True)


class NCCLTrainerWeightTransferEngine:
    """The round trips of vLLM 0.32's class of this name."""

    def __init__(self, client, source, group: Group):
        self.client, self.source, self.group = client, source, group

    @classmethod
    def trainer_init(cls, init_info, *, client, source=None):
        told = {**dataclasses.asdict(init_info), "rank_offset": 1}
        told.pop("rank")
        group = GROUPS[init_info.master_address, init_info.master_port]
        with ThreadPoolExecutor(1) as threads:
            answered = threads.submit(client.init_weight_transfer_engine, told)
            group.join()
            answered.result()
        return cls(client, source, group)

    def send_weights(self) -> None:
        meta = self.source.metadata()
        told = {
            "names": [each.name for each in meta],
            "dtype_names": [str(each.dtype).rpartition(".")[-1] for each in meta],
            "shapes": [list(each.shape) for each in meta],
        }
        self.client.start_weight_update()
        with ThreadPoolExecutor(1) as threads:
            answered = threads.submit(self.client.update_weights, told)
            for (name, tensor), expected in zip(self.source, meta, strict=True):
                assert (name, tensor.dtype, tuple(tensor.shape)) == (expected.name, expected.dtype, expected.shape)
                self.group.sent.put(tensor)
            answered.result()
        self.client.finish_weight_update()


def stand_in(monkeypatch) -> None:
    """Make `import vllm` find the engine of this file."""
    names = ("vllm", "vllm.distributed", "vllm.distributed.weight_transfer")
    for name in (*names, "vllm.distributed.weight_transfer.nccl_engine"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    module.NCCLTrainerInitInfo = NCCLTrainerInitInfo
    module.NCCLTrainerWeightTransferEngine = NCCLTrainerWeightTransferEngine


class Worker:
    """The server's side: end points by their paths, each (body) -> (status, text, headers).

    Args:
        take: called with the names and tensors of a whole update.
    """

    def __init__(self, take):
        self.take, self.group, self.version, self.open = take, None, "default", False
        self.routes = {
            "/get_world_size": lambda body: (200, '{"world_size": 1}', {}),
            "/weight_info": lambda body: (200, f'{{"weight_version": "{self.version}"}}', {}),
            "/init_weight_transfer_engine": self._init,
            "/start_weight_update": self._start,
            "/update_weights": self._update,
            "/finish_weight_update": self._finish,
        }

    def _init(self, body: dict):
        info = body["init_info"]
        assert info["rank_offset"] == 1 and info["world_size"] == 2
        self.group = GROUPS[info["master_address"], info["master_port"]]
        self.group.join()
        return 200, "{}", {}

    def _start(self, body: dict):
        if self.open:
            return 500, '{"error": "an update is already active"}', {}
        self.open = True
        return 200, "{}", {}

    def _update(self, body: dict):
        info = body["update_info"]
        if not self.open or self.group is None:
            return 500, '{"error": "not initialized"}', {}
        tensors = {name: self.group.sent.get(timeout=_WAIT) for name in info["names"]}
        assert [list(each.shape) for each in tensors.values()] == info["shapes"]
        assert [str(each.dtype).rpartition(".")[-1] for each in tensors.values()] == info["dtype_names"]
        self.take(tensors)
        return 200, "{}", {}

    def _finish(self, body: dict):
        self.open, self.version = False, body["weight_version"]
        return 200, "{}", {}
