"""A job for vLLM's own environment: its engine for trainers sends weights, with a queue as the NCCL group."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from pathlib import Path

import torch
from completion_server import Server as StandIn
from nccl_group import GROUPS, Group, Worker
from safetensors.torch import save_file
from vllm.distributed.weight_transfer import nccl_engine

from windkern.train.samplers import transfer
from windkern.train.samplers.engine import Policy
from windkern.train.samplers.server import Server


def joined(info) -> Group:
    group = GROUPS[info.master_address, info.master_port]
    group.join()
    return group


def broadcast(*, iterator, group: Group, post_iter_func, **sizes) -> None:
    for item in iterator:
        group.sent.put(post_iter_func(item))


def main() -> None:
    nccl_engine.open_trainer_endpoint, nccl_engine.packed_nccl_broadcast_producer = joined, broadcast
    transfer._gpu = lambda: torch.device("cpu")
    taken: list[dict] = []
    worker = Worker(taken.append)
    stand_in = StandIn(route=lambda path, body: worker.routes[path](body))
    server = Server(stand_in.url.removesuffix("/v1"), attempts=1)
    sending = transfer.NcclTransfer(server)
    versions = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(2):
            weights = {"b": torch.full((3,), float(number)), "a": torch.ones(2, 2, dtype=torch.bfloat16) * number}
            save_file(weights, Path(folder) / "model.safetensors")

            async def push(name=f"policy-{number}") -> None:
                async with server.client() as client:
                    await sending.push(client, Policy(name, "", Path(folder)))

            asyncio.run(push())
            versions.append(worker.version)
            assert taken[-1].keys() == weights.keys()
            assert all(torch.equal(taken[-1][name], value) for name, value in weights.items())
    paths = [path for path, _, _ in stand_in.requests]
    stand_in.close()
    json.dump({"versions": versions, "paths": paths}, sys.stdout)


if __name__ == "__main__":
    main()
