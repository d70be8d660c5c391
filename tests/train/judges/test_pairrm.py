"""PairRM on a tiny random DeBERTa, against its published formulae computed by hand."""

from __future__ import annotations

import doctest
import functools
import itertools
import json

import pytest
import torch

transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_pairrm import NAMES, make_pairrm, make_tokenizer  # noqa: E402

from windkern.train.data.prompts import ChatPrompt  # noqa: E402
from windkern.train.judges import pairrm  # noqa: E402
from windkern.train.judges.models import PairJudge  # noqa: E402
from windkern.train.judges.named import load_judge  # noqa: E402
from windkern.train.judges.pairrm import MARKERS, PairRM, PairRMModel, load_pairrm  # noqa: E402

PROMPTS = ["the bus was", "rain and"]
RESPONSES = [["very good", "bad", "a day and so"], ["good good", "not bad", "rain"]]


@pytest.fixture
def folder(tmp_path):
    make_pairrm().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    return tmp_path


@functools.cache
def by_formula(tasks: int) -> dict[tuple[int, int, int], float]:
    """Return the logits of all ordered pairs of RESPONSES, by prompt and positions."""
    model = make_pairrm(n_tasks=tasks)
    return {
        (b, i, j): by_hand(model, PROMPTS[b], group[i], group[j])
        for b, group in enumerate(RESPONSES)
        for i, j in itertools.permutations(range(len(group)), 2)
    }


@torch.no_grad()
def by_hand(model: PairRMModel, source: str, first: str, second: str) -> float:
    """Return the logit of one unpadded pair: each part with its own [CLS] and [SEP], and the head written out."""
    tokenizer = make_tokenizer()
    weights = model.state_dict()
    ids = [token for marker, text in zip(MARKERS, (source, first, second), strict=True)
           for token in [1, tokenizer.convert_tokens_to_ids(marker), *_words(text), 2]]  # fmt: skip
    hidden = model.pretrained_model(torch.tensor([ids])).last_hidden_state[0]
    at = [hidden[ids.index(tokenizer.convert_tokens_to_ids(marker))] for marker in MARKERS]
    scores = []
    for candidate in at[1:]:
        both = torch.cat([at[0], candidate])
        inner = torch.tanh(weights["head_layer.1.weight"] @ both + weights["head_layer.1.bias"])
        scores.append(weights["head_layer.4.weight"] @ inner + weights["head_layer.4.bias"])
    return float((scores[0] - scores[1]).mean())


def _words(text: str) -> list[int]:
    return [NAMES.index(word) if word in NAMES else 3 for word in text.split()]


def test_the_examples_run():
    assert not doctest.testmod(pairrm).failed


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_its_logits_are_those_of_the_formulae_whatever_the_batch(tasks, batch_size):
    model = make_pairrm(n_tasks=tasks)
    read = PairRM(model, make_tokenizer(), batch_size=batch_size)
    judge = PairJudge(read, name="PairRM")
    prefs = judge.judge(PROMPTS, RESPONSES).prefs
    spread, logits = [], by_formula(tasks)
    for (b, i, j), forth in logits.items():
        chances = torch.tensor([forth, -logits[b, j, i]]).sigmoid()
        spread.append(float((chances[0] - chances[1]).abs()))
        assert prefs[b, i, j].item() == pytest.approx(chances.mean().item(), abs=1e-5)
    assert max(spread) > 0.01 and prefs.std() > 0.01


def test_it_is_named_on_a_command_line(folder):
    judge = load_judge(f"pairrm:{folder}", settings={"batch_size": 4})
    want = PairJudge(PairRM(make_pairrm(), make_tokenizer()), name="x").judge(PROMPTS, RESPONSES).prefs
    torch.testing.assert_close(judge.judge(PROMPTS, RESPONSES).prefs, want, rtol=1e-4, atol=1e-5)
    assert judge.name == str(folder)
    half = load_judge(f"pairrm:{folder}", settings={"dtype": "bfloat16"})
    assert half.prefer.classifier.model.dtype == torch.bfloat16
    torch.testing.assert_close(half.judge(PROMPTS, RESPONSES).prefs, want, rtol=0, atol=0.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("head_layer.4.weight"), r"head_layer\.4\.weight would be random"),
        (lambda weights: weights.update(other=torch.ones(1)), "other of the checkpoint would not be used"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused(folder, change, message):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load_pairrm(str(folder))


def test_it_cannot_pass_for_a_pair_model(folder):
    """Loaded as another kind of classifier, it would find none of its weights, and its win rates would be noise."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="would be random"):
        load_judge(f"pair-model:{folder}")


def test_conversations_are_written_as_llm_blender_writes_them():
    model, tokenizer = make_pairrm(), make_tokenizer()
    turns = [("system", "so"), ("user", "the bus"), ("assistant", "was bad"), ("user", "a day")]
    chat = ChatPrompt([{"role": role, "content": text} for role, text in turns])
    source = (
        "Finish the following coversation in each i-th turn by filling in <Response i> with your response."
        "USER: so\n\nthe bus\nAssistant: <Response 1>\nUSER: a day\nAssistant: <Response 2>"
    )
    texts = [f"<Response 1>: was bad\n<Response 2>: {text}" for text in ("good", "rain")]
    found = PairRM(model, tokenizer)([chat], ["good"], ["rain"])[0]
    assert found == pytest.approx(float(torch.tensor(by_hand(model, source, *texts)).sigmoid()), abs=1e-6)
    odd = ChatPrompt([{"role": "user", "content": "a"}, {"role": "user", "content": "day"}])
    with pytest.raises(ValueError, match="turns alternate between user and assistant"):
        PairRM(model, tokenizer)([odd], ["good"], ["rain"])


def test_long_texts_are_cut_part_by_part(monkeypatch):
    monkeypatch.setattr(pairrm, "_LONGEST", 40)
    read = PairRM(make_pairrm(), make_tokenizer(), source_length=8)
    row = read.encode("day " * 30, "good " * 30, "rain")
    ids = row["input_ids"]
    starts = [k for k, token in enumerate(ids) if token == 1]
    assert starts == [0, 8, 8 + 16] and len(ids) == 8 + 16 + 4 and [k + 1 for k in starts] == row["places"]


def test_a_response_that_holds_a_marker_is_read_as_text():
    read = PairRM(make_pairrm(), make_tokenizer())
    row = read.encode("day", f"good {MARKERS[1]} bad", f"{MARKERS[0]} rain {MARKERS[2]}")
    assert len(row["places"]) == 3 and 0 <= read(["day"], [f"good {MARKERS[1]}"], ["rain"])[0] <= 1


def test_its_tokenizer_must_know_the_markers():
    tokenizer = make_tokenizer()
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer.from_str(
        json.dumps({**json.loads(tokenizer.backend_tokenizer.to_str()), "added_tokens": []})
    ))  # fmt: skip
    with pytest.raises(ValueError, match="must know"):
        PairRM(make_pairrm(), bare)
    with pytest.raises(ValueError, match="source_length must be"):
        PairRM(make_pairrm(), tokenizer, source_length=5000)
