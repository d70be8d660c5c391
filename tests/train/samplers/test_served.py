"""Samplers whose server follows the policy: requests, accepted answers, and which weights the server has."""

from __future__ import annotations

import copy
import doctest
import importlib
import json
import logging

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from policy_server import PolicyServer  # noqa: E402
from tiny_model import make_model, make_tokenizer  # noqa: E402
from trainer_cases import lora, make_trainer  # noqa: E402

from windkern import hf  # noqa: E402
from windkern.train.samplers import following, vllm  # noqa: E402
from windkern.train.samplers.served import ServedSampler  # noqa: E402
from windkern.train.samplers.server import API_KEY, Server, ServerError  # noqa: E402
from windkern.train.samplers.sglang import Sglang  # noqa: E402
from windkern.train.samplers.verify import compare  # noqa: E402
from windkern.train.samplers.vllm import Vllm  # noqa: E402

PROMPTS = ["the bus was", "rain"]
RELOADED = "ignore:.*:UserWarning:peft.*"
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it


@pytest.fixture(autouse=True)
def no_key_and_few_questions(monkeypatch):
    monkeypatch.delenv(API_KEY, raising=False)
    monkeypatch.setattr(following, "_ASKED", 16)  # tokens; fewer, to save time


@pytest.fixture
def serve():
    made = []

    def start(model=None, **options):
        made.append(PolicyServer(make_model() if model is None else model, **options))
        return made[-1]

    yield start
    for each in made:
        each.close()


def sampler_of(server, folder, kind="vllm", **options) -> ServedSampler:
    reached = {"attempts": 3, "pause": lambda seconds: None, "timeout": 60}
    root = server.url.removesuffix("/v1")
    engine = Vllm(Server(f"{root}/v1", **reached)) if kind == "vllm" else Sglang(Server(root, **reached))
    return ServedSampler(engine, make_tokenizer(), folder=folder, **({"max_completion_length": 6} | options))


def adapted(seed: int = 0):
    torch.manual_seed(seed)
    return peft.get_peft_model(make_model(), lora()).eval()


def moved(model, step: float = 0.3):
    """Return the same policy after some training."""
    made = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value += step * torch.randn(value.shape, generator=made)
    return model


@pytest.mark.parametrize("name", ["engine", "received", "verify", "vllm", "weights"])
def test_the_examples_run(name):
    module = importlib.import_module(f"windkern.train.samplers.{name}")
    found = doctest.testmod(module, extraglobs={"torch": torch})
    assert found.attempted and not found.failed


# Which policy is served


@pytest.mark.parametrize("kind", ["adapter", "whole", "sglang"])
def test_a_server_serves_each_policy_it_is_given(serve, tmp_path, kind, caplog):
    server, model = serve(), adapted() if kind == "adapter" else make_model()
    sampler = sampler_of(server, tmp_path, "sglang" if kind == "sglang" else "vllm")
    heard = []
    sampler.listener = lambda prompt, drawn: heard.append((prompt, drawn))
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            sampler.update(model)
            heard.clear()
            batch = sampler.sample(PROMPTS, 3, seed=0)
            assert [len(group) for group in batch.texts] == [3, 3]
            ids, attended, own = batch.input_ids, batch.attention_mask, batch.completion_mask
            with torch.no_grad():
                ours = hf.sequence_logps(model, ids, attended, own)
            theirs = [sum(each.logps) for _, drawn in heard for each in drawn]
            assert ours.tolist() == pytest.approx(theirs, abs=1e-4)
            moved(model)
    assert caplog.text.count("nats a token from the trainer's log-probs") == 3 and "told apart" not in caplog.text
    assert len(set(server.loaded)) == 3
    left = [path.name for path in (tmp_path / "policies").iterdir()]
    assert sorted(name.partition("-")[0] for name in left) == ["policy", "state.json"]  # only the newest
    assert any(name.startswith("policy-0003-") for name in left)
    if kind == "adapter":
        assert list(server.adapters) == [name for name in left if name != "state.json"]


@pytest.mark.parametrize("kind", ["adapter", "whole", "sglang"])
def test_a_server_that_goes_on_with_the_previous_policy_is_an_error(serve, tmp_path, kind):
    server, model = serve(fault="stale"), adapted() if kind == "adapter" else make_model()
    sampler = sampler_of(server, tmp_path, "sglang" if kind == "sglang" else "vllm")
    sampler.update(model)
    sampler.sample(PROMPTS, 3, seed=0)
    with pytest.raises(ServerError, match=r"given policy-0002-\w+ but still serves the previous policy: .* nats"):
        sampler.update(moved(model))
    again = sampler_of(server, tmp_path, "sglang" if kind == "sglang" else "vllm")  # a run that was resumed
    with pytest.raises(ServerError, match="but still serves the previous policy"):
        again.update(model)


def test_a_state_that_cannot_be_written_is_named(serve, tmp_path):
    sampler = sampler_of(serve(), tmp_path)
    (tmp_path / "policies" / "state.json").mkdir(parents=True)
    with pytest.raises(OSError, match=r"cannot write .*state\.json: .*the previous file is intact"):
        sampler.update(make_model())
    assert not list((tmp_path / "policies").glob(".*"))


def test_a_server_that_takes_some_of_the_weights_is_an_error(serve, tmp_path):
    """Like vLLM with --enable-lora: the new policy is nearer than the previous one, but it is not served."""
    server, model = serve(fault="part"), make_model()
    sampler = sampler_of(server, tmp_path)
    sampler.update(model)
    sampler.sample(PROMPTS, 3, seed=0)
    with pytest.raises(ServerError, match=r"has not taken all of it: .* nats a token, and by .* after the first"):
        sampler.update(moved(model, 0.05))


def test_a_server_of_another_model_is_an_error(serve, tmp_path):
    other = make_model(seed=5)
    with torch.no_grad():
        for value in other.parameters():
            value *= 2
    with pytest.raises(ServerError, match=r"serves a different model from the one that is trained: .* nats a token"):
        sampler_of(serve(other), tmp_path).update(adapted())
    with pytest.raises(ServerError, match="serves a different model"):
        sampler_of(serve(fault="base"), tmp_path / "2").update(moved(adapted(), 1.0))


def test_policies_that_cannot_be_told_apart_are_said(serve, tmp_path, caplog):
    server, model = serve(), adapted()
    sampler = sampler_of(server, tmp_path)
    sampler.update(model)
    sampler.sample(PROMPTS, 3, seed=0)
    with caplog.at_level(logging.WARNING):
        sampler.update(moved(model, 1e-9))
    assert "cannot be told apart" in caplog.text and "policy-0002" in caplog.text


def test_rounding_does_not_hide_a_stale_server():
    """Server and trainer differ by 1e-2 nats, and the policies by 0.1 on some of the tokens."""
    made = torch.Generator().manual_seed(0)
    previous = -torch.rand(64, generator=made) * 3
    new = previous.clone()
    new[::3] += 0.1
    noise = 1e-2 * torch.randn(64, generator=made)
    for base, verdict in ((new, "new"), (previous, "stale")):
        assert compare(new.tolist(), (base + noise).tolist(), previous.tolist()).verdict == verdict
    everywhere = previous + 0.2  # no token shows the noise alone
    assert compare(everywhere.tolist(), (previous + noise).tolist(), previous.tolist()).verdict == "stale"
    loud = 10 * noise
    assert compare(new.tolist(), (new + loud).tolist(), previous.tolist()).verdict == "unknown"
    assert compare(new.tolist(), (new + 1).tolist(), previous.tolist()).verdict == "other"
    assert compare(new.tolist(), [float("nan")] * 64, previous.tolist()).verdict == "other"


@pytest.mark.parametrize("kind", ["adapter", "whole", "sglang"])
def test_a_server_that_was_started_again_gets_its_policy(serve, tmp_path, kind, caplog):
    server, model = serve(), adapted() if kind == "adapter" else make_model()
    sampler = sampler_of(server, tmp_path, "sglang" if kind == "sglang" else "vllm")
    sampler.update(model)
    sampler.sample(PROMPTS, 3, seed=0)
    sampler.update(moved(model))
    before = sampler.sample(PROMPTS, 3, seed=1).texts
    server.forget()
    sampler.received.clear()
    with caplog.at_level(logging.WARNING):
        after = sampler.sample(PROMPTS, 3, seed=1).texts
    assert after == before and "was restarted" in caplog.text and len(server.loaded) == 1


def test_whole_weights_lost_in_the_middle_are_given_and_drawn_again(serve, tmp_path):
    server, model = serve(), make_model()
    sampler = sampler_of(server, tmp_path)
    sampler.update(model)
    sampler.sample(PROMPTS, 3, seed=0)
    sampler.update(moved(model))
    wanted = sampler.sample(PROMPTS, 3, seed=1).texts
    sampler.received.clear()
    times = iter([True])

    def restart(body, content):
        if next(times, False):
            server.forget()
        return content

    server.change = restart
    assert sampler.sample(PROMPTS, 3, seed=1).texts == wanted


# Requests


def test_tokens_go_in_and_nothing_is_left_to_the_server(serve, tmp_path):
    server = serve()
    sampler = sampler_of(server, tmp_path, temperature=0.7)
    sampler.update(adapted())
    sampler.sample([PROMPTS[0]], 4, seed=0)
    body = server.asked("/v1/completions")[-1]
    tokenizer = make_tokenizer()
    assert body["prompt"] == tokenizer("user the bus was <eos> assistant")["input_ids"]
    assert body["n"] == 4 and body["model"].startswith("policy-0001-") and body["temperature"] == 0.7
    assert body["stop_token_ids"] == [tokenizer.eos_token_id] and body["ignore_eos"] is True
    assert vllm.NEUTRAL.items() <= body.items() and body["return_token_ids"] is True and body["max_tokens"] == 6


def test_as_many_tokens_as_were_said_are_under_way(serve, tmp_path):
    """A prompt of 5 tokens and its 2 responses of 6 count as 17."""
    at_once, most = [], []
    for tokens, expected in ((20, 1), (40, 2), (1, 1)):
        server = serve()
        sampler = sampler_of(server, tmp_path / str(tokens), tokens=tokens)
        original = sampler.server.post

        async def counted(*args, _original=original, **given):
            at_once.append(1)
            most.append(len(at_once))
            try:
                return await _original(*args, **given)
            finally:
                at_once.pop()

        sampler.server.post = counted
        most.clear()
        sampler.sample([f"{word} day was" for word in ("a", "the", "so", "bad", "good")], 2, seed=0)
        assert max(most) == expected


def test_what_was_received_is_not_asked_for_again(serve, tmp_path):
    server = serve()
    sampler = sampler_of(server, tmp_path, tokens=1)  # one request after another
    sampler.update(adapted())
    done = server.drawn()
    tries = iter([None, None, (401, "no", {})])
    original = server._completions
    server._completions = lambda body: next(tries, None) or original(body)
    prompts = ["rain was", "bus was", "day was", "a was"]
    with pytest.raises(ServerError, match="status 401: no"):
        sampler.sample(prompts, 3, seed=0)
    assert server.drawn() - done == 3 * 3
    again = sampler_of(server, tmp_path, tokens=1)  # another process, after a kill
    again.update(adapted())
    done = server.drawn()
    batch = again.sample(prompts, 3, seed=0)
    assert server.drawn() - done == 2 * 3  # two of four were already there
    assert again.sample(prompts, 3, seed=0).texts == batch.texts and server.drawn() - done == 2 * 3
    again.sample(prompts[:1], 3, seed=7)
    assert len(list((tmp_path / "received").iterdir())) == 1  # of the last call


def test_a_damaged_answer_on_the_disk_is_asked_for_again(serve, tmp_path):
    server = serve()
    sampler = sampler_of(server, tmp_path)
    batch = sampler.sample(PROMPTS, 2, seed=0)
    first, second = sorted((tmp_path / "received").iterdir())
    first.write_text("{")
    second.write_text('{"choices": []}')
    assert sampler.sample(PROMPTS, 2, seed=0).texts == batch.texts and server.drawn() == 8


def test_a_run_that_is_trained_draws_from_each_policy(serve, tmp_path):
    """The whole loop: three iterations of WIND with an adapter."""
    server = serve()
    trainer = make_trainer(
        tmp_path,
        model=adapted(),
        sampler=f"vllm:{server.url}",
        reference="adapter",
        num_iterations=3,
        save_strategy="no",
    )
    trainer.train()
    names = [body["model"] for body in server.asked("/v1/completions")]
    assert sorted({name[:11] for name in names}) == ["policy-0001", "policy-0002", "policy-0003"]
    assert len(server.asked("/v1/unload_lora_adapter")) == 2
    kept = [path.name for path in (tmp_path / "served" / "policies").iterdir()]
    assert sum(name.startswith("policy-") for name in kept) == 1


# Answers


def changed(**entries):
    """Change the first choice of an answer; the value ... removes an entry."""

    def change(body, content):
        choice = content["choices"][0]
        for name, value in entries.items():
            choice.pop(name) if value is ... else choice.update({name: value})
        return content

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(finish_reason="tool_calls"), "ended by 'tool_calls'"),
        (changed(finish_reason=None), "ended by None"),
        (changed(token_ids=...), "without token_ids"),
        (changed(token_ids=None), "not those of a response"),
        (changed(token_ids=[]), "not those of a response"),
        (changed(token_ids=[1.0]), "not those of a response"),
        (changed(token_ids=[True, 1]), "not those of a response"),
        (changed(token_ids=[5] * 7, finish_reason="length"), "of 7 tokens, where 6 were the limit"),
        (changed(token_ids=[5, 5], finish_reason="length"), "cut after 2 tokens, not 6"),
        (changed(token_ids=[5, 6], finish_reason="stop"), "ended with token 6, which is not one of"),
        (changed(token_ids=[1, 5, 5, 5, 5, 5], finish_reason="length"), "continues after its end token 1"),
        (changed(prompt_token_ids=[1]), "to another prompt"),
        (changed(logprobs={"token_logprobs": [0.0] * 9}), "log-probs that are not those of"),
        (changed(logprobs=[1]), "log-probs of another form"),
        (lambda body, content: {**content, "model": "other"}, "answered as 'other', not as 'base'"),
        (
            lambda body, content: {**content, "choices": content["choices"] * 2},
            "answered 4 completions, but 2 were wanted",
        ),
        (lambda body, content: {**content, "choices": []}, "without completions"),
        (lambda body, content: {"error": "no"}, "without completions: .*no"),
        (lambda body, content: {**content, "choices": [7, 7]}, "without token_ids"),
        (lambda body, content: [content], "without completions"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_quoted(serve, tmp_path, change, message):
    server = serve(change=change)
    with pytest.raises(ServerError, match=message) as error:
        sampler_of(server, tmp_path).sample([PROMPTS[0]], 2, seed=0)
    assert server.url in str(error.value) and len(str(error.value)) < 900
    assert not list(tmp_path.glob("received/*"))  # no wrong answer is kept


def test_responses_given_up_are_drawn_again_whole(serve, tmp_path):
    times = iter([True, True])
    give_up = changed(finish_reason="abort")
    server = serve(change=lambda body, content: give_up(body, content) if next(times, False) else content)
    assert sampler_of(server, tmp_path).sample([PROMPTS[0]], 2, seed=0).num_generations == 2 and server.drawn() == 6
    always = serve(change=give_up)
    with pytest.raises(ServerError, match="gave up responses half-way"):
        sampler_of(always, tmp_path / "2").sample([PROMPTS[0]], 2, seed=0)


def test_a_server_that_gives_fewer_is_asked_for_the_rest(serve, tmp_path):
    def one(body, content):
        return {**content, "choices": content["choices"][:1]}

    whole, fewer = serve(), serve(change=one)
    batches = [
        sampler_of(server, tmp_path / str(k)).sample(PROMPTS, 3, seed=0) for k, server in enumerate((whole, fewer))
    ]
    assert batches[0].texts == batches[1].texts  # the seeds of the rest continue


def test_an_end_token_at_the_limit_is_an_end(serve, tmp_path):
    eos = make_tokenizer().eos_token_id
    found = {"token_ids": [5, 5, 5, 5, 5, eos], "logprobs": None, "finish_reason": "length"}
    batch = sampler_of(serve(change=changed(**found)), tmp_path).sample([PROMPTS[0]], 1, seed=0)
    assert batch.truncated.tolist() == [False]


def test_a_server_that_cannot_take_adapters_says_how_to_start_it(serve, tmp_path):
    server = serve()
    server._load = lambda body: (404, '{"detail": "Not Found"}', {})
    with pytest.raises(ServerError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora"):
        sampler_of(server, tmp_path).update(adapted())
    server._load = lambda body: (500, '{"error": {"message": "LoRA rank 64 is greater than max_lora_rank 16."}}', {})
    with pytest.raises(ServerError, match=r"has not accepted the policy .*rank 64 is greater"):
        sampler_of(server, tmp_path).update(adapted())
    assert len(server.asked("/v1/load_lora_adapter")) == 2  # the same again would not help
    with pytest.raises(ServerError, match="takes whole weights, but the policy is an adapter"):
        sampler_of(server, tmp_path / "2", "sglang").update(adapted())


def test_the_name_of_the_base_model_is_found_or_given(serve, tmp_path):
    server = serve()
    server._models = lambda body: (200, json.dumps({"data": [{"id": "a"}, {"id": "b"}]}), {})
    with pytest.raises(ServerError, match="must serve one base model"):
        sampler_of(server, tmp_path).sample(PROMPTS, 1, seed=0)


def test_the_key_is_in_no_file_and_no_message(serve, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(API_KEY, "SECRET-KEY")
    server = serve()
    sampler = sampler_of(server, tmp_path)
    with caplog.at_level(logging.DEBUG):
        sampler.update(adapted())
        sampler.sample(PROMPTS, 2, seed=0)
        server._completions = lambda body: (401, "Bearer SECRET-KEY is not known", {})
        with pytest.raises(ServerError, match=r"\*\*\* is not known") as error:
            sampler.sample(PROMPTS, 2, seed=3)
    assert {key for _, _, key in server.requests} == {"Bearer SECRET-KEY"}
    texts = [path.read_bytes().decode(errors="replace") for path in tmp_path.rglob("*") if path.is_file()]
    assert not any("SECRET" in text for text in (*texts, str(error.value), caplog.text, repr(vars(sampler))))


def test_policies_are_named_by_their_contents(serve, tmp_path):
    server, model = serve(), adapted()
    sampler = sampler_of(server, tmp_path)
    sampler.update(model)
    sampler.update(copy.deepcopy(model))  # the run resumed at the same policy
    assert sampler.follower.policy.name.startswith("policy-0001-") and len(server.asked("/v1/load_lora_adapter")) == 2
    resumed = sampler_of(server, tmp_path)
    resumed.update(model)
    assert resumed.follower.policy == sampler.follower.policy
    resumed.update(moved(model))
    assert resumed.follower.policy.name.startswith("policy-0002-")
