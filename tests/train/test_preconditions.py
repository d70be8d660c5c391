"""What is known to fail is reported before anything is sampled or judged."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import tiny_model
import transformers
from trainer_cases import HELDOUT, PROMPTS, lora, make_config, make_trainer

from windkern.hf.positions import positions_of
from windkern.train.data.loading import Demonstration, encode_prompts
from windkern.train.data.prompts import ChatPrompt
from windkern.train.models import MissingPackageError
from windkern.train.preconditions import Room, check_model

LONG = "the bus was " * 6 + "very bad"  # 20 words, and user, <eos> and assistant of the template
CALLS = []


def reward(prompts, responses):
    CALLS.append(len(responses))
    return [0.0] * len(responses)


@pytest.fixture(autouse=True)
def nothing_is_judged():
    CALLS.clear()
    yield
    assert not CALLS


def refused(tmp_path, message, error=ValueError, **changes):
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, reward=reward, **changes)


def gpt2(positions: int):
    config = transformers.GPT2Config(
        vocab_size=18, n_embd=16, n_layer=1, n_head=2, n_positions=positions, pad_token_id=0, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_something_must_be_trained(tmp_path):
    peft = pytest.importorskip("peft")
    refused(tmp_path, "but none requires a gradient$", model=tiny_model.make_model().requires_grad_(False))
    peft.get_peft_model(tiny_model.make_model(), lora()).save_pretrained(tmp_path / "adapter")
    frozen = peft.PeftModel.from_pretrained(tiny_model.make_model(), tmp_path / "adapter")
    refused(tmp_path, "but none requires a gradient; .*is_trainable=True", model=frozen)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_must_be_finite(tmp_path, value):
    model = tiny_model.make_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    refused(tmp_path, r"weights of the model are not finite: .*layers\.1\.mlp\.up_proj\.weight", model=model)


def test_a_bias_may_mask():
    model = torch.nn.Linear(2, 3)
    model.bias.data[1] = -torch.inf
    check_model(model)


@pytest.mark.parametrize("kind", ["rope", "learned"])
def test_prompts_and_responses_must_fit_the_positions(tmp_path, kind):
    model = tiny_model.make_model() if kind == "rope" else gpt2(64)
    changes = {"max_completion_length": 44, "given": {"ref_model": copy.deepcopy(model)}}
    message = (
        rf"train_dataset\[1\] has 23 tokens, but only 20 fit \(the 64 positions .* 44\): '{LONG[:50]}.*set long_prompts"
    )
    refused(tmp_path, message, model=model, prompts=[PROMPTS[0], LONG], **changes)
    refused(
        tmp_path, r"eval_dataset\[0\] has 23 tokens, but only 20 fit", model=model, heldout=[LONG, "rain"], **changes
    )
    refused(
        tmp_path,
        "max_completion_length must leave room for a prompt in the 64 positions .* got 64",
        max_completion_length=64,
    )
    make_trainer(tmp_path, model=model, prompts=[PROMPTS[0], LONG], **changes | {"max_completion_length": 41})


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({}, 64),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, 256),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, 128),
        (
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 4,
                    "rope_theta": 1e4,
                }
            },
            64,
        ),
    ],
)
def test_positions_are_those_of_a_scaled_embedding(changes, limit):
    config = transformers.LlamaConfig(
        hidden_size=8, num_attention_heads=2, num_hidden_layers=1, max_position_embeddings=64, **changes
    )
    model = torch.nn.Module()
    model.config = config
    assert positions_of(model) == limit


def test_models_without_positions_have_no_limit():
    model = torch.nn.Module()
    assert positions_of(model) is None
    model.config = transformers.MambaConfig(hidden_size=8, num_hidden_layers=1)
    assert positions_of(model) is None


def prompts_of(trainer) -> list[str]:
    return trainer.outer.prompts


def test_long_prompts_are_left_out_and_counted(tmp_path):
    given = {"max_prompt_length": 20, "long_prompts": "drop", "heldout": [*HELDOUT, LONG + " bus"]}
    with pytest.warns(UserWarning) as caught:
        trainer = make_trainer(tmp_path, prompts=[LONG, "rain was", LONG + " day"], **given)
    said = sorted(str(each.message) for each in caught)
    assert said[0].startswith("1 of 3 eval_dataset have more than 20 tokens (max_prompt_length): they are left out")
    assert said[1].startswith("2 of 3 train_dataset have more than 20 tokens (max_prompt_length): they are left out")
    assert prompts_of(trainer) == ["rain was"] and trainer.eval_dataset == list(HELDOUT)
    with pytest.raises(ValueError, match="all 1 train_dataset have more than 20 tokens"), pytest.warns(UserWarning):
        make_trainer(tmp_path, prompts=[LONG], **given)


def room(**changes) -> Room:
    config = make_config("unused", long_prompts="cut", **changes)
    return Room(config, tiny_model.make_model(), tiny_model.make_tokenizer())


def test_long_prompts_are_cut_at_their_beginning_and_keep_the_template(tmp_path):
    notes = []
    limited = room(max_prompt_length=8, system="so very")
    (place, cut), (_, whole) = limited.fit("train_dataset", [LONG, "rain"], notes.append)
    assert (place, cut, whole) == (0, "bad", "rain")  # system so very <eos> user bad <eos> assistant
    ids = encode_prompts(limited.tokenizer, [cut], system="so very").input_ids[0]
    assert limited.tokenizer.decode(ids) == "system so very <eos> user bad <eos> assistant"
    assert notes == [
        "1 of 2 train_dataset have more than 8 tokens (max_prompt_length): their beginnings are cut off",
    ]
    assert room(max_prompt_length=10).fit("p", [LONG], notes.append) == [(0, " ".join(LONG.split()[-7:]))]
    with pytest.raises(ValueError, match=r"p\[0\] cannot be cut to 3 tokens"):
        room(max_prompt_length=3).fit("p", [LONG], notes.append)


def test_conversations_lose_their_oldest_messages_first():
    turns = [("user", "the bus"), ("assistant", "was bad"), ("user", "and a day")]
    talk = [{"role": "system", "content": "so very"}, *({"role": role, "content": text} for role, text in turns)]
    ((_, cut),) = room(max_prompt_length=10).fit("p", [ChatPrompt(talk)], [].append)
    assert cut.messages == (talk[0], talk[3])
    ((_, cut),) = room(max_prompt_length=9).fit("p", [ChatPrompt(talk)], [].append)
    assert cut.messages == (talk[0], {"role": "user", "content": "a day"})


@pytest.mark.filterwarnings("ignore:1 of 2 train_dataset")
def test_demonstrations_keep_their_answers(tmp_path):
    shown = [Demonstration(LONG, "good"), Demonstration("rain", "bad")]
    given = {"loss": "spin", "num_generations": 1, "max_prompt_length": 10, "given": {"judge": None}, "prompts": shown}
    trainer = make_trainer(tmp_path, long_prompts="drop", **given)
    assert trainer.demonstrations == [("rain", "bad")] and prompts_of(trainer) == ["rain"]
    trainer = make_trainer(tmp_path, long_prompts="cut", **given)
    assert trainer.demonstrations == [(" ".join(LONG.split()[-7:]), "good"), ("rain", "bad")]


@pytest.mark.filterwarnings("ignore:1 of 2 train_dataset", "ignore:eval_dataset holds one prompt")
def test_prompts_that_cutting_makes_equal_to_held_out_ones_are_refused(tmp_path):
    end = " ".join(LONG.split()[-7:])
    given = {"prompts": [LONG, "rain"], "max_prompt_length": 10, "long_prompts": "cut"}
    refused(
        tmp_path, "long_prompts='cut' to 10 tokens .*: 1 held-out prompts are also training", heldout=[end], **given
    )
    make_trainer(tmp_path, heldout=[end.replace("bad", "good")], **given)


def test_recorded_prompts_cannot_be_cut(tmp_path):
    with pytest.raises(ValueError, match="long_prompts must be refuse or drop with recorded:FILE"):
        make_config(tmp_path, long_prompts="cut", sampler="recorded:r.jsonl")


def test_the_tokens_of_prompts_and_padding_must_be_the_models(tmp_path):
    more = tiny_model.make_tokenizer()
    more.add_tokens(["snow"])
    given = {"given": {"processing_class": more}}
    make_trainer(tmp_path, **given)  # a token that no prompt has
    refused(
        tmp_path, r"train_dataset\[1\] \('the snow'\) has the id 18 \('snow'\)", prompts=["the", "the snow"], **given
    )
    padded = tiny_model.make_tokenizer()
    padded.add_special_tokens({"pad_token": "<more>"})
    message = r"padding token has the id 18 \('<more>'\), .* embeddings for 18 tokens only; .*resize_token_embeddings"
    refused(tmp_path, message, given={"processing_class": padded})


def test_an_evaluation_needs_prompts_and_says_what_one_lacks(tmp_path):
    refused(tmp_path, "eval_dataset must be given for eval_strategy='epoch'", eval_strategy="epoch")
    with pytest.warns(UserWarning, match="eval_dataset holds one prompt: means over prompts get no standard error"):
        make_trainer(tmp_path, heldout=HELDOUT[:1])


@pytest.mark.filterwarnings("ignore:eval_dataset holds one prompt")
def test_of_one_prompt_no_standard_error_is_logged_or_written(tmp_path):
    changes = {"eval_strategy": "epoch", "num_iterations": 1, "max_completion_length": 3}
    trainer = make_trainer(tmp_path, heldout=HELDOUT[:1], **changes)
    trainer.train()
    (logged,) = (entry for entry in trainer.state.log_history if "eval_win_rate" in entry)
    assert "eval_win_rate_se" not in logged
    for path in (*tmp_path.glob("checkpoint-*/*.json"), *tmp_path.glob("completions/*/*.json")):
        assert "NaN" not in path.read_text(), path


def test_what_is_reported_to_must_be_installed(tmp_path, monkeypatch):
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: False)
    message = "report_to tensorboard needs a package that is not installed; run: python -m pip install tensorboard"
    refused(tmp_path, message, MissingPackageError, report_to="tensorboard")
    refused(tmp_path, "report_to must be none to report nowhere, got 'no'", report_to="no")
    refused(tmp_path, "report_to must be one of .*, got 'tensorbord'; did you mean", report_to="tensorbord")
