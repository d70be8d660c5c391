"""Every setting of transformers.TrainingArguments works in a WindTrainer, or is refused with the reason."""

from __future__ import annotations

import dataclasses

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from trainer_cases import HELDOUT, make_config, make_trainer  # noqa: E402

from windkern.train import inherited  # noqa: E402
from windkern.train.config import WindConfig  # noqa: E402
from windkern.train.inherited import CONDITIONAL, FREE, REFUSED, TRAINED  # noqa: E402

OTHERS = {  # values that are not the default, for settings whose default does not tell its kind
    "dataloader_prefetch_factor": 2,
    "dataloader_multiprocessing_context": "fork",
    "label_names": ["labels"],
    "neftune_noise_alpha": 5.0,
    "data_seed": 1,
    "liger_kernel_config": {"rope": True},
    "eval_accumulation_steps": 1,
    "include_for_metrics": ["loss"],
    "parallelism_config": "a plan",
    "resume_from_checkpoint": "out/checkpoint-3",
    "train_sampling_strategy": "sequential",
    "length_column_name": "size",
    "label_smoothing_factor": 0.1,
    "dataloader_num_workers": 2,
}
FIELDS = {field.name: field for field in dataclasses.fields(transformers.TrainingArguments)}


def test_every_setting_of_the_installed_transformers_has_its_verdict():
    """A new release can add settings: windkern/train/inherited.py must say how each is treated."""
    for name in FIELDS:
        assert sum(name in table for table in (TRAINED, FREE, REFUSED)) == 1, name
    assert set(CONDITIONAL) <= {*TRAINED, *FREE} and len(set(TRAINED)) + len(set(FREE)) == len(TRAINED) + len(FREE)


@pytest.mark.parametrize("name", [name for name in REFUSED if name in FIELDS])
def test_what_would_do_nothing_is_refused(tmp_path, name):
    default = FIELDS[name].default
    if name == "remove_unused_columns":
        default = False
    value = (not default) if isinstance(default, bool) else OTHERS[name]
    with pytest.raises(ValueError, match=f"^{name} must be .*, got .*: [a-z-].{{15}}"):
        make_config(tmp_path, **{name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_eval": True}, "do_eval must be False, got True: .*set eval_strategy"),
        ({"eval_strategy": "epoch", "eval_delay": 1}, "eval_delay must be 0, got 1: .* every iteration is evaluated"),
        ({"local_rank": 3}, "local_rank must be -1, got 3: the launcher"),
        ({"optim_target_modules": "all-linear"}, "optim_target_modules must be None.*galore"),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
            "metric_for_best_model must be one of win_rate, .*got None",
        ),
    ],
)
def test_what_works_with_others_only_is_refused_without_them(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **changes)


def test_a_configuration_can_be_copied(tmp_path):
    """A copy is checked again, with what transformers has filled in."""
    config = make_config(tmp_path, eval_strategy="epoch", metric_for_best_model="kl")
    assert dataclasses.replace(config, seed=3).seed == 3 and config.greater_is_better is False


@pytest.mark.parametrize("what", ["all", "non_padding"])
def test_input_tokens_are_counted(tmp_path, what):
    trainer = make_trainer(tmp_path, num_iterations=1, include_num_input_tokens_seen=what)
    seen, collate = [0], trainer.data_collator

    def counted(groups):
        made = collate(groups)
        rows = made["batch"].rows
        seen[0] += int(rows.attention_mask.sum()) if what == "non_padding" else rows.input_ids.numel()
        assert not any(isinstance(value, torch.Tensor) for value in made.values())  # nothing is sent twice
        return made

    trainer.data_collator = counted
    trainer.train()
    logged = [entry["num_input_tokens_seen"] for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.state.num_input_tokens_seen == seen[0] == logged[-1] > logged[0] > 0


def test_optimizer_arguments_nobody_looks_at_are_refused_before_sampling(tmp_path):
    trainer = make_trainer(tmp_path, optim_args="amsgrad=True")
    with pytest.raises(ValueError, match="optim_args must be None for optim='adamw_torch', which takes none"):
        trainer.train()
    assert not list(tmp_path.glob("completions/iteration-*"))
    make_trainer(tmp_path / "b", num_iterations=1, optim="rmsprop", optim_args="alpha=0.9", save_strategy="no").train()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "changes",
    [
        {"debug": "underflow_overflow"},
        {"skip_memory_metrics": False},
        {"full_determinism": True},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "win_rate", "eval_strategy": "epoch"},
        {"logging_strategy": "epoch"},
        {"eval_strategy": "steps", "eval_steps": 1, "eval_delay": 2},
        {"torch_empty_cache_steps": 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_is_taken_runs(tmp_path, changes):
    trainer = make_trainer(tmp_path, heldout=HELDOUT, max_completion_length=3, **changes)
    trainer.train()
    assert [record.iteration for record in trainer.history] == [1, 2]
    if changes.get("eval_delay"):
        assert [entry["step"] for entry in trainer.state.log_history if "eval_win_rate" in entry] == [2, 3, 4]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_both_names_of_checkpointing_are_taken_from_a_file(tmp_path, name):
    from windkern.settings.run import load_settings

    path = tmp_path / "x.yaml"
    path.write_text(f"model: m\ntrain_dataset: p.txt\noutput_dir: out\nuse_cpu: true\n{name}: true\n")
    _, config = load_settings(str(path))
    assert config.gradient_checkpointing is True


def test_without_tqdm_no_progress_is_shown(tmp_path, capsys):
    import tiny_model

    from windkern.commands.cli import main

    model = tiny_model.save(tmp_path / "tiny")
    (tmp_path / "p.txt").write_text("rain was\nthe bus\n")
    path = tmp_path / "x.yaml"
    path.write_text(
        f"model: {model}\ndtype: float32\ntrain_dataset: {tmp_path / 'p.txt'}\njudge: tiny_model:goodness\n"
        f"output_dir: {tmp_path / 'out'}\nnum_iterations: 1\nsteps_per_iteration: 1\nnum_generations: 2\n"
        "max_completion_length: 2\nuse_cpu: true\nsave_strategy: 'no'\n"
    )
    for more, lines in (("false", True), ("true", False)):
        assert main(["train", "--config", str(path), "--override", f"disable_tqdm={more}"]) == 0
        assert ("sampling 0 of" in capsys.readouterr().out) == lines


def test_what_is_unset_does_not_follow_the_log_level(tmp_path):
    from transformers.utils import logging

    before = logging.get_verbosity()
    try:
        logging.set_verbosity_error()
        assert WindConfig(output_dir=str(tmp_path), use_cpu=True).disable_tqdm is False
    finally:
        logging.set_verbosity(before)


def test_the_tables_are_data(monkeypatch):
    """A setting of another release that the installed one lacks is ignored."""
    monkeypatch.setitem(inherited.REFUSED, "of_another_release", "because")
    inherited.check_inherited(transformers.TrainingArguments(remove_unused_columns=False, use_cpu=True))
