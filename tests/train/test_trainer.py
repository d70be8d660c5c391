"""WindTrainer on a model of a few words: what is fitted to what, with equal results on every path."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import tiny_model
from trainer_cases import (
    HELDOUT,
    PROMPTS,
    assert_has_not_moved,
    lora,
    make_config,
    make_trainer,
    sharing_seen,
    weights_of,
)

from windkern import hf
from windkern.losses import LOSSES
from windkern.train.checkpoints.identity import ResumeError
from windkern.train.config import WindConfig
from windkern.train.data.loading import Demonstration
from windkern.train.dropout import disable_dropout
from windkern.train.groups import verdict_of

SEPARABLE = [name for name, loss in LOSSES.items() if loss.separable]


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def begin(trainer):
    """Start the first iteration, before any step."""
    return trainer.outer.begin(1, inside=False)


def test_the_first_loss_is_the_variance_of_the_win_rates(tmp_path):
    """With pi_theta = pi_t = pi_ref every log-ratio is 0, so the centred square loss is c^2 Var w."""
    trainer = make_trainer(tmp_path, num_iterations=1, steps_per_iteration=1, per_device_train_batch_size=8)
    trainer.train()
    win_rates = verdict_of(trainer.iterations.current.groups).prefs.mean(-1)
    assert losses_of(trainer) == [pytest.approx(float(win_rates.var(-1, unbiased=False).mean()), rel=1e-4)]
    first = trainer.state.log_history[0]
    assert_has_not_moved(first["kl_old"], first["kl_ref"])
    assert first["residual"] > 0.01
    # At pi = pi_ref the exploitability is Var(w) / (2 beta) to second order.
    assert first["exploitability"] == pytest.approx(losses_of(trainer)[0] / (2 * 0.05), rel=1e-4)


def test_the_loss_falls_and_the_win_rate_rises(tmp_path):
    trainer = make_trainer(
        tmp_path,
        heldout=HELDOUT,
        num_iterations=3,
        steps_per_iteration=16,
        passes_per_iteration=4,
        eval_strategy="epoch",
        eval_responses=8,
        reference_responses=8,
    )
    trainer.train()
    rates = [record.win_rate for record in trainer.history]
    assert len(rates) == 3 and rates[-1] > 0.65 and rates[-1] > rates[0]
    losses = losses_of(trainer)
    assert sum(losses[12:16]) < sum(losses[:4])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_plain_torch_and_completions_only(tmp_path, temperature):
    trainer = make_trainer(tmp_path, num_iterations=1, temperature=temperature)
    group = begin(trainer).fitted[0]
    for tokens, got in zip(group.completions, group.constants["old_logps"].tolist(), strict=True):
        ids = torch.tensor([[*group.prompt_ids, *tokens]])
        logps = trainer.model(ids).logits.detach().double().div(temperature).log_softmax(-1)
        want = sum(float(logps[0, len(group.prompt_ids) + k - 1, token]) for k, token in enumerate(tokens))
        assert got == pytest.approx(want, abs=1e-4)


def test_accumulated_gradients_are_those_of_the_big_batch(tmp_path, monkeypatch):
    """They also equal those of rows with one response each."""
    gradients, seen = [], sharing_seen(monkeypatch)
    for name, size, way in (("big", 8, "auto"), ("small", 1, "auto"), ("middle", 2, "auto"), ("apart", 8, "never")):
        seen.clear()
        trainer = make_trainer(
            tmp_path / name,
            num_iterations=1,
            steps_per_iteration=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            optim="sgd",
            learning_rate=1e-2,
            max_grad_norm=1e9,
            shared_prompt=way,
        )
        before = weights_of(trainer)
        trainer.train()
        assert any(seen) == (way == "auto")
        gradients.append({name: value - before[name] for name, value in weights_of(trainer).items()})
    for other in gradients[1:]:
        for name, value in gradients[0].items():
            torch.testing.assert_close(other[name], value, rtol=2e-4, atol=1e-7)
    assert max(float(value.abs().max()) for value in gradients[0].values()) > 1e-5


def test_the_extremes_are_fitted_to_their_win_rates_against_all(tmp_path):
    trainer = make_trainer(tmp_path, num_generations=8, fit_responses=3)
    found = begin(trainer)
    for group, rollout in zip(found.fitted, found.groups, strict=True):
        rates = torch.tensor(rollout.prefs).mean(-1)
        torch.testing.assert_close(group.constants["win_rates"], rates.sort().values[[0, -2, -1]])
        for tokens, rate in zip(group.completions, group.constants["win_rates"], strict=True):
            assert any(tokens == other and rate == mine for other, mine in zip(rollout.completions, rates, strict=True))


@pytest.mark.parametrize("name", SEPARABLE)
def test_every_separable_loss_trains(tmp_path, name):
    fitted = LOSSES[name].group
    demonstrated = fitted.kind == "demonstration"
    prompts = [Demonstration(prompt, "good good day") for prompt in PROMPTS] if demonstrated else PROMPTS
    trainer = make_trainer(tmp_path, loss=name, prompts=prompts, num_iterations=1, num_generations=fitted.sampled or 4)
    before = weights_of(trainer)
    trainer.train()
    losses = torch.tensor(losses_of(trainer))
    assert len(losses) == 2 and losses.isfinite().all()
    assert any(not torch.equal(before[name], value) for name, value in weights_of(trainer).items())


@pytest.mark.parametrize("name", ["wind", "sppo", "bon_sft", "trajectory_balance", "dpo", "spin"])
def test_losses_raise_the_reward(tmp_path, name):
    prompts = [Demonstration(prompt, "good good good") for prompt in PROMPTS] if name == "spin" else PROMPTS
    changes = {"num_generations": 1} if name == "spin" else {"num_generations": 8}
    trainer = make_trainer(
        tmp_path,
        loss=name,
        prompts=prompts,
        heldout=HELDOUT,
        num_iterations=4,
        steps_per_iteration=4,
        eval_strategy="epoch",
        eval_responses=16,
        learning_rate=0.01,
        **changes,
    )
    trainer.train()
    assert trainer.history[-1].win_rate > 0.6


def test_pairs_are_the_best_and_the_worst(tmp_path):
    trainer = make_trainer(tmp_path, loss="dpo")
    found = begin(trainer)
    for group, rollout in zip(found.fitted, found.groups, strict=True):
        rates = torch.tensor(rollout.prefs).mean(-1)
        assert rollout.completions.index(group.completions[0]) in (rates == rates.max()).nonzero()
        assert rollout.completions.index(group.completions[1]) in (rates == rates.min()).nonzero()
        assert bool(group.constants["where"].all()) == bool(rates.max() > rates.min())


def test_a_demonstration_is_chosen_over_a_sample(tmp_path):
    prompts = [Demonstration(prompt, "good day") for prompt in PROMPTS]
    trainer = make_trainer(tmp_path, loss="spin", num_generations=1, prompts=prompts, given={"judge": None})
    tokenizer = trainer.processing_class
    for group in begin(trainer).fitted:
        assert tokenizer.decode(group.completions[0]) == "good day <eos>"
        assert len(group.completions) == 2 and set(group.constants) == {"old_logps"}


def test_the_anchor_follows_the_policy_slowly(tmp_path):
    trainer = make_trainer(
        tmp_path, loss="bond", num_generations=3, anchor_rate=0.25, steps_per_iteration=1, num_iterations=1
    )
    start = weights_of(trainer)
    trainer.train()
    end = weights_of(trainer)
    with trainer.policy.anchor.in_place():
        for name, value in trainer.model.named_parameters():
            torch.testing.assert_close(value, start[name] + 0.25 * (end[name] - start[name]))
    assert all(torch.equal(end[name], value) for name, value in trainer.model.named_parameters())


def test_the_anchor_scores_its_own_samples(tmp_path):
    trainer = make_trainer(tmp_path, loss="bond", num_generations=3, anchor_rate=0.25, num_iterations=1)
    trainer.train()
    groups = trainer.outer.begin(2, inside=False).fitted
    with trainer.policy.anchor.in_place():
        anchor = trainer.policy.logps(groups, 2)
    for group, mine, other in zip(groups, trainer.policy.logps(groups, 2), anchor, strict=True):
        assert torch.equal(group.constants["anchor_logps"], other) and not torch.allclose(mine, other)
    assert len({float(group.constants["baseline"]) for group in groups}) == 1


def test_truncated_responses_are_kept_or_dropped(tmp_path):
    kept = make_trainer(tmp_path / "kept", max_completion_length=4)
    dropped = make_trainer(tmp_path / "dropped", max_completion_length=4, mask_truncated_completions=True)
    assert "where" not in begin(kept).fitted[0].constants
    found = begin(dropped)
    for group, rollout in zip(found.fitted, found.groups, strict=True):
        assert group.constants["where"].tolist() == [not each for each in rollout.truncated]
        torch.testing.assert_close(group.constants["win_rates"], torch.tensor(rollout.prefs).mean(-1))
        for tokens, cut in zip(rollout.completions, rollout.truncated, strict=True):
            assert (tokens[-1] != 1) == cut and (len(tokens) == 4 or not cut)
    assert any(any(rollout.truncated) for rollout in found.groups)


def test_the_hardest_prompts_are_answered_more_often(tmp_path):
    def reward(prompts, responses):
        """A reward that differs only between responses to prompts about buses."""
        scores = tiny_model.goodness(prompts, responses)
        return [score if "bus" in prompt else 0.0 for prompt, score in zip(prompts, scores, strict=True)]

    trainer = make_trainer(
        tmp_path, reward=reward, focus="hardest", focus_uniform_share=0.5, num_iterations=6, learning_rate=1e-6
    )
    asked = []
    for iteration in range(1, 7):
        asked.append([PROMPTS[group.place] for group in trainer.outer.begin(iteration, inside=False).groups])
    late = [prompt for prompts in asked[3:] for prompt in prompts]
    assert sum("bus" in prompt for prompt in late) >= 6  # of 12; uniform would be 3
    again = make_trainer(
        tmp_path, reward=reward, focus="hardest", focus_uniform_share=0.5, num_iterations=6, learning_rate=1e-6
    )
    assert [PROMPTS[group.place] for group in again.outer.begin(6, inside=True).groups] == asked[5]


def test_replayed_groups_come_from_earlier_iterations(tmp_path):
    changes = {"loss": "trajectory_balance", "replay": True, "replay_on_policy_prob": 0.0, "num_generations": 3}
    trainer = make_trainer(tmp_path, **changes)
    first = begin(trainer)
    fresh = {tokens for group in first.groups for tokens in group.completions}
    iteration = trainer.outer.begin(2, inside=False)
    second = iteration.fitted
    fresh_again = {tokens for group in iteration.groups for tokens in group.completions}
    drawn = {tokens for group in second for tokens in group.completions}
    assert drawn - fresh_again and drawn <= fresh | fresh_again and len(first.fitted) == len(second)
    again = make_trainer(tmp_path, **changes)
    assert [group.completions for group in again.outer.begin(2, inside=True).fitted] == [
        group.completions for group in second
    ]
    with torch.no_grad():
        logps = hf.group_logps(
            trainer.model, [group.prompt_ids for group in second], [group.completions for group in second]
        )  # the policy has not moved, so it is the reference
    ref_logps = torch.stack([group.constants["ref_logps"] for group in second])
    torch.testing.assert_close(ref_logps, logps, rtol=1e-4, atol=1e-4)


def test_dropout_is_off_and_modes_of_attention_too(tmp_path):
    model = tiny_model.make_model()
    model.model.layers[0].self_attn.attention_dropout = 0.5
    trainer = make_trainer(tmp_path, model=model, num_iterations=1, steps_per_iteration=1)
    trainer.train()
    assert_has_not_moved(trainer.state.log_history[0]["kl_old"])


def test_every_dropout_module_is_off():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5))
    disable_dropout(model)
    ones = torch.ones(8, 4)
    assert torch.equal(model.train()(ones), model.eval()(ones))


def test_the_reference_stays_and_both_gradients_of_a_tied_embedding_arrive(tmp_path):
    trainer = make_trainer(tmp_path, num_iterations=1, steps_per_iteration=1)
    before = {name: value.clone() for name, value in trainer.reference.model.named_parameters()}
    inputs = {"batch": trainer.policy.batch(begin(trainer).fitted[:2])}
    trainer.compute_loss(trainer.model, inputs).backward()
    embedding = trainer.model.get_input_embeddings().weight
    batch = inputs["batch"]
    read = torch.isin(torch.arange(embedding.shape[0]), batch.rows.input_ids[batch.rows.attention_mask])
    assert embedding is trainer.model.lm_head.weight
    assert (embedding.grad[~read].abs().sum(-1) > 0).all() and (embedding.grad[read].abs().sum(-1) > 0).all()
    trainer.train()
    assert all(torch.equal(before[name], value) for name, value in trainer.reference.model.named_parameters())


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`",
    "ignore:Model has `tie_word_embeddings=True`",
    "ignore:Setting `save_embedding",
    "ignore:Could not find a config file in",  # for a model without a name: peft before 0.21
)
@pytest.mark.parametrize("modules", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_an_adapter_has_its_base_as_reference(tmp_path, modules):
    pytest.importorskip("peft")
    torch.manual_seed(1)
    trainer = make_trainer(
        tmp_path, reference="adapter", given={"peft_config": lora(target_modules=modules)}, num_iterations=1
    )
    groups = begin(trainer).fitted
    base = make_trainer(tmp_path / "base")
    want = base.policy.logps(groups, 2)
    for group, logps in zip(groups, want, strict=True):
        torch.testing.assert_close(group.constants["ref_logps"], logps, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(group.constants["ref_logps"], group.constants["old_logps"], atol=1e-3)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "lora_" in name}


def recorded(tmp_path) -> str:
    path = tmp_path / "responses.jsonl"
    lines = [
        {"prompt": prompt, "responses": ["good day", "bad rain", "the bus", "so very good and bad", "not a bus"]}
        for prompt in PROMPTS
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"recorded:{path}"


def test_a_precomputed_reference_is_the_policy_at_the_start(tmp_path):
    changes = {"sampler": recorded(tmp_path), "num_iterations": 3, "num_generations": 3}
    plain = make_trainer(tmp_path / "model", **changes)
    plain.train()
    table = make_trainer(tmp_path / "table", reference="precomputed", **changes)
    table.train()
    for ours, theirs in zip(weights_of(table).values(), weights_of(plain).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "table" / "ref_logps.json").is_file()


def test_no_logits_exist_outside_generation(tmp_path, monkeypatch):
    """With recorded responses nothing is generated, and the whole product with the head is never formed."""
    trainer = make_trainer(tmp_path, sampler=recorded(tmp_path), num_generations=3)
    vocab, plain = trainer.model.config.vocab_size, torch.nn.Linear.forward

    def refuse(self, states):
        assert self.out_features != vocab, "logits"
        return plain(self, states)

    monkeypatch.setattr(torch.nn.Linear, "forward", refuse)
    with pytest.raises(AssertionError, match="logits"):
        trainer.model(torch.tensor([[3, 4]]))
    trainer.train()
    assert len(losses_of(trainer)) == 4


def test_what_is_saved_is_a_model_that_says_where_it_comes_from(tmp_path):
    from transformers import AutoModelForCausalLM

    trainer = make_trainer(tmp_path, num_iterations=1)
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(value, dict(loaded.named_parameters())[name]) for name, value in weights_of(trainer).items())
    card = (tmp_path / "README.md").read_text()
    assert "2410.20727" in card and "wind" in card


def test_a_run_does_not_mix_with_another(tmp_path):
    make_trainer(tmp_path, num_iterations=1).train()
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run"):
        make_trainer(tmp_path, num_iterations=1).train()
    with pytest.raises(ResumeError, match=r"eta 4\.0 there, 2\.0 here"):
        make_trainer(tmp_path, num_iterations=2, eta=2.0).train(resume_from_checkpoint=True)
    more = make_trainer(tmp_path, num_iterations=2)
    more.train(resume_from_checkpoint=True)
    assert [record.iteration for record in more.history] == [1, 2]
    anew = make_trainer(tmp_path, num_iterations=1, overwrite=True)
    anew.train()
    assert [record.iteration for record in anew.history] == [1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eta": -1.0}, "eta must be"),
        ({"loss": "windy"}, "loss must be one of"),
        ({"top_p": 0.9, "sampler": "http://localhost"}, "top_p must be 1 with sampler='http://localhost'"),
        ({"loss": "kto"}, "loss must be a sum over groups"),
        ({"objective": "kl", "loss": "sppo"}, "loss='sppo' has no argument objective; it has eta"),
        ({"num_iterations": 0}, "num_iterations must be"),
        ({"steps_per_iteration": 4, "passes_per_iteration": 3}, "passes_per_iteration must divide"),
        ({"num_generations": 1}, "num_generations must be"),
        ({"loss": "spin", "num_generations": 2}, "num_generations must be 1"),
        ({"fit_responses": 5}, "fit_responses must be at most"),
        ({"fit_responses": 2, "objective": "square_pair"}, "fit_responses must be None"),
        ({"top_p": 1.5}, "top_p must be at most 1"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"reference": "none"}, "reference must be one of"),
        ({"reference": "precomputed"}, "known beforehand"),
        ({"replay": True}, "replay=True needs"),
        ({"loss": "sppo", "focus": "hardest"}, "focus='hardest' needs"),
        ({"loss": "dpo", "loss_kwargs": {"delta": 1}}, "has no argument delta"),
        ({"loss": "sppo", "beta": 0.1}, "has no argument beta"),
        ({"dataloader_num_workers": 2}, "dataloader_num_workers must be 0"),
        ({"max_steps": 5}, "max_steps follows from"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size must be False"),
        ({"ignore_data_skip": True}, "ignore_data_skip must be False"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha must be None"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0"),
        ({"use_liger_kernel": True}, "use_liger_kernel must be False"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy must be 'random'"),
        ({"data_seed": 1}, "data_seed must be None"),
        ({"accelerator_config": {"split_batches": True}}, r"accelerator_config\.split_batches must be off"),
        ({"accelerator_config": {"dispatch_batches": True}}, r"accelerator_config\.dispatch_batches must be off"),
        ({"sampler": "http://localhost/v1", "top_p": 0.9}, "top_p must be 1 with"),
        ({"load_best_model_at_end": True, "eval_strategy": "epoch"}, "metric_for_best_model must be one of"),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, "metric_for_best_model must be one of"),
    ],
)
def test_settings_that_make_no_sense_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        ({"heldout": PROMPTS[:1]}, {}, "1 held-out prompts are also training prompts"),
        ({"prompts": ()}, {}, "train_dataset must hold at least one"),
        ({}, {"judge": None}, "judge must be given"),
        ({}, {"ref_model": None}, "ref_model must be given"),
        ({"reference": "adapter"}, {}, "needs a PEFT model"),
        ({"loss": "spin", "num_generations": 1}, {}, "must hold a prompt and a completion in each row"),
        ({"sampler": "telepathy"}, {}, "sampler must be transformers"),
    ],
)
def test_trainers_that_make_no_sense_are_refused(tmp_path, changes, given, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, given=given, **changes)


def test_the_model_is_not_its_own_reference(tmp_path):
    model = tiny_model.make_model()
    with pytest.raises(ValueError, match="ref_model must not be model itself"):
        make_trainer(tmp_path, model=model, given={"ref_model": model})


def test_every_field_explains_itself():
    for name in WindConfig.__annotations__:
        assert len(WindConfig.__dataclass_fields__[name].metadata.get("help", "")) > 30, name


def test_a_judge_without_rewards_serves_losses_that_only_order(tmp_path):
    from windkern.train.judges.models import PairJudge

    judge = PairJudge(lambda prompts, firsts, seconds: [0.8 if a < b else 0.3 for a, b in zip(firsts, seconds)])  # noqa: B905
    make_trainer(tmp_path / "order", loss="bon_sft", given={"judge": judge}, num_iterations=1).train()
    trainer = make_trainer(tmp_path / "size", loss="rebel", given={"judge": judge})
    with pytest.raises(ValueError, match="needs rewards"):
        begin(trainer)
