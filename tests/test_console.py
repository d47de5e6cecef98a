"""Progress on the screen and in files."""

import io
import subprocess
import sys
import time

import pytest
from rich.console import Console

from oreal_jax.console import Screen, time_text


@pytest.fixture
def clock(monkeypatch):
    """Return a list whose only item is the time."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def make_screen(**options) -> tuple[Screen, io.StringIO]:
    file = io.StringIO()
    return Screen(Console(file=file, width=200, highlight=False, **options)), file


def test_a_file_gets_a_line_a_minute_with_the_time_left(clock):
    screen, file = make_screen()
    with screen.phase("gen", total=40, label="step 3: ") as advance:
        for _ in range(10):  # one in 30 seconds
            clock[0] += 30
            advance(1, tokens=600)
    assert file.getvalue().splitlines() == [
        "step 3: gen 2/40, 20 tokens/s, about 19 min left",
        "step 3: gen 4/40, 20 tokens/s, about 18 min left",
        "step 3: gen 6/40, 20 tokens/s, about 17 min left",
        "step 3: gen 8/40, 20 tokens/s, about 16 min left",
        "step 3: gen 10/40, 20 tokens/s, about 15 min left",
    ]
    assert screen.timings == {"gen": 300}


def test_a_phase_of_unknown_length_or_less_than_a_minute(clock):
    screen, file = make_screen()
    with screen.phase("load") as advance:
        clock[0] += 59
        advance()
        assert not file.getvalue()
        clock[0] += 2
        advance(0)
    assert file.getvalue() == "load 1\n"


def test_a_terminal_shows_the_time_left_and_no_lines(clock):
    screen, file = make_screen(force_terminal=True, legacy_windows=False)
    with screen.phase("gen", total=4) as advance:
        for _ in range(3):
            clock[0] += 70
            advance()
    assert "about" not in file.getvalue() and "-:--:--" in file.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (89.0, "89 s"), (100.0, "2 min"), (6e3, "1.7 h"), (3e5, "3.5 d")],
)
def test_times_are_in_one_unit(seconds, text):
    assert time_text(seconds) == text


def test_a_run_goes_on_when_nobody_reads_its_output():
    program = """if True:
        import sys
        from oreal_jax.console import Screen
        from oreal_jax.interrupts import exit_process
        screen = Screen()
        for _ in range(9999):
            screen.log("text" * 99)
        sys.stderr.write("saved")
        exit_process(0)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.stderr.read() == "saved"
    assert process.wait() == 0
