"""A second stage on the adapter of a first: it begins where the first ended and loses nothing of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

import tiny_model  # noqa: E402
from trainer_cases import HELDOUT, PROMPTS, lora, make_trainer  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from windkern.commands.cli import main  # noqa: E402
from windkern.train import models  # noqa: E402
from windkern.train.models import load_model, load_policy, name_base, public_name  # noqa: E402
from windkern.train.report.card import card_text  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`", "ignore:`gradient_checkpointing`")
IDS = torch.tensor([[3, 6, 9, 10, 12]])
PEFT = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Path:
    """Make a folder with a base, prompts, and an adapter far from its base, as after a first stage."""
    folder = tmp_path_factory.mktemp("stage")
    base = tiny_model.save(folder / "base")
    torch.manual_seed(1)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora(task_type="CAUSAL_LM"))
    adapted.save_pretrained(folder / "first")
    (folder / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    (folder / "h.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in HELDOUT))
    return folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def first_stage(stage: Path):
    return peft.AutoPeftModelForCausalLM.from_pretrained(stage / "first")


def train(stage: Path, out: Path, *arguments: str, **changes) -> int:
    content = {
        "model": str(stage / "first"),
        "dtype": "float32",
        "train_dataset": str(stage / "p.jsonl"),
        "judge": "tiny_model:goodness",
        "output_dir": str(out),
        "num_iterations": 1,
        "steps_per_iteration": 1,
        "per_device_train_batch_size": 2,
        "num_generations": 2,
        "max_completion_length": 3,
        "learning_rate": 1e-6,  # so that the policy stays where it began
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        **changes,
    }
    out.parent.mkdir(exist_ok=True)
    settings = out.with_suffix(".yaml")
    settings.write_text(yaml.safe_dump(content))
    return main(["train", "--config", str(settings), *arguments])


def logged(out: Path) -> dict:
    return json.loads((out / "result.json").read_text())


def test_an_adapter_folder_is_trained_further(stage, tmp_path):
    out = tmp_path / "second"
    assert train(stage, out, reference="adapter", peft=PEFT) == 0
    second = peft.AutoPeftModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits(second), logits(first_stage(stage)), atol=1e-3, rtol=0)
    base = logits(AutoModelForCausalLM.from_pretrained(stage / "base"))
    assert (logits(second) - base).abs().max() > 0.1
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(stage / "base")
    assert second.peft_config["default"].r == 4


def test_the_reference_of_a_second_stage_is_the_first_ones_policy(stage, tmp_path):
    for name, changes in {
        "adapter": {"reference": "adapter"},
        "model": {},
        "merged": {"reference": "adapter", "adapter": "merge", "peft": {**PEFT, "init_lora_weights": True}},
        "merged whole": {"adapter": "merge"},
    }.items():
        folder = tmp_path / name
        options = {"logging_steps": 1, "save_strategy": "epoch", "temperature": 1.0}
        assert train(stage, folder, **changes, **options) == 0
        (state,) = folder.glob("checkpoint-*/trainer_state.json")
        first = json.loads(state.read_text())["log_history"][0]
        assert first["kl_ref"] == 0 and first["kl_old"] == 0, name
    away = {"ref_model": str(stage / "base"), "logging_steps": 1, "save_strategy": "epoch"}
    assert train(stage, tmp_path / "base", **away) == 0
    (state,) = (tmp_path / "base").glob("checkpoint-*/trainer_state.json")
    assert abs(json.loads(state.read_text())["log_history"][0]["kl_ref"]) > 1e-2


def test_a_merged_adapter_gets_a_new_one_on_a_base_that_is_kept(stage, tmp_path):
    out = tmp_path / "second"
    more = {"r": 2, "target_modules": ["k_proj"]}
    assert train(stage, out, adapter="merge", reference="adapter", peft=more) == 0
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(out / "merged_base") and config["r"] == 2
    second = peft.AutoPeftModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits(second), logits(first_stage(stage)), atol=1e-3, rtol=0)
    merged = AutoModelForCausalLM.from_pretrained(out / "merged_base")
    torch.testing.assert_close(logits(merged), logits(first_stage(stage)), atol=1e-4, rtol=0)


def test_what_contradicts_the_adapter_is_refused(stage, tmp_path, capsys):
    for changes, message in (
        ({"peft": {"r": 8}}, r"peft.r is 8, but the adapter '.*first' has 4, and adapter: continue trains it as it is"),
        ({"peft": {"r": 4, "target_modules": ["q_proj"]}}, r"peft.target_modules is ['q_proj'], but"),
        ({"model": str(stage / "base"), "adapter": "merge"}, "adapter must be continue where model is not an adapter"),
        ({"adapter": "both"}, "adapter must be one of 'continue', 'merge', got 'both'"),
    ):
        assert train(stage, tmp_path / "out", **changes) == 2
        assert message.split("'.*first'")[0] in capsys.readouterr().err


@pytest.mark.parametrize("loaded", ["by peft", "by transformers"])
def test_a_new_adapter_never_takes_the_place_of_one(stage, tmp_path, loaded):
    model = first_stage(stage) if loaded == "by peft" else AutoModelForCausalLM.from_pretrained(stage / "first")
    given = {"peft_config": lora(), "ref_model": None}
    with pytest.raises(ValueError, match=r"already has one \(default\), .* is_trainable=True\); .*merge_and_unload"):
        make_trainer(tmp_path, model=model, reference="adapter", given=given)


def test_an_adapter_of_ones_own_is_trained_further_from_python(stage, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(stage / "base")
    model = peft.PeftModel.from_pretrained(base, stage / "first", is_trainable=True)
    start = logits(model)
    given = {"ref_model": None}
    trainer = make_trainer(tmp_path, model=model, reference="adapter", num_iterations=1, given=given)
    trainer.train()
    assert trainer.state.log_history[0]["kl_ref"] == 0 and not torch.equal(logits(model), start)
    with trainer.reference.weights():
        torch.testing.assert_close(logits(trainer.model), start)
    assert not torch.equal(logits(model), start)


def test_an_adapter_that_takes_from_its_base_is_kept_as_it_began(tmp_path):
    """PiSSA moves the largest part of a weight into the adapter, so the base alone is not where the run began."""
    model, config = tiny_model.make_model(), lora(init_lora_weights="pissa")
    start = logits(model)
    trainer = make_trainer(
        tmp_path, model=model, reference="adapter", given={"peft_config": config, "ref_model": None}, num_iterations=1
    )
    trainer.train()
    with trainer.reference.weights():
        torch.testing.assert_close(logits(trainer.model), start, atol=1e-4, rtol=0)
    assert trainer.state.log_history[0]["kl_ref"] == pytest.approx(0, abs=1e-5)


def test_a_second_stage_resumes(stage, tmp_path):
    options = {"reference": "adapter", "num_iterations": 2, "save_strategy": "epoch", "learning_rate": 0.01}
    assert train(stage, tmp_path / "whole", **options) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoint-2")
    shutil.rmtree(tmp_path / "cut/completions/iteration-0002")
    assert train(stage, tmp_path / "cut", "--resume", **options) == 0
    ours, theirs = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("cut", "whole"))
    assert ours == theirs


def test_a_first_stage_that_has_changed_is_noticed(stage, tmp_path, capsys):
    held = tmp_path / "stage"
    shutil.copytree(stage, held)
    options = {"reference": "adapter", "num_iterations": 2, "save_strategy": "epoch"}
    assert train(held, tmp_path / "out", **options) == 0
    torch.manual_seed(2)
    other = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(held / "base"), lora(task_type="CAUSAL_LM"))
    other.save_pretrained(held / "first")
    assert train(held, tmp_path / "out", "--resume", **options) == 2
    assert "weights of the model differ from those when the run began, first in base_model" in capsys.readouterr().err


def test_what_is_wrong_with_an_adapter_is_named(stage, tmp_path):
    folder = tmp_path / "first"
    shutil.copytree(stage / "first", folder)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cannot load the adapter '.*first' on .*adapter_model\.safetensors is cut"):
        load_policy(str(folder))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/no/where"}))
    with pytest.raises(
        FileNotFoundError, match=r"/no/where does not exist \(the base that the adapter '.*first' names"
    ):
        load_model(str(folder))
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match=r"adapter_config\.json names no base"):
        load_model(str(folder))
    (folder / "adapter_config.json").write_text('{"r": 4')
    with pytest.raises(ValueError, match=r"adapter_config\.json is not the configuration of an adapter"):
        load_model(str(folder))


def test_a_loaded_adapter_is_the_model_with_its_layers(stage):
    model, tokenizer = load_model(str(stage / "first"), dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(first_stage(stage)))
    assert type(model).__name__ == "LlamaForCausalLM" and len(tokenizer) == 18


def test_a_base_has_the_name_that_others_know(tmp_path, monkeypatch):
    monkeypatch.setenv("WINDKERN_CACHE", str(tmp_path / "cache"))
    packaged = str(models.cache_dir() / f"{models.PACKAGED}-12345")
    hub = "/data/hub/models--Qwen--Qwen3-0.6B/snapshots/c1899de289a04d12100db370d81485cdf75e47ca"
    assert [public_name(name) for name in (packaged, hub, "org/name", "./mine", "")] == [
        models.PACKAGED,
        "Qwen/Qwen3-0.6B",
        "org/name",
        "./mine",
        "",
    ]
    for name, wanted in ((packaged, models.PACKAGED), (hub, "Qwen/Qwen3-0.6B"), (None, None)):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "base_model_name_or_path": name}))
        name_base(tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text()) == {"r": 4, "base_model_name_or_path": wanted}


def test_the_card_says_how_an_adapter_of_the_packaged_model_is_loaded():
    text = card_text(config={}, base_model=models.PACKAGED, judge=None, history=[], name="mine", library="peft")
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in text
    assert "load_policy('mine')" in text and "AutoPeft" not in text
