"""Settings files: a value in YAML becomes the type of its field, and one that does not fit is named."""

from __future__ import annotations

import dataclasses
import doctest
import json
import re
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("yaml")
pytest.importorskip("rich")

from windkern import recipes  # noqa: E402
from windkern.commands.cli import main  # noqa: E402
from windkern.settings import describe, run  # noqa: E402
from windkern.settings import fields as settings_fields  # noqa: E402
from windkern.settings import file as settings_file  # noqa: E402
from windkern.settings.fields import build, known_fields, own_fields  # noqa: E402
from windkern.settings.file import read_settings  # noqa: E402
from windkern.settings.foreign import FOREIGN  # noqa: E402
from windkern.settings.run import classes_of  # noqa: E402
from windkern.train import launch  # noqa: E402


class Colour(Enum):
    RED = "red"
    NONE = "no"


@dataclasses.dataclass
class Model:
    model: str
    learning_rate: float = 0.1
    steps: int = 3
    bf16: bool = False
    tf32: bool | None = None
    colour: Colour | str = "red"
    save: str = "epoch"
    folder: Path | None = None
    names: list[str] = dataclasses.field(default_factory=list)
    weights: dict[str, float] | str | None = None
    free: dict[str, Any] | None = None
    mode: Literal["a", False] = "a"
    share: int | float | None = None
    inner: int = dataclasses.field(default=0, init=False)


@dataclasses.dataclass
class Prompts:
    prompts: str = "demo"

    def __post_init__(self):
        if self.prompts == "none":
            raise ValueError("prompts must not be none")


@dataclasses.dataclass
class StandIn(transformers.TrainingArguments):
    """A configuration that extends TrainingArguments, like the trainers' own."""

    loss: str = dataclasses.field(default="wind", metadata={"help": "Loss that\n is fitted [see below]."})
    eta: float | None = dataclasses.field(default=None, metadata={"help": "Step size."})


@pytest.fixture
def written(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "x.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize(
    "module", [describe, launch, run, settings_fields, settings_file], ids=lambda module: module.__name__
)
def test_docstring_examples_run(module):
    failed, tried = doctest.testmod(module)
    assert tried and not failed


def read(written, text: str, *overrides: str) -> dict:
    return read_settings(written(text), overrides)


def made(text_or_content, written=None) -> Model:
    content = read(written, text_or_content) if written else text_or_content
    return build([Model], {"model": "m"} | content, "x.yaml")[0]


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-5", 1e-5),
        ("5E3", 5000.0),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("12", 12),
        ("-3", -3),
        ("true", True),
        ("False", False),
        ("null", None),
        ("", None),
        ("~", None),
        ("010", "010"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2024-01-02", "2024-01-02"),
        ("no", "no"),
        ("'1e-5'", "1e-5"),
        ("[1, a]", [1, "a"]),
        ("{r: 8, lr: 1e-4, on_: true}", {"r": 8, "lr": 1e-4, "on_": True}),
        ("{use: 'no'}", {"use": "no"}),
    ],
)
def test_scalars_are_read_as_yaml_1_2_reads_them(written, text, value):
    (got,) = read(written, f"key: {text}\n").values()
    assert got == value and type(got) is type(value)


def test_an_anchor_can_be_merged(written):
    content = read(written, "a: &a {r: 1, s: 2}\nb:\n  <<: *a\n  r: 3\n")
    assert content["b"] == {"r": 3, "s": 2}


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: 1\nb: 2\na: 3\n", "x.yaml, line 3: key 'a' is given twice, first in line 1"),
        ("peft:\n  r: 1\n  r: 2\n", "x.yaml, line 3: key 'r' is given twice, first in line 2"),
        ("peft: {r: 1, r: 1}", "x.yaml, line 1: key 'r' is given twice, first in line 1"),
        ("peft: {use_rslora: no}", "x.yaml, line 1: use_rslora: write false, or quote it if it is a string, got no"),
        ("a:\n  b:\n    c: [1, On]", "x.yaml, line 3: c: write true, or quote it if it is a string, got On"),
        ("a: [1", "x.yaml, line 1: not YAML: expected ',' or ']'"),
        ("a: 1\n\tb: 2", "x.yaml, line 2: not YAML: found character"),
        ("a: !!python/object:os.system 1", "x.yaml, line 1: not YAML: could not determine a constructor"),
        ("- 1\n- 2", r"x.yaml must hold keys and values, got \[1, 2\]"),
        ("1: 2", "x.yaml: keys must be strings, got 1"),
        ("~: 2", "x.yaml: keys must be strings, got null"),
        ("a: 1\n---\na: 2", "x.yaml, line 2: not YAML: but found another document"),
    ],
)
def test_files_that_are_not_settings_are_refused(written, text, message):
    with pytest.raises(ValueError, match=message):
        read(written, text)


def test_an_empty_file_has_no_entries_and_a_missing_one_is_named(written, tmp_path):
    assert read(written, "# nothing\n") == {}
    with pytest.raises(FileNotFoundError, match=r"settings file .*y\.yaml does not exist"):
        read_settings(tmp_path / "y.yaml")


def test_overrides_win_and_reach_into_mappings(written):
    text = "eta: 1\npeft: {r: 16, lora_alpha: 32}\nfsdp_config: null\n"
    content = read(written, text, "eta=1e1", "peft.r=8", "fsdp_config.version=2", "a.b.c=[x, 1]", "name=a=b", "eta=2")
    assert content == {
        "eta": 2,
        "peft": {"r": 8, "lora_alpha": 32},
        "fsdp_config": {"version": 2},
        "a": {"b": {"c": ["x", 1]}},
        "name": "a=b",
    }
    assert read(written, text, "peft=null")["peft"] is None
    assert read(written, text, "system=")["system"] is None
    assert read(written, text, "save=no")["save"] == "no"


@pytest.mark.parametrize(
    "entry, message",
    [
        ("eta", "--override must be key=value, such as seed=5 or peft.r=8, got 'eta'"),
        ("=1", "--override must be key=value"),
        ("peft..r=1", "--override must be key=value"),
        ("eta.x=1", "--override eta.x=1: eta must be keys and values, got 1"),
        ("peft=[1", r"--override peft=\[1, line 1: not YAML"),
        ("peft={r: 1, r: 2}", "line 1: key 'r' is given twice"),
        ("peft.use_rslora=no", "--override peft.use_rslora=no, value: write false, or quote it"),
    ],
)
def test_overrides_that_make_no_sense_are_refused(written, entry, message):
    with pytest.raises(ValueError, match=message):
        read(written, "eta: 1\npeft: {r: 16}\n", entry)


@pytest.mark.parametrize(
    "key, value, wanted",
    [
        ("learning_rate", 1, 1.0),
        ("learning_rate", "1e-5", 1e-5),
        ("steps", 1e3, 1000),
        ("steps", "8", 8),
        ("bf16", "yes", True),
        ("bf16", "Off", False),
        ("tf32", None, None),
        ("tf32", "no", False),
        ("colour", "no", Colour.NONE),
        ("colour", Colour.RED, Colour.RED),
        ("save", "no", "no"),
        ("save", 2024, "2024"),
        ("folder", "a/b", Path("a/b")),
        ("names", ["a", 1], ["a", "1"]),
        ("weights", {"a": 1}, {"a": 1.0}),
        ("weights", "file.json", "file.json"),
        ("free", {"a": [1, {"b": None}]}, {"a": [1, {"b": None}]}),
        ("mode", False, False),
        ("share", 2, 2),
        ("share", 0.5, 0.5),
    ],
)
def test_values_become_what_the_annotation_says(key, value, wanted):
    got = getattr(made({key: value}), key)
    assert got == wanted and type(got) is type(wanted)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("learning_rate", "fast", "learning_rate must be a number, got 'fast'"),
        ("learning_rate", True, "learning_rate must be a number, got true"),
        ("learning_rate", None, "learning_rate must be a number, got null"),
        ("learning_rate", float("nan"), "learning_rate must be a number, got nan"),
        ("learning_rate", 10**400, "learning_rate must be a number, got 1000"),
        ("steps", 1.5, "steps must be an integer, got 1.5"),
        ("steps", [1], r"steps must be an integer, got \[1\]"),
        ("bf16", 1, "bf16 must be true or false, got 1"),
        ("tf32", "maybe", "tf32 must be true or false or null, got 'maybe'"),
        ("colour", "rad", "colour must be one of 'red', 'no', got 'rad'; did you mean 'red'?"),
        ("save", False, "save must be a string, got false"),
        ("save", 1.5, "save must be a string, got 1.5"),
        ("folder", 3, "folder must be a path or null, got 3"),
        ("names", "a", "names must be a list, got 'a'"),
        ("names", [["a"]], r"names\[0\] must be a string, got \['a'\]"),
        ("weights", {"a": "x"}, "weights.a must be a number, got 'x'"),
        ("weights", [1], r"weights must be keys and values, a string or null, got \[1\]"),
        ("mode", 0, "mode must be 'a' or False, got 0"),
        ("share", "x", "share must be an integer, a number or null, got 'x'"),
        ("inner", 1, "unknown key 'inner'"),
    ],
)
def test_values_that_do_not_fit_are_named(key, value, message):
    with pytest.raises(ValueError, match=f"^x.yaml: {message}"):
        made({key: value})


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("prompts", "train_dataset"),
        ("train_prompts", "train_dataset"),
        ("dataset", "train_dataset"),
        ("eval_prompts", "eval_dataset"),
        ("num_samples", "num_generations"),
        ("n_responses", "num_generations"),
        ("num_responses", "num_generations"),
        ("max_new_tokens", "max_completion_length"),
        ("max_length", "max_completion_length"),
        ("reference_model", "ref_model"),
        ("reward_model", "judge"),
        ("peft_config", "peft"),
        ("model_name_or_path", "model"),
        ("lr", "learning_rate"),
        ("batch_size", "per_device_train_batch_size"),
        ("eta", "loss_kwargs"),
        ("lerning_rate", "learning_rate"),
        ("max_prompt_len", "max_prompt_length"),
        ("tokenizer", None),
        ("lora_r", None),
        ("steps", None),
        ("output", None),
    ],
)
def test_a_hint_names_the_right_key_or_none(key, meant):
    hint = "`windkern train --fields` lists the keys" if meant is None else f"did you mean '{meant}'?"
    with pytest.raises(ValueError, match=f"unknown key '{key}'; {re.escape(hint)}$"):
        build(classes_of("wind"), {key: 1}, "x.yaml")


def test_what_other_tools_call_a_key_is_not_a_key_here():
    """Otherwise it would silently set something else."""
    names = {name for cls in classes_of("wind") for name in known_fields(cls)}
    assert set(FOREIGN.values()) <= names and not set(FOREIGN) & names


def test_keys_are_split_among_classes_and_unknown_ones_named():
    model, prompts = build([Model, Prompts], {"model": "m", "prompts": "p", "steps": 1}, "x.yaml")
    assert (model.model, model.steps, prompts) == ("m", 1, Prompts("p"))
    with pytest.raises(ValueError, match=r"^x.yaml: unknown key 'lerning_rate'; did you mean 'learning_rate'\?"):
        made({"lerning_rate": 1})
    with pytest.raises(ValueError, match=r"^x.yaml: unknown key 'zzz'; `windkern train --fields` lists the keys$"):
        made({"zzz": 1})
    with pytest.raises(ValueError, match=r"^x.yaml: key 'model' is missing$"):
        build([Model], {}, "x.yaml")
    with pytest.raises(ValueError, match=r"^x.yaml: prompts must not be none$"):
        build([Prompts], {"prompts": "none"}, "x.yaml")


def test_training_arguments_take_what_people_write(tmp_path):
    content = {
        "output_dir": str(tmp_path),
        "use_cpu": "yes",
        "learning_rate": "5e-7",
        "lr_scheduler_type": "linear",
        "save_strategy": "no",
        "report_to": ["none"],
        "warmup_steps": 0.1,
        "logging_steps": 10,
        "eta": 5,
    }
    (config,) = build([StandIn], content, "x.yaml")
    assert (config.learning_rate, config.eta, config.save_strategy.value, config.use_cpu) == (5e-7, 5.0, "no", True)
    with pytest.raises(ValueError, match=r"^x.yaml: lr_scheduler_type must be one of .*; did you mean 'linear'\?"):
        build([StandIn], content | {"lr_scheduler_type": "linaer"}, "x.yaml")
    with pytest.raises(ValueError, match=r"^x.yaml: .*warmup_steps"):
        build([StandIn], content | {"warmup_steps": -1}, "x.yaml")


def test_every_field_of_training_arguments_takes_its_own_default():
    """`build` can read the annotation of every inherited field."""
    for name, known in settings_fields.known_fields(transformers.TrainingArguments).items():
        value = known.default.value if isinstance(known.default, Enum) else known.default
        assert settings_fields._value(name, value, known) == known.default, name
    assert (
        settings_fields._value("fsdp", True, settings_fields.known_fields(transformers.TrainingArguments)["fsdp"])
        is True
    )


def listed(cls: type, names: list[str], width: int = 100) -> str:
    return describe.listing([describe.Section(cls.__name__, describe.describe(cls, names))], width).plain


def test_fields_are_described():
    assert own_fields(StandIn) == ["loss", "eta"]
    shown = listed(StandIn, ["loss", "eta", "lr_scheduler_type", "output_dir"])
    assert "loss  str, default 'wind'\n    Loss that is fitted [see below].\n" in shown
    assert "eta  float | None, default null\n    Step size.\n" in shown and "SchedulerType |" in shown
    assert "model  str, required" in listed(Model, ["model"])
    with pytest.raises(ValueError, match=r"name must be one of .* got 'et'; did you mean 'eta'"):
        describe.describe(StandIn, ["et"])


@pytest.mark.parametrize("width", [60, 80, 200])
def test_descriptions_fit_a_terminal(width):
    shown = listed(
        transformers.TrainingArguments, list(settings_fields.known_fields(transformers.TrainingArguments)), width
    )
    longest = max(len(line) for line in shown.splitlines())
    assert longest <= min(width, describe.WIDEST + 20) and longest > 50


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(run, "classes_of", lambda method: (run.RunConfig, StandIn))


def test_a_run_is_made_of_file_overrides_and_command_line(written, stand_in, tmp_path):
    path = written("model: a\ntrain_dataset: demo\neta: 1\noutput_dir: out\nuse_cpu: true\npeft: {r: 4}\n")
    mine, trainer = run.load_settings(str(path), ["eta=3", "peft.r=8"], output_dir=tmp_path / "o", method="value")
    assert (mine.model, mine.peft, mine.method, mine.dtype) == ("a", {"r": 8}, "value", "auto")
    assert (trainer.eta, trainer.output_dir) == (3.0, str(tmp_path / "o"))
    with pytest.raises(ValueError, match=r"x.yaml --override dtype=int8: dtype must be one of .*, got 'int8'"):
        run.load_settings(str(path), ["dtype=int8"])
    with pytest.raises(ValueError, match="max_train_prompts must be at least 1, got 0"):
        run.load_settings(str(path), ["max_train_prompts=0"])
    with pytest.raises(ValueError, match="model must not be empty"):
        run.load_settings(str(path), ["model=''"])


def test_the_command_names_mistakes(written, stand_in, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["train"]) == 2
    assert "--config must name a file or a recipe (demo, " in capsys.readouterr().err
    assert main(["train", "--config", "lora"]) == 2
    assert "no file 'lora' and no recipe of this name; recipes: demo, " in capsys.readouterr().err
    path = written("model: a\ntrain_dataset: demo\nlerning_rate: 1\n")
    assert main(["train", "--config", str(path)]) == 2
    assert "x.yaml: unknown key 'lerning_rate'; did you mean 'learning_rate'?" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "deepspeed" else name)
    assert main(["train", "--config", "zeropp"]) == 2
    assert "not installed: deepspeed; run: python -m pip install deepspeed" in capsys.readouterr().err
    assert main(["train", "--config", str(path), "--override", "lerning_rate=1", "eta=x"]) == 2
    assert "--override lerning_rate=1 --override eta=x: unknown key" in capsys.readouterr().err


def test_the_command_lists_fields(stand_in, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["train", "--fields"]) == 0
    own = capsys.readouterr().out
    assert max(map(len, own.splitlines())) <= 80
    assert main(["train", "--fields", "--all"]) == 0
    everything = capsys.readouterr().out
    words = set(own.split())
    assert {"model", "train_dataset", "peft", "loss", "eta"} <= words and "learning_rate" not in words
    names = {field.name for field in dataclasses.fields(StandIn)}
    assert len(names) > 100 and names <= set(everything.split())


def test_the_command_lists_fields_as_json(stand_in, capsys):
    assert main(["train", "--fields", "--json"]) == 0
    found = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert found["model"]["required"] and found["model"]["section"] == "RunConfig"
    assert found["eta"] == {
        "section": "StandIn",
        "name": "eta",
        "type": "float | None",
        "required": False,
        "default": None,
        "help": "Step size.",
    }
    assert found["eval_strategy"]["default"] == "no" and "learning_rate" not in found
    assert main(["train", "--fields", "--all", "--json"]) == 0
    everything = {entry["name"] for entry in json.loads(capsys.readouterr().out)}
    assert {field.name for field in dataclasses.fields(StandIn)} <= everything


@pytest.mark.parametrize("method", run.METHODS)
def test_a_new_settings_file_is_read_as_it_is_and_with_every_default(method, written, capsys, tmp_path):
    assert main(["train", "--init", "--method", method]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    plain = run.load_settings(str(written(text + "use_cpu: true\n")), output_dir=tmp_path)
    every = re.sub(r"^#(\w+:)", r"\1", text, flags=re.MULTILINE)
    assert len(read(written, every)) > len(read(written, text)) + 4
    whole = run.load_settings(str(written(every + "use_cpu: true\n")), output_dir=tmp_path)
    for ours, theirs in zip(plain, whole, strict=True):
        for each in dataclasses.fields(ours):
            assert getattr(ours, each.name) == getattr(theirs, each.name), each.name


def test_recipes_are_found_by_name_and_files_win(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # the folder that `windkern demo` writes into
    assert recipes.find("demo") == recipes.FOLDER / "demo.yaml" == recipes.find("demo.yaml")
    (tmp_path / "demo.yaml").write_text("")
    assert recipes.find("demo.yaml") == Path("demo.yaml")
    with pytest.raises(FileNotFoundError):
        recipes.find("../recipes/demo/../../../etc/passwd")
