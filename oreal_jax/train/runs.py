"""Overview of run directories: step, score, age and state of each."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from oreal_jax import metrics
from oreal_jax.errors import InputError
from oreal_jax.files import read_json
from oreal_jax.train.history import read_history
from oreal_jax.train.lock import holder


class RunSummary(NamedTuple):
    """A run: `step` of `steps` are finished (None: as many as `epochs` of its data).

    `score` is that of the last evaluation, after `score_step` steps; `changed` the time
    of the last step in seconds since 1970. `state` is running, finished, stopped,
    failed or killed; `reason` the error of a failed run, or the host of a running one.
    """

    path: str
    method: str
    step: int
    steps: int | None
    score: float | None
    score_step: int | None
    changed: float
    state: str
    reason: str


def summarize_runs(folder: Path) -> list[RunSummary]:
    """Return the runs in a folder and its subfolders, most recently changed first.

    Raises:
        InputError: there is none.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such directory")
    runs = []
    for path in find_runs(folder):
        try:
            config = read_json(path / "config.json")
            runs += [summarize_run(path, config)] if "class" in config else []
        except (InputError, OSError) as error:
            print(f"oreal: {error}; this run is omitted", file=sys.stderr)
    if not runs:
        raise InputError(f"{folder}: no run directories found")
    return sorted(runs, key=lambda run: -run.changed)


def find_runs(folder: Path) -> Iterator[Path]:
    """Yield the run and model directories in a folder."""
    for name, folders, files in os.walk(folder):
        if "config.json" in files:
            yield Path(name)
            folders.clear()  # do not search a run or a model
        folders.sort()


def summarize_run(run: Path, config: dict[str, Any]) -> RunSummary:
    """Return the summary of one run, from its files and its lock."""
    rows = metrics.read(run / "metrics.jsonl", step=int)
    evaluations = metrics.read(run / "evaluations.jsonl", step=int, score=int | float)
    step, steps = (rows[-1]["step"] + 1 if rows else 0), config.get("steps") or None
    steps = steps if isinstance(steps, int) else None
    state, reason = _state(run, step, steps)
    files = [run / "metrics.jsonl", run / "config.json"]
    return RunSummary(
        path=str(run),
        method="train" if "prompts" in config else "sft",
        step=step,
        steps=steps,
        score=evaluations[-1]["score"] if evaluations else None,
        score_step=evaluations[-1]["step"] if evaluations else None,
        changed=max(file.stat().st_mtime for file in files if file.exists()),
        state=state,
        reason=reason,
    )


def _state(run: Path, step: int, steps: int | None) -> tuple[str, str]:
    if process := holder(run):
        return "running", process.host
    history = read_history(run)
    if not history:  # of an older version
        return ("finished" if steps and step >= steps else "stopped"), ""
    last = history[-1]
    if last["event"] == "start":  # and no end
        return "killed", ""
    return str(last.get("outcome", "stopped")), str(last.get("reason", ""))


def age(run: RunSummary) -> float:
    """Return the seconds since the last step of a run."""
    return max(0.0, time.time() - run.changed)
