"""Runs of the tiny model, in this process or in separate processes.

The latter are for tests of signals, deaths and several processes.
"""

import contextlib
import io
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import make_tiny
import numpy as np
import orbax.checkpoint as ocp
import pytest

from oreal_jax.cli import main

ROOT = Path(__file__).parents[1]
ONE_STEP = ("steps=1", "freeze_steps=0")  # in which the policy is trained
ALONE = os.environ | {"PYTHONPATH": str(ROOT)}
ALONE.pop("TPU_LIBRARY_PATH", None)  # set by importing JAX where libtpu is installed


class Result(NamedTuple):
    """Exit code and output of a command."""

    code: int
    output: str
    errors: str


def oreal_in_process(*arguments) -> Result:
    """Run `oreal` in this process, with one device."""
    one_device = jax.devices()[:1]
    output, errors = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        patch.setattr(jax, "devices", lambda: one_device)
        code = main(list(map(str, arguments)))
    return Result(code, output.getvalue(), errors.getvalue())


def check_ok(result: Result) -> str:
    """Check that a command succeeded; return its output."""
    assert result.code == 0, result.output + result.errors
    return result.output


def oreal(*arguments, environment: Mapping[str, str] = ALONE) -> subprocess.Popen:
    """Start `oreal` in a separate process, with one device by default."""
    script = "from oreal_jax.cli import command; command()"
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, output + errors
    return output


def fine_tuned(home: Path) -> Path:
    """Write the tiny model into a folder, and a fine-tuned run of it as `sft`."""
    make_tiny.write(home / "start")
    output = check_ok(
        oreal_in_process(
            "sft",
            ROOT / "configs/tiny_sft.py",
            *("--set", f"model={home / 'start' / 'hf'}"),
            *("--set", f"examples={home / 'start' / 'solutions.jsonl'}"),
            *("--run", home / "sft"),
        )
    )
    assert "(60/60)" in output
    return home


def command(
    tiny: Path, run: Path, *settings: str, config: Path, options: Sequence[str]
) -> list:
    all_settings = [
        f"model={tiny / 'sft'}",
        f"prompts={tiny / 'start' / 'prompts.jsonl'}",
        "saving.every=1",
        "steps=5",
        *settings,
    ]
    flags = [word for setting in all_settings for word in ("--set", setting)]
    return ["train", config, *flags, "--run", run, *options]


def train(
    tiny: Path,
    run: Path,
    *settings: str,
    config: Path = ROOT / "configs/tiny.py",
    options: Sequence[str] = (),
    environment: Mapping[str, str] = ALONE,
) -> subprocess.Popen:
    """Start `oreal train` in a separate process."""
    words = command(tiny, run, *settings, config=config, options=options)
    return oreal(*words, environment=environment)


def train_in_process(
    tiny: Path,
    run: Path,
    *settings: str,
    config: Path = ROOT / "configs/tiny.py",
    options: Sequence[str] = (),
) -> Result:
    """Run `oreal train` in this process."""
    return oreal_in_process(
        *command(tiny, run, *settings, config=config, options=options)
    )


def train_ok(
    tiny: Path,
    run: Path,
    *settings: str,
    config: Path = ROOT / "configs/tiny.py",
    options: Sequence[str] = (),
) -> str:
    """Run `oreal train` in this process, which must succeed; return its output."""
    return check_ok(
        train_in_process(tiny, run, *settings, config=config, options=options)
    )


def wait_for_steps(run: Path, count: int, process: subprocess.Popen) -> None:
    """Wait until the run has finished `count` steps."""
    path = run / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def arrays(run: Path, step: int) -> list[np.ndarray]:
    """Return all arrays of a checkpoint, whatever devices saved it."""
    values = []
    for item in ("policy", "trainer"):
        path = (run / "checkpoints" / str(step) / item).absolute()
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(path).item_metadata.tree
            plain = lambda _: ocp.RestoreArgs(restore_type=np.ndarray)
            tree = checkpointer.restore(path, restore_args=jax.tree.map(plain, tree))
        values += [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return values
