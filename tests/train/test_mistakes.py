"""A user's mistake ends in one line that names the file or the setting, and in exit code 2."""

from __future__ import annotations

import doctest
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import tiny_model
from trainer_cases import HELDOUT, PROMPTS

from windkern.commands.cli import main
from windkern.train import errors
from windkern.train.errors import AnotherProcessError, ended_by_another, message_of, one_line


def test_docstring_examples_run():
    failed, tried = doctest.testmod(errors)
    assert tried and not failed


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Make a folder with a model and prompts."""
    folder = tmp_path_factory.mktemp("place")
    tiny_model.save(folder / "tiny")
    (folder / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    (folder / "h.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in HELDOUT))
    return folder


def settings_of(place: Path, out: Path, **changes) -> Path:
    content = {
        "model": str(place / "tiny"),
        "dtype": "float32",
        "train_dataset": str(place / "p.jsonl"),
        "judge": "tiny_model:goodness",
        "output_dir": str(out),
        "num_iterations": 1,
        "steps_per_iteration": 2,
        "per_device_train_batch_size": 2,
        "num_generations": 2,
        "max_completion_length": 3,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        **changes,
    }
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(content))
    return path


def cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def pickled_weights(folder: Path) -> None:
    class Code:
        def __reduce__(self):
            return (print, ("this ran",))

    (folder / "model.safetensors").unlink()
    torch.save({"a": Code()}, folder / "pytorch_model.bin")


def without_a_layer(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3, "layer_types": None}))


MODELS = {
    "cut weights": (cut_weights, r"cannot load the model '.*/broken' \(folder\): model.safetensors has 5000 bytes"),
    "weights in a pickle": (pickled_weights, r"broken' \(folder\): its weights are a pickle that would run code"),
    "weights that are not all there": (without_a_layer, r"broken' is incomplete: its files lack \d+ .*layers\.2\."),
    "no configuration": (lambda folder: (folder / "config.json").write_text("{"), r"cannot load the model '.*/broken'"),
}


def refused(capsys, path: Path, message: str, *arguments: str) -> None:
    assert main(["train", "--config", str(path), *arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("windkern: error: ") and "this ran" not in said
    import re

    assert re.search(message, said), said


@pytest.mark.parametrize("name", MODELS)
def test_a_damaged_model_is_named(place, tmp_path, capsys, name):
    damage, message = MODELS[name]
    shutil.copytree(place / "tiny", tmp_path / "broken")
    damage(tmp_path / "broken")
    refused(capsys, settings_of(place, tmp_path / "out", model=str(tmp_path / "broken")), message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"learning_rate": 1e30, "max_grad_norm": 0, "steps_per_iteration": 4},
            r"the loss of step \d is (nan|inf); lower learning_rate=1e\+30, "
            r"or the arguments of the loss \(eta=4.0, beta",
        ),
        (
            {"loss_kwargs": {"eta": 1e30, "beta": 0.0}},
            r"the loss of step 1 is nan, before any weight has moved: .*eta=1e\+30, beta=0",
        ),
        ({"train_dataset": "none.jsonl"}, "prompts file none.jsonl does not exist"),
        ({"loss": "kto"}, "loss must be a sum over groups .*, got 'kto', .* in TRL"),
        (
            {"output_dir": "$UNSET_HERE/out"},
            r"output_dir names the environment variable \$UNSET_HERE, which is not set",
        ),
        ({"include_for_metrics": ["loss"]}, r"include_for_metrics must be \[\], got \['loss'\]: "),
        ({"eval_strategy": "epoch"}, "eval_dataset must be given for eval_strategy='epoch'"),
    ],
)
def test_a_setting_is_named(place, tmp_path, capsys, changes, message):
    refused(capsys, settings_of(place, tmp_path / "out", **changes), message)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = undefined_here", "NameError: name 'undefined_here' is not defined"),
        ("def f(:", r"SyntaxError: .* \(judge_that_fails.py, line 1\)"),
        ("{}['key']", "KeyError: 'key'"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
    ],
)
def test_a_judge_whose_module_fails_is_named(place, tmp_path, monkeypatch, capsys, code, message):
    (tmp_path / "judge_that_fails.py").write_text(code + "\n")
    monkeypatch.chdir(tmp_path)
    path = settings_of(place, tmp_path / "out", judge="judge_that_fails:reward")
    refused(capsys, path, f"judge 'judge_that_fails:reward': importing 'judge_that_fails' failed: {message}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: a\0b\n", r"x\.yaml, line 1: holds a NUL character"),
        (b"model: a\x07b\n", r"x\.yaml: not YAML: "),
        (b"model: caf\xe9\n", r"x\.yaml must be UTF-8, but byte 10 \(line 1\) is not"),
        (b"a: " + b"[" * 5000, r"x\.yaml: nested too deeply"),
        ("model: a\n".encode("utf-16"), r"x\.yaml must be UTF-8, but its byte-order mark is that of UTF-16"),
    ],
)
def test_a_settings_file_is_named(tmp_path, capsys, content, message):
    (tmp_path / "x.yaml").write_bytes(content)
    refused(capsys, tmp_path / "x.yaml", message)


def test_variables_stand_in_paths(place, tmp_path, monkeypatch):
    from windkern.settings.run import load_settings

    monkeypatch.setenv("PLACE", str(place))
    path = settings_of(
        place, tmp_path / "out", model="${PLACE}/tiny", output_dir="~/mine", train_dataset="$PLACE/p.jsonl"
    )
    run, config = load_settings(str(path))
    assert run.model == f"{place}/tiny" and run.train_dataset == f"{place}/p.jsonl"
    assert config.output_dir == os.path.expanduser("~/mine")


class Odd(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("a\nb"), "a b"),
        (RecursionError("too deep"), "too deep"),
        (Odd(), "Odd"),
        (FloatingPointError("the loss is nan"), "the loss is nan"),
        (MemoryError(), "out of memory: this machine has no more; lower per_device_train_batch_size.*"),
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            "out of memory: CUDA out of memory; lower .*sampling_batch_size.*",
        ),
        (
            AnotherProcessError("x"),
            "process 0 ends because another process of the run has failed; its message says why .x.",
        ),
        (KeyError("eta"), None),
        (AttributeError("eta"), None),
        (RuntimeError("Connection closed by peer"), None),  # in a single process
    ],
)
def test_what_a_user_is_told(error, told):
    import re

    found = message_of(error)
    assert found is None if told is None else re.fullmatch(told, found)


def test_a_lost_connection_is_another_processs_end(monkeypatch):
    lost = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234")
    assert not ended_by_another(lost)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ended_by_another(lost) and not ended_by_another(RuntimeError("shapes do not match"))
    assert not ended_by_another(ValueError("Connection closed by peer"))


def test_a_message_is_one_line_that_a_terminal_shows():
    assert one_line("a\x1b[1m b\x1b[0m\r\n\tc\x07\u202e") == "a b c\\x07\\u202e"
    assert len(one_line("x" * 10_000)) == 2000


JUDGE = """
import os

def fails(prompts, responses):
    if os.environ["RANK"] == "1":
        raise KeyError("score")
    return [0.0] * len(responses)
"""


@pytest.mark.slow  # a launcher and two processes that import everything
def test_one_process_says_why_and_the_others_end_quietly(place, tmp_path):
    (tmp_path / "halfjudge.py").write_text(JUDGE)
    path = settings_of(place, tmp_path / "out", judge="halfjudge:fails", sampling_batch_size=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "windkern", "train", "--config", str(path)]
    ranks = []
    for rank in ("0", "1"):
        environment = os.environ | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parents[1])])
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
        ranks.append(subprocess.Popen(command, env=environment, **options))
    said = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 2], said
    assert "Traceback" not in said[0] + said[1]
    assert "windkern: error: judge 'halfjudge:fails' failed: KeyError: 'score'" in said[1]
    lines = [line for line in said[0].splitlines() if line.startswith("windkern:")]
    assert (
        len(lines) == 1
        and "process 0 ends because another process of the run has failed; its message says why" in lines[0]
    )
