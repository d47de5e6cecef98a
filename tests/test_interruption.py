"""Ctrl-C ends a command with exit code 130 whatever it is doing."""

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import ALONE, train

COMPILING = """
import os, signal, threading
from oreal_jax.cli import command, train

def compile_for_long(parsed):
    import jax, jax.numpy as jnp

    def f(x):
        for i in range(150):
            x = jnp.sin(x * i) @ x
        return x

    lowered = jax.jit(f).lower(jnp.ones((64, 64)))
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    lowered.compile()
    print("compiled")

train.train = compile_for_long
command()
"""


def test_an_interrupted_compilation_ends_with_130():
    """The compilation continues in XLA's thread, which must not outlive its client."""
    # Compiled with full optimization and not from a cache, for seconds.
    environment = ALONE | {"JAX_ENABLE_COMPILATION_CACHE": "0", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", COMPILING, "train", "configs/tiny.py"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 130, done.stderr
    assert (done.stdout, done.stderr) == ("", "oreal: interrupted\n")


ENDING = """
import atexit, sys, threading, time
from oreal_jax.interrupts import exit_process

def main():
    atexit.register(print, "handler")
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
    {end}

exit_process(main())
"""


@pytest.mark.parametrize(
    "end, code",
    [("return 0", 0), ("return 2", 2), ("sys.exit()", 0), ("sys.exit(2)", 2)]
    + [("raise RuntimeError('a bug')", 1)],
)
def test_a_process_ends_with_its_code_after_threads_and_handlers(end, code):
    program = ENDING.format(end=end)
    process = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert process.returncode == code
    assert process.stdout == "thread\nhandler\n"
    assert ("RuntimeError: a bug" in process.stderr) == (code == 1)


INTERRUPTED_EXIT = """
import atexit, os, signal
from oreal_jax.interrupts import exit_process

atexit.register(print, "closed")
atexit.register(os.kill, os.getpid(), signal.SIGINT)  # handlers run last to first
exit_process(2)
"""


def test_ctrl_c_during_exit_changes_no_exit_code():
    process = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_EXIT],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (process.returncode, process.stdout, process.stderr) == (2, "closed\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_training_interrupted_at_any_moment_ends_with_130(tiny, tmp_path, cached):
    """From the first check of the input to the third step or so."""
    cache = {"JAX_ENABLE_COMPILATION_CACHE": str(int(cached))}
    moments = random.Random(0)
    for _ in range(6):
        run = tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        process = train(tiny, run, "steps=500", environment=ALONE | cache)
        wait_for(run / "config.json", process)
        time.sleep(moments.uniform(0, 3 if cached else 9))
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 130, output + errors
        assert "Traceback" not in output + errors


def wait_for(file: Path, process: subprocess.Popen) -> None:
    """Wait until the file exists."""
    while not file.exists():
        assert process.poll() is None
        time.sleep(0.01)
