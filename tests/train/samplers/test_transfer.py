"""Whole weights sent over NCCL: the requests to the server and their order, with a mocked group."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import nccl_group
from policy_server import PolicyServer
from tiny_model import make_model, make_tokenizer
from trainer_cases import make_trainer

from windkern._extras import MissingPackageError
from windkern.train.samplers import following, transfer
from windkern.train.samplers.served import ServedSampler
from windkern.train.samplers.server import Server, ServerError
from windkern.train.samplers.transfer import NcclTransfer
from windkern.train.samplers.vllm import Vllm

SENT = ["/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache"]
JOINED = ["/get_world_size", "/init_weight_transfer_engine"]


@pytest.fixture
def mocked(monkeypatch):
    nccl_group.stand_in(monkeypatch)
    monkeypatch.setattr(transfer, "_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(following, "_ASKED", 16)


@pytest.fixture
def server():
    made = PolicyServer(make_model())
    yield made
    made.close()


def sampler_of(server, folder) -> ServedSampler:
    root = server.url.removesuffix("/v1")
    sending = NcclTransfer(Server(root, attempts=1))
    engine = Vllm(Server(server.url, attempts=2, pause=lambda seconds: None), transfer=sending)
    return ServedSampler(engine, make_tokenizer(), folder=folder, max_completion_length=6)


def moved(model):
    with torch.no_grad():
        for value in model.parameters():
            value += 0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    return model


def said(server) -> list[str]:
    """Return the endpoints for weights that were called since the last time."""
    found = [path for path, _, _ in server.requests if path in (*SENT, *JOINED)]
    server.requests.clear()
    return found


def test_weights_are_broadcast_and_the_group_is_kept(mocked, server, tmp_path):
    model, sampler = make_model(), sampler_of(server, tmp_path)
    for first in (True, False):
        sampler.update(model)
        assert said(server) == (JOINED if first else []) + SENT
        assert server.worker.version == sampler.follower.policy.name
        held = server.whole.state_dict()
        assert all(torch.equal(value, held[name]) for name, value in model.state_dict().items())
        sampler.sample(["the bus was"], 2, seed=0)
        moved(model)


def test_a_server_that_was_started_again_is_joined_anew(mocked, server, tmp_path):
    model, sampler = make_model(), sampler_of(server, tmp_path)
    sampler.update(model)
    sampler.sample(["the bus was", "rain"], 3, seed=0)
    server.forget()
    said(server)
    sampler.update(moved(model))
    assert said(server) == JOINED + SENT
    wanted = sampler.sample(["the bus was"], 3, seed=1).texts
    server.forget()
    sampler.received.clear()
    assert sampler.sample(["the bus was"], 3, seed=1).texts == wanted and said(server) == JOINED + SENT


def test_a_server_that_goes_on_with_the_previous_weights_is_an_error(mocked, server, tmp_path):
    server.fault = "stale"
    model, sampler = make_model(), sampler_of(server, tmp_path)
    sampler.update(model)
    sampler.sample(["the bus was", "rain"], 3, seed=0)
    with pytest.raises(ServerError, match="but still serves the previous policy"):
        sampler.update(moved(model))


def test_a_refusal_is_asked_for_once_and_the_group_is_made_anew(mocked, server, tmp_path):
    model, sampler = make_model(), sampler_of(server, tmp_path)
    server.worker.open = True  # for an update that another client started
    with pytest.raises(ServerError, match="an update is already active"):
        sampler.update(model)
    assert said(server) == [*JOINED, "/start_weight_update"]
    server.worker.open = False
    sampler.update(model)
    assert said(server) == JOINED + SENT


def test_a_settings_file_chooses_it(mocked, server, tmp_path):
    trainer = make_trainer(
        tmp_path,
        sampler=f"vllm:{server.url}",
        sampler_settings={"transfer": "nccl", "address": "127.0.0.1"},
        num_iterations=2,
        save_strategy="no",
    )
    trainer.train()
    assert server.loaded == ["sent"] * 2


def test_what_it_needs_is_said(server, monkeypatch, tmp_path):
    root = Server(server.url.removesuffix("/v1"))
    with pytest.raises(MissingPackageError, match="not installed: vllm"):
        NcclTransfer(root)
    nccl_group.stand_in(monkeypatch)
    for address in ("", ":1", "host:", "host:x", "host:70000"):
        with pytest.raises(ValueError, match="address must be HOST or HOST:PORT"):
            NcclTransfer(root, address)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a GPU for the policy"):
            NcclTransfer(root)
    for settings, message in (
        ({"address": "host"}, "address needs transfer: nccl"),
        ({"transfer": "ncl"}, "did you mean 'nccl'"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, sampler=f"vllm:{server.url}", sampler_settings=settings)
