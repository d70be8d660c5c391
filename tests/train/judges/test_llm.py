"""A language model as judge: both orders, log-probs of the labels, verdicts, ties, refusals, and paying only once."""

from __future__ import annotations

import doctest
import json
import logging
import math

import pytest

pytest.importorskip("transformers")

from completion_server import Server
from trainer_cases import make_trainer

from windkern.train.judges import llm
from windkern.train.judges.llm import LanguageModelJudge, opinion_of
from windkern.train.judges.named import load_judge
from windkern.train.samplers.server import API_KEY, ServerError

PROMPTS, RESPONSES = ["the bus", "rain"], [["good", "bad", "good"], ["so", "very", "{first}"]]


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv(API_KEY, raising=False)


@pytest.fixture
def serve():
    made = []

    def start(reply):
        made.append(Server(reply=reply))
        return made[-1]

    yield start
    for each in made:
        each.close()


def judge_of(server, folder, **options) -> LanguageModelJudge:
    return LanguageModelJudge(server.url, cache=folder, **({"attempts": 2, "pause": lambda seconds: None} | options))


def answer(text, top=None, **more) -> tuple:
    """Return an answer as servers write it; `top` has probabilities of tokens at the last position of the text."""
    entry = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop", "index": 0}
    if top is not None:
        listed = [{"token": token, "logprob": math.log(chance)} for token, chance in top.items()]
        entry["logprobs"] = {"content": [{**listed[0], "top_logprobs": listed}]}
    usage = {"prompt_tokens": 100, "completion_tokens": 1}
    return 200, json.dumps({"choices": [entry], "usage": usage, **more}), {}


def texts_of(body) -> tuple[str, str]:
    asked = body["messages"][-1]["content"]
    return tuple(asked.split(f"<response_{label}>\n")[1].split(f"\n</response_{label}>")[0] for label in "AB")


def test_the_examples_run():
    assert not doctest.testmod(llm, extraglobs={"math": math}).failed


def test_both_orders_are_asked_and_chances_come_from_the_labels(serve, tmp_path):
    """The server prefers the first response by 0.1, and longer texts."""

    def reply(body):
        first, second = texts_of(body)
        a = 0.5 + 0.05 * (len(first) - len(second)) + 0.1
        return answer("A", {"A": 0.8 * a, "B": 0.8 * (1 - a) * 0.75, " B": 0.8 * (1 - a) * 0.25, "C": 0.1, "The": 0.1})

    server = serve(reply)
    judge = judge_of(server, tmp_path, model="big")
    prefs = judge.judge(PROMPTS, RESPONSES).prefs
    for b, group in enumerate(RESPONSES):
        for i, one in enumerate(group):
            for j, other in enumerate(group):
                gap = 0.05 * (len(one) - len(other))
                want = 0.5 if one == other else 0.5 + 0.8 * gap / 0.9
                assert prefs[b, i, j].item() == pytest.approx(want, abs=1e-6)
    assert len(server.requests) == 2 + 6  # no question about equal responses, and none twice
    path, body, _ = server.requests[0]
    assert path == "/v1/chat/completions" and body["model"] == "big" and body["max_tokens"] == 1
    assert body["logprobs"] is True and body["top_logprobs"] == 20 and body["temperature"] == 0
    assert body["messages"][0] == {"role": "system", "content": llm.RUBRIC}
    assert any("{first}" in texts_of(body) for _, body, _ in server.requests)  # a text is not a field
    assert judge.costs.asked == 8 and judge.costs.prompt_tokens == 800 and judge.costs.completion_tokens == 8


def test_nothing_is_paid_for_twice(serve, tmp_path, caplog):
    server = serve(lambda body: answer("A", {"A": 0.7, "B": 0.3}))
    first = judge_of(server, tmp_path).judge(PROMPTS, RESPONSES).prefs
    again = judge_of(server, tmp_path)
    assert again.judge(PROMPTS, RESPONSES).prefs.equal(first) and len(server.requests) == 8
    assert again.costs.asked == 0 and again.costs.kept == 8
    with caplog.at_level(logging.INFO):
        judge_of(server, tmp_path, rubric="Shorter is better.").judge(PROMPTS[:1], [["a", "b"]])
    assert len(server.requests) == 10 and "2 questions asked" in caplog.text  # another rubric is another question


def test_what_was_answered_is_kept_when_another_question_fails(serve, tmp_path):
    usual = answer("A", {"A": 0.7, "B": 0.3})
    server = serve(lambda body: usual)
    server.script = [usual, usual, usual, (401, "no", {})]
    with pytest.raises(ServerError, match="status 401"):
        judge_of(server, tmp_path, concurrency=1).judge(PROMPTS, RESPONSES)
    judge_of(server, tmp_path).judge(PROMPTS, RESPONSES)
    assert len(server.requests) == 4 + 5


@pytest.mark.parametrize(
    ("content", "reported", "expected"),
    [
        ("A", None, (1.0, "verdict")),
        (" B.", None, (0.0, "verdict")),
        ("**C**", None, (0.5, "verdict")),
        ("Both A and B are fine, so: B", None, (0.0, "verdict")),
        ("A or B", None, (0.0, "verdict")),
        ("Between A and B I cannot choose.", None, (0.5, "refused")),
        ("Bad", None, (0.5, "refused")),
        (None, None, (0.5, "refused")),
        ([{"text": "A"}], None, (0.5, "refused")),
        ("A", [], (1.0, "verdict")),
        ("A", [{"token": "A"}], (1.0, "verdict")),
        ("A", [{"token": "A", "logprob": -0.1, "top_logprobs": [{"token": "A", "logprob": "x"}]}], (1.0, "verdict")),
        ("A", [{"token": "A", "logprob": -0.5}], (1.0, "logprobs")),
        ("A", "nonsense", (1.0, "verdict")),
    ],
)
def test_answers_without_log_probs_are_taken_at_their_word(content, reported, expected):
    assert opinion_of(content, reported, llm.LABELS) == expected


def test_the_answer_comes_behind_the_thoughts():
    def entry(token, **chances):
        top = [{"token": name, "logprob": math.log(chance)} for name, chance in chances.items()]
        return {"token": token, "logprob": -0.1, "top_logprobs": top}

    thought = [entry("A", A=0.9, B=0.1), entry(" is", x=1.0), entry(" B", **{"A": 0.2, " B": 0.6, "C": 0.2})]
    assert opinion_of("A is worse: B", thought, llm.LABELS).chance == pytest.approx(0.3)


def test_a_server_without_log_probs_is_asked_without_them(serve, tmp_path, caplog):
    refuse = iter(["'logprobs' is not supported here", "use 'max_completion_tokens' instead of 'max_tokens'"])

    def reply(body):
        text = next(refuse, None)
        return (400, text, {}) if text else answer("B")

    server = serve(reply)
    with caplog.at_level(logging.WARNING):
        prefs = judge_of(server, tmp_path, concurrency=1).judge(PROMPTS[:1], [["a", "b"]]).prefs
    assert prefs[0, 0, 1] == 0.5  # the second response both times
    assert "without logprobs, top_logprobs" in caplog.text and len(server.requests) == 4
    last = server.requests[-1][1]
    assert "logprobs" not in last and "max_tokens" not in last and last["max_completion_tokens"] == 1


def test_refusals_are_ties_that_are_counted_until_they_are_most(serve, tmp_path):
    def reply(body):
        return answer(None) if set(texts_of(body)) == {"good", "bad"} else answer("A", {"A": 0.9, "B": 0.1})

    judge = judge_of(serve(reply), tmp_path)
    prefs = judge.judge(PROMPTS, RESPONSES).prefs
    assert prefs[0, 0, 1] == 0.5 and judge.costs.refused == 2
    with pytest.raises(ServerError, match=r"none of the labels A, B, C in 2 of 2 answers; a model that thinks first"):
        judge_of(serve(lambda body: answer("Hm")), tmp_path / "2").judge(["p"], [["a", "b"]])
    with pytest.raises(ServerError, match=r"without a completion: .*choices"):
        judge_of(serve(lambda body: (200, '{"choices": []}', {})), tmp_path / "3").judge(["p"], [["a", "b"]])


def test_rubric_template_and_labels_are_a_persons_own(serve, tmp_path):
    server = serve(lambda body: answer("first", {"first": 0.75, "second": 0.25}))
    template = "{prompt} / {first} / {second}"
    judge = judge_of(server, tmp_path, rubric=None, template=template, labels=("first", "second"), max_tokens=3)
    judge.judge(["p"], [["a", "b"]])
    assert sorted(body["messages"][0]["content"] for _, body, _ in server.requests) == ["p / a / b", "p / b / a"]
    assert {len(body["messages"]) for _, body, _ in server.requests} == {1}
    for options, message in (
        ({"template": "{prompt}"}, "template must hold"),
        ({"labels": ("A",)}, "labels must be"),
        ({"labels": ("A", "A")}, "labels must be"),
        ({"max_tokens": 0}, "max_tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            LanguageModelJudge("http://host/v1", **options)
    with pytest.raises(ValueError, match=r"a key of judge_settings must be one of .*'rubrik'.*'rubric'"):
        load_judge("llm:http://host/v1", settings={"rubrik": ""})


def test_the_key_of_a_judge_may_be_another_and_is_not_shown(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "SECRET-KEY")
    server = serve(lambda body: (403, "SECRET-KEY may not", {}))
    judge = judge_of(server, tmp_path, key_variable="JUDGE_KEY")
    with pytest.raises(ServerError, match=r"\*\*\* may not") as error:
        judge.judge(["p"], [["a", "b"]])
    assert server.requests[0][2] == "Bearer SECRET-KEY" and "SECRET" not in f"{error.value} {judge.name}"
    open_server = serve(lambda body: answer("A", {"A": 0.9, "B": 0.1}))
    judge_of(open_server, tmp_path).judge(["p"], [["a", "b"]])
    assert open_server.requests[0][2] is None


def test_a_run_is_judged_by_it(serve, tmp_path):
    def reply(body):
        first, second = (text.split().count("good") for text in texts_of(body))
        return answer("A", {"A": 0.5 + 0.4 * (first > second), "B": 0.5 - 0.4 * (first > second)})

    server = serve(reply)
    settings = {"judge": f"llm:{server.url}", "num_iterations": 1, "save_strategy": "no"}
    make_trainer(tmp_path, given={"judge": None}, **settings).train()
    assert len(list((tmp_path / "judgements").iterdir())) == len({json.dumps(body) for _, body, _ in server.requests})
