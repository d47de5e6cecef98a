"""Runs of the tiny model in processes of their own."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import make_tiny
import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).parents[1]
# What processes of the tests compile is compiled once.
COMPILED = tempfile.TemporaryDirectory(prefix="oreal_compiled_")
ALONE = os.environ | {
    "XLA_FLAGS": "",
    "PYTHONPATH": str(ROOT),
    "JAX_COMPILATION_CACHE_DIR": COMPILED.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def oreal(*arguments, environment: Mapping[str, str] = ALONE) -> subprocess.Popen:
    """`oreal` in a process of its own, with one device unless told otherwise."""
    command = [sys.executable, "-c", "import sys; from oreal_jax.cli import main; "]
    command[-1] += "sys.exit(main())"
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    said, complained = process.communicate(timeout=300)
    assert process.returncode == 0, said + complained
    return said


def fine_tuned(home: Path) -> Path:
    """Writes the tiny model into a folder, and a fine-tuned run of it as `sft`."""
    make_tiny.write(home / "start")
    said = finish(
        oreal(
            "sft",
            ROOT / "configs/tiny_sft.py",
            *("--set", f"model={home / 'start' / 'hf'}"),
            *("--set", f"examples={home / 'start' / 'solutions.jsonl'}"),
            *("--run", home / "sft"),
        )
    )
    assert "step 60/60" in said
    return home


def train(
    tiny: Path,
    run: Path,
    *settings: str,
    config: Path = ROOT / "configs/tiny.py",
    options: Sequence[str] = (),
    environment: Mapping[str, str] = ALONE,
) -> subprocess.Popen:
    given = [
        f"model={tiny / 'sft'}",
        f"prompts={tiny / 'start' / 'prompts.jsonl'}",
        "saving.every=1",
        "steps=5",
        *settings,
    ]
    flags = [word for setting in given for word in ("--set", setting)]
    command = ["train", config, *flags, "--run", run, *options]
    return oreal(*command, environment=environment)


def wait_for_steps(run: Path, count: int, process: subprocess.Popen) -> None:
    """Returns when the run has done so many steps."""
    path = run / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def arrays(run: Path, step: int) -> list[np.ndarray]:
    """Every number of a checkpoint, whatever devices saved it."""
    found = []
    for item in ("policy", "trainer"):
        path = (run / "checkpoints" / str(step) / item).absolute()
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(path).item_metadata.tree
            plain = lambda _: ocp.RestoreArgs(restore_type=np.ndarray)
            tree = checkpointer.restore(path, restore_args=jax.tree.map(plain, tree))
        found += [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return found
