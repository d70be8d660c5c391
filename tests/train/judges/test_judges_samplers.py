"""Judges of models and of records, samplers of records and of a server, each against what it must equal."""

from __future__ import annotations

import doctest
import socket

import pytest
import torch

transformers = pytest.importorskip("transformers")

from completion_server import Server  # noqa: E402
from tiny_model import goodness, make_classifier, make_model, make_tokenizer  # noqa: E402

from windkern import hf  # noqa: E402
from windkern.train.data import records  # noqa: E402
from windkern.train.data.records import Recorded, load_records, save_records  # noqa: E402
from windkern.train.judges import models as judges_models  # noqa: E402
from windkern.train.judges import named as judges_named  # noqa: E402
from windkern.train.judges import recorded as judges_recorded  # noqa: E402
from windkern.train.judges.judge import RewardJudge  # noqa: E402
from windkern.train.judges.models import ModelPreference, ModelReward, PairJudge  # noqa: E402
from windkern.train.judges.named import load_judge  # noqa: E402
from windkern.train.judges.recorded import RecordedJudge  # noqa: E402
from windkern.train.samplers import openai as samplers_openai  # noqa: E402
from windkern.train.samplers import recorded as samplers_recorded  # noqa: E402
from windkern.train.samplers.openai import OpenAISampler, ServerError  # noqa: E402
from windkern.train.samplers.recorded import RecordedSampler, completions_of_texts  # noqa: E402
from windkern.train.samplers.sampler import TransformersSampler  # noqa: E402

PROMPTS = ["the bus was", "rain and"]
RESPONSES = [["very good", "bad", "a day and so"], ["good good", "not bad", "rain"]]


@pytest.mark.parametrize(
    "module", [judges_models, judges_named, judges_recorded, records, samplers_openai, samplers_recorded]
)
def test_the_examples_run(module):
    assert not doctest.testmod(module).failed


# Models that judge


@pytest.mark.parametrize("kind", ["Llama", "Bert"])
@pytest.mark.parametrize("chat", [True, False])
def test_a_reward_model_gives_its_logit_whatever_the_batch(kind, chat):
    tokenizer, model = make_tokenizer(chat=chat), make_classifier(kind)
    tokenizer.model_input_names = ["input_ids", "attention_mask"] + ["token_type_ids"] * (kind == "Bert")
    judge = RewardJudge(ModelReward(model, tokenizer, batch_size=4), strength=2.0)
    verdict = judge.judge(PROMPTS, RESPONSES)
    for prompt, group, rewards in zip(PROMPTS, RESPONSES, verdict.rewards, strict=True):
        for text, reward in zip(group, rewards, strict=True):
            if chat:
                turns = f"user {prompt} <eos> assistant {text} <eos> "
                encoded = tokenizer(turns, return_tensors="pt", add_special_tokens=False)
            else:
                encoded = tokenizer(prompt, text, return_tensors="pt")
            torch.testing.assert_close(reward, model(**encoded).logits[0, 0].detach(), rtol=1e-4, atol=1e-5)
    assert verdict.rewards.std() > 0.1 and verdict.prefs.shape == (2, 3, 3)


def test_models_that_cannot_tell_padding_are_asked_one_by_one():
    tokenizer = make_tokenizer(chat=False)
    without, padded = make_classifier(padding=None), make_classifier()
    without.load_state_dict(padded.state_dict())
    ours = ModelReward(without, tokenizer, batch_size=8)
    assert ours.classifier.batch_size == 1
    flat = [text for group in RESPONSES for text in group]
    prompts = [prompt for prompt in PROMPTS for _ in range(3)]
    assert ours(prompts, flat) == pytest.approx(ModelReward(padded, tokenizer)(prompts, flat), rel=1e-4, abs=1e-5)


def test_long_texts_are_cut_on_the_tokenizers_side():
    tokenizer, model = make_tokenizer(chat=False), make_classifier()
    tokenizer.truncation_side = "left"
    cut = ModelReward(model, tokenizer, max_length=3)
    assert cut.classifier.encode("a bus was very good")["input_ids"] == tokenizer("was very good")["input_ids"]


def test_labels_must_say_what_they_mean():
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match=r"which of the model's 2 labels .*LABEL_0"):
        ModelReward(make_classifier(labels=2), tokenizer)
    with pytest.raises(ValueError, match="below the model's 2 labels, got 2"):
        ModelReward(make_classifier(labels=2), tokenizer, label=2)
    with pytest.raises(ValueError, match="below the model's 1 labels, got 1"):
        ModelPreference(make_classifier(), tokenizer, label=1)
    with pytest.raises(ValueError, match="but lacks \\['second'\\]"):
        ModelPreference(make_classifier(), tokenizer, template="{prompt} {first}")
    second = ModelReward(make_classifier(labels=2), tokenizer, label=1)(["a"], ["b"])
    assert second != ModelReward(make_classifier(labels=2), tokenizer, label=0)(["a"], ["b"])


@pytest.mark.parametrize("labels", [1, 2])
def test_a_pairwise_model_is_asked_in_both_orders(labels):
    tokenizer, model = make_tokenizer(chat=False), make_classifier(labels=labels)
    template = "{prompt} user {first} assistant {second} system"
    judge = PairJudge(ModelPreference(model, tokenizer, template=template, batch_size=5), name="pairs")
    prefs = judge.judge(PROMPTS, RESPONSES).prefs
    assert torch.equal(prefs.diagonal(dim1=1, dim2=2), torch.full((2, 3), 0.5))
    torch.testing.assert_close(prefs + prefs.mT, torch.ones(2, 3, 3))

    def chance(prompt: str, first: str, second: str) -> float:
        text = f"{prompt} user {first} assistant {second} system"
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        return float(logits[0].sigmoid() if labels == 1 else logits.softmax(-1)[0])

    spread = []
    for b, (prompt, group) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        for i, first in enumerate(group):
            for j, second in enumerate(group):
                if i != j:
                    forth, back = chance(prompt, first, second), chance(prompt, second, first)
                    spread.append(abs(forth + back - 1))
                    assert prefs[b, i, j].item() == pytest.approx((forth + 1 - back) / 2, abs=1e-5)
    assert max(spread) > 0.01  # this model does prefer one of the two positions


def test_braces_in_responses_stay_as_they_are():
    parts = {"{prompt}": "{first}", "{first}": "{second}", "{second}": "x{prompt}"}
    assert judges_models.filled("{first}|{second}|{prompt}", parts) == "{second}|x{prompt}|{first}"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda n: [0.5] * (n - 1), "one number for each of 2 ordered pairs"),
        (lambda n: [1.2] * n, r"in \[0, 1\], got 1\.2"),
    ],
)
def test_a_wrong_preference_function_is_refused(answer, message):
    with pytest.raises(ValueError, match=message):
        PairJudge(lambda p, a, b: answer(len(a)), name="wrong").judge(["p"], [["x", "y"]])


JUDGES = (RewardJudge(goodness, strength=1.0), PairJudge(lambda p, a, b: [0.7] * len(a), name="pairs"))


@pytest.mark.parametrize("judge", JUDGES, ids=lambda judge: judge.name)
@pytest.mark.parametrize(
    ("prompts", "responses", "error", "message"),
    [
        (["p", "q", "r"], [["1"], ["2", "3"], ["4", "5", "6"]], ValueError, "equally many .* got 1 and 2 and 3"),
        (["p", "q"], [["1", "2"], ["3", "4", "5"]], ValueError, "equally many responses to each prompt, got 2 and 3"),
        (["p", "q"], [["1", "2"]], ValueError, "one group for each of 2 prompts, got 1"),
        (["p", "q"], ["xy", "zw"], TypeError, "list of responses for each prompt, got a string"),
    ],
)
def test_groups_that_cannot_be_compared_are_refused(judge, prompts, responses, error, message):
    with pytest.raises(error, match=f"responses must hold .*{message}"):
        judge.judge(prompts, responses)


@pytest.mark.parametrize("judge", JUDGES, ids=lambda judge: judge.name)
def test_a_response_alone_ties_with_itself_and_no_prompts_give_no_verdicts(judge):
    assert judge.judge(["p", "q"], [["x"], ["y"]]).prefs.tolist() == [[[0.5]], [[0.5]]]
    assert judge.judge([], []).prefs.shape == (0, 0, 0)


def test_rewards_of_a_model_read_with_gradients_are_constants():
    scale = torch.tensor(2.0, requires_grad=True)
    verdict = RewardJudge(lambda p, r: scale * torch.tensor([1.0, 3.0]), strength=1.0).judge(["p"], [["x", "y"]])
    assert verdict.rewards.tolist() == [[2.0, 6.0]] and not verdict.rewards.requires_grad
    assert not verdict.prefs.requires_grad


# Records


def test_records_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "r.jsonl"
    written = [
        Recorded("p", ("a", "b é"), rewards=(1.0, -2.5)),
        Recorded("q", ("c", "d"), prefs=((0.5, 0.9), (0.1, 0.5))),
        Recorded("r", ("e", "f"), truncated=(True, False)),
    ]
    save_records(path, written)
    assert load_records(path) == written


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "line 2: not JSON"),
        ('{"text": 1}', 'line 2: expected an object with a string under "prompt"'),
        ('{"prompt": "p", "responses": []}', '"responses" must be a list of at least one string'),
        ('{"prompt": "p", "responses": ["a"], "rewards": [1, 2]}', '"rewards" must be a list of 1 finite numbers'),
        ('{"prompt": "p", "responses": ["a"], "rewards": [NaN]}', '"rewards" must be a list of 1 finite numbers'),
        ('{"prompt": "p", "responses": ["a", "b"], "prefs": [[0.5, 0.9]]}', '"prefs" must be a list of 2 lists'),
        ('{"prompt": "p", "responses": ["a"], "truncated": [1]}', '"truncated" must be a list of 1 booleans'),
        ('{"prompt": "p", "responses": ["a", "b"], "prefs": [[0.5, 0.9], [0.3, 0.5]]}', r"prefs\[0\]\[1\] = 0\.9"),
    ],
)
def test_a_wrong_line_of_records_is_named(tmp_path, line, message):
    path = tmp_path / "r.jsonl"
    path.write_text('{"prompt": "p", "responses": ["a"]}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        load_records(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_records(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [Recorded("p", ("a", "b"), rewards=(1.0, 0.0)), Recorded("p", ("a",), rewards=(3.0,))],
            r'r\.jsonl: "a" to "p" was judged twice, with 1\.0 and 3\.0',
        ),
        ([Recorded("p", ("a", "a"), rewards=(0.0, 2e-3))], r'"a" to "p" was judged twice, with 0\.0 and 0\.002'),
        (
            [
                Recorded("p", ("a", "b"), prefs=((0.5, 0.9), (0.1, 0.5))),
                Recorded("p", ("b", "a"), prefs=((0.5, 0.8), (0.2, 0.5))),
            ],
            r'"b" and "a" to "p" were compared twice, with 0\.1 and 0\.8',
        ),
    ],
)
def test_two_verdicts_on_a_response_are_refused(tmp_path, rows, message):
    save_records(tmp_path / "r.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        RecordedJudge(tmp_path / "r.jsonl")


def test_a_verdict_may_be_repeated(tmp_path):
    """In the record of a run, a response that was drawn again has the same verdict up to rounding."""
    rows = [Recorded("p", ("a", "b"), rewards=(1.0, 0.0)), Recorded("p", ("a", "a"), rewards=(1.004, 1.0))]
    save_records(tmp_path / "s.jsonl", [*rows, Recorded("q", ("a",), rewards=(5.0,))])
    judge = RecordedJudge(tmp_path / "s.jsonl")
    assert judge.judge(["p", "q"], [["a"], ["a"]]).rewards.tolist() == [[1.0], [5.0]]
    tied = Recorded("p", ("a", "a", "b"), prefs=((0.5, 0.6, 0.9), (0.4, 0.5, 0.9), (0.1, 0.1, 0.5)))
    save_records(tmp_path / "c.jsonl", [tied, tied])
    assert RecordedJudge(tmp_path / "c.jsonl").judge(["p"], [["a", "b"]]).prefs[0, 0].tolist() == pytest.approx(
        [0.5, 0.9]
    )


def test_recorded_scores_and_preferences_judge(tmp_path):
    scored, compared = tmp_path / "s.jsonl", tmp_path / "c.jsonl"
    save_records(
        scored, [Recorded("p", ("a", "b", "c"), rewards=(1.0, 0.0, 3.0)), Recorded("q", ("a",), rewards=(7.0,))]
    )
    save_records(compared, [Recorded("p", ("a", "b"), prefs=((0.5, 0.9), (0.1, 0.5)))])
    verdict = RecordedJudge(scored, strength=2.0).judge([" p"], [["c ", "a"]])
    assert verdict.rewards.tolist() == [[3.0, 1.0]]
    assert verdict.prefs[0, 0, 1].item() == pytest.approx(1 / (1 + 2.718281828**-4))
    judge = RecordedJudge(compared)
    torch.testing.assert_close(judge.judge(["p"], [["b", "a", "b"]]).prefs[0, 0], torch.tensor([0.5, 0.1, 0.5]))
    assert judge.judge(["p"], [["b", "a"]]).rewards is None
    with pytest.raises(ValueError, match=r"s\.jsonl: 'b' to 'q' was not judged"):
        RecordedJudge(scored).judge(["q"], [["a", "b"]])
    with pytest.raises(ValueError, match=r"'a' and 'x' to 'p' were not compared"):
        judge.judge(["p"], [["a", "x"]])
    save_records(scored, [Recorded("p", ("a",), rewards=(1.0,)), Recorded("q", ("a",))])
    with pytest.raises(ValueError, match='every line must have "prefs", or every line "rewards"'):
        RecordedJudge(scored)


def test_a_command_line_names_any_judge(tmp_path):
    make_classifier().save_pretrained(tmp_path / "reward")
    make_tokenizer().save_pretrained(tmp_path / "reward")
    save_records(tmp_path / "s.jsonl", [Recorded("p", ("a", "b"), rewards=(1.0, 0.0))])
    assert load_judge("tiny_model:goodness", strength=3.0).strength == 3.0
    assert load_judge(f"recorded:{tmp_path / 's.jsonl'}").judge(["p"], [["a", "b"]]).rewards.tolist() == [[1.0, 0.0]]
    reward = load_judge(f"reward-model:{tmp_path / 'reward'}")
    pairs = load_judge(f"pair-model:{tmp_path / 'reward'}")
    assert reward.judge(PROMPTS, RESPONSES).rewards.shape == (2, 3) and reward.strength == 1.0
    assert pairs.judge(PROMPTS, RESPONSES).prefs.shape == (2, 3, 3)
    with pytest.raises(ValueError, match=r"vader, module:function, .* got 'vadr'"):
        load_judge("vadr")


# Samplers of texts


def test_texts_become_what_the_sampler_would_have_returned():
    """Texts of a real sampler, encoded again: the same tokens, masks and log-probs."""
    model, tokenizer = make_model(), make_tokenizer()
    drawn = TransformersSampler(model, tokenizer, max_completion_length=8).sample(PROMPTS, 3, seed=1)
    keep = [len(tokenizer(text)["input_ids"]) for group in drawn.texts for text in group]
    cuts = drawn.truncated.view(2, 3).tolist()
    ours = completions_of_texts(tokenizer, PROMPTS, drawn.texts, truncated=cuts)
    assert ours.texts == drawn.texts and torch.equal(ours.truncated, drawn.truncated)
    same = [k for k in range(6) if int(drawn.completion_mask[k].sum()) == keep[k] + (not drawn.truncated[k])]
    assert len(same) >= 3  # the others drew a special token, which is not visible in a text
    for k in same:
        assert (
            ours.input_ids[k][ours.attention_mask[k]].tolist() == drawn.input_ids[k][drawn.attention_mask[k]].tolist()
        )
    with torch.no_grad():
        scores = [
            hf.sequence_logps(model, batch.input_ids, batch.attention_mask, batch.completion_mask)
            for batch in (ours, drawn)
        ]
    torch.testing.assert_close(scores[0][same], scores[1][same], rtol=1e-5, atol=1e-4)


def test_texts_that_cannot_be_completions_are_refused():
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match=r"same number of responses, at least one, got \[1, 2\]"):
        completions_of_texts(tokenizer, PROMPTS, [["a"], ["a", "b"]])
    with pytest.raises(ValueError, match="encodes to no tokens: ''"):
        completions_of_texts(tokenizer, PROMPTS[:1], [[""]], truncated=[[True]])
    cut = completions_of_texts(tokenizer, PROMPTS[:1], [["a day", "a very good day", ""]], max_completion_length=3)
    assert cut.truncated.tolist() == [False, True, False] and cut.num_tokens == 3 + 3 + 1
    endless = make_tokenizer(chat=False)
    endless.eos_token = None
    with pytest.raises(ValueError, match="no end token"):
        completions_of_texts(endless, PROMPTS[:1], [["a"]])


def test_recorded_responses_are_drawn_by_the_seed(tmp_path):
    path = tmp_path / "r.jsonl"
    save_records(path, [Recorded("the bus was", ("good", "bad")), Recorded("the bus was", ("a day", "rain"))])
    sampler = RecordedSampler(path, make_tokenizer(), system="very")
    draws = {seed: sampler.sample(PROMPTS[:1], 3, seed).texts[0] for seed in range(8)}
    assert draws[1] == sampler.sample(PROMPTS[:1], 3, 1).texts[0] and len(set(draws.values())) > 1
    assert all(len(set(group)) == 3 and set(group) <= {"good", "bad", "a day", "rain"} for group in draws.values())
    with pytest.raises(ValueError, match="has 4 responses to 'the bus was', but 5 are wanted"):
        sampler.sample(PROMPTS[:1], 5, 0)
    with pytest.raises(ValueError, match="has 0 responses to 'rain and'"):
        sampler.sample(PROMPTS, 1, 0)


# A server


@pytest.fixture
def server():
    made = Server()
    yield made
    made.close()


def sampler_of(server: Server, **options) -> OpenAISampler:
    settings = {
        "max_completion_length": 4,
        "temperature": 0.5,
        "system": "very",
        "api_key": "secret",
        "pause": lambda s: None,
    }
    return OpenAISampler(server.url, "tiny", make_tokenizer(), **(settings | options))


def test_a_server_is_asked_for_the_policy_and_nothing_else(server):
    batch = sampler_of(server).sample(PROMPTS, 3, seed=0)
    assert len(batch.texts) == 2 and all(len(group) == 3 for group in batch.texts)
    assert sorted(body["messages"][-1]["content"] for _, body, _ in server.requests) == sorted(PROMPTS)
    for path, body, authorization in server.requests:
        assert path == "/v1/chat/completions" and authorization == "Bearer secret"
        assert body["messages"][0] == {"role": "system", "content": "very"}
        wanted = {"model": "tiny", "n": 3, "max_tokens": 4, "temperature": 0.5, "top_p": 1.0}
        assert wanted.items() <= body.items()
    flat = [text for group in batch.texts for text in group]
    assert batch.truncated.tolist() == [text.startswith("bad") for text in flat]
    again = sampler_of(server).sample(PROMPTS, 3, seed=0)
    assert again.texts == batch.texts and sampler_of(server).sample(PROMPTS, 3, seed=5).texts != batch.texts


def test_a_server_that_gives_one_at_a_time_is_asked_again():
    server = Server(most=1)
    try:
        batch = sampler_of(server, concurrency=1).sample(PROMPTS[:1], 3, seed=0)
    finally:
        server.close()
    assert [body["n"] for _, body, _ in server.requests] == [3, 2, 1]
    assert len({body["seed"] for _, body, _ in server.requests}) == 3 and len(set(batch.texts[0])) == 3


def test_what_may_pass_is_tried_again(server):
    pauses = []
    server.script = [(503, "busy", {}), (429, "slow down", {"Retry-After": "7"}), (500, "oops", {})]
    batch = sampler_of(server, concurrency=1, pause=pauses.append).sample(PROMPTS[:1], 2, seed=0)
    assert len(batch.texts[0]) == 2 and len(server.requests) == 4
    assert all(least <= pause <= 1.25 * least for pause, least in zip(pauses, (1.0, 7.0, 4.0), strict=True))


@pytest.mark.parametrize(
    ("script", "message", "requests"),
    [
        ([(401, "bad key", {})], "refused: status 401: bad key", 1),
        ([(503, "busy", {})] * 2, r"no answer in 2 attempts of 30 s; last: status 503: busy", 2),
        ([(200, "<html>", {})], "answered no JSON: <html>", 1),
        ([(200, '{"choices": []}', {})], "answered without completions", 1),
        ([(200, '{"error": "no model"}', {})], "answered without completions: .*no model", 1),
    ],
)
def test_a_server_that_does_not_answer_says_what_it_said(server, script, message, requests):
    server.script = list(script)
    with pytest.raises(ServerError, match=message):
        sampler_of(server, attempts=2, timeout=30).sample(PROMPTS[:1], 1, seed=0)
    assert len(server.requests) == requests


def test_a_server_that_hangs_or_is_not_there_is_given_up(server):
    server.script = ["hang"]
    with pytest.raises(ServerError, match=r"no answer in 1 attempts of 0\.1 s; last: .*timed out"):
        sampler_of(server, attempts=1, timeout=0.1).sample(PROMPTS[:1], 1, seed=0)
    with socket.socket() as gone:  # bound to reserve the port, but not listening
        gone.bind(("127.0.0.1", 0))
        server.url = f"http://127.0.0.1:{gone.getsockname()[1]}/v1"
        with pytest.raises(ServerError, match="Connection refused"):
            sampler_of(server, attempts=1).sample(PROMPTS[:1], 1, seed=0)


def test_arguments_of_the_server_are_checked():
    for options, message in (
        ({"max_completion_length": 0}, "max_completion_length"),
        ({"timeout": 0}, "timeout"),
        ({"attempts": 0}, "attempts"),
        ({"temperature": 0.0}, "temperature"),
    ):
        with pytest.raises(ValueError, match=message):
            OpenAISampler("http://x/v1", "m", make_tokenizer(), **({"max_completion_length": 4} | options))
    with pytest.raises(ValueError, match="url must start with http"):
        OpenAISampler("x", "m", make_tokenizer(), max_completion_length=4)


def test_a_reward_of_the_servers_texts_fits_the_judge(server):
    batch = sampler_of(server).sample(PROMPTS, 2, seed=0)
    verdict = RewardJudge(goodness, strength=1.0).judge(PROMPTS, batch.texts)
    assert verdict.prefs.shape == (2, 2, 2)
