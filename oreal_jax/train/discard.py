"""What a run directory holds of steps that will be run again.

A run that was killed resumes after its newest checkpoint. What it wrote after that is
of steps that will be run again, perhaps with other settings; the checkpoints decide.
"""

import itertools
import re
import shutil
from pathlib import Path

from oreal_jax import metrics
from oreal_jax.checkpoints import run as checkpoints
from oreal_jax.files import write_lines


def discard_after(run: Path, step: int) -> list[str]:
    """Removes what `run` wrote after its first `step` steps, and what a killed process
    left half-written; returns lines for the log.

    A best policy of a later step is renamed to RUN/best.abandoned, or .2, .3, ... after
    it: the steps to come may not find it again.
    """
    lines = [
        f"{directory}: incomplete, without {' and '.join(items)}; removed"
        for directory, items in checkpoints.remove_unfinished(run, step)
    ]
    counts = {
        "step(s) of trajectories": _remove_steps(run / "trajectories", step),
        # Those of the next step stay until it is finished.
        "interrupted step(s)": _remove_steps(run / "interrupted", step + 1),
        "evaluation(s)": _remove_evaluations(run / "evaluations.jsonl", step),
    }
    removed = [f"{count} {name}" for name, count in counts.items() if count]
    if removed:
        lines.append(f"{run}: removed {', '.join(removed)} after step {step}")
    return lines + _set_aside_best(run, step)


def _remove_steps(folder: Path, first: int) -> int:
    """Removes the files of steps from `first` on; returns the number of steps."""
    matches = [(re.search(r"step_(\d+)", path.name), path) for path in folder.glob("*")]
    files = [(int(m[1]), path) for m, path in matches if m and path.is_file()]
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
    kept = checkpoints.newest_step(best)
    if kept is None or kept <= step:
        return []
    suffixes = itertools.chain([""], (f".{number}" for number in itertools.count(2)))
    names = (run / f"best.abandoned{suffix}" for suffix in suffixes)
    abandoned = next(name for name in names if not name.exists())
    best.rename(abandoned)
    return [
        f"{best}: from step {kept}, which will be run again; renamed to {abandoned}"
    ]
