"""WindTrainer when it is stopped, called twice, given nonsense, or given models that share weights."""

from __future__ import annotations

import inspect

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import tiny_model
import transformers
from trainer_cases import HELDOUT, PROMPTS, lora, make_config, make_trainer, weights_of
from transformers import TrainerCallback

from windkern.hf import shared_check
from windkern.losses import LOSSES, Loss
from windkern.train.checkpoints.identity import ResumeError
from windkern.train.data.loading import Demonstration
from windkern.train.dropout import disable_dropout
from windkern.train.evaluation.recorded import RecordedTexts
from windkern.train.judges.judge import JudgeError, RewardJudge
from windkern.train.loss_plan import plan_loss
from windkern.train.metrics import step_metrics
from windkern.train.policy import AnyPolicy, Policy, PolicyView
from windkern.train.reference import RecordedLogps
from windkern.train.trainer import WindTrainer
from windkern.train.world import World


def test_one_object_trains_once(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="no")
    trainer.train()
    for resume in (None, True):
        with pytest.raises(ValueError, match="has already trained for 4 steps"):
            trainer.train(resume_from_checkpoint=resume)


def test_nothing_that_the_trainer_made_holds_the_trainer(tmp_path):
    """Neither the trainer nor one of its methods, apart from transformers' own objects."""
    trainer = make_trainer(tmp_path, heldout=HELDOUT, loss="bond", num_generations=3, replay=False)
    seen: set[int] = set()
    waiting = [trainer.run, trainer.iterations, trainer.data_collator, trainer.train_dataset, trainer.policy]
    while waiting:
        held = waiting.pop()
        assert held is not trainer and getattr(held, "__self__", None) is not trainer, held
        if id(held) in seen or isinstance(held, (torch.nn.Module, type, transformers.TrainingArguments)):
            continue
        seen.add(id(held))
        if isinstance(held, dict):
            waiting += held.values()
        elif isinstance(held, (list, tuple, set)):
            waiting += held
        elif type(held).__module__.startswith("windkern"):
            waiting += vars(held).values()
    assert len(seen) > 40


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "bond", "num_generations": 3, "anchor_rate": 0.25},
        {"loss": "trajectory_balance", "replay": True},
        {"focus": "hardest"},
    ],
)
def test_an_object_that_failed_goes_on_as_if_nothing_had_been(tmp_path, changes):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **given):
            if state.global_step == 5 and not failed:
                failed.append(state.global_step)
                raise ConnectionError("the network is away")

    failed, settings = [0], {"num_iterations": 3} | changes
    whole = make_trainer(tmp_path / "whole", given={"callbacks": [Fails()]}, **settings)
    whole.train()
    failed.clear()
    trainer = make_trainer(tmp_path / "failed", given={"callbacks": [Fails()]}, **settings)
    with pytest.raises(ConnectionError):
        trainer.train()
    trainer.train(resume_from_checkpoint=True)
    want = weights_of(whole)
    assert failed == [5]
    assert all(torch.equal(value, want[name]) for name, value in weights_of(trainer).items())


def test_an_evaluation_before_the_first_step_is_of_no_iteration(tmp_path):
    trainer = make_trainer(tmp_path, heldout=HELDOUT, eval_strategy="epoch", eval_on_start=True)
    trainer.train()
    assert [record.iteration for record in trainer.history] == [1, 2]
    assert [entry["step"] for entry in trainer.state.log_history if "eval_win_rate" in entry] == [0, 2, 4]


@pytest.mark.filterwarnings("ignore:all responses to each of the iteration's")
def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    trainer = make_trainer(tmp_path, learning_rate=1e30, max_grad_norm=0)
    with pytest.raises(FloatingPointError, match=r"the loss of step \d is (nan|inf)"):
        trainer.train()


def spoil(trainer, monkeypatch, value: float, calls: int) -> list[str]:
    """Make the loss infinite or NaN in one call, and return a list that grows: a loss, a backward, a weight's step."""
    run, seen = trainer.policy.run, []

    def spoilt(*given):
        loss = run(*given)
        if loss.requires_grad:
            seen.append("loss")
            loss = loss * value if seen.count("loss") == calls else loss
        return loss

    backward, step = trainer.accelerator.backward, torch.optim.AdamW.step
    monkeypatch.setattr(trainer.policy, "run", spoilt)
    monkeypatch.setattr(
        trainer.accelerator, "backward", lambda *given, **more: (seen.append("backward"), backward(*given, **more))
    )
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *given: (seen.append("step"), step(*given))[1])
    return seen


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_the_loss_is_read_behind_backward_and_before_weights_move(tmp_path, monkeypatch, value):
    """In the first of two batches that make up step 2; the error has the loss, not its share of the step."""
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=1)
    seen = spoil(trainer, monkeypatch, value, calls=3)
    with pytest.raises(FloatingPointError, match=f"the loss of step 2 is {value};"):
        trainer.train()
    assert seen == ["loss", "backward"] * 2 + ["step"] + ["loss", "backward"]
    assert trainer.state.global_step == 1
    assert all(weight.isfinite().all() for weight in weights_of(trainer).values())


@pytest.mark.parametrize("early", ["lomo", "galore_adamw_layerwise", "deepspeed"])
def test_the_loss_is_read_before_a_backward_that_moves_weights(tmp_path, monkeypatch, early):
    trainer = make_trainer(tmp_path)
    seen = spoil(trainer, monkeypatch, float("nan"), calls=1)
    if early == "deepspeed":
        trainer.is_deepspeed_enabled = True
    else:
        trainer.args.optim = transformers.training_args.OptimizerNames(early)
    inputs = {"batch": trainer.policy.batch(trainer.outer.begin(1, inside=False).fitted[:2])}
    with pytest.raises(FloatingPointError, match="the loss of step 1 is nan, before any weight has moved"):
        trainer.training_step(trainer.model, inputs)
    assert seen == ["loss"]


def test_a_loss_without_a_gradient_is_read_at_once(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    inputs = {"batch": trainer.policy.batch(trainer.outer.begin(1, inside=False).fitted[:2])}
    run = trainer.policy.run
    monkeypatch.setattr(trainer.policy, "run", lambda *given: run(*given) * torch.nan)
    with torch.no_grad(), pytest.raises(FloatingPointError, match="the loss of step 1 is nan"):
        trainer.compute_loss(trainer.model, inputs, return_outputs=True)


def test_a_checkpoint_without_an_optimizer_is_not_resumed(tmp_path):
    make_trainer(tmp_path, num_iterations=1, save_only_model=True).train()
    with pytest.raises(FileNotFoundError, match="save_only_model"):
        make_trainer(tmp_path, save_only_model=True).train(resume_from_checkpoint=True)


def test_optimizers_without_master_weights_are_named(tmp_path):
    model, reference = (tiny_model.make_model().bfloat16() for _ in range(2))
    trainer = make_trainer(tmp_path, model=model, optim="sgd", given={"ref_model": reference})
    with pytest.warns(UserWarning, match="optim=sgd has no float32 master weights"):
        trainer.create_optimizer()


def test_a_policy_and_its_reference_that_cannot_share_prompts_say_so_once(tmp_path, caplog, monkeypatch):
    import transformers

    monkeypatch.setattr(shared_check, "_said", set())
    config = transformers.MambaConfig(
        vocab_size=18, hidden_size=16, state_size=4, num_hidden_layers=1, eos_token_id=1, pad_token_id=0
    )
    model, reference = (transformers.MambaForCausalLM(config) for _ in range(2))
    trainer = make_trainer(tmp_path, model=model, num_iterations=1, given={"ref_model": reference})
    with caplog.at_level("WARNING", logger="windkern"):
        trainer.train()
    assert not trainer.policy.rules.shared and not trainer.reference.rules.shared
    said = [record.getMessage() for record in caplog.records if "share their prompt" in record.getMessage()]
    assert len(said) == 1
    assert "MambaForCausalLM: responses do not share their prompt, since it has layers of the kind" in said[0]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_the_base_under_an_adapter_is_not_its_reference(tmp_path):
    pytest.importorskip("peft")
    model = tiny_model.make_model()
    with pytest.raises(ValueError, match="must have its own parameters"):
        make_trainer(tmp_path, model=model, given={"ref_model": model, "peft_config": lora()})


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_an_adapter_whose_base_is_trained_too_gives_no_reference(tmp_path):
    """Disabling the adapter would keep the new norm, and pi_ref would move with the policy."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model.make_model(), lora())
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1 of its parameters are trained, e\.g\. .*norm\.weight"):
        make_trainer(tmp_path, model=model, reference="adapter")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Bloom", {"n_layer": 1, "n_head": 2, "hidden_dropout": 0.5}),
        ("Falcon", {"num_attention_heads": 2, "num_hidden_layers": 1, "hidden_dropout": 0.5}),
        (
            "Starcoder2",
            {
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "num_hidden_layers": 1,
                "intermediate_size": 16,
                "residual_dropout": 0.5,
            },
        ),
    ],
)
def test_dropout_that_is_only_a_number_is_off(name, settings):
    import transformers

    config = getattr(transformers, f"{name}Config")(vocab_size=16, hidden_size=16, **settings)
    model = getattr(transformers, f"{name}ForCausalLM")(config).train()
    ids = torch.arange(8)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    disable_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_data_parallel_is_refused(tmp_path):
    config = make_config(tmp_path)
    assert config.n_gpu <= 1
    config._n_gpu = 2
    with pytest.raises(ValueError, match="nproc_per_node=2"):
        WindTrainer(
            tiny_model.make_model(), config, train_dataset=PROMPTS, processing_class=tiny_model.make_tokenizer()
        )


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            {},
            {"given": {"judge": RewardJudge(tiny_model.goodness, strength=1.0)}},
            r"strength 4\.0' there, .*strength 1\.0' here",
        ),
        ({}, {"optim_args": "amsgrad=True"}, "optim_args None there"),
        (
            {"loss": "spin", "num_generations": 1, "prompts": [Demonstration("rain", "good")]},
            {"prompts": [Demonstration("rain", "bad")]},
            "prompts .* there",
        ),
    ],
)
def test_a_run_with_other_answers_or_another_judge_is_another_run(tmp_path, first, second, message):
    settings = {"num_iterations": 1} | first
    make_trainer(tmp_path, **settings).train()
    with pytest.raises(ResumeError, match=message):
        make_trainer(tmp_path, **settings | second).train(resume_from_checkpoint=True)


def test_responses_that_are_not_fitted_are_not_in_the_metrics(tmp_path):
    """Without the dropped response nothing has moved, and the residual is that of the kept responses."""
    config = make_config(tmp_path)
    old, rates = torch.zeros(1, 3), torch.tensor([[0.75, 0.25, 0.0]])
    constants = {"old_logps": old, "ref_logps": old, "win_rates": rates, "where": torch.tensor([[True, True, False]])}
    found = step_metrics(torch.tensor([[0.0, 0.0, -80.0]]), constants, plan_loss(config))
    assert found["kl_old"] == found["kl_ref"] == found["outside"] == 0
    assert found["residual"] == pytest.approx(0.25) and found["implied_win_rate_max"] == pytest.approx(0.5)
    everything = step_metrics(old, {**constants, "where": torch.zeros(1, 3, dtype=torch.bool)}, plan_loss(config))
    assert everything.keys() == found.keys()


class OneOfTwo(World):
    """The first of two processes, where the other has no work; `told` records what the other is told."""

    def __init__(self, accelerator):
        super().__init__(accelerator)
        self.size, self.told, self.sharing = 2, [], False

    def agree(self, value):
        assert not self.sharing, "the other process has no work here, so it would never answer"
        self.told.append(value)
        return value

    def share(self, items, work, *, together=False, done=lambda items: None):
        self.sharing = True
        try:
            return [work(item) for item in items]
        finally:
            self.sharing = False


def test_processes_agree_on_rows_before_they_share_out_the_scoring(tmp_path):
    """Two held-out prompts are one batch: the second process has none and would wait for the first in another call."""
    trainer = make_trainer(tmp_path, heldout=HELDOUT, eval_strategy="epoch")
    world = OneOfTwo(trainer.accelerator)
    trainer.policy.world = trainer.reference.world = trainer.evaluator.world = world
    assert trainer.compare(2).result.kl.mean == pytest.approx(0, abs=1e-4)
    assert world.told.count(trainer.policy.rules) == 2  # of the policy and of the reference


def test_a_judge_that_fails_fails_on_all_processes(tmp_path):
    def broken(prompts, responses):
        raise ConnectionError("the judge is away")

    trainer = make_trainer(tmp_path, heldout=HELDOUT, reward=broken)
    world = trainer.policy.world = trainer.reference.world = trainer.evaluator.world = OneOfTwo(trainer.accelerator)
    with pytest.raises(JudgeError, match="the judge is away"):
        trainer.compare(2)
    assert world.told[-1] == (True, None)  # that it failed, without a result


@pytest.mark.parametrize("changes", [{"focus": "hardest"}, {"loss": "trajectory_balance", "replay": True}])
def test_a_verdict_of_the_past_that_is_gone_is_named(tmp_path, changes):
    make_trainer(tmp_path, num_iterations=1, **changes).train()
    (tmp_path / "completions/iteration-0001/verdict-0001.json").unlink()
    with (
        pytest.warns(UserWarning, match=r"missing in .*: iteration-0001/verdict-0001\.json; the run continues without"),
        pytest.raises(FileNotFoundError, match=r"verdict-0001\.json is missing, and the run needs it"),
    ):
        make_trainer(tmp_path, **changes).train(resume_from_checkpoint=True)


def test_an_iteration_without_its_record_and_a_verdict_is_left_alone(tmp_path):
    make_trainer(tmp_path, num_iterations=1).train()
    for name in ("record", "verdict-0000"):
        (tmp_path / f"completions/iteration-0001/{name}.json").unlink()
    trainer = make_trainer(tmp_path)
    with pytest.warns(UserWarning, match=r"verdict-0000\.json, iteration-0001/record\.json; the run continues without"):
        trainer.train(resume_from_checkpoint=True)
    assert [record.iteration for record in trainer.history] == [2]


@pytest.mark.parametrize(
    "changes", [{}, {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0}}]
)
def test_an_evaluation_that_was_cut_off_counts_as_one_in_time(tmp_path, changes):
    """For the best metric and for a schedule that uses it."""
    settings = {"num_iterations": 4, "eval_strategy": "epoch", "save_strategy": "steps", "save_steps": 1, **changes}
    settings |= {"heldout": HELDOUT, "metric_for_best_model": "kl", "save_total_limit": None}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    trainer = make_trainer(tmp_path / "cut", **settings)
    compare, calls = trainer.compare, []

    def cut(*given):
        calls.append(given)
        if len(calls) == 2:
            raise ConnectionError
        return compare(*given)

    trainer.compare = cut
    with pytest.raises(ConnectionError):
        trainer.train()
    again = make_trainer(tmp_path / "cut", **settings)
    again.train(resume_from_checkpoint=True)
    for name in ("best_metric", "best_global_step"):
        assert getattr(again.state, name) == getattr(whole.state, name) is not None
    rates = [[line["learning_rate"] for line in each.state.log_history if "loss" in line] for each in (whole, again)]
    assert rates[0] == rates[1] and (len(set(rates[0])) > 1) == bool(changes)


def test_an_evaluation_before_training_reads_nothing_of_an_earlier_run(tmp_path):
    make_trainer(tmp_path, heldout=HELDOUT, eval_strategy="epoch", num_iterations=1).train()
    trainer = make_trainer(tmp_path, heldout=("bus and", "very a day"))
    found = trainer.compare(1)
    assert [group.prompt_ids for group in found.reference] == [group.prompt_ids for group in found.policy]


def test_optional_tensors_of_a_loss_are_given(tmp_path, monkeypatch):
    given = set()

    def kept(logps, ref_logps=None, lengths=None, *, where=None, reduction="mean"):
        if logps.requires_grad:  # in training, not in the trial of the arguments
            given.update(name for name, value in (("ref", ref_logps), ("lengths", lengths)) if value is not None)
        return logps.square().mean(-1)

    inputs = ("logps", "ref_logps?", "lengths?")
    monkeypatch.setitem(LOSSES, "kept", Loss("kept", kept, "mean_i l_i^2", inputs, "", separable=True, when=""))
    with pytest.raises(ValueError, match="ref_model must be given for loss='kept'"):
        make_trainer(tmp_path, loss="kept", given={"ref_model": None})
    make_trainer(tmp_path, loss="kept", num_iterations=1).train()
    assert given == {"ref", "lengths"}


@pytest.mark.parametrize("kind", [Policy, PolicyView, RecordedLogps, RecordedTexts])
def test_whatever_samples_and_scores_takes_what_a_policy_takes(kind):
    for name in ("sample", "logps"):
        wanted = inspect.signature(getattr(AnyPolicy, name)).parameters
        assert inspect.signature(getattr(kind, name)).parameters == wanted, name
