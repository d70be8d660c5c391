"""`make gpu` without a GPU: order, budget and packing with a fake clock; arguments of its programs; stopping one."""

import importlib
import itertools
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import windkern as wk

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import gpu, products, record, smoke  # noqa: E402

MINUTES = 9
# Seconds that a step takes on its own: as hoped, and twice as slow.
HOPED = {
    **{"build": 25, "smoke": 30, "table": 90, "products": 20, "tests": 90, "bandwidth": 30, "kernels": 15},
    **{"peers": 120, "step": 60, "bodies": 20, "pairs": 20, "speed": 1000, "tune": 200, "sanitize": 100, "widths": 60},
}


@pytest.fixture
def h100(monkeypatch):
    """Makes torch report an H100."""
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(wk.backends, "available", lambda device, dtype: ("triton", "cuda", "torch"))


class Machine:
    """A clock that advances as programs run; each program writes a log and its own file."""

    def __init__(self, results: Path, out: Path, takes: dict[str, float], ends: dict[str, list[str]] | None = None):
        self.now, self.results, self.out, self.takes, self.ends = 1000.0, results, out, takes, ends or {}
        self.ran: list[tuple[str, float, float]] = []  # name, begun at, seconds it was given
        self.commands: dict[str, list[str]] = {}
        self.environments: dict[str, dict[str, str]] = {}
        self.packed: list[set[str]] = []

    def clock(self) -> float:
        return self.now

    def run(self, command, log, seconds, environment, meanwhile):
        name = log.stem
        self.ran.append((name, self.now - 1000, seconds))
        self.commands[name], self.environments[name] = command, environment
        log.write_text("begun\n")
        meanwhile()
        self.packed.append(self.archive())
        (self.results / f"{name}.json").write_text("{}")
        takes = self.takes[name.split("-")[0]]
        # A stopped program may take all of its grace twice.
        self.now += min(takes, seconds) if takes <= seconds else seconds + 2 * gpu.GRACE
        if self.ends.get(name):
            return self.ends[name].pop(0)
        return "ok" if takes <= seconds else f"stopped after {seconds:.0f} s"

    def archive(self) -> set[str]:
        with tarfile.open(self.out / "gpu.tgz") as file:
            return {Path(name).name for name in file.getnames()}


def go(tmp_path, takes, call="1", **options) -> tuple[Machine, gpu.Run]:
    results, out = tmp_path / "results", tmp_path / "out"
    results.mkdir(parents=True)
    out.mkdir()
    machine = Machine(results, out, takes, **options)
    run = gpu.Run(out, results, 60 * MINUTES, clock=machine.clock, run=machine.run)
    for step in gpu.CALLS[call]:
        run.step(step)
    return machine, run


@pytest.mark.parametrize("slow", [1, 2, 100])
@pytest.mark.parametrize("call", gpu.CALLS)
def test_what_matters_most_comes_first_and_the_time_is_kept(h100, tmp_path, slow, call):
    machine, run = go(tmp_path, {name: slow * seconds for name, seconds in HOPED.items()}, call)
    assert machine.now - 1000 <= 60 * MINUTES
    names = [name for name, _, _ in machine.ran]
    assert names == [step.name for step in gpu.CALLS[call]][: len(names)] or slow == 100
    for (name, begun, seconds), step in zip(machine.ran, gpu.CALLS[call], strict=False):
        assert seconds <= step.seconds and begun + seconds + 2 * gpu.GRACE <= 60 * MINUTES, name
    assert list(run.ended) == [step.name for step in gpu.CALLS[call]]
    if call == "1":
        assert names[:3] == ["build", "smoke", "table"]
        begun = {name: at for name, at, _ in machine.ran}
        assert begun["table"] <= 200  # a third of the call, even if all before it hangs
        if slow == 1:
            assert {"products", "tests", "bandwidth", "kernels", "peers", "step", "bodies"} <= set(names)
            assert all(run.ended[name] == "ok" for name in names if name != "speed")
        if slow == 2:
            assert {"products", "tests"} <= set(names)


def test_after_every_step_the_archive_has_all_there_is(h100, tmp_path):
    machine, _ = go(tmp_path, HOPED)
    left = set()
    for (name, _, _), packed in zip(machine.ran, machine.packed, strict=True):
        left.add(f"{name}.log")
        assert left <= packed, name  # while the step still runs
        left.add(f"{name}.json")
    assert left <= machine.archive()
    assert sorted(path.name for path in machine.out.iterdir()) == ["gpu.tgz"]


def test_the_build_is_for_this_gpu_and_must_not_fail_in_silence(h100, tmp_path):
    machine, run = go(tmp_path, HOPED, ends={"build": ["exit code 1"]})
    assert machine.environments["build"]["WINDKERN_BUILD_CUDA"] == "1"
    assert machine.environments["build"]["WINDKERN_CUDA_ARCHS"] == "90"
    assert run.ended["build"] == "exit code 1" and run.ended["table"] == "ok"
    command = machine.commands["table"]
    assert command[command.index("--peers") + 1] == "gemm,plain,windkern-triton,windkern-cuda"
    cases = command[command.index("--cases") + 1].split(",")
    assert [case.split("x")[0] for case in cases] == ["8192", "2048", "512"]


def test_a_step_goes_on_after_a_broken_device(h100, tmp_path):
    machine, run = go(tmp_path, HOPED, ends={"peers": ["exit code 3"], "peers-1": ["exit code 3"]})
    names = [name for name, _, _ in machine.ran]
    assert names[names.index("peers") :][:3] == ["peers", "peers-1", "step"] and run.ended["peers"] == "exit code 3"
    fast, run = go(tmp_path / "fast", {**HOPED, "peers": 20}, ends={"peers": ["exit code 3"]})
    assert [name for name, _, _ in fast.ran if name.startswith("peers")] == ["peers", "peers-1"]
    assert run.ended["peers"] == "ok"


def test_a_step_that_cannot_be_begun_leaves_the_others(h100, tmp_path, monkeypatch):
    def broken(device, dtype):
        raise RuntimeError("no such GPU")

    monkeypatch.setattr(wk.backends, "available", broken)
    machine, run = go(tmp_path, HOPED)
    assert run.ended["table"] == "not begun" and run.ended["tests"] == "ok"
    assert (machine.results / "table.log").read_text() == "RuntimeError: no such GPU\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the programs would run")
@pytest.mark.parametrize("step", [step for call in gpu.CALLS.values() for step in call], ids=lambda step: step.name)
def test_every_program_takes_its_arguments(step, tmp_path, monkeypatch, capsys):
    """Each of our programs then reports that there is no GPU; pytest must know its options."""
    path = tmp_path / "nvidia-h100-2026-01-01.json"
    with monkeypatch.context() as patch:
        patch.setattr(record, "default_path", lambda device: path)
        patch.setattr(wk.backends, "available", lambda device, dtype: ("torch",))
        command = step.command(tmp_path, 100)
    assert command[0] == sys.executable
    if command[1] == "-m" and command[2].startswith("benchmarks."):
        module = importlib.import_module(command[2])
        try:
            code = module.main(command[3:])
        except SystemExit as stopped:
            code = stopped.code
        said = "".join(capsys.readouterr())
        assert code == 2 and "GPU" in said and "unrecognized" not in said, said
    elif command[2] == "pytest":
        assert all((ROOT / word.split("::")[0]).exists() for word in command if word.startswith("tests/"))
        assert importlib.import_module(command[command.index("-p") + 1])


def test_the_run_says_what_it_lacks(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--steps", "test"])
    assert "unknown step test; call 1 has build, smoke, table" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            gpu.main([])
        assert "torch sees none" in capsys.readouterr().err


def test_a_program_is_logged_and_stopped_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PACK_EVERY", 0.05)
    log, calls = tmp_path / "a.log", itertools.count()

    def run(code, seconds, **environment):
        command = [sys.executable, "-c", code]
        return gpu.run_command(command, log, seconds, environment, lambda: next(calls))

    assert run("import os; print(os.environ['GIVEN'])", 600, GIVEN="measured") == "ok"
    assert log.read_text() == "measured\n"
    assert run("import sys; print('wrong'); sys.exit(7)", 600) == "exit code 7" and log.read_text() == "wrong\n"
    # First an interrupt, like Ctrl-C, so that a program can report its results.
    told = "import time\ntry:\n    time.sleep(600)\nexcept KeyboardInterrupt:\n    print('half')"
    monkeypatch.setattr(gpu, "GRACE", 60)
    ready = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    assert run(ready + told, 3) == "stopped after 3 s" and log.read_text() == "half\n"
    assert next(calls) > 0  # the results were packed in the meantime
    # A program that does not react is killed, with its children.
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    deaf = (
        "import os, signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    assert run(deaf, 3) == "stopped after 3 s"
    child = int(log.read_text())
    deadline = time.monotonic() + 60
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _runs(child)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] not in "ZX"
    except OSError:
        return False


def test_a_failure_is_told_at_once(tmp_path):
    """It is printed before later tests end, so that a killed run has reported it."""
    tests = tmp_path / "test_two.py"
    tests.write_text("import time\ndef test_a():\n    assert 1 == 2, 'told'\ndef test_b():\n    time.sleep(600)\n")
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.failures", "-p", "no:cacheprovider", str(tests)]
    log = tmp_path / "log"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=tmp_path, env=environment, start_new_session=True
        )
        try:
            deadline = time.monotonic() + 300
            while "AssertionError: told" not in log.read_text() and time.monotonic() < deadline:
                assert process.poll() is None, log.read_text()
                time.sleep(0.05)
            assert process.poll() is None
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert "-- test_two.py::test_a (call)" in log.read_text()


def test_smoke_checks_every_back_end_and_gear(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the interpreter is slow, and tested elsewhere
    monkeypatch.setattr(smoke, "SHAPES", ((40, 16, 515),))
    assert smoke.main(["--device", "cpu"]) == 0
    said = capsys.readouterr().out
    for backend in wk.backends.available("cpu", torch.bfloat16):
        for gear in smoke.GEARS:
            assert f"{backend:7s} {gear:12s}" in said
    right = wk.token_logps
    monkeypatch.setattr(wk, "token_logps", lambda hidden, *rest, **more: right(hidden * 1.01, *rest, **more))
    assert smoke.main(["--device", "cpu"]) == 1
    assert "WRONG logps" in capsys.readouterr().out


class FakeTimer:
    def seconds(self, call, prepare, samples):
        prepare()
        call()
        return [2e-6]


def test_products_are_told_with_their_rates_or_why_not(capsys):
    saved = []
    sizes = {"rows": 8, "inner": 16, "widths": (32, 64), "copy_bytes": 1000}
    data = products.measure(FakeTimer(), "cpu", **sizes, save=lambda data: saved.append(len(data["rows"])))
    assert saved == [5, 10] and {row["width"] for row in data["rows"]} == {32, 64}
    for row in data["rows"]:
        if "cannot" not in row:
            assert row["flops_per_s"] == 2 * 8 * 16 * row["width"] / 2e-6
    assert {"logits, bfloat16", "dweight"} <= {row["product"] for row in data["rows"] if "cannot" not in row}
    assert "GB/s" in capsys.readouterr().out
