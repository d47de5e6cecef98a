"""Resuming a run: which step, with which settings and data, and what is removed.

A run resumes after its newest complete checkpoint. Files of later steps are removed:
those steps will be run again, perhaps with other settings.
"""

import itertools
import math
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from oreal_jax import config as configuration
from oreal_jax import distributed, metrics
from oreal_jax.checkpoints import run as checkpoints
from oreal_jax.checkpoints.run import Progress
from oreal_jax.checkpoints.source import ModelSource, open_model
from oreal_jax.config import SftConfig, TrainConfig
from oreal_jax.errors import InputError
from oreal_jax.files import check_local, read_json, write_lines
from oreal_jax.train.history import Change, setting_changes

# Settings that cannot change within a run.
IDENTITY = ("class", "model", "seed", "prompts", "examples", "chat_template")

Log = Callable[[str], None]


class Data(NamedTuple):
    """The data that a run trains on.

    `rows` is the fingerprint of all rows of `source`, `order` that of the list of which
    each step takes the next `per_step`.
    """

    source: str
    rows: str
    order: str
    per_step: int


def open_source(config: TrainConfig | SftConfig, run: Path) -> ModelSource:
    """Return the model of a run: its own once it has begun, else the config's.

    Raises:
        InputError: it cannot be used, or is not the same in all processes.
    """
    check_local(run)
    for name, value in configuration.as_json(config).items():
        distributed.assert_equal(f"config: {name}", value)
    newest = checkpoints.newest_step(run, checkpoints.ITEMS)
    distributed.assert_equal(
        f"{run}: step of the newest checkpoint, seen by all", newest
    )
    if newest is not None:
        return open_model(run)
    if checkpoints.steps(run):
        raise InputError(
            f"{run}: its checkpoints hold a policy but no state to resume from; train "
            f"this policy in another run: --set model={run} --run ANOTHER"
        )
    return open_model(config.model)


def read_progress(run: Path) -> tuple[int | None, Progress]:
    """Return the step that a run resumes after, and its progress.

    The step is None before the run has begun.

    Raises:
        InputError: they cannot be read.
    """
    step = checkpoints.newest_step(run, checkpoints.ITEMS)
    if step is None:
        return None, Progress()
    progress = checkpoints.read_progress(run, step)
    return step, progress or _unrecorded_progress(run, step)


def record_progress(run: Path) -> None:
    """Add their progress to checkpoints that do not record it.

    Call it before config.json is replaced, from which the progress follows.
    """
    for step in checkpoints.steps(run, checkpoints.ITEMS):
        if not checkpoints.has_progress(run, step):
            progress = _unrecorded_progress(run, step)
            checkpoints.add_progress(run, step, progress)


def _unrecorded_progress(run: Path, step: int) -> Progress:
    """Assume that every earlier step took as many prompts as in the run's config."""
    config = read_json(run / "config.json")
    per_step = config.get("prompts_per_step") or config["examples_per_step"]
    return Progress(taken=step * per_step)


def compare_settings(
    run: Path, config: TrainConfig | SftConfig, is_resumed: bool, log: Log
) -> dict[str, Change]:
    """Return and log the settings that have changed since the last start of the run.

    Raises:
        InputError: a setting that cannot change within a run has changed.
    """
    path = run / "config.json"
    if not path.exists():
        return {}
    old = read_json(path)
    changes = setting_changes(old, config)
    has_token_reward = bool(getattr(config, "token_reward", None))
    if is_resumed and bool(old.get("token_reward")) != has_token_reward:
        raise InputError(
            f"{path}: token_reward cannot be added or removed once the run has "
            "checkpoints"
        )
    for name, (before, now) in changes.items():
        change = f"{name}: {before} -> {now}"
        if name in IDENTITY:
            raise InputError(
                f"{path}: this run began with other settings; {change}; undo this "
                "change or choose another --run"
            )
        log(f"changed setting: {change}")
    return changes


def compare_progress(
    run: Path, step: int, progress: Progress, data: Data, rates: Mapping, log: Log
) -> None:
    """Log what changes at step `step`, the next one.

    `rates` are the learning rates as functions of the step, by metric name.

    Raises:
        InputError: the data are not those that the run began with.
    """
    where = f"{run}: step {step}"
    if progress.data not in ("", data.rows):
        raise InputError(
            f"{data.source}: has changed since {run} began; restore it, "
            f"or train on it in another run: --set model={run} --run ANOTHER"
        )
    if progress.order not in ("", data.order):
        log(
            f"{where}: the usable prompts or examples have changed, and so has their "
            "order: in this pass some will repeat and some will be skipped"
        )
    for name, before in progress.rates.items():
        now = float(rates[name](step)) if name in rates else before
        if not math.isclose(before, now, rel_tol=1e-6):
            log(f"{where}: {name} jumps from {before:.4g} to {now:.4g}")


def discard_after(run: Path, step: int) -> list[str]:
    """Remove files of steps from `step` on, and incomplete ones of a killed process.

    Returns lines for the log. A best policy of a later step is renamed to
    RUN/best.abandoned (or .2, .3, ...): the rerun may not find it again.
    """
    lines = [
        f"{directory}: incomplete, without {' and '.join(items)}; removed"
        for directory, items in checkpoints.remove_unfinished(run, step)
    ]
    counts = {
        "step(s) of trajectories": _remove_steps(run / "trajectories", step),
        # Those of the next step stay until it is finished.
        "interrupted step(s)": _remove_steps(run / "interrupted", step + 1),
        "file(s) of evaluations": _remove_steps(run / "evaluations", step + 1),
        "evaluation(s)": _remove_evaluations(run / "evaluations.jsonl", step),
    }
    removed = [f"{count} {name}" for name, count in counts.items() if count]
    if removed:
        lines.append(f"{run}: removed {', '.join(removed)} after {step} step(s)")
    return lines + _set_aside_best(run, step)


def _remove_steps(folder: Path, first: int) -> int:
    """Remove the files of steps from `first` on; return the number of steps."""
    matches = [(re.search(r"step_(\d+)", path.name), path) for path in folder.glob("*")]
    files = [(int(m[1]), path) for m, path in matches if m and path.is_file()]
    later = [(step, path) for step, path in files if step >= first]
    for _, path in later:
        path.unlink()
    return len({step for step, _ in later})


def _remove_evaluations(path: Path, step: int) -> int:
    """Remove the rows of policies after `step`; return their number."""
    rows = metrics.read(path, step=int)
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
    best_step = checkpoints.newest_step(best)
    if best_step is None or best_step <= step:
        return []
    suffixes = itertools.chain([""], (f".{number}" for number in itertools.count(2)))
    names = (run / f"best.abandoned{suffix}" for suffix in suffixes)
    abandoned = next(name for name in names if not name.exists())
    best.rename(abandoned)
    return [
        f"{best}: after {best_step} steps, which will be run again; renamed to "
        f"{abandoned}"
    ]
