"""Files of a finished, running or killed run, read for reports.

Files may be missing, and a killed process may have cut their last lines short. Files of
earlier versions have fewer fields; those are empty or None here.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

from oreal_jax import metrics
from oreal_jax.errors import InputError
from oreal_jax.files import check_local, read_json
from oreal_jax.verify.verdict import read_outcome

# Lists with one number per token of a selected completion.
PER_TOKEN = ("token_scores", "entropy", "log_probs", "old_log_probs")


class Run(NamedTuple):
    """The content of a run directory.

    name: the path as the user wrote it.
    settings: config.json, empty if there is none.
    rows: the metrics of each step.
    files: trajectory files by step, in order.
    notes: what could not be read; grows while completions are read.
    """

    name: str
    path: Path
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    files: dict[int, Path]
    notes: list[str]


class SavedCompletion(NamedTuple):
    """A line of a trajectory file.

    pieces: the text of each token, None if the file has none.
    per_token: the finite lists of `PER_TOKEN`, all of the same length T.
    """

    step: int
    group: int
    sample: int
    id: str
    question: str
    gold_answer: str
    text: str
    tokens: int
    finish_reason: str
    outcome: str
    reason: str
    by: str
    advantage: float
    selected: bool
    pieces: list[str] | None
    per_token: dict[str, np.ndarray]

    @property
    def correct(self) -> bool:
        """Whether the verdict was correct; undecided counts as incorrect."""
        return self.outcome == "correct"


def open_run(name: str) -> Run:
    """Read the small files of a run directory and list the others.

    Raises:
        InputError: not a run directory.
    """
    path = Path(name)
    check_local(path)
    if not path.is_dir():
        raise InputError(f"{name}: no such run directory")
    log, folder, config = (
        path / x for x in ("metrics.jsonl", "trajectories", "config.json")
    )
    settings = read_json(config) if config.is_file() else {}
    is_run = log.is_file() or folder.is_dir() or "class" in settings
    if not is_run:
        raise InputError(
            f"{name}: not a run directory: it has neither metrics.jsonl nor "
            "trajectories/ nor the config.json of a run"
        )
    rows, notes = metrics.read(log, step=int), []
    if not rows:
        notes.append("metrics.jsonl has no finished step yet")
    files = {}
    for file in sorted(folder.glob("step_*.jsonl")):
        if match := re.fullmatch(r"step_(\d+)\.jsonl", file.name):
            files[int(match[1])] = file
    return Run(name, path, settings, rows, files, notes)


def select_steps(run: Run, steps: Sequence[int]) -> Run:
    """Return the run with the trajectory files of `steps` only (empty: of all steps).

    Raises:
        InputError: a step has no file.
    """
    for step in steps:
        if step not in run.files:
            stored = f"{min(run.files)} to {max(run.files)}" if run.files else "none"
            raise InputError(
                f"--step {step}: not in the trajectories of {run.name}; available: "
                f"{stored}"
            )
    return run._replace(files={step: run.files[step] for step in steps or run.files})


def read_completions(run: Run, step: int) -> Iterator[SavedCompletion]:
    """Yield the completions of a step; a line that is not JSON ends the file.

    Raises:
        InputError: a line has no valid verdict.
    """
    path = run.files[step]
    try:
        file = path.open("rb")
    except FileNotFoundError:  # a run that resumes removes files of later steps
        run.notes.append(f"trajectories/{path.name} was removed while it was read")
        return
    with file:
        for number, line in enumerate(file, start=1):
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError:
                row = None
            if not isinstance(row, dict):
                run.notes.append(
                    f"trajectories/{path.name}: line {number} is cut short or not "
                    "JSON; it and the following lines are omitted"
                )
                return
            yield _completion(f"{path}:{number}", row, step, number - 1)


def _completion(
    place: str, row: dict[str, Any], step: int, index: int
) -> SavedCompletion:
    per_token = _per_token(row)
    length = len(next(iter(per_token.values()), ()))
    text = lambda field: str(row.get(field, ""))
    number = lambda field, default: (
        row[field] if isinstance(row.get(field), int | float) else default
    )
    pieces = row.get("pieces")
    if not isinstance(pieces, list) or len(pieces) != length or not length:
        pieces = None
    return SavedCompletion(
        step=step,
        group=int(number("group", index)),
        sample=int(number("sample", index)),
        id=text("id"),
        question=text("question"),
        gold_answer=text("gold_answer"),
        text=text("completion"),
        tokens=int(number("tokens", length)),
        finish_reason=text("finish_reason"),
        outcome=read_outcome(place, row),
        reason=text("reason"),
        by=text("by"),
        advantage=float(number("advantage", 0.0)),
        selected=bool(row.get("kept", length > 0)),
        pieces=pieces and [str(piece) for piece in pieces],
        per_token=per_token,
    )


def _per_token(row: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return the lists that hold finite numbers and are as long as the first one."""
    arrays: dict[str, np.ndarray] = {}
    for name in PER_TOKEN:
        try:
            values = np.array(row.get(name), np.float32)
        except (TypeError, ValueError):
            continue
        length = len(next(iter(arrays.values()), values)) if values.ndim == 1 else 0
        if length and values.shape == (length,) and np.isfinite(values).all():
            arrays[name] = values
    return arrays
