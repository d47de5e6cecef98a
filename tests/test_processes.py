"""Runs of the tiny model in several real processes on loopback, a device each."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_distributed import free_port
from tiny_runs import ALONE, ROOT, arrays, command, finish, train, wait_for_steps

from oreal_jax import metrics

CONFIG = ROOT / "configs" / "tiny.py"


@pytest.fixture(scope="module")
def start(tiny):
    """`start(count, run, *settings)` starts `count` processes of one run."""

    def begin(count: int, run: Path, *settings: str, **named) -> list[subprocess.Popen]:
        several = ["--coordinator", f"localhost:{free_port()}"]
        several += ["--processes", str(count)]
        return [
            train(
                tiny,
                run,
                *settings,
                options=[*several, "--process", str(index)],
                **named,
            )
            for index in range(count)
        ]

    return begin


@pytest.fixture(scope="module")
def alone(tiny):
    """`alone(devices, run, *settings)`: a run of one process with fake devices."""

    def run(devices: int, run: Path, *settings: str) -> None:
        several = {"JAX_NUM_CPU_DEVICES": str(devices)}
        finish(train(tiny, run, *settings, environment=ALONE | several))

    return run


@pytest.fixture(scope="module")
def two(tiny, start) -> Path:
    """Two steps of two processes."""
    first, second = start(2, tiny / "two", "steps=2")
    assert "(2/2)" in finish(first)
    assert "step" not in finish(second)
    return tiny / "two"


def completions(run: Path) -> list[list[tuple]]:
    """All completions of each step, and which were selected."""
    names = ("id", "group", "sample", "completion", "verdict", "advantage", "kept")
    return [
        [tuple(row[name] for name in names) for row in map(json.loads, file.open())]
        for file in sorted((run / "trajectories").iterdir())
    ]


def assert_same_metrics(run: Path, other: Path, **tolerance) -> None:
    """Except those that depend on the clock or on the number of engines."""
    apart = ("timing_s/", "perf/", "rollout/", "training/")
    ours, theirs = (
        [
            {name: row[name] for name in row if not name.startswith(apart)}
            for row in metrics.read(each / "metrics.jsonl")
        ]
        for each in (run, other)
    )
    for row, expected in zip(ours, theirs, strict=True):
        assert row.keys() == expected.keys()
        for name in row:
            assert row[name] == pytest.approx(expected[name], **tolerance), name


def test_two_processes_train_as_one_does_bit_for_bit(tiny, two, alone):
    alone(2, tiny / "one", "steps=2")
    assert completions(two) == completions(tiny / "one")
    for ours, expected in zip(arrays(two, 2), arrays(tiny / "one", 2), strict=True):
        assert ours.tobytes() == expected.tobytes()
    assert_same_metrics(two, tiny / "one", rel=1e-6)
    learned = metrics.read(two / "metrics.jsonl")[1]
    assert learned["actor/grad_norm"] > 0  # there was something to be equal


def test_a_run_of_two_processes_holds_what_every_run_holds(two):
    names = {path.name for path in two.iterdir()}
    plain = {
        "config.json",
        "model",
        "data",
        "metrics.jsonl",
        "trajectories",
        "history.jsonl",
    }
    assert names == plain | {"checkpoints", "reference"}


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_run_ends_when_one_is_killed_or_suspended(tiny, two, victim, blow):
    run, address = tiny / f"ended-{victim}-{blow}", f"localhost:{free_port()}"
    shutil.copytree(two, run)
    program = (
        "from oreal_jax import cli, distributed; "
        "distributed.HEARTBEAT = 10; cli.command()"
    )
    started = []
    for index in range(2):
        options = ["--coordinator", address, "--processes", "2", "--process", index]
        words = command(tiny, run, "steps=500", config=CONFIG, options=options)
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", program, *map(str, words)],
                env=ALONE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    wait_for_steps(run, 3, started[0])
    began = time.monotonic()
    started[victim].send_signal(blow)
    _, errors = started[1 - victim].communicate(timeout=120)
    assert time.monotonic() - began < 10 + 30
    assert started[1 - victim].returncode == -signal.SIGABRT
    assert "JAX distributed service detected fatal errors" in errors
    started[victim].kill()
    started[victim].communicate()


@pytest.mark.slow
def test_four_processes_train_and_evaluate_as_one_does_bit_for_bit(tiny, start, alone):
    rows = [{"question": f"max {a} {a}?", "gold_answer": a} for a in range(10, 16)]
    exam = tiny / "exam.jsonl"
    exam.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [f"evaluation.data=({str(exam)!r},)", "evaluation.every=2", "steps=2"]
    for process in start(4, tiny / "four", *settings):
        finish(process)
    alone(4, tiny / "of-four", *settings)
    assert completions(tiny / "four") == completions(tiny / "of-four")
    assert_same_metrics(tiny / "four", tiny / "of-four", rel=1e-4, abs=1e-6)
    both = [arrays(tiny / name, 2) for name in ("four", "of-four")]
    for ours, expected in zip(*both, strict=True):
        assert ours.tobytes() == expected.tobytes()
    found = [
        (tiny / name / "evaluations.jsonl").read_text() for name in ("four", "of-four")
    ]
    assert found[0] == found[1] and found[0].count("\n") == 2
    assert (tiny / "four" / "best" / "checkpoints").is_dir()


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_processes(tiny, start, alone):
    """2, 4, then 1, each but the last preempted: the same as undisturbed."""
    run = tiny / "handed-on"
    for count, steps in [(2, 2), (4, 4)]:
        started = start(count, run, "steps=8")
        wait_for_steps(run, steps, started[0])
        started[-1].send_signal(signal.SIGTERM)
        for process in started:
            output, errors = process.communicate(timeout=120)
            assert process.returncode == 130, output + errors
            assert "Traceback" not in output + errors
    alone(1, run, "steps=8")
    alone(1, tiny / "undisturbed", "steps=8")
    assert completions(run) == completions(tiny / "undisturbed")
    assert_same_metrics(run, tiny / "undisturbed", rel=1e-3, abs=1e-5)
    both = arrays(run, 8), arrays(tiny / "undisturbed", 8)
    for ours, expected in zip(*both, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


BROKEN = """
from oreal_jax import distributed
from oreal_jax.errors import InputError
from oreal_jax.sampling import Engine
from oreal_jax.train import loop
from tiny import config

distributed.STOP_LIMIT = {limit}
steps, sample, pack = [], Engine.sample, loop.pack

def fail(place):
    if (distributed.process_index(), steps[-1], place) == (1, 2, {place!r}):
        raise {error}("a bug")

def broken_sample(self, *given, step=0, **named):
    steps.append(step)
    fail("sampling")
    return sample(self, *given, step=step, **named)

def broken_pack(*given, **named):
    fail("packing")
    return pack(*given, **named)

Engine.sample, loop.pack = broken_sample, broken_pack
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "limit", "saved"), [("sampling", 60, ["2"]), ("packing", 3, [])]
)
@pytest.mark.parametrize(("error", "code"), [("RuntimeError", 1), ("InputError", 2)])
def test_an_error_in_one_is_saved_by_all_or_ends_all(
    tiny, tmp_path, start, place, limit, saved, error, code
):
    """All processes exit with the message and the exit code of the error.

    Processes that wait for the failed one in collectives of the update cannot save.
    """
    config, run = tmp_path / "own.py", tmp_path / "run"
    shutil.copy(CONFIG, tmp_path)
    config.write_text(BROKEN.format(place=place, limit=limit, error=error))
    for index, process in enumerate(start(2, run, "saving.every=10", config=config)):
        output, errors = process.communicate(timeout=200)
        assert process.returncode == code, output + errors
        last = errors.splitlines()[-1]
        assert last.startswith("oreal: process 1 of 2 on ") and last.endswith("a bug")
        assert ("Traceback" in errors) == (index == 1 and code == 1), errors
        assert ("not saved: " in errors) == (index == 1 and not saved), errors
    checkpoints = [path.name for path in (run / "checkpoints").glob("*")]
    assert checkpoints == saved
