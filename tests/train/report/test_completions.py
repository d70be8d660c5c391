"""Tables of completions: their contents, the files of a run, and what trackers receive."""

from __future__ import annotations

import doctest
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")
parquet = pytest.importorskip("pyarrow.parquet")

from trainer_cases import PROMPTS, make_trainer  # noqa: E402

from windkern.train.groups import Group  # noqa: E402
from windkern.train.report import completions  # noqa: E402
from windkern.train.report.completions import columns_of, track_completions, write_completions  # noqa: E402

GROUP = Group(0, (1,), ((5, 2), (6,)), (False, True), ("a", "b"), ((0.5, 0.9), (0.1, 0.5)), (1.0, -1.0))


def test_the_examples_run():
    assert not doctest.testmod(completions).failed


def test_a_run_leaves_a_file_for_each_iteration(tmp_path):
    make_trainer(tmp_path, log_completions=True, save_strategy="no").train()
    paths = sorted((tmp_path / "completions").glob("*.parquet"))
    assert [path.name for path in paths] == ["completions_00001.parquet", "completions_00002.parquet"]
    for iteration, path in enumerate(paths, 1):
        rows = parquet.read_table(path).to_pylist()
        assert len(rows) == 4 * 4 and {row["iteration"] for row in rows} == {iteration}
        assert {row["step"] for row in rows} == {2 * (iteration - 1)} and {row["prompt"] for row in rows} <= {*PROMPTS}
        for k in range(0, 16, 4):
            assert sum(row["win_rate"] for row in rows[k : k + 4]) == pytest.approx(2.0)
        words = [row["completion"].split() for row in rows]
        rewards = [(text.count("good") - text.count("bad")) / max(1, len(text)) for text in words]
        assert [row["reward"] for row in rows] == pytest.approx(rewards)


def test_a_run_leaves_none_where_none_is_asked_for(tmp_path):
    make_trainer(tmp_path, save_strategy="no", num_iterations=1).train()
    assert not list((tmp_path / "completions").glob("*.parquet"))


def test_what_was_not_judged_is_null(tmp_path):
    bare = Group(0, (1,), ((5, 2),), (False,), ("a",))
    path = write_completions(tmp_path, columns_of(3, 7, ["p"], [bare]))
    (row,) = parquet.read_table(path).to_pylist()
    assert row["win_rate"] is None and row["reward"] is None and row["step"] == 7


def test_trackers_with_tables_get_them(monkeypatch):
    logged = []
    wandb = SimpleNamespace(
        run=object(), log=logged.append, Table=lambda columns, data: {"columns": columns, "data": data}
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    table = columns_of(1, 0, ["p"], [GROUP])
    assert track_completions(table, ["wandb", "tensorboard"]) == ["wandb"]
    (entry,) = logged
    assert entry["completions"]["data"][0] == [0, 1, "p", "a", 2, False, 0.9, 1.0]
    assert track_completions(table, ["tensorboard"]) == [] and len(logged) == 1
    wandb.run = None  # no run is active
    assert track_completions(table, ["wandb"]) == []
