"""What a run directory holds of steps that will be run again.

A run that was killed resumes after its newest checkpoint. What it wrote after that is
of steps that will be run again, perhaps with other settings; the checkpoints decide.
"""

import re
import shutil
from pathlib import Path

from oreal_jax import metrics
from oreal_jax.checkpoints import run as checkpoints
from oreal_jax.files import write_lines


def discard_after(run: Path, step: int) -> list[str]:
    """Removes what `run` wrote after its first `step` steps, and what a killed process
    left half-written; returns lines for the log.

    A best policy of a later step is renamed to RUN/best.abandoned: the steps to come
    may not find it again.
    """
    checkpoints.remove_unfinished(run)
    counts = {
        "step(s) of trajectories": _remove_steps(run / "trajectories", step),
        # Those of the next step stay until it is finished.
        "interrupted step(s)": _remove_steps(run / "interrupted", step + 1),
        "evaluation(s)": _remove_evaluations(run / "evaluations.jsonl", step),
    }
    removed = [f"{count} {name}" for name, count in counts.items() if count]
    lines = [f"{run}: removed {', '.join(removed)} after step {step}"]
    return (lines if removed else []) + _set_aside_best(run, step)


def _remove_steps(folder: Path, first: int) -> int:
    """Removes the files of steps from `first` on; returns the number of steps."""
    matches = [(re.search(r"step_(\d+)", path.name), path) for path in folder.glob("*")]
    files = [(int(match[1]), path) for match, path in matches if match]
    later = [(step, path) for step, path in files if step >= first]
    for _, path in later:
        path.unlink()
    return len({step for step, _ in later})


def _remove_evaluations(path: Path, step: int) -> int:
    """Removes the rows of policies after `step`; returns their number."""
    if not path.exists():
        return 0
    rows = metrics.read(path)
    valid = [row for row in rows if row["step"] <= step]
    if len(valid) < len(rows):
        write_lines(path, valid)
    return len(rows) - len(valid)


def _set_aside_best(run: Path, step: int) -> list[str]:
    best, old, incomplete = run / "best", run / ".best.old", run / ".best.incomplete"
    shutil.rmtree(incomplete, ignore_errors=True)
    if old.exists() and not best.exists():  # killed between two renames
        old.rename(best)
    shutil.rmtree(old, ignore_errors=True)
    steps = checkpoints.steps(best)
    if not steps or steps[-1] <= step:
        return []
    abandoned = run / "best.abandoned"
    shutil.rmtree(abandoned, ignore_errors=True)
    best.rename(abandoned)
    return [
        f"{best}: from step {steps[-1]}, which will be run again; "
        f"renamed to {abandoned}"
    ]
