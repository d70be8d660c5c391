"""The display of a running command: lines for files, a bar for terminals, an estimate of the time left."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("rich")

from rich.console import Console

from windkern.display import RANKS, Display, clock
from windkern.forecast import Forecast
from windkern.terminal import printable

SAMPLING, FITTING, SAVING = ("sampling", "responses"), ("fitting", "batches"), ("saving", "")
HOSTILE = "\x1b]0;mine\x07\x1b[2J\x9b31m\r\u202e[/red][bold]:heart:\ud800"
SHOWN = r"\x1b]0;mine\x07\x1b[2J\x9b31m\r\u202e[/red][bold]:heart:\ud800"


class Time:
    """A clock that a test advances."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _one_process(monkeypatch):
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def seconds() -> Time:
    return Time()


def lines_of(display: Display) -> list[str]:
    return display.console.file.getvalue().splitlines()


def in_a_file(seconds: Time, **options) -> Display:
    return Display(Console(file=io.StringIO()), seconds=seconds, look=None, **options)


def run_of_two_iterations(display: Display, seconds: Time) -> None:
    """30 s of loading, then twice 64 responses in 64 s and 4 batches in 8 s."""
    with display:
        display.phase(0, "loading the model")
        seconds.now += 30
        display.plan(iterations=2, each={SAMPLING: 64.0, FITTING: 8.0})
        for iteration in (1, 2):
            display.phase(iteration, *SAMPLING[:1], 64, SAMPLING[1])
            for _ in range(64):
                seconds.now += 1
                display.advance()
            display.phase(iteration, *FITTING[:1], 4, FITTING[1])
            for _ in range(4):
                seconds.now += 2
                display.advance()


def test_a_file_gets_a_line_a_phase_and_one_every_20_seconds(seconds):
    display = in_a_file(seconds)
    run_of_two_iterations(display, seconds)
    assert lines_of(display) == [
        "0:00 loading the model",
        "0:30 iteration 1/2: sampling 0 of 64 responses",
        "0:50 iteration 1/2: sampling 20 of 64 responses, 2:04 left",
        "1:10 iteration 1/2: sampling 40 of 64 responses, 1:44 left",
        "1:30 iteration 1/2: sampling 60 of 64 responses, 1:24 left",
        "1:34 iteration 1/2: fitting 0 of 4 batches, 1:20 left",
        # Only in the first iteration does it start within 5 s of the previous line.
        "1:42 iteration 2/2: sampling 0 of 64 responses, 1:12 left",
        "2:02 iteration 2/2: sampling 20 of 64 responses, 0:52 left",
        "2:22 iteration 2/2: sampling 40 of 64 responses, 0:32 left",
        "2:42 iteration 2/2: sampling 60 of 64 responses, 0:12 left",
    ]


def test_lines_come_at_most_every_20_seconds_however_much_happens(seconds):
    display = in_a_file(seconds)
    with display:
        display.phase(0, "sampling", 6400, "responses")
        for _ in range(6400):
            seconds.now += 1 / 64
            display.advance()
    assert [line.split(" of ")[0] for line in lines_of(display)] == [
        "0:00 sampling 0",
        *(f"{clock(k * 20)} sampling {1280 * k}" for k in range(1, 6)),
    ]


def test_a_phase_without_steps_says_that_it_is_alive(seconds):
    display = Display(Console(file=io.StringIO()), seconds=seconds, look=0.005)
    with display:
        display.phase(0, "loading the model")
        for passed in (21, 42):
            seconds.now = 1000 + passed
            while len(lines_of(display)) < 1 + passed // 21:
                time.sleep(0.005)
    assert lines_of(display) == ["0:00 loading the model", "0:21 loading the model", "0:42 loading the model"]


def test_lines_are_in_a_pipe_at_once_and_without_escape_codes(seconds, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    reader, writer = os.pipe()
    with os.fdopen(writer, "w", buffering=1 << 16) as file, Display(Console(file=file), look=None) as display:
        display.phase(0, "loading packages")
        assert os.read(reader, 1000) == b"0:00 loading packages\n"
        display.note("a note of more than eighty characters " * 3)
        assert os.read(reader, 1000) == b"a note of more than eighty characters " * 3 + b"\n"
    os.close(reader)


@pytest.mark.parametrize("name", RANKS)
def test_only_the_first_process_speaks(seconds, monkeypatch, name):
    for rank in ("0", "1"):
        monkeypatch.setenv(name, rank)
        display = in_a_file(seconds)
        run_of_two_iterations(display, seconds)
        display.print("end")
        assert (lines_of(display) == []) is (rank == "1")


def test_a_process_that_learns_that_it_is_not_the_first_says_no_more(seconds):
    display = in_a_file(seconds)
    with display:
        display.phase(0, "loading packages")
        display.hush(True)
        display.phase(0, "loading the model")
        display.print("end")
    assert lines_of(display) == ["0:00 loading packages"]


# In a terminal


def terminal(width: int, seconds: Time) -> Display:
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=width, legacy_windows=False)
    return Display(console, animated=True, seconds=seconds)


def frame_of(display: Display) -> list[str]:
    with display.console.capture() as captured:
        display.console.print(display._frame())
    return captured.get().splitlines()


@pytest.mark.parametrize("width", [40, 80, 120])
def test_two_lines_move_in_a_terminal(seconds, width):
    display = terminal(width, seconds)
    display.phase(0, "loading packages")
    assert "loading packages" in frame_of(display)[0] and frame_of(display)[1].rstrip().endswith("0:00")
    seconds.now += 10
    display.plan(iterations=2, before={("sampling", "responses of the reference"): 40.0}, each={SAMPLING: 30.0})
    display.phase(0, "sampling", 40, "responses of the reference")
    assert "sampling 0 of 40 responses" in frame_of(display)[0] and "left" not in frame_of(display)[1]
    seconds.now += 10
    display.under_way(10.5)
    head, bar = frame_of(display)
    assert "sampling 0 of 40 responses" in head  # none is whole yet, and the bar moves
    assert "10 %" in bar and "0:20" in bar and "1:25 left" in bar and "━" in bar
    display.advance(20)
    head, bar = frame_of(display)
    assert "sampling 20 of 40" in head and "20 %" in bar and "0:40 left" in bar
    assert {len(line) <= width for line in (head, bar)} == {True}


def test_the_bar_vanishes_and_lines_stay(seconds):
    display = terminal(80, seconds)
    with display:
        display.phase(0, "loading packages")
        display.print("kept")
        display.note("noted")
    shown = display.console.file.getvalue()
    assert "kept\n" in shown and "noted\n" in shown
    # At the end the lines of the bar are erased, and the cursor is back.
    assert min(map(shown.rindex, ("\x1b[2K", "\x1b[?25h"))) > shown.rindex("loading packages")


def test_words_are_not_cut_in_a_terminal(seconds):
    display = terminal(40, seconds)
    display.print("every weight of this model is ", ("trained", "bold"), " in twelve iterations")
    assert [line.rstrip() for line in lines_of(display)] == [
        "every weight of this model is trained in",
        "twelve iterations",
    ]


# Text from outside


def test_nothing_from_outside_is_obeyed(seconds):
    harmless = "naïve 日本 👩\u200d👧 a\u00a0b"
    assert printable(HOSTILE) == SHOWN and printable(harmless) == harmless
    display = in_a_file(seconds)
    with display:
        display.phase(0, f"loading {HOSTILE}")
        display.print(HOSTILE, (HOSTILE, "bold"))
        display.note(HOSTILE)
    assert lines_of(display) == [f"0:00 loading {SHOWN}", SHOWN * 2, SHOWN]
    display = terminal(200, seconds)
    display.phase(0, HOSTILE)
    assert frame_of(display)[0].endswith(SHOWN)


# Forecasts


def test_what_is_left_follows_what_has_been_measured(seconds):
    forecast = Forecast(each={SAMPLING: 2.0, FITTING: 1.0, SAVING: 1.0}, iterations=4, clock=seconds)
    forecast.begin(1, SAMPLING)
    assert forecast.left is None and forecast.share == 0
    seconds.now += 20
    forecast.move(0.5)
    assert forecast.left == pytest.approx(20 + 40 + 3 * 80)  # 20 s per unit of cost
    seconds.now += 15  # it counts down between two steps
    assert forecast.left == pytest.approx(20 + 40 + 3 * 80 - 15)
    seconds.now += 5
    forecast.begin(1, FITTING)
    seconds.now += 5
    forecast.move(0.5)
    mean = (40 + 5) / (2 + 0.5)  # seconds per unit of cost, for a kind that has not been measured
    assert forecast.left == pytest.approx(5 + mean + 3 * (40 + 10 + mean))
    seconds.now += 5
    forecast.begin(2, SAMPLING)  # nothing was saved
    assert forecast.left == pytest.approx(3 * 50) and forecast.share == pytest.approx(0.25)


def test_a_resumed_run_begins_where_it_was(seconds):
    forecast = Forecast(before={SAVING: 1.0}, each={SAMPLING: 2.0, FITTING: 2.0}, iterations=4, clock=seconds)
    forecast.begin(3, FITTING, 0.5)
    assert forecast.share == pytest.approx((1 + 2 * 4 + 2 + 1) / 17)
    seconds.now += 10
    forecast.move(0.75)
    assert forecast.left == pytest.approx(10 + 80)
    seconds.now += 10
    forecast.begin(4, SAMPLING)  # sampling is not free because iteration 3 had none
    assert forecast.left == pytest.approx(80)


def test_the_share_does_not_fall_and_ends_at_one(seconds):
    forecast = Forecast(each={SAMPLING: 1.0, FITTING: 1.0}, iterations=2, after={SAVING: 1.0}, clock=seconds)
    shares = []
    for iteration in (1, 2):
        for kind, took in ((SAMPLING, 1), (FITTING, 100 * iteration)):
            forecast.begin(iteration, kind)
            for k in range(1, 11):
                seconds.now += took / 10
                forecast.move(k / 10)
                shares.append(forecast.share)
            forecast.begin(iteration, ("something", "unplanned"))
            shares.append(forecast.share)
    forecast.begin(3, SAVING)
    forecast.move(1.0)
    assert shares == sorted(shares) and forecast.share == 1 and forecast.left == 0


# From the first second


def windkern(*arguments: str, **options) -> subprocess.Popen:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "windkern", *arguments]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_libraries_draw_no_bars_of_their_own():
    pytest.importorskip("tqdm")
    code = (
        "from windkern.commands.loading import loading\nwith loading(lines=False):\n from tqdm.auto import tqdm\n"
        "for _ in tqdm(range(3), mininterval=0): pass"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("command", [("bandit",), ("demo",), ("train", "--config", "demo")])
def test_an_interrupt_while_packages_are_loaded_is_one_line(tmp_path, command):
    # Hazard: a process in a shell's background ignores SIGINT, like its children. Remedy: restore the default.
    process = windkern(*command, cwd=tmp_path, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        assert process.stdout.readline().endswith(" loading packages\n")
        process.send_signal(signal.SIGINT)
        out, error = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 130 and out == ""
    assert error.startswith("windkern: interrupted") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
