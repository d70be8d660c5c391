"""Recipes: all are read and produce their configurations; those for this machine run in a reduced form."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
for package in ("rich", "matplotlib"):
    pytest.importorskip(package)

import tiny_model  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from windkern import recipes  # noqa: E402
from windkern.commands.cli import main  # noqa: E402
from windkern.settings import run  # noqa: E402
from windkern.train.models import load_policy  # noqa: E402

HERE = ("use_cpu=true", "bf16=false")  # replaces the settings of a recipe that need a GPU
OF_ADAPTERS = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`", "ignore:`.*gradient_checkpointing", "ignore:Model has"
)
WORDS = ("rain", "bus", "day", "the bus", "a day", "so very", "was a", "not the")


@pytest.fixture(autouse=True)
def environment():
    """Removes the variables that fsdp settings write into the environment."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_recipes_are_found_in_a_zip_archive(tmp_path):
    package = Path(recipes.__file__).parents[1]
    with zipfile.ZipFile(tmp_path / "windkern.zip", "w") as archive:
        for path in package.rglob("*"):
            if path.suffix in (".py", ".yaml"):
                archive.write(path, path.relative_to(package.parent))
    code = "from windkern import recipes as r; print(r.names()); print(r.purpose('demo')); "
    code += "print(r.find('demo').read_text(), end=''); print(r.find('accelerate/zero3').is_file())"

    def python(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "windkern.zip")}
        return subprocess.run(
            [sys.executable, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )

    first, *rest = python("-c", code).stdout.splitlines()
    assert first == str(recipes.names()) and recipes.names()
    assert rest == [recipes.purpose("demo"), *recipes.find("demo").read_text().splitlines(), "True"]
    listed = python("-m", "windkern.recipes")
    assert [line.split()[0] for line in listed.stdout.splitlines()] == recipes.names(), listed.stderr
    refused = python("-m", "windkern.recipes", "demo")
    assert refused.returncode == 1 and "demo is in an archive and has no path; unpack " in refused.stderr
    (tmp_path / "mine.yaml").touch()
    assert python("-m", "windkern.recipes", "mine.yaml").stdout == "mine.yaml\n"


@pytest.mark.parametrize("name", ["../recipes/demo", "/demo", "accelerate", ""])
def test_a_path_that_leaves_the_recipes_names_none(name):
    with pytest.raises(FileNotFoundError, match="no recipe of this name; recipes: demo, "):
        recipes.find(name)


def overrides_in(name):
    """The overrides that a recipe's comments propose, each command a list of KEY=VALUE."""
    comment = " ".join(line[1:].strip() for line in recipes.find(name).read_text().splitlines() if line[:1] == "#")
    commands = re.findall(r'--override((?: (?:"[^"]+"|[\w.]+=[^\s,()]+))+)', comment)
    return [[entry.rstrip(".") for entry in shlex.split(command)] for command in commands]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing`")
@pytest.mark.parametrize(
    ("name", "overrides"), [(name, each) for name in recipes.names() for each in overrides_in(name)]
)
def test_the_overrides_that_comments_propose_are_accepted(name, overrides, tmp_path):
    _, config = run.load_settings(name, (*HERE, *overrides), output_dir=tmp_path)
    wanted = next((entry.removeprefix("loss=") for entry in overrides if entry.startswith("loss=")), config.loss)
    assert config.loss == wanted


def test_the_comments_of_the_papers_run_propose_its_baselines():
    assert [each[0] for each in overrides_in("wind_llama3_8b")] == ["peft=null", "loss=sppo", "loss=bond"]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing`")
@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_makes_its_configuration(name, monkeypatch, tmp_path):
    content = yaml.safe_load(recipes.find(name).read_text())
    dropped = ()
    if "deepspeed" in content:
        monkeypatch.setattr(run, "require", lambda *names: None)
        dropped = ("deepspeed=null",)  # its own reader is not installed; test_deepspeed_settings tests it
    settings, config = run.load_settings(name, (*HERE, *dropped), output_dir=tmp_path)
    assert settings.method == content.get("method", "wind") and config.output_dir == str(tmp_path)
    for key, value in content.items():
        if key in ("output_dir", "bf16", "use_cpu", "deepspeed", "fsdp", "fsdp_config"):
            continue
        holder = settings if hasattr(settings, key) else config
        found = getattr(holder, key)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            assert float(found) == float(value), key
        elif isinstance(value, str) and not value.replace("e-", "").replace(".", "").isdigit():
            assert str(getattr(found, "value", found)) == value, key


def test_deepspeed_settings_are_what_they_say():
    zeropp = yaml.safe_load(recipes.find("zeropp").read_text())["deepspeed"]["zero_optimization"]
    assert zeropp["stage"] == 3 and zeropp["zero_quantized_weights"] is True
    assert zeropp["zero_quantized_gradients"] is True and zeropp["zero_hpz_partition_size"] > 1
    zero3 = yaml.safe_load((recipes.find("zero3").parent / "accelerate" / "zero3.yaml").read_text())
    assert zero3["distributed_type"] == "DEEPSPEED" and zero3["deepspeed_config"]["zero_stage"] == 3


def test_fsdp2_is_asked_for_whole_weights():
    content = yaml.safe_load(recipes.find("fsdp2_8gpu").read_text())
    assert content["fsdp_config"]["version"] == 2
    assert content["fsdp_config"].get("state_dict_type", "FULL_STATE_DICT") == "FULL_STATE_DICT"


@pytest.fixture
def inputs(tmp_path) -> Path:
    tiny_model.save(tmp_path / "model")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"prompt": f"{word} was"}) + "\n" for word in WORDS))
    (tmp_path / "heldout.txt").write_text("\n".join(f"{word} and" for word in WORDS[:4]))
    lines = [{"prompt": f"{word} was", "answer": "good good day"} for word in WORDS]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def train(inputs: Path, name: str, *changes: str, more: tuple[str, ...] = ()) -> int:
    given = {
        "model": inputs / "model",
        "train_dataset": inputs / ("answers.jsonl" if name == "spin" else "train.jsonl"),
        "eval_dataset": inputs / "heldout.txt",
        "judge": "tiny_model:goodness",
        "max_completion_length": 6,
        "num_iterations": 2,
        "steps_per_iteration": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.02,
        "attention": "eager",
    }
    overrides = [*HERE, *(f"{key}={value}" for key, value in given.items()), *changes]
    command = ["train", "--config", name, "--output-dir", str(inputs / "out"), "--override", *overrides]
    return main([*command, *more])


def test_the_demo_recipe_runs_and_resumes(inputs, capsys):
    assert train(inputs, "demo", "num_generations=4", "fit_responses=2") == 0
    printed = capsys.readouterr().out
    for part in ("2/2  win rate", "95 % interval", "result.json", "win_rate.png"):
        assert part in printed
    result = json.loads((inputs / "out" / "result.json").read_text())
    assert result["kind"] == "train" and len(result["history"]) == 2
    assert main(["plot", str(inputs / "out" / "result.json"), "--output", str(inputs / "again.png")]) == 0
    assert (inputs / "again.png").read_bytes() == (inputs / "out" / "win_rate.png").read_bytes()
    assert train(inputs, "demo", "num_generations=4", "fit_responses=2") == 2
    assert "holds checkpoints of an earlier run" in capsys.readouterr().err
    assert train(inputs, "demo", "num_generations=4", "fit_responses=2", "num_iterations=3", more=("--resume",)) == 0
    assert len(json.loads((inputs / "out" / "result.json").read_text())["history"]) == 3


@OF_ADAPTERS
def test_the_lora_recipe_trains_an_adapter(inputs):
    pytest.importorskip("peft")
    assert train(inputs, "lora_1gpu", "dtype=float32", "gradient_checkpointing=false", "peft.r=2") == 0
    assert (inputs / "out" / "adapter_model.safetensors").is_file()
    card, result = (inputs / "out" / "README.md").read_text(), json.loads((inputs / "out" / "result.json").read_text())
    low, high = result["final"]["win_rate_95"]
    final = f"**{result['final']['win_rate']:.3f}**, 95 % interval [{low:.3f}, {high:.3f}]"
    assert "library_name: peft" in card and final in card
    for fact in (
        "`dtype` | `float32`",
        "`peft.default.r` | `2`",
        "`peft.default.target_modules` | `[",
        "on prompts from `",
    ):
        assert fact in card, fact


@OF_ADAPTERS
def test_the_qlora_recipe_trains_an_adapter_on_four_bits(inputs):
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    changes = ("gradient_checkpointing=false", "chat_template_kwargs=null", "peft.r=2")
    assert train(inputs, "qlora_1gpu", *changes) == 0
    kept = load_file(inputs / "out" / "adapter_model.safetensors")
    moved = [name for name, value in kept.items() if "lora_B" in name and value.any()]  # each begins as zeros
    assert len(moved) == len(kept) // 2 > 0


@OF_ADAPTERS
def test_four_bits_stay_trainable_after_sampling(tmp_path):
    """On a CPU with AVX-512 BF16, bitsandbytes repacks weights in eval mode, and no gradient passes them afterwards."""
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    tiny_model.save(tmp_path)
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    model, _ = load_policy(str(tmp_path), dtype=torch.float32, quantization=settings)
    packed = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    assert packed and isinstance(model.lm_head, torch.nn.Linear) and model.lm_head.weight.is_floating_point()
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    ids = torch.tensor([[4, 5, 6, 7]])
    with torch.no_grad():
        before = model.eval()(ids).logits
    after = model.train()(ids).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    after.sum().backward()
    gradients = [value.grad for value in model.parameters() if value.requires_grad]
    assert gradients and all(each is not None and each.abs().sum() > 0 for each in gradients)


def test_four_bits_cannot_be_trained_themselves(inputs, capsys):
    for change, message in (
        ("peft=null", "quantization needs peft"),
        ("reference=model", "quantization needs reference: adapter"),
    ):
        assert train(inputs, "qlora_1gpu", "gradient_checkpointing=false", change) == 2
        assert message in capsys.readouterr().err


def test_the_spin_recipe_trains_on_demonstrations(inputs):
    assert train(inputs, "spin", "fsdp=null", "fsdp_config=null") == 0
    assert json.loads((inputs / "out" / "result.json").read_text())["settings"]["loss"] == "spin"


def test_the_value_recipe_trains_a_value_model(inputs, capsys):
    torch.manual_seed(0)
    overrides = [
        *HERE,
        *(f"{name}={inputs / 'model'}" for name in ("base_model", "value_model", "transfer_base")),
        *(f"{name}={inputs / 'answers.jsonl'}" for name in ("train_demonstrations", "eval_demonstrations")),
        *("max_steps=4", "per_device_train_batch_size=4", "gradient_accumulation_steps=1", "learning_rate=0.02"),
        *("save_steps=2", "report_to=none", "disable_tqdm=true"),
    ]
    assert main(["train", "--config", "value", "--output-dir", str(inputs / "out"), "--override", *overrides]) == 0
    result = json.loads((inputs / "out" / "result.json").read_text())
    assert result["kind"] == "value" and result["nll_per_token"]["after"] < result["nll_per_token"]["before"]
    assert (inputs / "out" / "nll.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plot", str(inputs / "out" / "result.json"), "--output", str(inputs / "again.png")]) == 0
    assert "negative log-likelihood" in capsys.readouterr().out


def test_what_is_logged_goes_where_report_to_says(inputs, monkeypatch):
    from transformers import TrainerCallback, trainer
    from transformers.integrations import integration_utils

    seen = []

    class Log(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **given):
            seen.append(set(logs))

    def callbacks(names):
        return [Log] if names == ["tensorboard"] else []

    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setattr(trainer, "get_reporting_integration_callbacks", callbacks)
    assert train(inputs, "demo", "num_generations=4", "fit_responses=2", more=("--report-to", "tensorboard")) == 0
    assert any({"loss", "kl_old", "kl_ref", "residual", "exploitability"} <= names for names in seen)
    assert any({"eval_win_rate", "eval_win_rate_se", "eval_kl"} <= names for names in seen)


def test_mistakes_are_one_line(inputs, capsys):
    for change, message in (
        ("lerning_rate=1", "did you mean 'learning_rate'"),
        ("train_dataset=/no/such", "/no/such"),
        ("judge=tiny_model:nothing", "no function 'nothing'"),
        ("loss_kwargs.eta=fast", "eta must be a finite number, got 'fast'"),
        ("model=/no/such/model", "/no/such/model"),
    ):
        assert train(inputs, "demo", change) == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith("windkern: error: ") and error.count("\n") == 1, error
