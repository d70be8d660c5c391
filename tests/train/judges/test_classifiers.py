"""Classifiers as judges: complete or refused, the same reward in any batch, and texts cut to what they can read."""

from __future__ import annotations

import json
import logging

import pytest
import torch

transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_model import WORDS, make_classifier, make_model, make_tokenizer  # noqa: E402

from windkern.hf.positions import positions_of  # noqa: E402
from windkern.train.judges.classifiers import Classifier, load_classifier  # noqa: E402
from windkern.train.judges.judge import JudgeError, RewardJudge, ask  # noqa: E402
from windkern.train.judges.models import ModelPreference, ModelReward  # noqa: E402
from windkern.train.judges.named import load_judge  # noqa: E402

VOCABULARY = 6 + len(WORDS)
PROMPTS = ["rain was", "the bus", "a", "so very"]
RESPONSES = ["good day", "bad and very bad rain so", "good", "the the"]


def classifier(kind: str, **changes):
    """Make a tiny classifier with `positions` positions; each kind has its own names for its sizes."""
    torch.manual_seed(0)
    positions = changes.pop("positions", 32)
    common = {"vocab_size": VOCABULARY, "num_labels": 1, "pad_token_id": 0, "initializer_range": 0.5}
    body = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {
        "GPT2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": positions},
        "XLNet": {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32},
    }.get(kind, body | {"max_position_embeddings": positions})
    config = getattr(transformers, f"{kind}Config")(
        **common | sizes | {"bos_token_id": None, "eos_token_id": 1} | changes
    )
    return getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()


def saved(folder, model):
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def changed(folder, change):
    """Return the same checkpoint with other weights in its file."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    return str(folder)


# Whole


@pytest.mark.parametrize("kind", ["reward-model", "pair-model"])
def test_a_judge_without_its_head_is_refused(tmp_path, kind):
    saved(tmp_path, make_model())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"id2label": {"0": "LABEL_0"}, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is not a judge: as LlamaForSequenceClassification, score\.weight would be"):
        load_judge(f"{kind}:{tmp_path}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("score.weight"), r"score\.weight would be random"),
        (lambda weights: weights.pop("model.norm.weight"), r"model\.norm\.weight would be random"),
        (lambda weights: weights.update(v_head=torch.ones(1)), "v_head of the checkpoint would not be used"),
        (
            lambda weights: weights.update({f"extra.{k}": torch.ones(1) for k in range(5)}),
            r"extra\.0, extra\.1, extra\.2 and 2 more of the checkpoint",
        ),
    ],
)
def test_weights_that_are_missing_or_left_over_are_named(tmp_path, change, message):
    saved(tmp_path, make_classifier())
    changed(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load_classifier(str(tmp_path))


def test_a_whole_judge_is_read_as_it_was_written(tmp_path):
    model = make_classifier()
    read, _ = load_classifier(saved(tmp_path, model))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), read.state_dict().values(), strict=True))
    assert not read.training


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers for it
def test_an_adapter_must_bring_the_head(tmp_path):
    peft = pytest.importorskip("peft")
    base = make_model()
    base.config.num_labels = 1
    saved(tmp_path / "base", base)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"]))
    folder = tmp_path / "adapter"
    saved(folder, adapted)
    read, tokenizer = load_classifier(str(folder))
    ours, theirs = (ModelReward(each, tokenizer)(PROMPTS, RESPONSES) for each in (read, adapted))
    assert ours == pytest.approx(theirs, rel=1e-5)
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name: each for name, each in weights.items() if "score" not in name}, folder / "adapter_model.safetensors"
    )
    with pytest.raises(ValueError, match=r"score.* would be random"):
        load_classifier(str(folder))


# Any batch


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Bert", "Roberta", "XLNet"])
@pytest.mark.parametrize("padding", [0, VOCABULARY - 1])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_reward_is_the_same_in_any_batch(kind, padding, side):
    """RoBERTa counts positions by the padding id; XLNet pools the last position, so it reads texts one by one."""
    tokenizer, model = make_tokenizer(), classifier(kind, pad_token_id=padding)
    tokenizer.padding_side = side
    alone, together = (ModelReward(model, tokenizer, batch_size=size)(PROMPTS, RESPONSES) for size in (1, 4))
    assert together == pytest.approx(alone, rel=1e-4, abs=1e-4)
    assert len({round(each, 3) for each in alone}) == 4


def test_a_model_that_padding_disturbs_is_read_one_by_one_and_said(caplog):
    judge = ModelReward(classifier("XLNet"), make_tokenizer(), batch_size=4)
    with caplog.at_level(logging.WARNING):
        judge(PROMPTS, RESPONSES)
        judge(PROMPTS, RESPONSES)
    assert judge.classifier.batch_size == 1 and caplog.text.count("so texts are read one by one") == 1
    right = ModelReward(classifier("Llama"), make_tokenizer(), batch_size=4)
    right(PROMPTS, RESPONSES)
    assert right.classifier.batch_size == 4


@pytest.mark.parametrize("padding", [None, -1, VOCABULARY])
def test_a_padding_id_that_is_no_token_pads_nothing(padding):
    model = classifier("Llama")
    model.config.pad_token_id = padding
    judge = ModelReward(model, make_tokenizer(), batch_size=4)
    assert judge.classifier.batch_size == 1 and len(judge(PROMPTS, RESPONSES)) == 4


def test_a_tokenizer_without_padding_does_not_matter():
    bare, model = make_tokenizer(), classifier("Llama")
    want = ModelReward(model, make_tokenizer(), batch_size=1)(PROMPTS, RESPONSES)
    bare.pad_token = None
    assert ModelReward(model, bare, batch_size=4)(PROMPTS, RESPONSES) == pytest.approx(want, rel=1e-4, abs=1e-4)


def test_dropout_is_off_while_a_judge_reads():
    model = classifier("GPT2", resid_pdrop=0.5, embd_pdrop=0.5).train()
    judge = ModelReward(model, make_tokenizer())
    assert judge(PROMPTS, RESPONSES) == judge(PROMPTS, RESPONSES) and model.training


# Length


@pytest.mark.parametrize(("kind", "most"), [("Llama", 16), ("GPT2", 16), ("Bert", 16), ("Roberta", 15)])
def test_a_text_beyond_the_positions_is_refused(kind, most):
    model = classifier(kind, positions=16)
    assert positions_of(model) == most
    judge = RewardJudge(ModelReward(model, make_tokenizer(chat=False)), strength=1.0, name="small")
    with pytest.raises(JudgeError, match=rf"'small' failed: .*text of 40 tokens .* the {most} positions .*max_length"):
        ask(judge, ["rain"], [["good " * 39, "bad"]])
    fits = "good " * (most - 1)
    assert ask(judge, ["rain"], [[fits, "bad"]]).rewards.isfinite().all()


def test_a_stretched_rotary_embedding_has_more_positions():
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    assert positions_of(classifier("Llama", positions=16, rope_parameters=rope)) == 64
    assert positions_of(make_model()) == 64 and positions_of(torch.nn.Linear(1, 1)) is None


def test_what_a_setting_cuts_is_counted(caplog):
    judge = ModelReward(classifier("Bert", positions=16), make_tokenizer(chat=False), max_length=4)
    with caplog.at_level(logging.WARNING):
        long = judge(["rain", "day"], ["good " * 30, "bad"])
    assert long[0] == pytest.approx(judge(["rain"], ["good good good"])[0], rel=1e-5)
    assert "1 of the judge's 2 texts so far were longer than max_length = 4 tokens and were cut" in caplog.text
    with caplog.at_level(logging.WARNING):
        for _ in range(7):
            judge(["rain"], ["good " * 30])
    assert judge.classifier.cut == 8 and len(caplog.records) == 4  # at 1, 2, 4 and 8


def test_a_longer_limit_than_the_positions_is_refused_where_there_are_none_beyond():
    for kind in ("GPT2", "Bert"):
        with pytest.raises(ValueError, match="max_length must be at most the model's 16 positions, got 17"):
            Classifier(classifier(kind, positions=16), make_tokenizer(), max_length=17)
    stretched = ModelReward(classifier("Llama", positions=16), make_tokenizer(), max_length=64)
    assert len(stretched(["rain"], ["good " * 30])) == 1


# Settings


def test_a_settings_file_can_say_what_an_error_asks_for(tmp_path):
    folder = saved(tmp_path, make_classifier(labels=2))
    with pytest.raises(ValueError, match=r"label must say .* 2 labels .*judge_settings: \{label: NUMBER\}"):
        load_judge(f"reward-model:{folder}")
    rewards = [
        load_judge(f"reward-model:{folder}", settings={"label": label}).judge(["rain"], [["good", "bad"]]).rewards
        for label in (0, 1)
    ]
    assert not torch.equal(*rewards)
    pairs = load_judge(f"pair-model:{folder}", settings={"template": "{prompt} {first} {second}", "batch_size": 2})
    assert isinstance(pairs.prefer, ModelPreference) and pairs.prefer.template == "{prompt} {first} {second}"
    with pytest.raises(ValueError, match=r"key of judge_settings must be one of 'label', .* did you mean 'label'"):
        load_judge(f"reward-model:{folder}", settings={"lable": 1})
    for other in ("vader", "tiny_model:goodness"):
        with pytest.raises(ValueError, match=r"judge_settings are for .* pairrm:NAME"):
            load_judge(other, settings={"label": 1})


def test_the_settings_of_a_run_reach_its_judge(tmp_path):
    from trainer_cases import make_config

    from windkern.train.judges import make_judge

    name = f"reward-model:{saved(tmp_path / 'judge', make_classifier(labels=2))}"
    config = make_config(tmp_path / "run", judge=name, judge_settings={"label": 1, "max_length": 8}, judge_strength=2.0)
    judge = make_judge(config)
    assert judge.reward.label == 1 and judge.reward.classifier.max_length == 8 and judge.strength == 2.0
