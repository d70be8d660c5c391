"""Where sampled, recorded, served and demonstrated responses begin and end, with several tokenizers."""

from __future__ import annotations

import string

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tiny_model import make_model, make_tokenizer  # noqa: E402

from windkern.train.data.loading import encode_prompts, opened_prompts  # noqa: E402
from windkern.train.data.records import Recorded, load_records, save_records  # noqa: E402
from windkern.train.data.turns import encode_responses, turn_of  # noqa: E402
from windkern.train.judges.recorded import RecordedJudge  # noqa: E402
from windkern.train.samplers.recorded import RecordedSampler, completions_of_ids, completions_of_texts  # noqa: E402
from windkern.train.samplers.sampler import TransformersSampler  # noqa: E402

GEMMA = (
    "{% for m in messages %}{{ '<turn>' + m['role'] + '\n' + (m['content'] | trim) + '</turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{{ 'assistant:' }}"
ANSWERS = (" blue", "blue", "\n    return 1", "\n\tif x:\n\t\ty  ", "  two  spaces ", "tail\n", "caf\u00e9 \U0001f600")


def finished(inner, template=None):
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    made.chat_template = template
    return made


def byte_level(template=None, special=("<turn>", "</turn>"), behind=False):
    """Make a tokenizer of bytes, like GPT-2's and Llama 3's; `behind` appends the end token to each text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    names = ["<pad>", "<eos>", *special]
    table = {word: k for k, word in enumerate([*names, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    inner = Tokenizer(models.BPE(vocab=table, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(name, special=True) for name in names])
    if behind:
        inner.post_processor = processors.TemplateProcessing(
            single="<pad> $A <eos>", special_tokens=[("<pad>", 0), ("<eos>", 1)]
        )
    return finished(inner, template)


def sentence_piece(template=None):
    """Make a tokenizer of characters that puts a space before each text, like Llama 2's."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    names = ["<pad>", "<eos>"]
    letters = ["▁", *string.ascii_letters, *string.digits, *"[]()/:.<>\n\t\u00e9\U0001f600"]
    inner = Tokenizer(models.BPE(vocab={word: k for k, word in enumerate([*names, *letters])}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.decoder = decoders.Metaspace(prepend_scheme="always")
    inner.add_special_tokens([AddedToken(name, special=True) for name in names])
    return finished(inner, template)


def fitted(tokenizer, batch, row=0):
    """Return everything that the model sees of a row, as text."""
    return tokenizer.decode(batch.input_ids[row][batch.attention_mask[row]], clean_up_tokenization_spaces=False)


# Ends


@pytest.mark.parametrize(
    ("tokenizer", "space", "end"),
    [
        (byte_level(GEMMA), "", "</turn>"),
        (byte_level(LLAMA2), " ", "<eos>"),
        (byte_level(PLAIN), " ", "<eos>"),
        (byte_level(), "", "<eos>"),
        (byte_level("{{ 'nothing of the answer' }}"), "", "<eos>"),
        (make_tokenizer(), " ", "<eos>"),
    ],
    ids=["own end", "eos in the template", "no end in the template", "no template", "no answer", "words"],
)
def test_a_turn_ends_as_the_template_ends_it(tokenizer, space, end):
    turn = turn_of(tokenizer)
    assert turn.space == space and tokenizer.convert_ids_to_tokens(turn.end) == end
    assert set(turn.ends) == {turn.end, tokenizer.eos_token_id}
    made = completions_of_texts(tokenizer, ["good"], [["bad", "very bad"]])
    for row in range(2):
        ids = made.input_ids[row][made.completion_mask[row]].tolist()
        assert ids[-1] == turn.end and not set(ids[:-1]) & set(turn.ends)


def test_an_answer_stands_in_the_template_as_the_template_would_put_it():
    for tokenizer in (byte_level(GEMMA), byte_level(LLAMA2), sentence_piece(LLAMA2)):
        dialogue = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        whole = tokenizer.apply_chat_template(dialogue, tokenize=False)
        made = completions_of_texts(tokenizer, ["Hi"], [["Hello"]])
        assert "".join(fitted(tokenizer, made).split()) == "".join(whole.split())
        assert made.texts == (("Hello",),)


def test_a_response_has_one_end():
    tokenizer = byte_level(GEMMA)
    batch = completions_of_texts(
        tokenizer, ["Hi"], [["Hello", "Hello</turn>", "Hello<eos>", "Hello</turn>\n<turn>user\nmore</turn>"]]
    )
    rows = [tokenizer.decode(batch.input_ids[k][batch.completion_mask[k]]) for k in range(4)]
    assert rows == ["Hello</turn>", "Hello</turn>", "Hello<eos>", "Hello</turn>"]
    assert batch.texts == (("Hello",) * 4,) and not batch.truncated.any()


def test_the_end_of_the_template_ends_a_sample_too():
    """The model's generation_config does not know that token."""
    tokenizer, model = make_tokenizer(), make_model()
    tokenizer.add_special_tokens({"additional_special_tokens": ["so"]})  # a word of the vocabulary
    tokenizer.chat_template = tokenizer.chat_template.replace("<eos>", "so")
    sampler = TransformersSampler(model, tokenizer, max_completion_length=8)
    end = tokenizer.convert_tokens_to_ids("so")
    assert turn_of(tokenizer).end == end and set(sampler.end_ids) == {1, end}
    batch = sampler.sample(["rain", "day"], 8, seed=0)
    rows = [ids[own].tolist() for ids, own in zip(batch.input_ids, batch.completion_mask, strict=True)]
    assert any(row[-1] == end for row in rows) and all(end not in row[:-1] for row in rows)


def test_a_tokenizer_that_ends_every_text_does_not_end_a_prompt():
    tokenizer = byte_level(behind=True)
    assert tokenizer.decode(tokenizer("Hi")["input_ids"]) == "<pad>Hi<eos>"
    assert tokenizer.decode(encode_prompts(tokenizer, ["Hi"]).input_ids[0]) == "<pad>Hi"
    made = completions_of_texts(tokenizer, ["Hi"], [[" you"]])
    assert fitted(tokenizer, made) == "<pad>Hi you<eos>" and made.texts == ((" you",),)


# Space


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
@pytest.mark.parametrize("prompt", ["The sky is", "def one():", "twice:\n", "ends with "])
def test_nothing_is_lost_or_put_between_prompt_and_answer(make, prompt):
    tokenizer = make()
    batch = completions_of_texts(tokenizer, [prompt], [ANSWERS])
    assert [fitted(tokenizer, batch, row) for row in range(len(ANSWERS))] == [
        f"{prompt}{text}<eos>" for text in ANSWERS
    ]
    assert batch.texts == (ANSWERS,)


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
@pytest.mark.parametrize("template", [None, GEMMA, LLAMA2])
def test_texts_of_ids_and_ids_of_texts_are_inverse(make, template):
    tokenizer = make(template)
    made = completions_of_texts(tokenizer, ["Hi", "So"], [ANSWERS, ANSWERS])
    again = completions_of_texts(tokenizer, ["Hi", "So"], made.texts)
    assert torch.equal(made.input_ids, again.input_ids) and again.texts == made.texts
    groups = [
        [made.input_ids[row][made.completion_mask[row]].tolist() for row in range(first, first + len(ANSWERS))]
        for first in (0, len(ANSWERS))
    ]
    known = completions_of_ids(tokenizer, ["Hi", "So"], groups)
    assert torch.equal(made.input_ids, known.input_ids) and known.texts == made.texts


def test_the_text_of_a_sample_is_what_was_sampled():
    """With the leading space that a base model draws where a word begins."""
    tokenizer = make_tokenizer(chat=False)
    batch = TransformersSampler(make_model(), tokenizer, max_completion_length=4).sample(["the bus", "rain"], 4, seed=0)
    for k, (prompt, group) in enumerate(zip(["the bus", "rain"], batch.texts, strict=True)):
        for j, text in enumerate(group):
            row = 4 * k + j
            whole = tokenizer.decode(batch.input_ids[row][batch.attention_mask[row]], skip_special_tokens=True)
            assert prompt + text == whole


def test_merges_over_the_seam_leave_the_prompt_as_it_was():
    """With a tokenizer that has one token for two line ends, the prompt keeps its own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    table = {word: k for k, word in enumerate(["<pad>", "<eos>", *alphabet, "ĊĊ"])}
    inner = Tokenizer(models.BPE(vocab=table, merges=[("Ċ", "Ċ")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(name, special=True) for name in ("<pad>", "<eos>")])
    tokenizer = finished(inner)
    opened = opened_prompts(tokenizer, ["a\n"])
    (row,) = encode_responses(tokenizer, turn_of(tokenizer), opened, ["\nb"])
    assert tokenizer.convert_ids_to_tokens(row) == ["Ċ", "b"]
    assert fitted(tokenizer, completions_of_texts(tokenizer, ["a\n"], [["\nb"]])) == "a\n\nb<eos>"


# What the judge reads


def test_a_cut_response_is_cut_for_its_reader_too():
    tokenizer = byte_level()
    batch = completions_of_texts(tokenizer, ["Hi"], [[" a long answer", " short"]], max_completion_length=7)
    assert batch.texts == ((" a long", " short"),) and batch.truncated.tolist() == [True, False]
    ids = [[*batch.input_ids[0][batch.completion_mask[0]].tolist(), 40, 41]]
    assert completions_of_ids(tokenizer, ["Hi"], [ids], max_completion_length=7).texts == ((" a long",),)


def test_known_ids_are_not_encoded_again():
    tokenizer = sentence_piece()
    odd = [tokenizer.convert_tokens_to_ids(["▁", "▁", "b", "▁"])]  # no text has these ids
    batch = completions_of_ids(tokenizer, ["Hi"], [odd], truncated=[[True]])
    assert batch.input_ids[0][batch.completion_mask[0]].tolist() == odd[0] and batch.texts == (("  b ",),)
    with pytest.raises(ValueError, match=f"ids below the tokenizer's {len(tokenizer)}, got -1"):
        completions_of_ids(tokenizer, ["Hi"], [[[3, -1]]])
    with pytest.raises(ValueError, match="a response to 'Hi' must have tokens"):
        completions_of_ids(tokenizer, ["Hi"], [[[]]], truncated=[[True]])
    with pytest.raises(ValueError, match="responses must have one group of responses for each of 1 prompts, got 2"):
        completions_of_ids(tokenizer, ["Hi"], [[[3]], [[3]]])


# Records


def test_records_keep_their_space_and_are_found_with_and_without_it(tmp_path):
    path = tmp_path / "r.jsonl"
    written = [
        Recorded("def f():", ("\n    a", "\n  a"), rewards=(1.0, 2.0)),
        Recorded("def f():\n", ("x",), rewards=(3.0,)),
    ]
    save_records(path, written)
    assert load_records(path) == written
    sampler, judge = RecordedSampler(path, byte_level()), RecordedJudge(path)
    assert sampler.everything("def f():\n").texts == (("x",),) and len(sampler.everything("def f():").texts[0]) == 2
    assert len(sampler.everything(" def f(): ").texts[0]) == 3  # found loosely: all of them
    assert judge.judge(["def f():"], [["\n    a", "\n  a"]]).rewards.tolist() == [[1.0, 2.0]]
    assert judge.judge(["def f(): "], [["a ", " x"]]).rewards.tolist() == [[2.0, 3.0]]


def test_letters_that_a_tokenizer_composes_are_found(tmp_path):
    path = tmp_path / "r.jsonl"
    save_records(path, [Recorded("p", ("cafe\u0301",), rewards=(1.0,))])
    assert RecordedJudge(path).judge(["p"], [["caf\u00e9"]]).rewards.tolist() == [[1.0]]


def test_a_cut_response_was_not_judged(tmp_path):
    path = tmp_path / "r.jsonl"
    save_records(path, [Recorded("Hi", ("a long answer", "short"), rewards=(1.0, 0.0))])
    batch = RecordedSampler(path, byte_level(), max_completion_length=6).sample(["Hi"], 2, seed=0)
    assert sorted(batch.texts[0]) == ["a long", "short"]
    with pytest.raises(ValueError, match=r"'a long' to 'Hi' was not judged; a longer one was: .* max_completion"):
        RecordedJudge(path).judge(["Hi"], batch.texts)
