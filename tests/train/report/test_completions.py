"""Tables of completions: their contents, the files of a run, and what trackers receive."""

from __future__ import annotations

import doctest
import json
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")
parquet = pytest.importorskip("pyarrow.parquet")

from trainer_cases import PROMPTS, make_trainer  # noqa: E402

from windkern.train.groups import Group  # noqa: E402
from windkern.train.judges.recorded import RecordedJudge  # noqa: E402
from windkern.train.report import completions  # noqa: E402
from windkern.train.report.completions import columns_of, track_completions, write_completions  # noqa: E402
from windkern.train.store import Block, GroupStore  # noqa: E402

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


def test_a_run_can_be_fitted_again_from_what_it_left(tmp_path):
    """Prompts, texts, truncation and verdicts of both iterations come back through `recorded:`."""
    make_trainer(tmp_path / "first", save_strategy="no").train()
    store = GroupStore(tmp_path / "first" / "completions")
    parts, wanted = [], {}
    for iteration in (1, 2):
        parts.append(store.responses(iteration).read_text())
        for path in sorted(store.iteration(iteration).glob("block-*.json")):
            entries = json.loads(path.read_text())["groups"]
            places = tuple(entry["place"] for entry in entries)
            for group in store.read(store.iteration(iteration), Block(int(path.stem[-4:]), places)):
                cut = dict(zip(group.texts, group.truncated, strict=True))
                verdict = {
                    (a, b): group.prefs[i][j] for i, a in enumerate(group.texts) for j, b in enumerate(group.texts)
                }
                wanted[group.place] = cut, verdict
    assert len(wanted) == len(PROMPTS) and {True, False} == {
        cut for cuts, _ in wanted.values() for cut in cuts.values()
    }
    file = tmp_path / "all.jsonl"
    file.write_text("".join(parts))
    given = {"judge": RecordedJudge(file, strength=4.0)}
    again = make_trainer(tmp_path / "again", sampler=f"recorded:{file}", given=given, save_strategy="no")
    again.train()
    found = [group for iteration in (1, 2) for group in again.outer.recall(iteration).groups]
    assert {group.place for group in found} == wanted.keys()
    for group in found:
        cuts, verdict = wanted[group.place]
        assert dict(zip(group.texts, group.truncated, strict=True)) == cuts
        for i, a in enumerate(group.texts):
            for j, b in enumerate(group.texts):
                assert a == b or group.prefs[i][j] == pytest.approx(verdict[a, b], abs=1e-6)


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
