"""The examples run at a small size and do what they describe."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_model
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def imported(name: str):
    specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses look up their module
    specification.loader.exec_module(module)
    yield module
    del sys.modules[name]


@pytest.fixture(scope="module")
def ranking():
    yield from imported("ranking")


@pytest.fixture(scope="module")
def plain_loop():
    yield from imported("plain_loop")


def test_ranker_learns_more_than_its_noisy_feedback_says(ranking):
    result = ranking.run(items=600, steps=50)
    assert result.wrong == pytest.approx(0.25, abs=0.03)
    assert abs(result.before.tau) < 0.3 < result.feedback.tau < result.after.tau - 0.05
    assert result.after.ndcg > 0.9 > result.before.ndcg
    assert result.ours.value == pytest.approx(result.plain.value, rel=1e-5)


def test_both_losses_have_one_gradient(ranking):
    scores, observed = torch.randn(50, requires_grad=True), torch.randn(50).round()  # with ties
    ours, plain = (loss(scores, observed) for loss in (ranking.ranking_loss, ranking.plain_loss))
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(torch.autograd.grad(ours, scores)[0], torch.autograd.grad(plain, scores)[0])


def test_measures_of_quality(ranking):
    worth = torch.tensor([3.0, 2.0, 1.0, 0.0])
    assert ranking.kendall_tau(worth, worth, rows=3) == 1 and ranking.kendall_tau(-worth, worth) == -1
    assert ranking.kendall_tau(torch.tensor([3.0, 1.0, 2.0, 0.0]), worth) == pytest.approx(1 - 2 / 6)
    assert ranking.ndcg(worth, worth) == pytest.approx(1)
    best = 3 + 2 / math.log2(3)
    assert ranking.ndcg(torch.tensor([2.0, 3.0, 1.0, 0.0]), worth, top=2) == pytest.approx(
        (2 + 3 / math.log2(3)) / best
    )


def test_command_prints_quality_time_and_memory(ranking, capsys):
    assert ranking.main(["--items", "200", "--steps", "5"]) == 0
    shown = capsys.readouterr().out
    for words in ("39,800 ordered pairs", "before    Kendall", "after     Kendall", "pair_loss", "N x N expression"):
        assert words in shown


def test_a_cut_head_trains_as_the_whole_one(tmp_path):
    from distributed_tools import launch

    (two, other), (one,) = (launch("example", tmp_path / str(n), processes=n, module="sharding_jobs") for n in (2, 1))
    assert two == other and two["losses"][-1] < 0.9 * two["losses"][0]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)


@pytest.mark.slow
def test_a_cut_head_trains_from_the_command_line():
    done = subprocess.run([sys.executable, EXAMPLES / "vocab_parallel.py"], capture_output=True, text=True, check=True)
    assert "2 processes: loss" in done.stdout and "have the same bits" in done.stdout


def test_the_plain_loop_learns_its_pairs(plain_loop):
    model = plain_loop.ToyLM()
    ids, targets = plain_loop.make_pairs(count=3, length=10, prompt=4)
    assert (targets == -100).sum() == 3 * 2 * 3 and torch.equal(ids[:, 0, :4], ids[:, 1, :4])
    losses = plain_loop.train(model, ids, targets, steps=8)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[-1] < 0.3


def test_the_plain_loop_has_the_gradient_of_the_logits(plain_loop):
    model = plain_loop.ToyLM()
    ids, targets = plain_loop.make_pairs(count=2, length=6, prompt=3)
    ours = plain_loop.wk.sequence_logps(model(ids), model.head.weight, targets)
    tokens = model.head(model(ids)).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    plain = torch.where(targets >= 0, tokens, 0.0).sum(-1)
    torch.testing.assert_close(ours, plain)
    for mine, other in zip(
        *(torch.autograd.grad(x.square().sum(), model.parameters()) for x in (ours, plain)), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def wind_loop():
    pytest.importorskip("transformers")
    yield from imported("wind_loop")


def test_the_wind_loop_learns_on_a_tiny_model(wind_loop, monkeypatch, capsys):
    """The whole loop, with a model of two layers instead of the packaged one."""
    tokenizer = tiny_model.make_tokenizer()
    monkeypatch.setattr(wind_loop, "load_model", lambda name, dtype: (tiny_model.make_model().eval(), tokenizer))
    monkeypatch.setattr(wind_loop, "PROMPTS", ("the bus", "rain"))
    curve = wind_loop.main(iterations=5, count=16, tokens=4, steps=8, lr=1e-2)
    first, *_, last = (torch.tensor(won) for won in curve)
    assert [len(won) for won in curve] == [32] * 5 and first.mean() == 0.5
    assert last.mean() > first.mean() + 2 * (first.var() + last.var()).div(32).sqrt()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 + 2
    for line in lines[:5]:
        losses = [float(each) for each in line.split("loss ")[1].split()]
        assert " +- " in line and len(losses) == 8 and min(losses) < 0.5 * losses[0]


def test_the_wind_loop_judges_by_the_alphabet(wind_loop):
    """Letters count, and neither case, signs nor an empty answer wins."""
    assert wind_loop.judge(["A bus", "the rain", ""], ["Rain."]).tolist() == [[1.0], [0.0], [0.0]]
    prefs = wind_loop.judge(texts := ["'a day", "A, day!", "bus", "..."], texts)
    assert prefs[0].tolist() == [0.5, 0.5, 1.0, 1.0]
    torch.testing.assert_close(prefs + prefs.mT, torch.ones(4, 4))


def test_the_quickstart_notebook_runs(tmp_path):
    """Every cell runs unchanged, in a new kernel."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs before you commit"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))
    assert "same numbers: True" in printed
