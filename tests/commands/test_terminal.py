"""Names, prompts, responses and messages from outside reach the terminal as text, whatever they contain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")
for package in ("rich", "matplotlib", "safetensors", "yaml"):
    pytest.importorskip(package)

import tiny_model  # noqa: E402
import yaml  # noqa: E402

from windkern.commands import diagnosis  # noqa: E402
from windkern.commands.cli import main  # noqa: E402
from windkern.train.data.records import Recorded, save_records  # noqa: E402

ESCAPES = "\x1b]0;mine\x07\x1b[2J\x9b31m\u202e"
NAME = f"x[red]y[/blue]{ESCAPES}$:smile:$^"
SHOWN = r"x[red]y[/blue]\x1b]0;mine\x07\x1b[2J\x9b31m\u202e$:smile:$^"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A model, prompts, a judge and recorded responses with hostile names and texts."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_model.save(folder / NAME)
    (folder / "train.txt").write_text("rain was\nbus was\na day\nso very")
    (folder / "heldout.jsonl").write_text(json.dumps({"prompt": f"rain {NAME}"}))
    for side in ("a", "b"):
        save_records(folder / f"{NAME}{side}.jsonl", [Recorded(f"rain {NAME}", (f"{side} {NAME}", "good"))])
    return folder


@pytest.fixture
def run(inputs, capfd, monkeypatch):
    """Run a command in the folder of the inputs; return its exit code and its output, which must be harmless."""
    monkeypatch.chdir(inputs)
    monkeypatch.setenv("COLUMNS", "400")

    def call(*arguments: str) -> tuple[int, str]:
        capfd.readouterr()
        code = main(list(arguments))
        out, error = capfd.readouterr()
        assert not set(out + error) & set(ESCAPES[:1] + "\x07\x9b\u202e\r"), repr(out + error)
        assert code or not error
        return code, out + error

    return call


def test_train(run, inputs):
    settings = {"model": NAME, "train_dataset": "train.txt", "eval_dataset": "heldout.jsonl", "dtype": "float32"}
    settings |= {"judge": "tiny_model:goodness", "output_dir": f"out {NAME}", "num_iterations": 1, "report_to": "none"}
    settings |= {
        "per_device_train_batch_size": 2,
        "steps_per_iteration": 2,
        "max_completion_length": 4,
        "use_cpu": True,
    }
    (inputs / "c.yaml").write_text(yaml.safe_dump(settings))
    code, shown = run("train", "--config", "c.yaml")
    assert code == 0
    for part in (f"{SHOWN}: Llama", f"\nrain {SHOWN}\n", f"model out {SHOWN}, ", "no interval from a single prompt"):
        assert part in shown
    assert "nan" not in shown  # a single prompt has no standard error
    assert run("plot", f"out {NAME}/result.json", "--output", "again.png") == (0, "picture again.png\n")
    code, shown = run("train", "--config", "c.yaml")
    assert code == 2 and f"out {SHOWN} holds checkpoints" in shown


def test_eval_and_plot(run):
    sides = (f"recorded:{NAME}a.jsonl", f"recorded:{NAME}b.jsonl")
    command = ("eval", "--prompts", "heldout.jsonl", "--judge", "tiny_model:goodness", "--output-dir", f"eval {NAME}")
    code, shown = run(*command, "--model", sides[0], "--base", sides[1])
    assert code == 0
    names = f"recorded:{SHOWN}a.jsonl against recorded:{SHOWN}b.jsonl"
    for part in (names, f"rain {SHOWN}", f"a {SHOWN}", f"picture eval {SHOWN}"):
        assert part in shown
    assert "none from a single prompt" in shown and "nan" not in shown
    code, shown = run("plot", f"eval {NAME}/eval.json", "--output", f"{NAME}.png")
    assert (code, shown) == (0, f"picture {SHOWN}.png\n"), shown
    code, shown = run(*command, "--model", f"no{NAME}", "--base", sides[1])
    assert code == 2 and shown.endswith("(WINDKERN_DEBUG=1 shows where)\n")


def test_the_table_of_a_value_run():
    from rich.console import Console

    from windkern.value import run as value

    console = Console(width=200)
    with console.capture() as captured:
        console.print(value._table([(NAME, 1.5)], 7, f"file {NAME}"))
    shown = " ".join(captured.get().split())
    assert f"│ {SHOWN} │" in shown and f"7 tokens of file {SHOWN}" in shown


def test_doctor(run, monkeypatch):
    monkeypatch.setattr(diagnosis, "_cpu_model", lambda: NAME)
    monkeypatch.setattr(diagnosis, "states", lambda on: [diagnosis.BackendState("cpp", "cpu", f"because {NAME}")])
    check = diagnosis.Check("torch", "cpu", "float32", "logps", None, 1e-5, f"Error: {NAME}")
    monkeypatch.setattr(diagnosis, "self_test", lambda found: [check])
    code, shown = run("doctor")
    assert code == 1
    for part in (f"cpu: {SHOWN}; ", f"because {SHOWN}", f"wrong Error: {SHOWN}"):
        assert part in shown


def test_losses(run):
    code, shown = run("losses", "dpo", "--output", f"{NAME}.png")
    assert code == 0 and f"picture: {SHOWN}.png" in shown


def test_messages_of_errors(run, inputs):
    (inputs / f"{NAME}.json").write_text("{")
    for command, message in (
        (("train", "--config", NAME), "no file 'x[red]y"),
        (("plot", f"{NAME}.json"), f"{SHOWN}.json is not JSON"),
        (("demo", "--model", f"./{NAME}/none"), f"model folder ./{SHOWN}/none does not exist"),
    ):
        code, shown = run(*command)
        assert code == 2 and message in shown


def test_messages_of_the_parser(run, capfd):
    with pytest.raises(SystemExit):
        run("plot", "a", NAME)
    assert f"unrecognized arguments: {SHOWN}\n" in capfd.readouterr().err
