"""Prompts that are conversations, where prompts and demonstrations come from, and every reader of a conversation."""

from __future__ import annotations

import copy
import doctest
import json
import pickle

import pytest
import torch

transformers = pytest.importorskip("transformers")

from completion_server import Server  # noqa: E402
from tiny_model import WORDS, make_classifier, make_model, make_tokenizer  # noqa: E402
from tiny_model import save as save_model  # noqa: E402

from windkern.train.data import loading as data  # noqa: E402
from windkern.train.data import prompts  # noqa: E402
from windkern.train.data.loading import Demonstration, encode_prompts, load_demonstrations, load_prompts  # noqa: E402
from windkern.train.data.prompts import ChatPrompt, as_messages, prompt_from_json, prompt_to_json  # noqa: E402
from windkern.train.data.records import Recorded, load_records, save_records  # noqa: E402
from windkern.train.judges.models import ModelReward  # noqa: E402
from windkern.train.judges.recorded import RecordedJudge  # noqa: E402
from windkern.train.samplers.openai import OpenAISampler  # noqa: E402
from windkern.train.samplers.recorded import RecordedSampler, completions_of_texts  # noqa: E402
from windkern.train.samplers.sampler import TransformersSampler  # noqa: E402


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ONE = [turn("user", "rain day")]
SYSTEM = [turn("system", "so very"), turn("user", "rain")]
LONG = [turn("user", "the bus"), turn("assistant", "was bad"), turn("user", "and a day")]
ANSWER = turn("assistant", "very good")
CONVERSATIONS = pytest.mark.parametrize("messages", [ONE, SYSTEM, LONG], ids=["one", "system", "long"])


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.mark.parametrize("module", [data, prompts])
def test_the_examples_run(module):
    assert not doctest.testmod(module).failed


# A conversation


def test_a_conversation_is_its_text():
    assert ChatPrompt(ONE) == "rain day" and {"rain day": 1}[ChatPrompt(ONE)] == 1
    assert ChatPrompt(SYSTEM) == "system: so very\n\nuser: rain"
    assert ChatPrompt(LONG) == "user: the bus\n\nassistant: was bad\n\nuser: and a day"
    assert ChatPrompt([turn("system", "rain")]) == "system: rain"  # not the user's


@CONVERSATIONS
def test_a_conversation_survives_copies_pickles_and_json(messages):
    prompt = ChatPrompt(messages)
    written = json.loads(json.dumps(prompt_to_json(prompt)))
    copies = [copy.copy(prompt), copy.deepcopy(prompt), prompt_from_json(written)]
    copies += [pickle.loads(pickle.dumps(prompt, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for each in copies:
        assert type(each) is ChatPrompt and each == prompt and each.messages == tuple(messages)
    assert prompt_from_json(prompt_to_json("rain")) == "rain" and type(prompt_from_json("rain")) is str


def test_a_conversation_does_not_change():
    mine = [dict(message) for message in LONG]
    prompt = ChatPrompt(mine)
    mine[0]["content"] = "changed"
    prompt.messages[1]["content"] = "changed"
    assert prompt.messages == tuple(LONG)
    with pytest.raises(AttributeError):
        prompt.messages = ()


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], r"at least one chat message, got \[\]"),
        ("hi", 'list of at least one chat message, got "hi"'),
        ([turn("human", "hi")], r'messages\[0\] must be .*"role" system, developer, user, assistant.* got .*"human"'),
        ([*SYSTEM, {"role": "user"}], r'messages\[2\] must be .*string under "content".* got {"role": "user"}'),
        ([{**turn("user", "hi"), "tool_calls": [{"id": 1}]}], "without tool calls"),
        ([*ONE, ANSWER], 'last message of a prompt must be .*, got .*"assistant"'),
        ([turn("user", " ")], "not blank"),
    ],
)
def test_messages_that_are_no_prompt_are_refused(messages, message):
    with pytest.raises(ValueError, match=message):
        ChatPrompt(messages)


def test_keys_that_say_nothing_are_left_out():
    filled = {**turn("user", "rain"), "name": None, "tool_calls": None, "weight": 1}
    assert ChatPrompt([filled]).messages == (turn("user", "rain"),)
    for wrong in (3, None, " ", {"role": "user", "content": "rain"}):
        with pytest.raises(ValueError, match="a prompt must be a non-empty string or a list"):
            prompt_from_json(wrong)


# Sources

RECORDS = [
    {"prompt": "rain  "},
    {"prompt": LONG},
    {"messages": [*SYSTEM, ANSWER]},
    {"messages": ONE},
    {"prompt": "rain  "},
]
EXPECTED = ["rain  ", LONG, SYSTEM, ONE, "rain  "]
WITH_ANSWERS = [
    {"prompt": "rain", "answer": "good"},
    {"prompt": LONG, "completion": "not bad"},
    {"prompt": "a day", "response": "was"},
    {"messages": [*SYSTEM, ANSWER]},
    {"prompt": "left out", "messages": [*LONG, ANSWER]},
    {"prompt": ONE, "completion": [ANSWER]},
]
DEMONSTRATIONS = [("rain", "good"), (LONG, "not bad"), ("a day", "was"), (SYSTEM, "very good"), (LONG, "very good")]
DEMONSTRATIONS += [(ONE, "very good")]


def lines(path, records):
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n", encoding="utf-8")
    return path


def as_read(found):
    return [prompt_to_json(prompt) for prompt in found]


def test_every_kind_of_file_gives_the_same_prompts(tmp_path):
    assert as_read(load_prompts(lines(tmp_path / "a.jsonl", RECORDS))) == EXPECTED
    (tmp_path / "a.json").write_text(json.dumps(RECORDS, indent=1))
    assert as_read(load_prompts(str(tmp_path / "a.json"))) == EXPECTED
    (tmp_path / "b.json").write_text(json.dumps(["rain", LONG]))
    assert as_read(load_prompts(tmp_path / "b.json")) == ["rain", LONG]
    (tmp_path / "a.txt").write_text('\ufeffrain\r\n\r\n {"prompt": "day"} \r\nrain', encoding="utf-8")
    assert load_prompts(tmp_path / "a.txt") == ["rain", '{"prompt": "day"}', "rain"]


def test_a_separator_inside_a_json_string_does_not_end_the_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "one\u2028two"}\n', encoding="utf-8")
    assert load_prompts(tmp_path / "a.jsonl") == ["one\u2028two"]


def test_demonstrations_are_prompts_with_their_answers(tmp_path):
    found = load_demonstrations(lines(tmp_path / "a.jsonl", WITH_ANSWERS))
    assert [(prompt_to_json(prompt), answer) for prompt, answer in found] == DEMONSTRATIONS
    (tmp_path / "a.json").write_text(json.dumps(WITH_ANSWERS))
    assert load_demonstrations(tmp_path / "a.json") == found and isinstance(found[0], Demonstration)


def test_demonstrations_become_completions(tokenizer):
    shown = [Demonstration("rain", "good"), Demonstration(ChatPrompt(SYSTEM), "not bad")]
    batch = completions_of_texts(tokenizer, [each.prompt for each in shown], [[each.answer] for each in shown])
    texts = [tokenizer.decode(row[mask]) for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
    opened = "system so very <eos> user rain <eos> assistant not bad <eos>"
    assert texts == ["user rain <eos> assistant good <eos>", opened] and batch.num_generations == 1


@pytest.mark.parametrize(
    ("load", "name", "content", "message"),
    [
        (load_prompts, "p.jsonl", '{"prompt": "a"}\n\n{"prompt": 3}', 'p.jsonl, line 3: .*"prompt".*got {"prompt": 3}'),
        (load_prompts, "p.jsonl", '"rain"', 'line 1: expected an object .* got "rain"'),
        (load_prompts, "p.jsonl", json.dumps({"prompt": [*ONE, ANSWER]}), "line 1: the last message .*user's"),
        (load_prompts, "p.jsonl", json.dumps({"messages": [ANSWER]}), "line 1: messages must hold a prompt before"),
        (load_prompts, "p.json", '["a", {"text": "b"}]', 'p.json, entry 2: .* got {"text": "b"}'),
        (load_prompts, "p.json", '{"prompt": "b"}', 'p.json must hold a list.* got {"prompt": "b"}; JSON lines end in'),
        (load_prompts, "p.json", '["a",\n"b', "p.json, line 2: not JSON"),
        (load_prompts, "p.json", "[]", "p.json holds no prompts"),
        (load_prompts, "p.txt", b"rain\xff", r"p.txt must be UTF-8, but byte 4 \(line 1\) is not"),
        (
            load_demonstrations,
            "p.txt",
            "rain",
            r"demonstrations must come from \.jsonl, .*, or hub:NAME, got .*p\.txt$",
        ),
        (
            load_demonstrations,
            "p.jsonl",
            '{"prompt": "a"}',
            'line 1: .*"answer", "completion", "response".* got {"prom',
        ),
        (load_demonstrations, "p.jsonl", '{"answer": "a"}', 'line 1: expected an object with "prompt" and'),
        (load_demonstrations, "p.jsonl", '{"prompt": "a", "answer": " "}', "line 1: .*non-empty string"),
        (load_demonstrations, "p.jsonl", json.dumps({"messages": LONG}), "line 1: .*that end with an answer"),
        (load_demonstrations, "p.jsonl", "\n", "holds no demonstrations"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, load, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        load(path)


def test_a_file_that_is_not_there_may_be_a_data_set():
    with pytest.raises(FileNotFoundError, match=r"prompts file some/set does not exist; .* hub:NAME"):
        load_prompts("some/set")
    with pytest.raises(FileNotFoundError, match=r"demonstrations file none\.jsonl does not exist"):
        load_demonstrations("none.jsonl")


# The hub


@pytest.fixture
def hub(monkeypatch):
    """Serve data sets by name and record the requests."""
    datasets = pytest.importorskip("datasets")
    known, asked = {}, []

    def load_dataset(name, *, split):
        asked.append((name, split))
        if name not in known:
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")
        return datasets.Dataset.from_list(known[name])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return known, asked


def test_data_sets_of_the_hub_give_prompts(hub):
    known, asked = hub
    known["a/plain"] = [{"prompt": "rain", "messages": [*ONE, ANSWER], "id": 1}, {"prompt": "day", "messages": None}]
    known["a/chat"] = [{"messages": [*SYSTEM, ANSWER], "chosen": [*LONG, ANSWER], "question": "bus"}]
    assert load_prompts("hub:a/plain") == ["rain", "day"]
    assert as_read(load_prompts("hub:a/chat:test[:10]")) == [SYSTEM]
    assert as_read(load_prompts("hub:a/chat::chosen")) == [LONG]
    assert load_prompts("hub:a/chat:train[5:10]:question") == ["bus"]
    assert asked == [("a/plain", "train"), ("a/chat", "test[:10]"), ("a/chat", "train"), ("a/chat", "train[5:10]")]


def test_data_sets_of_the_hub_give_demonstrations(hub):
    known, _ = hub
    known["a/pairs"] = [{"prompt": "rain", "completion": "good", "messages": None, "id": 7}]
    known["a/chat"] = [{"prompt": "rain", "messages": [*SYSTEM, ANSWER], "rejected": [*ONE, turn("assistant", "bad")]}]
    assert load_demonstrations("hub:a/pairs") == [("rain", "good")]
    for source, messages, answer in (("hub:a/chat", SYSTEM, "very good"), ("hub:a/chat:train:rejected", ONE, "bad")):
        ((prompt, found),) = load_demonstrations(source)
        assert prompt_to_json(prompt) == messages and found == answer


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("hub:none", OSError, "hub:none cannot be loaded: Dataset 'none' doesn't exist"),
        ("hub:", ValueError, "expected hub:NAME, hub:NAME:SPLIT or hub:NAME:SPLIT:COLUMN, got 'hub:'"),
        ("hub:a:b:c:d", ValueError, "expected hub:NAME"),
        (
            "hub:odd",
            ValueError,
            "hub:odd must have the column prompt or messages, but has text, n; .* hub:odd:train:COL",
        ),
        ("hub:qa", ValueError, "hub:qa must have the column prompt or messages, but has question, answer; "),
        ("hub:odd:train:txt", ValueError, "must have the column txt, but has text, n"),
        ("hub:odd:train:n", ValueError, 'hub:odd:train:n, row 0: expected .* got {"prompt": 4}'),
        ("hub:odd:train:text", ValueError, 'hub:odd:train:text, row 1: expected .* got {"prompt": ""}'),
    ],
)
def test_what_is_wrong_with_a_data_set_is_said(hub, source, error, message):
    hub[0]["odd"] = [{"text": "rain", "n": 4}, {"text": "", "n": 5}]
    hub[0]["qa"] = [{"question": "rain", "answer": "bad"}]
    with pytest.raises(error, match=message):
        load_prompts(source)


def test_a_folder_is_read_as_the_hub_would_be(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    lines(folder / "train.jsonl", [{"messages": [*LONG, ANSWER]}, {"messages": [*SYSTEM, ANSWER]}])
    lines(folder / "test.jsonl", [{"messages": [*ONE, ANSWER]}])
    assert as_read(load_prompts(f"hub:{folder}")) == [LONG, SYSTEM]
    assert as_read(load_prompts(f"hub:{folder}:train[:1]")) == [LONG]
    assert [answer for _, answer in load_demonstrations(f"hub:{folder}:test")] == ["very good"]
    with pytest.raises(ValueError, match=r'hub:.*set:dev cannot be loaded: Unknown split "dev"'):
        load_prompts(f"hub:{folder}:dev")


# Readers of a conversation


@CONVERSATIONS
@pytest.mark.parametrize("system", [None, "not bad"])
def test_the_chat_template_gets_the_messages(tokenizer, messages, system):
    own = messages is SYSTEM or system is None
    wanted = messages if own else [turn("system", system), *messages]
    by_hand = tokenizer.apply_chat_template(wanted, tokenize=True, add_generation_prompt=True, return_dict=False)
    encoded = encode_prompts(tokenizer, [ChatPrompt(messages), "rain " * 20], system=system)
    assert encoded.input_ids[0][encoded.attention_mask[0].bool()].tolist() == by_hand
    assert as_messages(ChatPrompt(messages), system) == wanted


def test_without_a_template_only_one_turn_is_encoded():
    plain = make_tokenizer(chat=False)
    assert encode_prompts(plain, [ChatPrompt(ONE)]).input_ids.tolist() == [plain("rain day")["input_ids"]]
    for messages, roles in ((SYSTEM, "system, user"), (LONG, "user, assistant, user"), (SYSTEM[:1], "system")):
        with pytest.raises(ValueError, match=f"prompt 1 must be one message of the user, got messages of {roles}: "):
            encode_prompts(plain, ["rain", ChatPrompt(messages)])


def test_messages_that_a_template_refuses_are_named():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no place for a system message') }}"
    with pytest.raises(ValueError, match="refuses messages of system, user: no place for a system message"):
        encode_prompts(tokenizer, [ChatPrompt(SYSTEM)])


def test_a_conversation_is_sampled_from_what_the_template_made(tokenizer):
    draw = TransformersSampler(make_model(), tokenizer, max_completion_length=4, system="not bad")
    batch = draw.sample([ChatPrompt(LONG), ChatPrompt(SYSTEM)], 3, seed=0)
    encoded = encode_prompts(tokenizer, [ChatPrompt(LONG), ChatPrompt(SYSTEM)], system="not bad")
    width = encoded.input_ids.shape[1]
    assert torch.equal(batch.input_ids[:, :width], encoded.input_ids.repeat_interleave(3, 0))
    assert "user and a day" in tokenizer.decode(batch.input_ids[0]) and len(batch.texts) == 2


def test_a_reward_model_reads_the_messages(tokenizer):
    model = make_classifier()
    conversations = [ONE, SYSTEM, LONG]
    rewards = ModelReward(model, tokenizer)([ChatPrompt(each) for each in conversations], [ANSWER["content"]] * 3)
    for messages, reward in zip(conversations, rewards, strict=True):
        ids = tokenizer.apply_chat_template([*messages, ANSWER], return_tensors="pt", return_dict=True)["input_ids"]
        with torch.no_grad():
            assert reward == pytest.approx(float(model(ids).logits), rel=1e-4, abs=1e-5)
    assert len({round(reward, 3) for reward in rewards}) == 3


def test_a_server_gets_the_messages(tokenizer):
    server = Server()
    try:
        sampler = OpenAISampler(server.url, "tiny", tokenizer, max_completion_length=4, system="not bad", concurrency=1)
        batch = sampler.sample([ChatPrompt(LONG), ChatPrompt(SYSTEM), "rain"], 2, seed=0)
    finally:
        server.close()
    asked = [body["messages"] for _, body, _ in server.requests]
    own = turn("system", "not bad")
    assert asked == [[own, *LONG], SYSTEM, [own, turn("user", "rain")]] and len(batch.texts) == 3
    assert set(" ".join(batch.texts[0]).split()) <= set(WORDS)


def test_records_of_conversations_are_written_read_and_looked_up(tmp_path, tokenizer):
    path = tmp_path / "r.jsonl"
    spaced = [turn("user", " rain ")]
    written = [
        Recorded(ChatPrompt(messages), ("good", "bad"), rewards=(float(k), 0.0))
        for k, messages in enumerate([SYSTEM, LONG, spaced], start=1)
    ]
    save_records(path, written)
    found = load_records(path)
    assert found == written and as_read(record.prompt for record in found) == [SYSTEM, LONG, spaced]
    asked = [record.prompt for record in found]
    assert RecordedJudge(path).judge(asked, [["bad", "good"]] * 3).rewards.tolist() == [[0, 1], [0, 2], [0, 3]]
    batch = RecordedSampler(path, tokenizer).sample([*asked, "rain"], 2, seed=0)
    assert all(set(group) == {"good", "bad"} for group in batch.texts)
    assert "user and a day <eos> assistant" in tokenizer.decode(batch.input_ids[2])
    path.write_text(json.dumps({"prompt": [*ONE, ANSWER], "responses": ["a"]}))
    with pytest.raises(ValueError, match="line 1: the last message of a prompt"):
        load_records(path)


def test_conversations_are_evaluated_and_drawn_again(tmp_path):
    for package in ("rich", "matplotlib", "safetensors"):
        pytest.importorskip(package)
    from windkern.commands.cli import main

    model, output = save_model(tmp_path / "model"), tmp_path / "eval"
    given = lines(tmp_path / "p.jsonl", [{"prompt": LONG}, {"messages": [*SYSTEM, ANSWER]}, {"prompt": " rain "}])
    save_records(tmp_path / "r.jsonl", [Recorded(prompt, ("good", "bad")) for prompt in load_prompts(given)])
    sides = ("--model", str(model), "--base", f"recorded:{tmp_path / 'r.jsonl'}", "--prompts", str(given))
    options = ("--judge", "tiny_model:goodness", "--output-dir", str(output), "--max-completion-length", "4")
    assert main(["eval", *sides, *options, "--dtype", "float32"]) == 0
    content = json.loads((output / "eval.json").read_text())
    assert [entry["prompt"] for entry in content["prompts"]] == [LONG, SYSTEM, " rain "]
    again = tmp_path / "again.png"
    assert main(["plot", str(output / "eval.json"), "--output", str(again)]) == 0
    assert again.read_bytes() == (output / "eval.png").read_bytes()
