"""What a resumed run must share with the run it continues, and files of that run that are damaged or missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import tiny_model
from trainer_cases import HELDOUT, PROMPTS, lora, make_trainer, weights_of

from windkern._files import DamagedRecordError
from windkern.train.checkpoints.identity import ResumeError
from windkern.train.checkpoints.manifest import CorruptCheckpointError

SETTINGS = {"num_iterations": 1, "max_completion_length": 3, "save_strategy": "no"}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Make a finished run without checkpoints: resuming it always starts with the check."""
    folder = tmp_path_factory.mktemp("begun")
    make_trainer(folder, **SETTINGS).train()
    return folder


def resume(folder: Path, tmp_path: Path, **changes):
    shutil.copytree(folder, tmp_path / "out")
    trainer = make_trainer(tmp_path / "out", **SETTINGS | changes)
    trainer.outer.begin = lambda *_, **__: pytest.fail("the check let it through")
    trainer.train(resume_from_checkpoint=True)


def other(scale: float = 1.0):
    model = tiny_model.make_model()
    model.model.layers[1].mlp.up_proj.weight.data.mul_(scale)
    return model


def with_template(text: str):
    tokenizer = tiny_model.make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("system", "system") + text
    return tokenizer


CASES = {
    "a setting": ({"eta": 3}, r"eta 4\.0 there, 3 here"),
    "a setting of transformers": ({"weight_decay": 0.1}, r"weight_decay 0\.0 there, 0\.1 here"),
    "the weights": (
        {"model": lambda: other(1.01)},
        r"weights of the model differ from those when the run began, first in model\.layers\.1\.mlp\.up_proj\.weight",
    ),
    "the reference": (
        {"given": lambda: {"ref_model": other(1.01)}},
        r"weights of the reference differ from those .* model\.layers\.1\.mlp\.up_proj\.weight",
    ),
    "the dtype": ({"model": lambda: other().bfloat16()}, "dtype 'float32' there, 'bfloat16' here"),
    "fewer prompts": (
        {"prompts": PROMPTS[:6]},
        "prompts differ: 8 there, 6 here, the first 6 are the same",
    ),
    "another prompt": (
        {"prompts": [*PROMPTS[:2], "not", *PROMPTS[3:], "bus"]},
        "prompts differ: 8 there, 9 here, first difference at prompt 3: 'day was' there, 'not' here",
    ),
    "held-out prompts": (
        {"heldout": HELDOUT},
        "held-out prompts differ: 0 there, 2 here, the first 0 are the same",
    ),
    "the template": (
        {"given": lambda: {"processing_class": with_template(" so")}},
        r"chat template differs at character \d+: '.*endif %}' there, '.*endif %} so' here",
    ),
}


@pytest.mark.filterwarnings("ignore:no complete checkpoint")
@pytest.mark.parametrize("name", CASES)
def test_what_differs_is_said_in_words(begun, tmp_path, name):
    changes, message = CASES[name]
    made = {key: value() if callable(value) else value for key, value in changes.items()}
    with pytest.raises(ResumeError, match=message) as caught:
        resume(begun, tmp_path, **made)
    assert str(tmp_path / "out") in str(caught.value) and "another output_dir" in str(caught.value)


@pytest.mark.filterwarnings("ignore:no complete checkpoint", "ignore:`is_gradient_checkpointing`")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["k_proj", "v_proj"]}, r"peft\.default\.target_modules \['q_proj', 'v_proj'\] there"),
        ({"use_rslora": True}, r"peft\.default\.use_rslora None there, True here"),
        ({"lora_alpha": 4}, r"peft\.default\.lora_alpha 8 there, 4 here"),
    ],
)
def test_every_setting_of_an_adapter_counts(tmp_path, changes, message):
    pytest.importorskip("peft")
    given = {"ref_model": None, "peft_config": lora()}
    make_trainer(tmp_path / "first", reference="adapter", given=given, **SETTINGS).train()
    with pytest.raises(ResumeError, match=message):
        given = {"ref_model": None, "peft_config": lora(**changes)}
        resume(tmp_path / "first", tmp_path, reference="adapter", given=given)


@pytest.mark.filterwarnings("ignore:no complete checkpoint")
def test_the_contents_of_recorded_responses_count(tmp_path):
    path = tmp_path / "r.jsonl"
    lines = [{"prompt": prompt, "responses": ["good", "bad", "a", "day"]} for prompt in PROMPTS]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    make_trainer(tmp_path / "first", sampler=f"recorded:{path}", **SETTINGS).train()
    path.write_text(path.read_text().replace('"day"]', '"rain"]', 1))
    with pytest.raises(ResumeError, match=r"the file of recorded:.*r\.jsonl has changed since the run began"):
        resume(tmp_path / "first", tmp_path, sampler=f"recorded:{path}")


# Damaged and missing files

LONGER = {
    "num_iterations": 3,
    "max_completion_length": 3,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": None,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Make a finished run with a checkpoint after each of its 6 steps; return it with its weights."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = make_trainer(folder, **LONGER)
    trainer.train()
    return folder, weights_of(trainer)


def goes_on(whole, tmp_path: Path, step: int, damage, **changes):
    """Damage a copy of the run's folder and resume the run from a step."""
    folder, out = whole[0], tmp_path / "out"
    shutil.copytree(folder, out)
    for checkpoint in out.glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)
    damage(out / "completions")
    trainer = make_trainer(out, **LONGER | changes)
    trainer.train(resume_from_checkpoint=True)
    return trainer


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def changed(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def swap(folder: Path) -> None:
    first, second = folder / "iteration-0002/block-0000.json", folder / "iteration-0002/block-0001.json"
    held = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(held)


def without_a_text(folder: Path) -> None:
    path = folder / "iteration-0002/block-0000.json"
    content = json.loads(path.read_text())
    content["groups"][0]["texts"].pop()
    path.write_text(json.dumps(content))


def without_a_row(folder: Path) -> None:
    path = folder / "iteration-0002/verdict-0000.json"
    content = json.loads(path.read_text())
    content["verdicts"][0]["prefs"].pop()
    path.write_text(json.dumps(content))


def of_format_1(folder: Path) -> None:
    changed(folder / BLOCK, format=1)


VERDICT = "iteration-0002/verdict-0001.json"
BLOCK, SCORED, RECORD = "iteration-0002/block-0001.json", "iteration-0002/scored.json", "iteration-0001/record.json"
BEGUN = "inside its iteration and resume from one at the end"
DAMAGES = [
    ("a block is cut", lambda c: cut(c / BLOCK), r"block-0001\.json is damaged \(Unterminated .*" + BEGUN),
    ("a block is empty", lambda c: (c / BLOCK).write_text(""), r"block-0001\.json is damaged \(Expecting value"),
    ("a block is not UTF-8", lambda c: (c / BLOCK).write_bytes(b"\xff"), r"block-0001\.json is damaged \('utf-8'"),
    ("a block is something else", lambda c: (c / BLOCK).write_text("[1]"), r"block-0001\.json is damaged \(TypeError"),
    (
        "blocks are exchanged",
        swap,
        r"block-000\d\.json is damaged \(it holds the prompts \[\d, \d\], but its block has",
    ),
    ("a text is lost", without_a_text, r"block-0000\.json is damaged \(ValueError: texts must hold 4 str values"),
    ("a verdict is cut", lambda c: cut(c / VERDICT), r"verdict-0001\.json is damaged \(.*" + BEGUN),
    ("a verdict lacks a row", without_a_row, r"verdict-0000\.json is damaged \(ValueError: prefs must hold 4 rows"),
    (
        "a block is of another release",
        of_format_1,
        r"block-0001\.json is damaged \(ValueError: it has format 1, but this",
    ),
    ("log-probs are cut", lambda c: cut(c / SCORED), r"scored\.json is damaged .*" + BEGUN),
    ("log-probs are others'", lambda c: changed(c / SCORED, old_logps=[[0.0]]), r"scored\.json is damaged \(old_logps"),
    ("log-probs lack a name", lambda c: (c / SCORED).write_text("{}"), r"scored\.json is damaged \(it must hold old_l"),
    (
        "a record is cut",
        lambda c: cut(c / RECORD),
        r"record\.json is damaged .*; delete it, and the history leaves",
    ),
    (
        "a record is no record",
        lambda c: (c / RECORD).write_text('{"x": 1}'),
        r"record\.json is damaged \(.*argument 'x'",
    ),
    (
        "a record holds text",
        lambda c: changed(c / RECORD, tokens="many"),
        r"record\.json is damaged \(it is not a record",
    ),
    ("the run is cut", lambda c: cut(c / "run.json"), r"run\.json is damaged .*; restore it from a copy, or start"),
    ("the run is something else", lambda c: (c / "run.json").write_text("{}"), r"run\.json is damaged \(KeyError"),
]


def test_a_verdict_that_steps_were_taken_on_is_not_asked_for_again(whole, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"verdict-0001\.json is missing; .*" + BEGUN):
        goes_on(whole, tmp_path, 3, lambda folder: (folder / VERDICT).unlink())


def test_a_server_may_move_to_another_address(tmp_path):
    made = [
        make_trainer(tmp_path, sampler=f"openai:http://127.0.0.1:{port}/v1", sampler_settings={"timeout": port})
        for port in (8011, 8012)
    ]
    first, second = (trainer.run.identity()["settings"] for trainer in made)
    assert first == second and first["sampler"] == "openai"


def test_a_run_of_an_older_release_is_refused(whole, tmp_path):
    def older(folder: Path) -> None:
        content = json.loads((folder / "run.json").read_text())
        del content["format"]
        (folder / "run.json").write_text(json.dumps(content))

    with pytest.raises(
        ResumeError, match=r"another release of windkern \(.*run\.json has format 1, but this release reads"
    ):
        goes_on(whole, tmp_path, 3, older)


def test_rows_that_were_laid_out_otherwise_are_refused(whole, tmp_path):
    with pytest.raises(ResumeError, match=r"layout\.json holds .*'shared': True.*, but groups are now laid out by"):
        goes_on(whole, tmp_path, 3, lambda folder: changed(folder / "layout.json", mask_budget=7))


@pytest.mark.parametrize(("damage", "message"), [case[1:] for case in DAMAGES], ids=[case[0] for case in DAMAGES])
def test_a_damaged_file_is_named_with_the_way_out(whole, tmp_path, damage, message):
    """The run resumes inside iteration 2, whose responses have already been fitted."""
    with pytest.raises(DamagedRecordError, match=message):
        goes_on(whole, tmp_path, 3, damage)


@pytest.mark.parametrize("name", [BLOCK, SCORED])
def test_what_has_been_fitted_is_not_made_again(whole, tmp_path, name):
    with pytest.raises(FileNotFoundError, match=rf"{name.split('/')[1]} is missing; .*{BEGUN}|is missing, and the run"):
        goes_on(whole, tmp_path, 3, lambda folder: (folder / name).unlink())


def test_without_what_says_which_run_it_is_nothing_goes_on(whole, tmp_path):
    with pytest.raises(
        ResumeError, match=r"run\.json is missing, which says which run the checkpoints in .* belong to"
    ):
        goes_on(whole, tmp_path, 3, lambda folder: (folder / "run.json").unlink())
    assert (tmp_path / "out/completions" / BLOCK).is_file()


def test_what_is_gone_of_finished_iterations_is_said(whole, tmp_path):
    def damage(folder):
        (folder / "iteration-0001/block-0000.json").unlink()
        (folder / RECORD).unlink()

    message = r"missing in .*completions: iteration-0001/block-0000\.json, iteration-0001/record\.json; the run cont"
    with pytest.warns(UserWarning, match=message):
        trainer = goes_on(whole, tmp_path, 3, damage)
    assert [record.iteration for record in trainer.history] == [2, 3]
    assert all(torch.equal(value, whole[1][name]) for name, value in weights_of(trainer).items())


def test_a_damaged_block_that_can_be_made_again_says_so(whole, tmp_path):
    """The run resumes at the end of iteration 1, with the policy that sampled."""
    with pytest.raises(DamagedRecordError, match="delete it, and what it held is sampled or judged again"):
        goes_on(whole, tmp_path, 2, lambda folder: cut(folder / BLOCK))
    shutil.rmtree(tmp_path / "out")
    trainer = goes_on(whole, tmp_path, 2, lambda folder: (folder / BLOCK).unlink())
    assert all(torch.equal(value, whole[1][name]) for name, value in weights_of(trainer).items())


def test_an_evaluation_that_was_cut_off_knows_all_earlier_iterations(tmp_path):
    """Killed between the checkpoint of iteration 2 and its evaluation; the prompts depend on all iterations."""
    changes = LONGER | {"focus": "hardest", "eval_strategy": "epoch", "save_strategy": "epoch"}
    trainer = make_trainer(tmp_path / "a", heldout=HELDOUT, **changes)
    trainer.train()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b/checkpoint-6")
    shutil.rmtree(tmp_path / "b/completions/iteration-0003")
    (tmp_path / "b/completions/iteration-0002/record.json").unlink()
    again = make_trainer(tmp_path / "b", heldout=HELDOUT, **changes)
    again.train(resume_from_checkpoint=True)
    places = [[group.place for group in each.iterations.current.groups] for each in (trainer, again)]
    assert places[0] == places[1]
    want = weights_of(trainer)
    assert all(torch.equal(value, want[name]) for name, value in weights_of(again).items())


class Code:
    def __reduce__(self):
        return print, ("this ran",)


def test_an_optimizer_that_would_run_code_is_named(whole, tmp_path, capsys):
    def damage(folder):
        checkpoint = folder.parent / "checkpoint-3"
        (checkpoint / "windkern_manifest.json").unlink()
        torch.save({"state": Code()}, checkpoint / "optimizer.pt")

    with pytest.raises(CorruptCheckpointError, match=r"checkpoint-3: optimizer\.pt or scheduler\.pt cannot be read: W"):
        goes_on(whole, tmp_path, 3, damage)
    assert "this ran" not in capsys.readouterr().out


def test_log_probs_of_a_precomputed_reference_that_are_damaged_are_named(tmp_path):
    path = tmp_path / "r.jsonl"
    lines = [{"prompt": prompt, "responses": ["good", "bad", "a", "day"]} for prompt in PROMPTS]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    changes = LONGER | {"sampler": f"recorded:{path}", "reference": "precomputed", "heldout": HELDOUT}
    make_trainer(tmp_path / "out", **changes).train()
    shutil.rmtree(tmp_path / "out/checkpoint-6")
    held = (tmp_path / "out/ref_logps.json").read_text()
    (tmp_path / "out/ref_logps.json").write_text("[1, 2]")
    with pytest.raises(DamagedRecordError, match=r"ref_logps\.json is damaged"):
        make_trainer(tmp_path / "out", **changes).train(resume_from_checkpoint=True)
    (tmp_path / "out/ref_logps.json").write_text(held)
    (tmp_path / "out/completions/held-out/block-0000.json").unlink()  # the reference's; the policy has moved
    trainer = make_trainer(tmp_path / "out", **changes)
    trainer.train(resume_from_checkpoint=True)
    with pytest.raises(FileNotFoundError, match=r"held-out/block-0000\.json is missing; the policy that made it has"):
        trainer.compare(1)
