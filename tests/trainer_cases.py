"""A trainer on a model of a few words for tests, and runs of it that can be killed."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import tiny_model
import torch
from tolerances import rounding_bound

PROMPTS = ("rain was", "bus was", "day was", "the bus was", "a day was", "so very was", "was a was", "not the was")
HELDOUT = ("rain and", "a day and")
LONGEST = 32.0  # nats of a response of 7 tokens from a vocabulary of 18
HEAD_OPERATIONS = 7 * (16 + 18)  # in its log-prob: 7 tokens, each of products over 16 states and a sum over 18 entries


def make_config(folder, **changes):
    from windkern.train.config import WindConfig

    settings = {
        "output_dir": str(folder),
        "num_iterations": 2,
        "steps_per_iteration": 2,
        "per_device_train_batch_size": 2,
        "num_generations": 4,
        "max_completion_length": 6,
        "sampling_batch_size": 8,
        "learning_rate": 0.02,
        "optim": "adamw_torch",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "eval_strategy": "no",
    }
    settings |= changes
    arguments = {name: settings.pop(name) for name in ("eta", "beta", "objective", "tau") if name in settings}
    if arguments:
        settings["loss_kwargs"] = arguments
    return WindConfig(**settings)


def make_trainer(folder, *, model=None, reward=tiny_model.goodness, heldout=(), prompts=PROMPTS, given=None, **changes):
    from windkern.train.judges.judge import RewardJudge
    from windkern.train.trainer import WindTrainer

    config = make_config(folder, **changes)
    parts = {
        "judge": RewardJudge(reward, strength=4.0),
        "ref_model": tiny_model.make_model() if config.reference == "model" else None,
        "processing_class": tiny_model.make_tokenizer(),
    } | (given or {})
    return WindTrainer(
        tiny_model.make_model() if model is None else model,
        config,
        train_dataset=list(prompts),
        eval_dataset=list(heldout),
        **parts,
    )


def sharing_seen(monkeypatch) -> list[bool]:
    """Record for each batch that a policy scores or fits from now on whether responses share rows."""
    from windkern.train import policy

    collate, seen = policy.collate, []

    def spy(groups, fill, rules):
        batch = collate(groups, fill, rules)
        seen.append(batch.rows.is_shared)
        return batch

    monkeypatch.setattr(policy, "collate", spy)
    return seen


def assert_has_not_moved(*divergences: float) -> None:
    """Check mean log-ratios (nats) of a policy to itself, between scores of its responses with and without gradients.

    Both use the same body on the same shapes; with gradients, the head uses other kernels.
    """
    bound = rounding_bound(HEAD_OPERATIONS, LONGEST, torch.float32)
    assert all(abs(value) <= bound for value in divergences), (divergences, bound)


def lora(**changes):
    import peft

    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    return peft.LoraConfig(**settings | changes)


def weights_of(trainer) -> dict:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def run_or_hang(folder: str, resume: bool, hang_at: str | None, changes: dict) -> None:
    """Run in a separate process; at `hang_at`, "place:n", write folder/hanging and never return."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    torch.set_num_threads(1)
    os.fsync = lambda handle: None  # as in conftest.py
    if hang_at is not None:
        _hang_at(hang_at, Path(folder) / "hanging")
    run = make_trainer(folder, heldout=HELDOUT, eval_strategy="epoch", **changes)
    run.train(resume_from_checkpoint=resume)
    run.save_model()


def _hang_at(place: str, sign: Path) -> None:
    """Make the n-th call of a function of the trainer never return, so that a test can kill the run there."""
    from windkern import _files
    from windkern.train import outer, responder, trainer
    from windkern.train.checkpoints import saving

    name, number = place.split(":")
    owner, attribute = {
        "sampling": (responder.Responder, "__call__"),
        "judging": (outer, "judged"),
        "writing a block": (_files, "sync_dir"),
        "scoring": (outer.OuterLoop, "_score"),
        "a step": (trainer.WindTrainer, "compute_loss"),
        "saving": (trainer.WindTrainer, "_save_optimizer_and_scheduler"),
        "the manifest": (saving, "sync_files"),
        "evaluating": (trainer.WindTrainer, "compare"),
    }[name]
    original, calls = getattr(owner, attribute), [0]

    def counted(*args, **given):
        calls[0] += 1
        if calls[0] == int(number):
            sign.touch()
            time.sleep(600)
        return original(*args, **given)

    setattr(owner, attribute, counted)
