"""Which answers of a server are accepted: forms, refusals, times, sizes, and who gets the key."""

from __future__ import annotations

import doctest
import email.utils
import json
import logging
import time

import pytest

transformers = pytest.importorskip("transformers")

from completion_server import Server  # noqa: E402
from tiny_model import make_tokenizer  # noqa: E402

from windkern.train.samplers import server as server_module  # noqa: E402
from windkern.train.samplers.openai import NEUTRAL, OpenAISampler, read_choice  # noqa: E402
from windkern.train.samplers.server import API_KEY, ServerError, check_key, check_url, retry_after  # noqa: E402

PROMPT = "the bus was"


@pytest.fixture
def serve():
    """Make servers, and close them at the end."""
    made = []

    def start(reply=lambda body: None, **options):
        made.append(Server(reply=reply, **options))
        return made[-1]

    yield start
    for each in made:
        each.close()


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv(API_KEY, raising=False)


def sampler_of(server, **options) -> OpenAISampler:
    settings = {"max_completion_length": 8, "attempts": 2, "pause": lambda seconds: None, "concurrency": 1}
    return OpenAISampler(getattr(server, "url", server), "tiny", make_tokenizer(), **(settings | options))


def choice(content="good day", reason="stop", **more) -> dict:
    return {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": content, **more}}


def choices(*found, **more) -> tuple:
    return 200, json.dumps({"choices": list(found), **more}), {}


def test_the_examples_run():
    from windkern.train.samplers import openai as samplers_openai

    assert not doctest.testmod(server_module).failed and not doctest.testmod(samplers_openai).failed


# Forms of an answer


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (choice("good", reasoning_content="so bad"), "reasoning_content besides the content, .*so bad"),
        (choice("good", reasoning="so bad"), "reasoning besides the content"),
        (choice("good", reasoning_details=[{"text": "so"}]), "reasoning_details besides the content"),
        (choice("good", tool_calls=[{"id": "1"}]), "tool_calls besides the content"),
        (choice(None, tool_calls=[{"id": "1"}]), "tool_calls besides the content"),
        (choice("", refusal="I will not."), "refusal besides the content, .*I will not"),
        (choice(None), "content is null, not text .*a refusal"),
        (choice([{"type": "text", "text": "good"}]), "content is a list, not text.*good"),
        (choice(7), "content is a int, not text"),
        (choice({"text": "good"}), "content is a dict, not text"),
        (choice(True), "content is a bool, not text"),
        (choice("a\ud800"), "half of a surrogate pair"),
        (choice(reason="content_filter"), "ended by 'content_filter'"),
        (choice(reason="tool_calls"), "ended by 'tool_calls'"),
        (choice(reason="abort"), "ended by 'abort'"),
        (choice(reason={"type": "stop"}), "ended by {'type': 'stop'}"),
        ({"text": "good", "finish_reason": "stop"}, "completion without a message: .*good"),
        ({"delta": {"content": "good"}}, "completion without a message"),
        ("good", "completion without a message: .good"),
        (None, "completion without a message: null"),
        ({"message": "good"}, "completion without a message"),
    ],
)
def test_an_answer_of_another_form_is_quoted(serve, found, message):
    server = serve(lambda body: choices(found))
    with pytest.raises(ServerError, match=f"{server.url} answered .*{message}"):
        sampler_of(server).sample([PROMPT], 1, seed=0)
    assert len(server.requests) == 1  # a repeat would not help


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"choices": {"0": 1}}', "without completions"),
        ("[1, 2]", r"without completions: \[1, 2\]"),
        ("null", "without completions: null"),
        ('data: {"choices": []}', "answered no JSON: data:"),
        ("[" * 200_000, r"answered no JSON: \[\["),
        ("9" * 10_000, "answered no JSON: 999"),
        ("", "answered no JSON"),
        (json.dumps({"choices": [choice(), choice()]}), "answered 2 completions, but 1 were wanted"),
    ],
)
def test_an_answer_that_is_not_one_is_quoted(serve, text, message):
    server = serve(lambda body: (200, text, {}))
    with pytest.raises(ServerError, match=message) as error:
        sampler_of(server).sample([PROMPT], 1, seed=0)
    assert len(str(error.value)) < 800


def test_what_says_nothing_is_no_form_of_its_own(serve):
    empty = choice("good", refusal=None, tool_calls=[], reasoning="", audio=None, provider_specific_fields={"a": 1})
    server = serve(lambda body: choices({**empty, "logprobs": None}, choice("", reason=None), choice("a", "length")))
    batch = sampler_of(server).sample([PROMPT], 3, seed=0)
    assert batch.texts == (("good", "", "a"),) and batch.truncated.tolist() == [False, False, True]


# Tokens


def test_the_tokens_of_a_server_are_taken_as_they_are(serve):
    tokenizer = make_tokenizer()
    asked = tokenizer("user the bus was <eos> assistant")["input_ids"]
    good, end = tokenizer("good <eos>")["input_ids"]
    drawn = [[good, good, end], [good, good], [good]]
    found = [
        {**choice("whatever"), "token_ids": drawn[0]},
        {**choice("good", reasoning="good"), "token_ids": drawn[1]},  # without its end token
        {**choice("good", "length"), "token_ids": drawn[2]},
    ]
    batch = sampler_of(serve(lambda body: choices(*found, prompt_token_ids=asked))).sample([PROMPT], 3, seed=0)
    rows = [batch.input_ids[k][batch.completion_mask[k]].tolist() for k in range(3)]
    assert rows == [[good, good, end], [good, good, end], [good]]
    assert batch.texts == (("good good", "good good", "good"),) and batch.truncated.tolist() == [False, False, True]
    with pytest.raises(ServerError, match=r"read another prompt than the policy .*'user the bus'.* chat template"):
        sampler_of(serve(lambda body: choices(*found, prompt_token_ids=asked[:3]))).sample([PROMPT], 3, seed=0)
    mixed = [found[0], choice("good")]
    with pytest.raises(ServerError, match="token_ids with some completions and not with others"):
        sampler_of(serve(lambda body: choices(*mixed, prompt_token_ids=asked))).sample([PROMPT], 2, seed=0)
    unsure = sampler_of(serve(lambda body: choices({**choice("good day"), "token_ids": [good]})))
    assert unsure.sample([PROMPT], 1, seed=0).texts == (("good day",),)  # the server does not say which prompt it read


@pytest.mark.parametrize("ids", [[1, True], [1, 2.0], ["1"], [-1], [[1]]])
def test_token_ids_are_data_too(ids):
    with pytest.raises(ValueError, match="token_ids that are not those of a response"):
        read_choice({**choice(), "token_ids": ids}, drawn=True)
    with pytest.raises(ValueError, match="token_ids that are not those of a response"):
        read_choice({**choice(reason="length"), "token_ids": []}, drawn=True)


# Requests


def test_nothing_is_left_to_the_server(serve):
    server = serve()
    sampler_of(server, temperature=0.5).sample([PROMPT], 2, seed=0)
    ((_, body, _),) = server.requests
    assert NEUTRAL.items() <= body.items() and body["temperature"] == 0.5
    assert {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}.items() <= body.items()
    assert {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repeat_penalty": 1.0}.items() <= body.items()


@pytest.mark.parametrize("status", [400, 422])
def test_a_field_that_is_refused_is_left_out_and_said(serve, caplog, status):
    """As `transformers serve` (all at once) and OpenAI (one at a time) refuse them."""
    unknown = ["repetition_penalty", "top_k", "seed"]

    def reply(body):
        first = next((name for name in unknown if name in body), None)
        return (status, f"Unrecognized request argument supplied: {first}", {}) if first else choices(choice())

    server = serve(reply)
    with caplog.at_level(logging.WARNING):
        batch = sampler_of(server).sample([PROMPT, PROMPT], 1, seed=0)
    bodies = [body for _, body, _ in server.requests]
    assert len(batch.texts) == 2 and len(bodies) == len(unknown) + 2  # the second prompt is asked without them at once
    assert set(bodies[0]) - set(bodies[-1]) == set(unknown)
    assert [name in caplog.text for name in (*unknown, "top_p")] == [True, True, True, False]
    assert len(caplog.records) == len(unknown) + 1  # and that texts are re-encoded
    assert caplog.text.count("re-encoded") == 1


def test_a_field_that_is_refused_without_its_name_is_found_too(serve, caplog):
    server = serve(lambda body: (422, "extra fields", {}) if "top_k" in body else choices(*[choice()] * body["n"]))
    with caplog.at_level(logging.WARNING):
        batch = sampler_of(server).sample([PROMPT], 2, seed=0)
    assert batch.num_generations == 2 and "without dry_multiplier" in caplog.text


@pytest.mark.parametrize(
    ("status", "text"), [(400, "Only one completion choice is allowed"), (500, "Only one completion choice is allowed")]
)
def test_a_server_of_one_choice_is_asked_n_times(serve, caplog, status, text):
    """Like llama.cpp, which has used both statuses for this."""
    server = serve(lambda body: (status, text, {}) if body["n"] > 1 else None)
    sampler = sampler_of(server)
    with caplog.at_level(logging.WARNING):
        batch = sampler.sample([PROMPT, "rain"], 3, seed=0)
    bodies = [body for _, body, _ in server.requests]
    assert [body["n"] for body in bodies] == [3, 1, 1, 1, 1, 1, 1] and len({body["seed"] for body in bodies}) == 6
    assert batch.num_generations == 3 and caplog.text.count("one response at a time") == 1
    assert bodies[1].keys() == bodies[0].keys()  # no field was the cause


def test_a_request_that_is_wrong_however_it_is_asked_is_an_error(serve):
    server = serve(lambda body: (400, "the prompt is too long", {}))
    with pytest.raises(ServerError, match="refused: status 400: the prompt is too long"):
        sampler_of(server).sample([PROMPT], 2, seed=0)
    assert len(server.requests) == 3  # unchanged, for one response, and without the optional fields
    for status in (401, 403, 404, 413):
        server = serve(lambda body, status=status: (status, "top_k", {}))
        with pytest.raises(ServerError, match=f"refused: status {status}: top_k"):
            sampler_of(server).sample([PROMPT], 2, seed=0)
        assert len(server.requests) == 1


# The key


def test_a_redirect_is_not_followed(serve):
    elsewhere = serve()
    target = elsewhere.url.replace("http://", "http://me:pass@") + "/chat/completions?token=1"
    for status in (301, 302, 303, 307, 308):
        server = serve(lambda body, status=status: (status, "", {"Location": target}))
        with pytest.raises(ServerError, match=r"redirects to .*not followed") as error:
            sampler_of(server, api_key="SECRET").sample([PROMPT], 1, seed=0)
        assert server.requests[0][2] == "Bearer SECRET" and len(server.requests) == 1
        assert not any(word in str(error.value) for word in ("SECRET", "pass", "token"))
    assert not elsewhere.requests


def test_the_key_may_come_from_the_environment_and_is_not_shown(serve, monkeypatch):
    monkeypatch.setenv(API_KEY, "from-outside\n")
    server = serve(lambda body: (401, "Bearer from-outside is not known", {}))
    sampler = sampler_of(server)
    with pytest.raises(ServerError, match=r"status 401: Bearer \*\*\* is not known") as error:
        sampler.sample([PROMPT], 1, seed=0)
    assert server.requests[0][2] == "Bearer from-outside"
    assert "from-outside" not in f"{error.value!r} {sampler!r} {sampler.server!r}"
    assert check_key("given") == "given" and check_key("") is None
    for wrong in ("a b", "a\nb", "clé"):
        with pytest.raises(ValueError, match="printable ASCII") as error:
            check_key(wrong)
        assert wrong not in str(error.value)
    monkeypatch.delenv(API_KEY)
    sampler_of(open_server := serve()).sample([PROMPT], 1, seed=0)
    assert open_server.requests[0][2] is None


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://me:secret@host/v1", "must not hold a user or a password, got 'http://***@host/v1'"),
        ("http://secret@host/v1", "must not hold a user"),
        ("ftp://me:secret@host/v1", "must start with http"),
        ("http://me:sec/ret@host/v1", "got 'http://***@host/v1'"),
        ("http://host/v1?key=1", "must end with its path"),
        ("http://host/v1#a", "must end with its path"),
        ("http:///v1", "name a host"),
        ("http://host:99999/v1", "must start with http"),
        ("http://host:x/v1", "must start with http"),
        ("host/v1", "must start with http"),
    ],
)
def test_a_url_that_is_none_or_holds_a_secret_is_refused(url, message):
    with pytest.raises(ValueError) as error:
        check_url(url)
    assert message in str(error.value) and "secret" not in str(error.value) and "ret@" not in str(error.value)


# Times and sizes


@pytest.mark.parametrize(
    ("header", "pause"),
    [
        ("7", 7.0),
        ("0", 0.0),
        ("1000000000000", 60.0),
        ("9" * 500, 60.0),
        ("\u00b2", 1.0),
        ("\u0663", 1.0),
        ("-3", 1.0),
        ("1.5", 1.0),
        ("1e3", 1.0),
        ("inf", 1.0),
        ("", 1.0),
        ("soon", 1.0),
        (None, 1.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("Wed, 21 Oct 9015 07:28:00 GMT", 60.0),
    ],
)
def test_how_long_a_server_may_ask_to_wait(header, pause):
    assert retry_after({} if header is None else {"Retry-After": header}, 1.0) == pause


def test_a_date_to_wait_for_is_a_time_from_now(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1e9)
    soon = email.utils.formatdate(1e9 + 30, usegmt=True)
    assert retry_after({"Retry-After": soon}, 1.0) == 30


def test_a_server_that_asks_for_an_age_gets_a_minute(serve):
    pauses = []
    server = serve()
    server.script = [(429, "", {"Retry-After": "10000000"}), (503, "", {"Retry-After": "\u00b2"})]
    sampler_of(server, attempts=3, pause=pauses.append).sample([PROMPT], 1, seed=0)
    assert pauses[0] == 60.0 and 2.0 <= pauses[1] <= 2.5


def test_clients_do_not_come_back_all_at_once(serve):
    pauses = []
    for _ in range(5):
        server = serve()
        server.script = [(503, "busy", {})]
        sampler_of(server, pause=pauses.append).sample([PROMPT], 1, seed=0)
    assert len(set(pauses)) > 1 and all(1.0 <= pause <= 1.25 for pause in pauses)


@pytest.mark.parametrize("step", ["drip", "drip headers", "hang"])
def test_an_answer_that_never_ends_is_given_up(serve, step):
    with pytest.raises(ServerError, match=r"no answer in 2 attempts of 0\.2 s; last: timed out"):
        sampler_of(serve(lambda body: step), timeout=0.2).sample([PROMPT], 1, seed=0)


def test_an_answer_without_bound_is_not_read_to_its_end(serve, monkeypatch):
    monkeypatch.setattr(server_module, "LARGEST_ANSWER", 2**20)
    server = serve(lambda body: (200, " " * 2**21, {}))
    with pytest.raises(ServerError, match="answered more than 1 MiB"):
        sampler_of(server).sample([PROMPT], 1, seed=0)
    assert len(server.requests) == 1


def test_one_prompt_that_fails_ends_the_others(serve):
    """The first prompt would hang for an hour."""
    server = serve(lambda body: "hang" if body["messages"][0]["content"] == "rain" else (401, "no", {}))
    with pytest.raises(ServerError, match="status 401"):
        sampler_of(server, timeout=3600, concurrency=4).sample(["rain", "day"], 1, seed=0)


def test_a_loop_that_runs_already_does_not_matter(serve):
    """A notebook has such a loop."""
    import asyncio

    async def cell():
        return sampler_of(serve()).sample([PROMPT], 2, seed=0)

    assert asyncio.run(cell()).num_generations == 2
