"""Runs of the tiny model in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import make_tiny

ROOT = Path(__file__).parents[1]
ALONE = os.environ | {
    "XLA_FLAGS": "",
    "PYTHONPATH": str(ROOT),
    "JAX_COMPILATION_CACHE_DIR": "",
}


def oreal(*arguments, **options) -> subprocess.Popen:
    """`oreal` in a process of its own, with one device."""
    command = [sys.executable, "-c", "import sys; from oreal_jax.cli import main; "]
    command[-1] += "sys.exit(main())"
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        env=ALONE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
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
    flags: tuple[str, ...] = (),
) -> subprocess.Popen:
    given = [
        f"model={tiny / 'sft'}",
        f"prompts={tiny / 'start' / 'prompts.jsonl'}",
        "saving.every=1",
        "steps=5",
        *settings,
    ]
    sets = [word for setting in given for word in ("--set", setting)]
    return oreal("train", config, *sets, "--run", run, *flags)
