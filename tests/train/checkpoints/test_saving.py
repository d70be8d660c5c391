"""Checkpoints of a Trainer: complete or absent, verified, and what a kill or a full disk leaves behind."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
from windkern.train.checkpoints import saving  # noqa: E402
from windkern.train.checkpoints.manifest import MANIFEST, verify, write_manifest  # noqa: E402
from windkern.train.checkpoints.saving import AtomicCheckpoints, CheckpointError, CorruptCheckpointError  # noqa: E402


class Regression(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.lin, self.drop = torch.nn.Linear(4, 1), torch.nn.Dropout(0.3)  # dropout, so that generators matter

    def forward(self, x, labels):
        out = self.drop(self.lin(x))[:, 0]
        return {"loss": (out - labels).square().mean(), "logits": out}


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 4, generator=generator)
    return [{"x": row, "labels": row.sum()} for row in x]


class T(AtomicCheckpoints, transformers.Trainer):
    def _write_extra(self, folder):
        (folder / f"extra-{self.args.process_index}.txt").write_text("mine")


def make(folder, cls=T, **options):
    settings = {
        "max_steps": 6,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.1,
        "report_to": [],
    }
    settings |= {"disable_tqdm": True, "use_cpu": True, "logging_strategy": "no", "dataloader_pin_memory": False}
    args = transformers.TrainingArguments(output_dir=str(folder), **(settings | options))
    return cls(model=Regression(), args=args, train_dataset=data(), eval_dataset=data())


def weights(trainer):
    return torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])


def steps(folder):
    return sorted(int(path.name.split("-")[1]) for path in Path(folder).glob("checkpoint-*"))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    trainer = make(tmp_path_factory.mktemp("straight"))
    trainer.train()
    return weights(trainer)


@pytest.fixture
def stopped(tmp_path):
    """Make a run that stopped after 4 of 6 steps, with checkpoints 2 and 4."""

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 4

    trainer = make(tmp_path)
    trainer.add_callback(Stop())
    trainer.train()
    assert steps(tmp_path) == [2, 4]
    return tmp_path


def resumed(folder):
    trainer = make(folder)
    trainer.train(resume_from_checkpoint=True)
    return weights(trainer)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_resuming_changes_nothing(stopped, straight):
    assert torch.equal(resumed(stopped), straight)
    assert (stopped / "checkpoint-6/extra-0.txt").read_text() == "mine"
    assert not list(stopped.glob(".saving*"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda c: flip(c / "optimizer.pt"), "optimizer.pt is not what was written"),
        (lambda c: half(c / "model.safetensors"), "model.safetensors has"),
        (lambda c: (c / "scheduler.pt").unlink(), "scheduler.pt is missing"),
        (lambda c: half(c / MANIFEST), "cannot be read"),
        (lambda c: [(c / n).unlink() for n in (MANIFEST, "trainer_state.json")], "no trainer_state.json"),
        (lambda c: [(c / MANIFEST).unlink(), half(c / "model.safetensors")], "model.safetensors"),
        (lambda c: [(c / MANIFEST).unlink(), half(c / "optimizer.pt")], "optimizer.pt is cut short"),
        (lambda c: c.rename(c.parent / ".saving-checkpoint-4"), "not written to the end"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(stopped, straight, damage, words):
    damage(stopped / "checkpoint-4")
    with pytest.warns(UserWarning, match=f"skipping .*checkpoint-4: .*{words}"):
        assert torch.equal(resumed(stopped), straight)
    verify(stopped / "checkpoint-4")  # written again


def test_a_checkpoint_of_plain_transformers_is_taken(stopped):
    (stopped / "checkpoint-4" / MANIFEST).unlink()
    assert saving.latest_checkpoint(stopped, pytest.fail) == stopped / "checkpoint-4"


def test_the_manifest_is_written_with_what_python_3_10_has(tmp_path, monkeypatch):
    monkeypatch.delattr(hashlib, "file_digest", raising=False)  # new in 3.11
    content = bytes(range(256)) * 2**13 + b"the end"  # more than is read at a time
    (tmp_path / "weights").write_bytes(content)
    write_manifest(tmp_path)
    listed = json.loads((tmp_path / MANIFEST).read_text())["files"]
    assert listed == {"weights": {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    verify(tmp_path)
    (tmp_path / "weights").write_bytes(content[:-1] + b"D")
    with pytest.raises(CorruptCheckpointError, match="sha256 differs"):
        verify(tmp_path)


def test_nothing_whole_starts_anew(stopped, straight):
    for step in (2, 4):
        flip(stopped / f"checkpoint-{step}/model.safetensors")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert torch.equal(resumed(stopped), straight)
    lines = [str(warning.message) for warning in caught]
    assert sum("skipping" in line for line in lines) == 2
    assert any("starting from the first step" in line for line in lines)


def test_a_given_path_is_verified(stopped):
    flip(stopped / "checkpoint-4/model.safetensors")
    with pytest.raises(CorruptCheckpointError, match=r"model\.safetensors"):
        make(stopped).train(resume_from_checkpoint=str(stopped / "checkpoint-4"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("place", ["write_manifest", "sync_files"])
def test_a_refused_write(stopped, straight, monkeypatch, place, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(saving, place, refuse)
        with pytest.raises(CheckpointError) as caught:
            resumed(stopped)
    text = str(caught.value)
    assert os.strerror(number) in text and "--resume" in text and "\n" not in text
    assert (
        f"cannot write {stopped / 'checkpoint-6'}" in text
        and f"{stopped / 'checkpoint-4'} is the last complete" in text
    )
    assert caught.value.errno == number
    assert steps(stopped) == [2, 4] and not list(stopped.glob(".saving*"))
    assert torch.equal(resumed(stopped), straight)


def forked(task):
    """Run `task` in a child process and return its exit status."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = task() or 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("limit", [100, 1200, 2500])  # bytes; fails in weights, optimizer, other files
def test_a_full_disk(stopped, straight, limit):
    import resource

    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            resumed(stopped)
        except CheckpointError as error:
            Path(stopped / "why").write_bytes(str(error).encode()[: min(90, limit)])
            return 7

    assert os.waitstatus_to_exitcode(forked(run)) == 7
    assert (stopped / "why").read_text().startswith("cannot write")
    assert steps(stopped) == [2, 4] and not list(stopped.glob(".saving*"))
    assert torch.equal(resumed(stopped), straight)


@pytest.mark.parametrize(
    "place", ["_save_optimizer_and_scheduler", "write_manifest", "sync_files", "sync_dir", "_rotate"]
)
def test_killed_while_saving(stopped, straight, monkeypatch, place):
    owner = saving if hasattr(saving, place) else T
    monkeypatch.setattr(owner, place, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    assert os.WTERMSIG(forked(lambda: resumed(stopped) and None)) == signal.SIGKILL
    monkeypatch.undo()
    named = place in ("sync_dir", "_rotate")
    assert steps(stopped) == ([2, 4, 6] if named else [2, 4])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert torch.equal(resumed(stopped), straight)
    lines = [str(warning.message) for warning in caught]
    assert any("not written to the end" in line for line in lines) == (place != "_rotate")


@pytest.mark.parametrize("limit", [1, 2])
def test_rotation(tmp_path, limit):
    make(tmp_path, save_total_limit=limit).train()
    assert steps(tmp_path) == [4, 6][-limit:]


def test_rotation_counts_whole_ones(stopped):
    (stopped / "checkpoint-4").rename(stopped / "checkpoint-5")
    half(stopped / "checkpoint-5/model.safetensors")
    make(stopped, save_total_limit=2).train(resume_from_checkpoint=str(stopped / "checkpoint-2"))
    assert steps(stopped) == [4, 6]
    assert not list(stopped.glob(".saving*"))


def test_pushes_see_the_finished_folder(tmp_path, monkeypatch):
    pushed = []

    def push(self, folder):
        assert (Path(folder) / MANIFEST).is_file()
        verify(Path(folder))
        pushed.append(Path(folder).name)

    monkeypatch.setattr(transformers.Trainer, "_push_from_checkpoint", push)
    trainer = make(tmp_path)
    trainer.args.push_to_hub = True
    trainer.push_in_progress = None
    trainer.train()
    assert pushed == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_errors_of_another_kind_pass(stopped, monkeypatch):
    monkeypatch.setattr(T, "_write_extra", lambda *_: {}["mine"])
    with pytest.raises(KeyError, match="mine"):
        resumed(stopped)
    assert steps(stopped) == [2, 4] and not list(stopped.glob(".saving*"))


@pytest.mark.parametrize("limit", [1, 2])
def test_the_best_is_kept_and_loaded(tmp_path, monkeypatch, limit):
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "greater_is_better": True}
    trainer = make(tmp_path, save_total_limit=limit, metric_for_best_model="score", **options)
    seen = {}

    def evaluate(*_, **__):
        seen[trainer.state.global_step] = weights(trainer)
        return {"eval_score": -trainer.state.global_step}

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    monkeypatch.setattr(trainer, "_evaluate", lambda *_, **__: evaluate())
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert torch.equal(weights(trainer), seen[2])
    assert 2 in steps(tmp_path)


def test_only_the_model(tmp_path):
    make(tmp_path, save_only_model=True).train()
    assert saving.latest_checkpoint(tmp_path, pytest.fail) == tmp_path / "checkpoint-6"
    assert not (tmp_path / "checkpoint-6/optimizer.pt").exists()


def two_processes(folder):
    options = {"max_steps": 4, "ddp_backend": "gloo"}
    rank = int(os.environ["RANK"])
    first = make(folder, **options)
    first.train()
    for other in (0, 1):
        assert (folder / f"checkpoint-4/extra-{other}.txt").is_file()
    torch.distributed.barrier()
    if rank == 0:
        flip(folder / "checkpoint-4/model.safetensors")
    torch.distributed.barrier()

    class Full(T):
        def _write_extra(self, folder):
            if rank == 1:
                raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match=r"No space left on device; .*checkpoint-2 is the last complete"):
        make(folder, Full, **options).train(resume_from_checkpoint=True)
    second = make(folder, **options)
    second.train(resume_from_checkpoint=True)
    assert torch.equal(weights(first), weights(second))
    verify(folder / "checkpoint-4")


@pytest.mark.slow  # a launcher and two processes that import everything; tests/train/test_distributed.py resumes too
def test_two_processes(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, tmp_path]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("UserWarning: skipping") == 2  # one for each time rank 0 looked
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in (tmp_path / "checkpoint-4").iterdir()}


if __name__ == "__main__":
    two_processes(Path(sys.argv[1]))
    torch.distributed.barrier()
    sys.stderr.flush()
    os._exit(0)  # after gloo, the interpreter sometimes aborts at shutdown, when all work is done
