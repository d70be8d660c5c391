"""`benchmarks.bodies` on a tiny model: its cells, a run that continues where it stopped, its table and picture."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import bodies, bodies_report, readme


def row(prompt: int, count: int, work: str, provider: str, seconds: float, chosen: bool = True) -> dict:
    return {
        **{"case": bodies.case_of("smollm2", prompt, count, work), "provider": provider, "model": "smollm2"},
        **{"prompt": prompt, "response": 60, "n": count, "work": work, "tokens": 100, "chosen": chosen},
        **{"peak_bytes": 2**20, "median_s": seconds, "run": 0, "status": "ok", "complete": True},
    }


def results(*rows: dict) -> dict:
    versions = {"torch": "2.13.0", "transformers": "5.24.0", "trl": None}
    machine = {"cpu": "AMD EPYC", "threads": 2, "versions": versions}
    return {
        **{"schema": 1, "kind": "bodies", "rows": list(rows)},
        "runs": [{"date": "2026-11-26T00:00:00", "commit": "abc", "dirty": False, "machine": machine}],
    }


def test_a_run_measures_every_cell_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "bodies.json", tmp_path / "bodies.png"
    arguments = ["--models", "tiny", "--cases", "4x2", "240x4", "--out", str(out), "--picture", str(picture)]
    monkeypatch.setattr(bodies, "trl", lambda model, ids: bodies.ours(model, ids, "never"))  # its import takes seconds
    measure, cells = bodies.measure_cell, []

    def stopped(calls, seconds, device):
        if len(cells) == 1:
            raise KeyboardInterrupt
        cells.append(seconds)
        return measure(calls, 0.0, device)

    monkeypatch.setattr(bodies, "measure_cell", stopped)
    with pytest.raises(KeyboardInterrupt):
        bodies.main(arguments)
    assert len(json.loads(out.read_text())["rows"]) == 3
    monkeypatch.setattr(
        bodies, "measure_cell", lambda *given: (cells.append(given[1]), measure(given[0], 0.0, given[2]))[1]
    )
    assert bodies.main(arguments) == 0 and len(cells) == 4
    rows = json.loads(out.read_text())["rows"]
    assert [(each["case"], each["provider"]) for each in rows] == [
        (bodies.case_of("tiny", prompt, count, work), provider)
        for prompt, count in ((4, 2), (240, 4))
        for work in ("score", "step")
        for provider in ("shared", "unshared", "trl")
    ]
    tokens = {(each["n"], each["provider"]): (each["tokens"], each["chosen"]) for each in rows}
    assert tokens[2, "shared"] == (4 + 2 * 59, False) and tokens[2, "unshared"] == (2 * (4 + 59), False)
    assert tokens[4, "shared"] == (240 + 4 * 59, True) and tokens[4, "trl"] == (4 * 300, True)
    assert all(each["median_s"] > 0 for each in rows)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_wrong_log_prob_is_not_reported():
    calls = {"shared": lambda: torch.ones(2), "unshared": lambda: torch.ones(2), "trl": lambda: torch.full((2,), 1.01)}
    with pytest.raises(RuntimeError, match=r"trl differs from unshared by 0\.01"):
        bodies.measure_cell(calls, 0.0, "cpu")


def test_no_cell_is_begun_after_the_time(tmp_path, capsys):
    arguments = ["--models", "tiny", "--cases", "4x2", "--minutes", "0", "--out", str(tmp_path / "a.json")]
    data = results(row(60, 2, "score", "shared", 1.0), row(60, 2, "score", "unshared", 2.0))
    (tmp_path / "a.json").write_text(json.dumps(data))
    assert bodies.main([*arguments, "--append", "--picture", str(tmp_path / "a.png")]) == 0
    assert "no time left for bodies-tiny-p4-r60-n2-score, bodies-tiny-p4-r60-n2-step" in capsys.readouterr().out


def test_the_table_says_where_auto_shares_and_whether_it_loses(tmp_path):
    kept = results(
        *(
            row(60, 2, "score", provider, seconds)
            for provider, seconds in (("shared", 1.0), ("unshared", 1.25), ("trl", 2.0))
        ),
        *(
            row(4, 2, "score", provider, seconds, chosen=False)
            for provider, seconds in (("shared", 2.0), ("unshared", 1.0))
        ),
    )
    table = bodies_report.markdown(kept)
    assert "| SmolLM2-135M | 60, 60, 2 | 100, 100 | 1.00 s, 1.25 x, 2.00 x | - | 1 MiB, 1 MiB, 1 MiB | - |" in table
    assert "| SmolLM2-135M | 4, 60, 2 (`auto` does not share) |" in table
    assert "N = 2: 0.80 times the time of unshared rows, within the 1.03 allowed." in table
    lost = bodies_report.markdown(results(row(60, 2, "step", "shared", 1.04), row(60, 2, "step", "unshared", 1.0)))
    assert "1.04 times the time of unshared rows, beyond the 1.03 allowed." in lost
    (tmp_path / "bodies.json").write_text(json.dumps(kept))
    page = tmp_path / "page.md"
    page.write_text("<!-- bench:bodies -->\nold\n<!-- /bench:bodies -->\n")
    assert readme.main(["--page", str(page), "--results", str(tmp_path)]) == 0
    assert table.strip() in page.read_text() and "old" not in page.read_text()
