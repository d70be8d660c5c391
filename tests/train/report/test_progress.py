"""What a run reports to its observer, and what `windkern train` writes of it to a file."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("rich")

import trainer_cases

CHANGES = {"eval_strategy": "epoch", "save_strategy": "epoch", "eval_responses": 2, "reference_responses": 3}


@dataclass
class Phase:
    iteration: int
    name: str
    steps: int
    done: float
    furthest: float = 0.0  # including work in progress


@dataclass
class Recorder:
    """An observer that records every report and checks that progress never goes back."""

    phases: list[Phase] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    records: list[int] = field(default_factory=list)

    def phase(self, iteration, name, steps=1, unit="", done=0):
        self.phases.append(Phase(iteration, f"{name} {unit}".strip(), steps, done, done))

    def advance(self, steps=1):
        phase = self.phases[-1]
        phase.done += steps
        assert phase.furthest <= phase.done <= phase.steps
        phase.furthest = phase.done

    def under_way(self, steps):
        phase = self.phases[-1]
        assert steps > 0 and phase.done + steps <= phase.steps + 1e-9
        phase.furthest = max(phase.furthest, phase.done + steps)

    def finished(self, record):
        self.records.append(record.iteration)

    def note(self, text):
        self.notes.append(text)

    @property
    def counted(self) -> list[tuple[int, str, float]]:
        """Return the iteration, name and steps of each phase, which must have taken all its steps."""
        assert all(phase.done == phase.steps for phase in self.phases if phase.steps > 1), self.phases
        return [(phase.iteration, phase.name, phase.steps) for phase in self.phases]


EVALUATION = [("sampling held-out responses", 4), ("scoring held-out log-probs", 8), ("judging held-out responses", 1)]
# 4 prompts of 4 responses, scored by two policies; 2 steps of a batch.
ITERATION = [("sampling responses", 16), ("scoring log-probs", 32), ("fitting batches", 2), *EVALUATION]


def observed(folder, observer, **changes):
    heldout = changes.pop("heldout", trainer_cases.HELDOUT)
    given = {"observer": observer}
    return trainer_cases.make_trainer(folder, heldout=heldout, given=given, **{**CHANGES, **changes})


def test_every_phase_is_announced_and_counted(tmp_path):
    observer = Recorder()
    trainer = observed(tmp_path, observer)
    trainer.train()
    trainer.compare(5)
    saved = [("saving a checkpoint", 1)]
    assert observer.counted == [
        (0, "sampling responses of the reference", 6),
        *((iteration, *phase) for iteration in (1, 2) for phase in [*ITERATION, *saved]),
        *((3, name, steps * 5 / 2 if steps > 1 else 1) for name, steps in EVALUATION),
    ]
    assert observer.records == [1, 2] and observer.notes == []


def test_sampling_moves_between_its_steps(tmp_path):
    observer, seen = Recorder(), []
    original = observer.under_way
    observer.under_way = lambda steps: (original(steps), seen.append((len(observer.phases), steps)))
    observed(tmp_path, observer, num_iterations=1, sampling_batch_size=4, eval_strategy="no", heldout=()).train()
    first = [steps for phase, steps in seen if phase == 1]
    # Blocks of one prompt with 4 responses of at most 6 tokens.
    assert first[:2] == pytest.approx([4 / 6, 8 / 6]) and max(first) <= 4 and len(first) > 4


def test_fitting_is_announced_again_after_what_comes_in_between(tmp_path):
    observer = Recorder()
    changes = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    changes |= {"num_iterations": 1, "gradient_accumulation_steps": 2}
    observed(tmp_path, observer, **changes).train()
    fits = [phase for phase in observer.phases if phase.name == "fitting batches"]
    assert [(phase.steps, phase.done) for phase in fits] == [(4, 2), (4, 2), (4, 4)]
    assert observer.phases[-1].name == "saving a checkpoint"


def test_a_resumed_run_says_where_it_goes_on(tmp_path):
    observed(tmp_path, Recorder(), save_strategy="steps", save_steps=1, save_total_limit=None).train()
    observer = Recorder()
    observed(tmp_path, observer, save_strategy="steps", save_steps=1).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-3")
    )
    assert observer.notes == ["resumed with iteration 2 of 2, 1 of its 2 steps are done"]
    # What is on the disk is neither sampled again nor shown.
    assert observer.phases[0].name == "fitting batches" and observer.phases[0].done == 2
    observer = Recorder()
    observed(tmp_path, observer, save_strategy="steps", save_steps=1).train(resume_from_checkpoint=True)
    assert observer.notes == ["resumed: all 2 iterations are done"]


def test_recorded_responses_are_counted_while_they_are_scored(tmp_path):
    from windkern.train.data.records import Recorded, save_records

    prompts = trainer_cases.PROMPTS
    file, observer = tmp_path / "r.jsonl", Recorder()
    save_records(file, [Recorded(prompt, ("good day", "bad", "a bus", "rain")) for prompt in prompts])
    changes = {"reference": "precomputed", "sampler": f"recorded:{file}", "num_iterations": 1}
    trainer_cases.make_trainer(tmp_path / "out", given={"observer": observer}, **changes).train()
    assert observer.counted[:2] == [
        (0, "scoring recorded responses", 4 * len(prompts)),
        (1, "sampling responses", 16),
    ]


def test_train_prints_lines_where_stdout_is_not_a_terminal(tmp_path, capfd, monkeypatch):
    import tiny_model
    import yaml

    from windkern.commands.cli import main

    monkeypatch.chdir(tmp_path)
    tiny_model.save(tmp_path / "model")
    (tmp_path / "train.txt").write_text("\n".join(trainer_cases.PROMPTS))
    (tmp_path / "heldout.txt").write_text("\n".join(trainer_cases.HELDOUT))
    settings = {"model": "model", "train_dataset": "train.txt", "eval_dataset": "heldout.txt", "dtype": "float32"}
    settings |= {"judge": "tiny_model:goodness", "output_dir": "out", "num_iterations": 2, "steps_per_iteration": 2}
    settings |= {"per_device_train_batch_size": 2, "num_generations": 4, "max_completion_length": 4, "use_cpu": True}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings | {"report_to": "none", **CHANGES}))
    capfd.readouterr()
    assert main(["train", "--config", "c.yaml"]) == 0
    out, error = capfd.readouterr()
    assert error == ""  # no progress bars of transformers
    assert "\x1b" not in out and "\r" not in out
    told = [re.sub(r"^\d+:\d\d |, \d+:\d\d left$", "", line) for line in out.splitlines()]
    expected = [
        "loading packages",
        "reading the prompts",
        "loading the judge tiny_model:goodness",
        "loading the model model",
        "loading the reference model",
        "preparing the run",
        "sampling 0 of 6 responses of the reference",
        "iteration 1/2: sampling 0 of 16 responses",
        "iteration 1/2: scoring 0 of 32 log-probs",
        "iteration 1/2: fitting 0 of 2 batches",
        "iteration 1/2: sampling 0 of 4 held-out responses",
        "iteration 1/2: judging held-out responses",
        "iteration 1/2: saving a checkpoint",
        "saving the model",
    ]
    places = [told.index(line) for line in expected]
    assert places == sorted(places)
    assert any(line.startswith(" 2/2  win rate ") for line in told)
