"""Several processes must give what one process gives on the same global batch."""

from __future__ import annotations

import pytest
import torch
from distributed_jobs import TRAINER, Toy, batch, plain_loss
from distributed_tools import launch


def test_a_gathered_head_gets_the_gradient_of_one_process(tmp_path):
    toy = Toy()
    loss = plain_loss(toy, *batch())
    loss.backward()
    ranks = launch("gathered", tmp_path)
    assert all(rank["sharded"] for rank in ranks)
    assert abs(sum(rank["loss"] for rank in ranks) / len(ranks) - float(loss.detach())) < 1e-6
    for rank in ranks:
        for name, parameter in toy.named_parameters():
            torch.testing.assert_close(
                torch.tensor(rank["grads"][name]), parameter.grad, rtol=1e-5, atol=1e-6, msg=name
            )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process on the same global batch, and its weights."""
    pytest.importorskip("accelerate")
    from trainer_cases import HELDOUT, make_trainer

    folder = tmp_path_factory.mktemp("alone")
    run = make_trainer(folder, heldout=HELDOUT, **{**TRAINER, "per_device_train_batch_size": 2})
    run.train()
    run.save_model()
    return run, folder


def weights(folder):
    from safetensors.torch import load_file

    found = load_file(folder / "model.safetensors")
    found.pop("lm_head.weight", None)  # tied; FSDP2 writes it, too
    return found


@pytest.mark.parametrize(("kind", "wrapper"), [("ddp", "DistributedDataParallel"), ("fsdp2", "FSDPLlamaForCausalLM")])
def test_two_processes_train_as_one(alone, tmp_path, kind, wrapper):
    run, folder = alone
    ranks = launch("trainer", tmp_path, kind)
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    rates = [entry["eval_win_rate"] for entry in run.state.log_history if "eval_win_rate" in entry]
    kls = [entry["eval_kl"] for entry in run.state.log_history if "eval_kl" in entry]
    for rank in ranks:
        assert rank["wrapped"] == wrapper
        assert [tuple(texts) for texts in rank["texts"]] == [rollout.texts for rollout in run.outer.rollouts]
        assert rank["losses"] == pytest.approx(losses, rel=1e-4)
        assert rank["rates"] == pytest.approx(rates, rel=1e-5) and rank["kls"] == pytest.approx(kls, rel=1e-3)
    ours, theirs = weights(tmp_path / "run"), weights(folder)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-5)
