"""The model card: valid metadata, how the model was made and is loaded, no secrets, no network."""

from __future__ import annotations

import doctest
import re
import socket
from enum import Enum
from pathlib import Path

import pytest

hub = pytest.importorskip("huggingface_hub")
yaml = pytest.importorskip("yaml")

from windkern.losses import LOSSES  # noqa: E402
from windkern.train.evaluation.evaluate import Estimate, Evaluation  # noqa: E402
from windkern.train.report import card as card_module  # noqa: E402
from windkern.train.report.card import PRIVATE, card_text, installed_versions, write_card  # noqa: E402

HISTORY = [
    {"iteration": 1, "win_rate": 0.61234, "kl": 1.5},
    {"iteration": 2, "win_rate": 0.7, "kl": 2.25, "reward": None},
]
PROMPTS = "hub:HuggingFaceH4/ultrafeedback_binarized:train_prefs:prompt"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a model card must not use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def card(**changes) -> str:
    content = {
        "config": {
            "loss": "wind",
            "loss_kwargs": {"objective": "square", "eta": 5.0},
            "temperature": 0.7,
            "num_iterations": 3,
        },
        "base_model": "Qwen/Qwen3-1.7B",
        "judge": "vader",
        "history": HISTORY,
        "name": "me/aligned",
    }
    return card_text(**content | changes)


def test_docstring_examples_run():
    assert not doctest.testmod(card_module).failed


def sections(text: str) -> dict[str, str]:
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows(table: str) -> list[list[str]]:
    """Return the cells of a Markdown table, split as Markdown splits them."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_metadata_is_what_the_hub_reads():
    data = hub.ModelCard(card(prompts=PROMPTS, library="peft")).data
    assert data.base_model == "Qwen/Qwen3-1.7B" and data.library_name == "peft"
    assert data.tags == ["windkern", "wind"] and data.datasets == ["HuggingFaceH4/ultrafeedback_binarized"]
    assert hub.ModelCard(card(config={"loss": "spin"})).data.tags == ["windkern", "wind", "spin"]


def test_the_packaged_model_is_named_by_its_origin():
    assert hub.ModelCard(card(base_model="smollm2-135m-instruct")).data.base_model == (
        "HuggingFaceTB/SmolLM2-135M-Instruct"
    )


def test_everything_is_said():
    text = card(defaults={"num_iterations": 3, "temperature": 1.0}, versions={"torch": "2.13.0"}, prompts=PROMPTS)
    parts = sections(text)
    assert list(parts) == ["What was done", "Loss", "Settings", "Results", "Loading", "Versions", "Citation"]
    done = parts["What was done"]
    assert all(each in done for each in ("`Qwen/Qwen3-1.7B`", "`wind`", "`square`", "`vader`", PROMPTS))
    assert LOSSES["wind"].formula in parts["Loss"] and "arXiv 2410.20727" in parts["Loss"]
    assert rows(parts["Settings"])[2:] == [
        ["`loss`", "`wind`", ""],
        ["`loss_kwargs`", "`{'objective': 'square', 'eta': 5.0}`", ""],
        ["`temperature`", "`0.7`", "`1.0`"],
    ]
    assert rows(parts["Results"]) == [
        ["iteration", r"win\_rate", "kl", "reward"],
        ["---"] * 4,
        ["1", "0.6123", "1.5", ""],
        ["2", "0.7", "2.25", ""],
    ]
    assert rows(parts["Versions"])[2:] == [["torch", "2.13.0"]]
    assert "2410.20727" in parts["Citation"] and "@software{windkern" in parts["Citation"]


def test_the_model_and_the_final_win_rate_are_told():
    outline = {"dtype": "bfloat16", "trained_parameters": 12, "peft.default.r": 8, "peft.default.target_modules": ["q"]}
    final = Evaluation(Estimate(0.78, 0.03), None, None, win_rates=(0.7, 0.8, 0.84))
    parts = sections(card(outline=outline, final=final))
    assert rows(parts["Model"])[2:] == [[f"`{name}`", f"`{value}`"] for name, value in outline.items()]
    assert "win rate against the reference is **0.780**, 95 % interval [0.721, 0.839], on 3" in parts["Results"]
    alone = Evaluation(Estimate(0.78, float("nan")), None, None, win_rates=(0.78,))
    assert "**0.780**, no interval from a single prompt" in sections(card(final=alone))["Results"]


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_has_its_formula(loss):
    assert LOSSES[loss].formula in sections(card(config={"loss": loss}))["Loss"]


@pytest.mark.parametrize("loss", [name for name, loss in LOSSES.items() if loss.variants])
def test_every_variant_is_named(loss):
    argument, names = LOSSES[loss].variants
    done = sections(card(config={"loss": loss, "loss_kwargs": {argument: names[-1]}}))["What was done"]
    assert f"`{loss}`, {argument} `{names[-1]}`" in done


@pytest.mark.parametrize("library", ["transformers", "peft"])
def test_loading_is_code_that_compiles(library):
    name = 'it\'s "odd" ``` \\ \n name'
    (code,) = re.findall(r"```python\n(.*?)\n```", sections(card(name=name, library=library))["Loading"], flags=re.S)
    names = []
    scope = {
        each: type(each, (), {"from_pretrained": names.append})
        for each in ("AutoModelForCausalLM", "AutoPeftModelForCausalLM", "AutoTokenizer")
    }
    exec(compile(re.sub(r"^from .*$", "", code, flags=re.M), "card", "exec"), scope)
    assert names == [name, name]


def test_odd_texts_break_neither_head_nor_tables():
    odd = "a|b `c` ``d`` <script> [x](y) *z*\n---\n# title: {e}"
    text = card(
        config={"loss": "wind", odd: odd, "system": "---\nlicense: mit\n---"},
        base_model=odd,
        judge=odd,
        history=[{odd: odd, "n": 1}],
        prompts=odd,
        versions={odd: odd},
        name=odd,
    )
    parsed = hub.ModelCard(text)
    assert set(parsed.data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    parts = sections(text)
    assert list(parts) == ["What was done", "Loss", "Settings", "Results", "Loading", "Versions", "Citation"]
    for name, width in {"Settings": 3, "Results": 2, "Versions": 2}.items():
        assert {len(row) for row in rows(parts[name])} == {width}
    assert "<script" not in parts["Results"] and "\n# title" not in text.split("## What", 1)[1]


def test_nothing_private_is_told(tmp_path):
    class Kind(Enum):
        LINEAR = "linear"

    secrets = {
        "hub_token": "hf_secret1",
        "read_token": "secret1",
        "api_key": "secret2",
        "output_dir": "/data/secret3",
        "logging_dir": "/data/secret3",
        "hub_model_id": "secret4/x",
        "run_name": "secret5",
        "sampler": "http:https://secret6:secret7@host:8000/v1?key=secret8",
        "judge": f"recorded:{Path.home()}/judged.jsonl",
        "lr_scheduler_type": Kind.LINEAR,
    }
    folder = tmp_path / "secret9" / "base"
    folder.mkdir(parents=True)
    text = card(config=secrets, base_model=str(folder), prompts=str(tmp_path / "secret9" / "prompts.jsonl"))
    assert "secret" not in text and str(Path.home()) not in text
    assert "http:https://host:8000/v1" in text and "~/judged.jsonl" in text and "`linear`" in text
    assert "`base` (a local folder)" in text and "`prompts.jsonl`" in text
    assert "base_model" not in hub.ModelCard(text).data.to_dict()
    kept = (
        "eta",
        "learning_rate",
        "max_completion_length",
        "system",
        "judge",
        "temperature",
        "num_train_epochs",
        "bf16",
    )
    assert not any(PRIVATE.search(name) for name in kept)


def test_an_empty_run_says_so():
    parts = sections(card(config={}, history=[], judge=None))
    assert "All settings have their defaults." in parts["Settings"] and "Nothing was measured." in parts["Results"]
    assert "judged" not in parts["What was done"]


def test_the_card_is_written_whole(tmp_path):
    folder = tmp_path / "aligned"
    folder.mkdir()
    path = write_card(folder, config={"loss": "wind"}, base_model="gpt2", judge="vader", history=HISTORY)
    assert path == folder / "README.md" and [each.name for each in folder.iterdir()] == ["README.md"]
    assert "# aligned\n" in path.read_text() and "from_pretrained('aligned')" in path.read_text()
    assert installed_versions()["windkern"] in path.read_text()
    with pytest.raises(ValueError, match=r"loss must be one of .* got 'wimd'; did you mean 'wind'"):
        write_card(folder, config={"loss": "wimd"}, base_model="gpt2", judge=None, history=[])
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match=r"cannot write .*README\.md: .*the previous file is intact"):
        write_card(folder, config={"loss": "wind"}, base_model="gpt2", judge="vader", history=HISTORY)
    assert [each.name for each in folder.iterdir()] == ["README.md"]
    with pytest.raises(ValueError, match="library must be one of 'transformers', 'peft', got 'trl'"):
        card(library="trl")
