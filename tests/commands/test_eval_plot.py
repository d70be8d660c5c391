"""`windkern eval` end to end on models of a few words, and `windkern plot` on the files of commands."""

from __future__ import annotations

import json
import math
import statistics

import pytest

transformers = pytest.importorskip("transformers")
for package in ("rich", "matplotlib", "safetensors"):
    pytest.importorskip(package)

import tiny_model  # noqa: E402
from trainer_cases import sharing_seen  # noqa: E402

from windkern.commands import evaluate as evaluation  # noqa: E402
from windkern.commands.cli import main  # noqa: E402
from windkern.train.data.records import Recorded, save_records  # noqa: E402
from windkern.train.evaluation.evaluate import Estimate, Evaluation  # noqa: E402
from windkern.train.report import show as report  # noqa: E402
from windkern.train.report.progress import Record  # noqa: E402

PROMPTS = ("rain was", "bus was", "a day", "so very", "the bus")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Two models, prompts, recorded responses."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_model.save(folder / "base")
    tiny_model.make_model(seed=5).save_pretrained(folder / "other")
    tiny_model.make_tokenizer().save_pretrained(folder / "other")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    save_records(folder / "good.jsonl", [Recorded(prompt, ("good good", "good")) for prompt in PROMPTS])
    save_records(folder / "mixed.jsonl", [Recorded(prompt, ("bad", "good")) for prompt in PROMPTS])
    return folder


def command(inputs, output, model: str, base: str, *more: str) -> list[str]:
    return [
        *("eval", "--model", model, "--base", base, "--prompts", str(inputs / "prompts.txt")),
        *("--judge", "tiny_model:goodness", "--output-dir", str(output), "--max-completion-length", "6", *more),
    ]


def test_two_models_are_sampled_judged_and_shown(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    output = tmp_path / "eval"
    options = ("--num-generations", "4", "--judge-strength", "6", "--dtype", "float32", "--batch-size", "8")
    shared = sharing_seen(monkeypatch)
    assert main(command(inputs, output, str(inputs / "other"), str(inputs / "base"), *options)) == 0
    assert any(shared) and len(shared) == 6  # three batches of two prompts, under both models
    shown = capsys.readouterr().out
    content = json.loads((output / "eval.json").read_text())
    assert content["kind"] == "eval" and content["settings"]["num_generations"] == 4
    assert [entry["prompt"] for entry in content["prompts"]] == list(PROMPTS)

    rates = []
    for entry in content["prompts"]:
        assert len(entry["model"]) == len(entry["base"]) == 4
        ours, theirs = (tiny_model.goodness(None, entry[side]) for side in ("model", "base"))
        rates.append(statistics.mean(1 / (1 + math.exp(-6 * (a - b))) for a in ours for b in theirs))
        assert entry["win_rate"] == pytest.approx(rates[-1], abs=1e-6)
    mean, error = statistics.mean(rates), statistics.stdev(rates) / math.sqrt(len(rates))
    assert content["win_rate"]["mean"] == pytest.approx(mean, abs=1e-6)
    assert content["win_rate"]["se"] == pytest.approx(error, abs=1e-6)
    assert content["win_rate"]["95"] == pytest.approx([mean - 1.96 * error, mean + 1.96 * error], abs=1e-6)
    assert content["kl"]["mean"] > 1 and content["reward"] is not None
    assert f"{mean:.3f} ± {error:.3f}" in shown and "95 % interval" in shown and "KL(model, base)" in shown
    assert "base" in shown and PROMPTS[0] in shown and "eval.png" in shown
    assert (output / "eval.png").read_bytes().startswith(b"\x89PNG")
    assert 1 <= content["tokens"]["model"] <= 6 and 0 <= content["truncated"]["base"] <= 1

    assert main(command(inputs, tmp_path / "again", str(inputs / "other"), str(inputs / "base"), *options)) == 0
    assert json.loads((tmp_path / "again" / "eval.json").read_text()) == content


def test_a_model_is_as_good_as_itself(inputs, tmp_path):
    base = str(inputs / "base")
    assert main(command(inputs, tmp_path, base, base, "--dtype", "float32", "--num-generations", "8")) == 0
    content = json.loads((tmp_path / "eval.json").read_text())
    low, high = content["win_rate"]["95"]
    assert low - 0.05 < 0.5 < high + 0.05
    assert content["kl"]["mean"] == pytest.approx(0, abs=1e-4)
    assert any(entry["model"] != entry["base"] for entry in content["prompts"])  # each side has its own draws


def test_recorded_responses_are_compared_without_a_model(inputs, tmp_path):
    good, mixed = (f"recorded:{inputs / name}.jsonl" for name in ("good", "mixed"))
    assert main(command(inputs, tmp_path, good, mixed, "--judge-strength", "2")) == 0
    content = json.loads((tmp_path / "eval.json").read_text())
    sigma = 1 / (1 + math.exp(-4))
    assert content["win_rate"]["mean"] == pytest.approx((sigma + 0.5) / 2, abs=1e-6)
    assert content["win_rate"]["se"] == pytest.approx(0, abs=1e-9)
    assert content["kl"] is None and content["tokens"] == {"model": None, "base": None}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num-generations", "0"], "num_generations must be at least 1"),
        (["--num-generations", "3"], "has fewer than 3 responses to 'rain was'"),
        (["--dtype", "float23"], "did you mean 'float32'"),
        (["--judge", "vadr"], "judge must be vader"),
        (["--prompts", "/no/such/file"], "does not exist"),
        (["--base", "recorded:/no/such/file"], "does not exist"),
    ],
)
def test_mistakes_are_one_line(inputs, tmp_path, capsys, more, message):
    good = f"recorded:{inputs / 'good.jsonl'}"
    assert main(command(inputs, tmp_path, good, good, *more)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


# Plot


def assert_redrawn(numbers, picture, tmp_path) -> None:
    again = tmp_path / "again" / "x.png"
    assert main(["plot", str(numbers), "--output", str(again)]) == 0
    assert again.read_bytes() == picture.read_bytes()


def test_an_evaluation_is_drawn_again(inputs, tmp_path):
    good, mixed = (f"recorded:{inputs / name}.jsonl" for name in ("good", "mixed"))
    assert main(command(inputs, tmp_path, good, mixed)) == 0
    assert_redrawn(tmp_path / "eval.json", tmp_path / "eval.png", tmp_path)
    (tmp_path / "eval.png").unlink()
    assert main(["plot", str(tmp_path / "eval.json")]) == 0
    assert (tmp_path / "eval.png").is_file()


def test_a_run_is_drawn_again(tmp_path):
    history = [Record(k, 0.5 + 0.1 * k, 0.04, 0.1, 0.3, 0.1, 0.05, 3.0, 0.1, 0.5, 900, 30.0) for k in (1, 2)]
    final = Evaluation(Estimate(0.8, 0.03), None, None)
    report.draw(tmp_path / "a.png", history, final, "wind on m, seed 4")
    report.as_json(
        tmp_path / "a.json",
        settings={"model": "m", "wind": {"seed": 4}},
        history=history,
        final=final,
        prompts=["p"],
        before=[["x"]],
        after=[["y"]],
    )
    assert_redrawn(tmp_path / "a.json", tmp_path / "a.png", tmp_path)


@pytest.mark.slow
def test_bandits_are_drawn_again(tmp_path):
    sizes = ("--seeds", "2", "--contexts", "1", "--responses", "2", "--exact-iterations", "2", "--num-iterations", "1")
    assert main(["bandit", *sizes, "--groups", "2", "--output-dir", str(tmp_path)]) == 0
    assert_redrawn(tmp_path / "bandit.json", tmp_path / "bandit.png", tmp_path)


def test_recorded_responses_may_lie_in_several_lines_of_a_prompt(tmp_path):
    """As the sampler and the judge read the same files: here the last line alone was used."""
    from windkern.train.evaluation.recorded import RecordedTexts

    lines = [("caf\u00e9", "a"), ("bus", "x"), (" cafe\u0301", "b"), ("bus", "y")]
    save_records(tmp_path / "r.jsonl", [Recorded(prompt, (text,)) for prompt, text in lines])
    found = RecordedTexts(str(tmp_path / "r.jsonl")).sample(["bus", "caf\u00e9 "], 2, seed=0)
    assert found.texts == (("x", "y"), ("a", "b"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "results file with"),
        ('{"kind": "doctor"}', "got 'doctor'"),
        ('{"kind": ["eval"]}', "got ['eval']"),
        ("[" * 100_000, "x.json is not JSON"),
        ('{"kind": "eval"}', "not a complete result of kind 'eval'"),
        ('{"kind": "train", "final": {"win_rate": 1, "win_rate_se": 0}, "settings": [], "history": []}', "complete"),
        ('{"kind": "train", "final": null, "settings": {}}', "x.json: this run had no held-out prompts"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path, capsys, content, message):
    path = tmp_path / "x.json"
    path.write_text(content)
    assert main(["plot", str(path)]) == 2
    assert message in capsys.readouterr().err
    assert main(["plot", str(tmp_path / "none.json")]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["potato", "cuda:0"])
def test_a_device_that_is_not_there_is_named(device, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=f"device must .*got '{device}'"):
        evaluation.EvalSettings(model="a", base="b", prompts="p.txt", judge="vader", device=device)


def test_settings_name_what_is_out_of_range():
    with pytest.raises(ValueError, match="temperature"):
        evaluation.EvalSettings(model="a", base="b", prompts="p.txt", judge="vader", temperature=0.0)
