"""What a WindTrainer refuses by name, and what must not depend on chance when a run starts again."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import tiny_model
from trainer_cases import PROMPTS, lora, make_config, make_trainer, weights_of

from windkern.train.checkpoints.identity import ResumeError
from windkern.train.data.datasets import PromptSets, prompt_sets
from windkern.train.data.loading import Demonstration
from windkern.train.judges.judge import Verdict


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_an_adapter_starts_as_the_seed_says(tmp_path):
    """Whatever torch's generator did before, since a run killed in its first iteration starts again."""
    pytest.importorskip("peft")
    found = []
    for other in (1, 2):
        model = tiny_model.make_model()
        given = {"peft_config": lora(), "ref_model": None, "processing_class": tiny_model.make_tokenizer()}
        torch.manual_seed(other)
        found.append(weights_of(make_trainer(tmp_path, model=model, reference="adapter", given=given)))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_rows_are_prompts_in_a_known_form(tmp_path):
    messages = [{"role": "user", "content": "the"}]
    assert (
        make_trainer(tmp_path, prompts=["rain was", messages], per_device_train_batch_size=1).outer.prompts[1] == "the"
    )
    for row, kind, message in (
        (3, TypeError, r"train_dataset\[1\] must be a string, a list of chat messages or a row with a prompt, got int"),
        ({"text": "the"}, ValueError, r"train_dataset\[1\] must have a \"prompt\", got 'text'"),
        ([{"role": "user"}], ValueError, r"train_dataset\[1\]: messages\[0\] must be an object"),
    ):
        with pytest.raises(kind, match=message):
            make_trainer(tmp_path, prompts=["rain was", row])


def test_a_dataset_of_trl_serves(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in PROMPTS]
    trainer = make_trainer(tmp_path, prompts=datasets.Dataset.from_list(rows))
    assert trainer.outer.prompts == list(PROMPTS)
    pairs = [{"prompt": text, "completion": [{"role": "assistant", "content": "good day"}]} for text in PROMPTS]
    trainer = make_trainer(tmp_path, loss="spin", num_generations=1, prompts=datasets.Dataset.from_list(pairs))
    assert {each.answer for each in trainer.demonstrations} == {"good day"}


def test_a_callable_is_a_judge(tmp_path):
    trainer = make_trainer(tmp_path, given={"judge": tiny_model.goodness}, judge_strength=3.0)
    assert trainer.judge.strength == 3.0 and trainer.judge.judge(["the"], [["good", "bad"]]).rewards[0, 0] > 0
    with pytest.raises(TypeError, match=r"judge must be a judge .* or a callable that returns rewards, got int"):
        make_trainer(tmp_path, given={"judge": 3})


def test_a_run_goes_on_with_its_model_only(tmp_path):
    given = {"max_completion_length": 4, "num_iterations": 1, "save_strategy": "no"}
    make_trainer(tmp_path, **given).train()
    other = tiny_model.make_model()
    other.config._name_or_path = "somewhere/other/"
    with pytest.raises(ResumeError, match=r"model '' there, 'other' here"):
        make_trainer(tmp_path, model=other, **given).train(resume_from_checkpoint=True)
    frozen = tiny_model.make_model()
    frozen.model.norm.requires_grad_(False)
    with pytest.raises(ResumeError, match=r"frozen_parameters 0 there, 16 here"):
        make_trainer(tmp_path, model=frozen, **given).train(resume_from_checkpoint=True)


def test_a_wrong_verdict_is_not_kept(tmp_path):
    class Lopsided:
        name = "lopsided"

        def judge(self, prompts, responses):
            return Verdict(torch.ones(len(prompts), len(responses[0]), len(responses[0])), None)

    trainer = make_trainer(tmp_path, given={"judge": Lopsided()}, num_iterations=1)
    with pytest.raises(ValueError, match="judge 'lopsided': prefs"):
        trainer.train()
    folder = tmp_path / "completions" / "iteration-0001"
    assert (folder / "block-0000.json").is_file() and not (folder / "verdict-0000.json").exists()


def test_a_judge_that_fails_is_named(tmp_path):
    def broken(prompts, responses):
        return {}["score"]

    trainer = make_trainer(tmp_path, reward=broken)
    with pytest.raises(ValueError, match="judge 'broken' failed: KeyError: 'score'"):
        trainer.train()


def test_a_name_is_no_model(tmp_path):
    with pytest.raises(TypeError, match=r"model must be a transformers causal LM .* got str"):
        make_trainer(tmp_path, model="gpt2")


@pytest.mark.parametrize("given", [None, "gpt2", object()], ids=lambda given: type(given).__name__)
def test_what_is_no_tokenizer_is_named(tmp_path, given):
    with pytest.raises(TypeError, match=f"processing_class must be a tokenizer .* got {type(given).__name__}"):
        make_trainer(tmp_path, given={"processing_class": given})


def test_a_model_in_float64_is_refused_before_it_samples(tmp_path):
    with pytest.raises(ValueError, match=r"model must be float32, .* but model\.embed_tokens\.weight is float64"):
        make_trainer(tmp_path, model=tiny_model.make_model().double())


@pytest.mark.parametrize("name", ["loss_kwargs", "sampler_settings", "judge_settings", "chat_template_kwargs"])
def test_arguments_by_name_are_a_dict(tmp_path, name):
    with pytest.raises(TypeError, match=f"{name} must be a dict of arguments by name, or None, got list"):
        make_config(tmp_path, **{name: [1]})


def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub():
    from windkern.train.models import load_model

    with pytest.raises(FileNotFoundError, match=r"model folder \./mine does not exist"):
        load_model("./mine")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("rain", 'train_dataset must hold rows, got str "rain"; put a single prompt in a list'),
        ({"train": ["rain"], "test": ["bus"]}, "got a dict with 'train', 'test'; pass one of its splits"),
    ],
)
def test_a_data_set_that_is_no_list_of_rows_is_named(rows, message):
    """A string would give a prompt per letter, and a dictionary of splits a prompt per name."""
    with pytest.raises(TypeError, match=message):
        prompt_sets(rows, None, demonstrations=False)
    with pytest.raises(TypeError, match=message.replace("train_", "eval_")):
        prompt_sets(["the"], rows, demonstrations=False)


@pytest.mark.parametrize("row", ["", " \n", {"prompt": "\t"}, Demonstration("", "good")], ids=repr)
def test_a_blank_prompt_is_refused_as_in_a_file(row):
    """Conversations refuse it too; a long one that long_prompts='cut' should cut ended in an IndexError."""
    with pytest.raises(ValueError, match=r"train_dataset\[1\] must have a prompt that is not blank, got"):
        prompt_sets(["rain", row], None, demonstrations=False)
    with pytest.raises(ValueError, match=r"eval_dataset\[0\] must have a prompt that is not blank, got"):
        prompt_sets(["rain"], [row], demonstrations=False)


def test_rows_may_come_from_an_iterator():
    pairs = [Demonstration("rain", "good"), Demonstration("bus", "bad")]
    for wanted in (False, True):
        found = prompt_sets(iter(pairs), iter(["day"]), demonstrations=wanted)
        assert found == PromptSets(["rain", "bus"], pairs, ["day"])
