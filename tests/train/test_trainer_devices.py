"""How a trainer uses devices: one GPU per process, no waiting inside a step, judges next to the model."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from torch.utils._python_dispatch import TorchDispatchMode
from trainer_cases import make_config, make_trainer

from windkern.hf import LayoutRules
from windkern.train.batches import collate
from windkern.train.config import WindConfig
from windkern.train.groups import Group
from windkern.train.loss_plan import plan_loss
from windkern.train.metrics import Averages, step_metrics


def test_two_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(WindConfig, "n_gpu", 2)
    with pytest.raises(ValueError, match="one process sees 2 GPUs; start one for each by torchrun"):
        make_config(tmp_path)


def test_a_transformers_without_distributed_loading_will_do(tmp_path, monkeypatch):
    import transformers

    begin = transformers.Trainer.__init__

    def without(trainer, *args, **given):
        begin(trainer, *args, **given)
        vars(trainer).pop("is_distributed_loading_by_transformers", None)

    monkeypatch.setattr(transformers.Trainer, "__init__", without)
    trainer = make_trainer(tmp_path)
    assert not trainer.policy.sharded


def test_a_named_judge_is_loaded_where_the_model_is(tmp_path, monkeypatch):
    from windkern.train.judges import named

    given = {}
    monkeypatch.setattr(named, "load_judge", lambda name, **options: given.update(options, name=name))
    with pytest.raises(ValueError, match="judge must be given"):
        make_trainer(tmp_path, given={"judge": None}, judge="reward-model:any", judge_strength=2.0)
    assert given == {"name": "reward-model:any", "strength": 2.0, "device": "cpu", "settings": None}


class Transfers(TorchDispatchMode):
    """Counts the reads of numbers from tensors, for which the host would wait on a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_the_metrics_of_a_step_do_not_wait_for_the_device(tmp_path):
    made = torch.Generator().manual_seed(0)
    logps, old, ref = (torch.randn(2, 4, generator=made) for _ in range(3))
    constants = {"old_logps": old, "ref_logps": ref, "win_rates": torch.rand(2, 4, generator=made)}
    plan = plan_loss(make_config(tmp_path))
    with Transfers() as seen:
        found = step_metrics(logps, constants, plan)
    assert seen.count == 0 and len(found) == 5
    averages = Averages()
    averages.add({"length": 3.0})
    for factor in (1.0, 3.0):
        averages.add({name: factor * value for name, value in found.items()})
    with Transfers() as seen:
        means = averages.take()
    assert seen.count == 0  # tolist transfers all of them at once
    assert means == {"length": 3.0} | {name: pytest.approx(2 * float(value)) for name, value in found.items()}
    assert averages.take() == {}


GROUP = Group(0, (5, 6), ((7,), (8, 9)), (False,) * 2, ("", ""), constants={"old_logps": torch.zeros(2)})


def test_a_batch_is_sent_to_a_gpu_without_waiting_and_back_with():
    """Meta tensors show no waiting, so this checks the arguments."""
    batch = collate([GROUP], 0, LayoutRules(shared=False))
    asked = []

    class Asked(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default:
                asked.append(kwargs.get("non_blocking", False))
            return function(*args, **(kwargs or {}))

    with Asked():
        away = batch.to(torch.device("meta"))
    assert asked == [True] * 8 and away.constants["old_logps"].device.type == "meta"
    assert batch.to(torch.device("cpu")).rows.input_ids is batch.rows.input_ids
