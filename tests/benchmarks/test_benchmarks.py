"""The benchmark suite end to end on a tiny head; times are not asserted, and compiled peers run eagerly."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tolerances import error_budget

import windkern as wk

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import compare, errors, exact, peers, plot, readme, record, run, step, timing  # noqa: E402
from benchmarks.cases import SHAPES, TINY, Case, make_problem, select_cases  # noqa: E402
from benchmarks.provider import LEVELS as provider_levels  # noqa: E402
from benchmarks.provider import quiet  # noqa: E402

CASES = "tiny/trained/fp32,tiny/frozen/bf16,tiny/scoring/fp32"


@pytest.fixture(scope="module", autouse=True)
def _one_thread_no_compiler_and_no_interpreter():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    interpret = os.environ.pop("TRITON_INTERPRET", None)  # kernels that Python runs are not worth measuring
    with quiet():
        stance = torch.compiler.set_stance("force_eager")
    with stance:
        yield
    torch.set_num_threads(threads)
    if interpret is not None:
        os.environ["TRITON_INTERPRET"] = interpret


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "tiny.json"
    assert run.main(["--cases", CASES, "--seconds", "0", "--out", str(path)]) == 0
    return path


def rows_of(path: Path) -> list[dict]:
    return json.loads(path.read_text())["rows"]


def row_of(path: Path, provider: str) -> dict:
    return next(row for row in rows_of(path) if row["provider"] == provider)


def test_every_provider_has_a_row_in_every_case(results):
    rows = rows_of(results)
    names = [provider.name for provider in peers.all_providers() if provider.by_default]
    for case in CASES.split(","):
        assert [row["provider"] for row in rows if row["case"] == case] == names
    for row in rows:
        assert row["complete"]
        assert row["status"] in ("ok", "same", "cannot", "absent"), (row["provider"], row["reason"])
        if row["status"] == "ok":
            assert row["median_s"] > 0
            assert row["num_samples"] == len(row["samples_s"]) >= 1  # fewer where a call took seconds
            assert row["times_floor"] == row["median_s"] / row["floor_s"]
            assert row["command"].endswith(row["provider"])
        else:
            assert row["reason"]
    for backend in wk.backends.available("cpu"):
        own = next(row for row in rows if row["provider"] == f"windkern-{backend}")
        assert own["errors"]["dweight"] < 1e-5
        assert own["errors"]["logps"] < 1e-6


def test_peers_compute_what_we_compute(results):
    for row in rows_of(results):
        allowed = 1e-4 if row["dtype"] == "fp32" else 0.1
        for name, error in row.get("errors", {}).items():
            assert error < allowed, (row["case"], row["provider"], name)


def test_products_that_round_their_operands_are_not_measured_as_float32(monkeypatch):
    case = Case(TINY, "scoring", "fp32", "cpu")
    through = [peer for peer in peers.all_providers() if peer.name in ("gemm-onednn", "plain-onednn")]
    monkeypatch.setattr("benchmarks.provider.onednn_error", lambda: 0.0023)
    for peer in through:
        assert peer.why_not(case) == (
            "cannot",
            "oneDNN rounds the operands of float32 products here (relative error 0.0023)",
        )
    monkeypatch.setattr("benchmarks.provider.onednn_error", lambda: 3e-7)
    assert len(through) == 2 and not any(peer.why_not(case) for peer in through)


def test_the_file_names_no_host_and_no_path(results):
    text = results.read_text()
    assert socket.gethostname() not in text
    assert str(ROOT) not in text
    assert os.path.expanduser("~") + "/" not in text
    machine = json.loads(text)["runs"][0]["machine"]
    assert {"cpu", "cores", "threads", "versions"} <= set(machine)


def test_a_run_goes_on_where_it_was_killed(results, tmp_path):
    data = json.loads(results.read_text())
    case, lost, unfinished = "tiny/scoring/fp32", "windkern-torch", "plain"
    data["rows"] = [row for row in data["rows"] if (row["case"], row["provider"]) != (case, lost)]
    for row in data["rows"]:
        if (row["case"], row["provider"]) == (case, unfinished):
            row["complete"] = False
    path = tmp_path / "killed.json"
    path.write_text(json.dumps(data))
    before = {(row["case"], row["provider"]): row for row in data["rows"]}
    assert run.main(["--cases", CASES, "--seconds", "0", "--out", str(path)]) == 0
    after = {(row["case"], row["provider"]): row for row in rows_of(path)}
    measured_again = {key for key, row in after.items() if before.get(key) != row}
    assert measured_again == {(case, lost), (case, unfinished)}
    assert all(after[key]["complete"] and after[key]["run"] == 1 for key in measured_again)
    assert not path.with_name("killed.json.part").exists()


def test_other_code_needs_append(results, tmp_path):
    data = json.loads(results.read_text())
    data["runs"][-1]["commit"] = "0" * 40
    path = tmp_path / "old.json"
    path.write_text(json.dumps(data))
    with pytest.raises(SystemExit):
        run.main(["--cases", "tiny/scoring/fp32", "--out", str(path)])
    assert run.main(["--cases", "tiny/scoring/fp32", "--out", str(path), "--append"]) == 0


def test_a_wrong_result_is_not_reported(monkeypatch, tmp_path):
    right = wk.token_logps

    def off_by_one(hidden, weight, targets, **kwargs):
        return right(hidden, weight, (targets + 1) % weight.shape[0], **kwargs)

    monkeypatch.setattr(wk, "token_logps", off_by_one)
    path = tmp_path / "wrong.json"
    arguments = ["--cases", "tiny/frozen/fp32", "--peers", "windkern-torch", "--seconds", "0", "--out", str(path)]
    assert run.main(arguments) == 1
    row = row_of(path, "windkern-torch")
    assert row["status"] == "wrong"
    assert "over the budget" in row["reason"]
    assert "median_s" not in row


def test_a_peer_that_is_not_installed_is_shown(monkeypatch):
    provider = next(provider for provider in peers.all_providers() if provider.name == "liger-dpo")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, reason = provider.why_not(select_cases("tiny/trained/fp32")[0])
    assert status == "absent"
    assert "liger-kernel" in reason


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="this torch has no chunked op")
def test_a_peer_that_fails_is_shown(monkeypatch, tmp_path):
    def broken(*args, **kwargs):
        raise RuntimeError("planted")

    monkeypatch.setattr(torch.nn.functional, "linear_cross_entropy", broken)
    path = tmp_path / "failed.json"
    run.main(["--cases", "tiny/scoring/fp32", "--peers", "torch-chunked", "--seconds", "0", "--out", str(path)])
    row = row_of(path, "torch-chunked")
    assert (row["status"], row["reason"]) == ("failed", "RuntimeError: planted")


def test_a_peer_that_breaks_the_device_spoils_no_other_row(monkeypatch, tmp_path):
    def broken(*args, **kwargs):
        monkeypatch.setattr(timing, "works", lambda device: False)
        raise RuntimeError("an illegal memory access was encountered")

    path = tmp_path / "broken.json"
    arguments = ["--cases", "tiny/scoring/fp32", "--peers", "liger-*,plain,windkern-torch", "--seconds", "0"]
    arguments += ["--out", str(path)]
    with monkeypatch.context() as planted:
        planted.setattr(torch.nn.functional, "linear", broken)  # of plain logits
        assert run.main(arguments) == run.DEVICE_BROKEN
    assert {row["provider"]: row["status"] for row in rows_of(path)} == {"plain": "failed"}
    monkeypatch.setattr(timing, "works", lambda device: True)
    assert run.main(arguments) == 0
    assert row_of(path, "plain")["reason"] == "RuntimeError: an illegal memory access was encountered"
    assert row_of(path, "windkern-torch")["status"] == "ok"
    data = json.loads(path.read_text())
    data["runs"][0]["commit"] = "0" * 40
    path.write_text(json.dumps(data))
    assert run.main([*arguments, "--append"]) == 0  # other code may have fixed it
    assert row_of(path, "plain")["status"] == "ok"


def test_names_are_checked():
    for arguments in (["--cases", "no/such/case"], ["--peers", "nobody"]):
        with pytest.raises(SystemExit):
            run.main([*arguments, "--list"])
    assert all(case.shape is not TINY for case in select_cases("*"))
    assert len(select_cases("*")) == 18
    assert len(run.select_providers("windkern-*")) == 3 * len(wk.backends.available("cpu"))


@pytest.mark.parametrize("level", ["tokens", "loss"])
def test_sampled_exact_results_equal_autograd(level):
    problem = make_problem(Case(TINY, "trained", "fp32"))
    hidden = problem.hidden.double().requires_grad_()
    weight = problem.weight.double().requires_grad_()
    logps = (hidden @ weight.T).log_softmax(-1).gather(-1, problem.targets[:, None]).squeeze(-1)
    if level == "tokens":
        found, output, upstream = exact.exact_tokens(problem), logps, problem.upstream.double()
    else:
        found, output, upstream = exact.exact_loss(problem), exact.pair_loss(TINY, logps), None
    dhidden, dweight = torch.autograd.grad(output, (hidden, weight), upstream)
    torch.testing.assert_close(found.output, output.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.dhidden, dhidden[found.rows], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.dweight, dweight[found.columns], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gate_is_the_rule_of_the_other_tests(dtype):
    right = torch.linspace(1, 2, 100, dtype=torch.float64)
    for rounded in (right.to(dtype), right * 1.05):
        own = exact.relative_error(rounded, right)
        assert exact.allowed_error(own, dtype) == pytest.approx(error_budget(rounded, right, dtype))


def test_no_call_always_follows_the_same_one():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    timing.interleave(calls, dict.fromkeys(calls, 8))
    rounds = [tuple(order[first : first + 3]) for first in range(0, 24, 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len({each.index("b") for each in rounds}) == 3
    order.clear()
    timing.interleave(calls, dict.fromkeys(calls, 8))
    assert [tuple(order[first : first + 3]) for first in range(0, 24, 3)] == rounds


def test_samples_are_spread_and_summed_up():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in ("often", "once")}
    samples = timing.interleave(calls, {"often": 4, "once": 1})
    assert sorted(order) == ["often"] * 4 + ["once"] and order.index("once") >= 3
    assert [len(samples[name]) for name in calls] == [4, 1]
    assert timing.summary([3.0, 1.0, 2.0]) == {"median_s": 2.0, "p20_s": 1.4, "p80_s": 2.6, "num_samples": 3}
    assert timing.summary([3.0])["p80_s"] == 3.0
    taken = {"calm": [1.0, 1.1], "disturbed": [1.0, 60.0], "many": [1.0, 9.0, 1.0], "once": [30.0]}
    assert timing.disputed(taken) == ["disturbed"]
    assert timing.disputed(taken, floor=1.0) == ["disturbed", "once"]
    assert timing.further_samples(0.1, share=1.05, fastest=0.1) == 10
    assert [timing.further_samples(first, 1.0, fastest=1.0) for first in (1.0, 2.2, 2.6, 6.0)] == [3, 2, 1, 0]
    assert timing.further_samples(6.0, 1.0, fastest=5.0) == 2
    assert timing.further_samples(6.0, share=20.0, fastest=1.0) == 3


def as_real_head(data: dict) -> dict:
    """Rename the tiny rows to a real head, because smoke runs are neither drawn nor put into the README."""
    for row in data["rows"]:
        row["shape"] = SHAPES[0].name
        row["case"] = row["case"].replace(TINY.name, SHAPES[0].name)
    return data


def test_pictures_are_drawn_from_the_file_alone(results, tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit):
        plot.main([str(results), "--out", str(tmp_path)])
    path = tmp_path / "real.json"
    path.write_text(json.dumps(as_real_head(json.loads(results.read_text()))))
    with quiet():
        assert plot.main([str(path), "--out", str(tmp_path), "--prefix", "cpu"]) == 0
    for name in ("cpu-time.png", "cpu-memory.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    named = {provider.name for provider in peers.all_providers() if provider.level != "floor" and not provider.cannot}
    assert named <= set(plot.COLOURS)


def test_readme_tables_stand_between_their_markers(results, tmp_path):
    data = as_real_head(json.loads(results.read_text()))
    slower = next(row for row in data["rows"] if row["provider"] == "plain" and row["mode"] == "frozen")
    slower["times_floor"] = 1e-3  # a peer that beats everything must be reported
    data["kind"] = "speed"  # also where this CPU is masked
    (tmp_path / "speed.json").write_text(json.dumps(data))
    (tmp_path / "other.json").write_text("[]")  # other results may lie in the same folder
    page = tmp_path / "README.md"
    short = "<!-- bench:summary --><!-- /bench:summary -->\n"
    page.write_text(f"{short}# top\n<!-- bench:cpu -->\nold table\n<!-- /bench:cpu -->\nrest\n")
    arguments = ["--page", str(page), "--results", str(tmp_path)]
    assert readme.main([*arguments, "--check"]) == 1
    assert readme.main(arguments) == 0
    assert readme.main([*arguments, "--check"]) == 0
    text = page.read_text()
    assert re.search(r"\| frozen, bf16 \| .*x, .* \| plain logits: .*x, .* \|\n", text.split("# top")[0])
    assert "# top\n<!-- bench:cpu -->\n" in text
    assert text.endswith("<!-- /bench:cpu -->\nrest\n")
    assert "old table" not in text
    assert re.search(r"Cases we lose:\n(- .*\n)*- .*/frozen/bf16: plain logits is .* times as fast as windkern", text)
    assert "**0.00x**" in text
    assert "cannot do per-row upstream" in text
    page.write_text("no markers")
    with pytest.raises(SystemExit):
        readme.main(arguments)


def test_compare_fails_above_the_stated_slowdown(results, tmp_path, capsys):
    assert compare.main([str(results), str(results)]) == 0
    data = json.loads(results.read_text())
    slower = next(row for row in data["rows"] if row["provider"] == "windkern-torch" and row["status"] == "ok")
    slower["times_floor"] *= 1.5
    path = tmp_path / "slower.json"
    path.write_text(json.dumps(data))
    assert compare.main([str(results), str(path)]) == 1
    assert "1.50 times as long, 1.10 is allowed" in capsys.readouterr().err
    assert compare.main([str(results), str(path), "--slowdown", "1.6"]) == 0
    assert compare.main([str(results), str(path), "--only", "plain"]) == 0
    slower.update(status="wrong", reason="planted")
    path.write_text(json.dumps(data))
    assert compare.main([str(results), str(path)]) == 1


def test_error_table(tmp_path):
    generator = torch.Generator().manual_seed(0)
    inputs = errors.Inputs(
        torch.randn(64, 32, generator=generator),
        torch.randn(515, 32, generator=generator) / 3,
        torch.randint(0, 515, (64,), generator=generator),
        "random numbers",
    )
    results = record.Results(tmp_path / "errors.json", "errors", {})
    for dtype_name in errors.DTYPES:
        for row in errors.error_rows(inputs, dtype_name):
            assert row["status"] == "ok", (dtype_name, row["label"], row["reason"])
            results.put(row)
    results.save()
    table = readme.replace_between(
        "<!-- bench:errors --><!-- /bench:errors -->",
        "errors",
        readme.SECTIONS["errors"][1](record.newest("errors", tmp_path)),
    )
    assert table.count("plain torch") == len(errors.DTYPES)
    assert "windkern, recomputed" in table


@pytest.mark.slow
def test_pytest_benchmark_rows(tmp_path):
    pytest.importorskip("pytest_benchmark")
    path = tmp_path / "rows.json"
    arguments = ["--cases", "tiny/trained/fp32", "--peers", "plain,windkern-torch,cce", f"--benchmark-json={path}"]
    command = [sys.executable, "-m", "pytest", "benchmarks/test_logprobs.py", "-p", "no:xdist", *arguments]
    # Reason: pytest-benchmark disables itself if it finds that it runs in a worker of this suite.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(path.read_text())
    assert [row["group"] for row in data["benchmarks"]] == ["tiny/trained/fp32"] * 2
    assert all({"times_floor", "extra_bytes", "command"} <= set(row["extra_info"]) for row in data["benchmarks"])
    assert "node" not in data["machine_info"]


def test_gpu_cases_and_providers_are_named_and_ordered():
    cases = select_cases("*", "cuda")
    assert cases[0].name == "8192x4096x128256/trained/bf16" and len(cases) == 4 * 4 * 3
    names = [provider.name for provider in peers.all_providers("cuda")]
    assert len(names) == len(set(names)) and names[0] == "gemm"
    assert {"cce-exact", "cce-filtered", "liger-flce", "plain-compile", "trl", "windkern-torch"} <= set(names)
    assert {provider.level for provider in peers.all_providers("cuda")} == {"floor", *provider_levels}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft's use of transformers
def test_a_whole_step_with_and_without_the_fused_ops(tmp_path, capsys):
    pytest.importorskip("transformers")
    out = tmp_path / "step.json"
    assert step.main(["--size", "tiny", "--device", "cpu", "--tokens", "8", "--most", "1", "--out", str(out)]) == 0
    rows = [row for row in json.loads(out.read_text())["rows"] if "absent" not in row]
    assert {(row["adapter"], row["step"]) for row in rows} >= {("full", "fused"), ("full", "plain")}
    assert all(row["fits"] and row["median_s"] > 0 for row in rows)


def test_the_two_steps_have_the_same_gradients():
    pytest.importorskip("transformers")
    model = step.make_model("tiny", "full", "cpu").float()
    batch = step._batch(model, 2, 8, "cpu")
    found = []
    for build in step.STEPS.values():
        model.zero_grad()
        build(model)(*batch)
        found.append({name: value.grad.clone() for name, value in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-3, atol=1e-5, msg=name)


def test_a_gpu_is_asked_for_by_name(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        run.main(["--device", "cuda"])
    assert "needs a GPU that torch can use" in capsys.readouterr().err
