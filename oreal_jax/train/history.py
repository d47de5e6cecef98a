"""RUN/history.jsonl: starts and ends of a run, and changes of its settings.

    {"event": "start", "time", "step", "host", "process", "version", "commit",
     "changes": {"policy.learning_rate": [0.001, 5e-05]}}
    {"event": "end", "time", "step", "outcome": "finished", "stopped" or "failed",
     "reason"}

`step` is the number of finished steps. config.json has the newest settings; undoing
the changes yields those of each earlier start. A start without an end means that the
process was killed.
"""

import dataclasses
import datetime
import os
import socket
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from oreal_jax import config as configuration
from oreal_jax.files import write_lines
from oreal_jax.metrics import read

# Names of older versions, of fields and of functions.
RENAMED = {
    "weight_right": "weight_correct",
    "weight_wrong": "weight_incorrect",
    "wrong": "incorrect",  # a value of verification.undecided
    "one_pair": "select_pair",
    "everything": "select_all",
}


class Change(NamedTuple):
    """Two values of a setting; None where a config has no such field."""

    old: Any
    new: Any


def setting_changes(old: Mapping[str, Any], config: Any) -> dict[str, Change]:
    """Return the settings that differ from a run's config.json, by dotted name.

    Names that a newer version changed, and fields that it added and that have their
    default, do not count as changes: their meaning is the same.
    """
    before, after = flatten(old), flatten(configuration.as_json(config))
    if before.pop("tensorboard", False):  # `trackers` replaced it
        before["trackers"] = ["tensorboard"]
    before = _defaults(config) | before
    return {
        name: Change(before.get(name), after.get(name))
        for name in after | before
        if _meaning(before.get(name)) != _meaning(after.get(name))
    }


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of nested objects by dotted name."""
    if not isinstance(value, Mapping):
        return {prefix.removesuffix("."): value}
    flat = {}
    for name, item in value.items():
        flat |= flatten(item, f"{prefix}{RENAMED.get(name, name)}.")
    return flat


def _defaults(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return the defaults of all fields that have a plain one, by dotted name."""
    flat = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            flat |= _defaults(value, f"{name}.")
        elif field.default is not dataclasses.MISSING:
            flat[name] = configuration.as_json(field.default)
    return flat


def _meaning(value: Any) -> Any:
    """Return a value with older names replaced by newer ones, for comparison."""
    if isinstance(value, list):
        return [_meaning(item) for item in value]
    if not isinstance(value, str):
        return value
    if value.startswith("oreal_jax."):  # functions have moved between modules
        value = value.rpartition(".")[2]
    return RENAMED.get(value, value)


def record_start(run: Path, step: int, changes: Mapping[str, Change]) -> None:
    """Record the start of a process after `step` finished steps."""
    _append(
        run,
        {
            "event": "start",
            "step": step,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "version": metadata.version("oreal-jax"),
            "commit": source_commit(),
            "changes": {name: list(change) for name, change in changes.items()},
        },
    )


def record_end(run: Path, step: int, outcome: str, reason: str = "") -> None:
    """Record the end of a process after `step` finished steps."""
    _append(run, {"event": "end", "step": step, "outcome": outcome, "reason": reason})


def _append(run: Path, row: dict[str, Any]) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    line = orjson.dumps({"time": now} | row, option=orjson.OPT_APPEND_NEWLINE)
    path = run / "history.jsonl"
    if path.exists() and not path.read_bytes().endswith(b"\n"):  # cut short
        write_lines(path, read(path))
    with path.open("ab") as file:
        file.write(line)


def read_history(run: Path) -> list[dict[str, Any]]:
    """Return the events of a run; empty for a run of an older version."""
    return read(run / "history.jsonl", event=str)


def source_commit() -> str | None:
    """Return the git commit of this package's checkout, None without one."""
    folder = Path(__file__).parent
    words = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(words, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
