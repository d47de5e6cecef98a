"""Experiment trackers: TensorBoard, Weights & Biases, Trackio.

Each is an adapter of three functions. All record the settings and the git commit of a
run, and a resumed run continues its record, whose id is in RUN/trackers.json. Offline
operation is that of the libraries: TensorBoard and Trackio write local files, W&B with
WANDB_MODE=offline.
"""

import html
import importlib
import json
import math
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any, Protocol

from oreal_jax import config as configuration
from oreal_jax.config import SftConfig, TrainConfig
from oreal_jax.errors import InputError, summarize
from oreal_jax.files import read_json, write_text
from oreal_jax.train.history import flatten, source_commit
from oreal_jax.trajectory import Group

MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
COLUMNS = ("question", "gold_answer", "completion", "verdict", "advantage")
MAX_ROWS, MAX_CHARACTERS = 8, 4000  # of a table of samples
PROJECT = "oreal-jax"  # unless WANDB_PROJECT or TRACKIO_PROJECT is set


class Tracker(Protocol):
    """The record of a run in one library."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step."""
        ...

    def log_samples(self, step: int, rows: Sequence[Sequence[str]]) -> None:
        """Record completions of a step: rows with `COLUMNS`."""
        ...

    def close(self) -> None:
        """Finish the record."""
        ...


class Trackers:
    """The trackers of a config; each records all steps."""

    def __init__(self, config: TrainConfig | SftConfig, run: Path, first: int):
        """Open or continue the records; `first` is the next step of the run."""
        record = {
            **flatten(configuration.as_json(config)),
            "commit": source_commit(),
            "version": metadata.version("oreal-jax"),
        }
        self._every = getattr(config, "sample_table_every", 0)
        openers = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}
        self._trackers: list[Tracker] = [
            openers[name](run, record_id(run, name), record, first)
            for name in config.trackers
        ]

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the finite metrics of a step."""
        finite = {
            name: value for name, value in metrics.items() if math.isfinite(value)
        }
        self._call("log", step, finite)

    def log_samples(self, step: int, groups: Sequence[Group]) -> None:
        """Record the first completion of some prompts, every N steps."""
        if self._trackers and step % self._every == 0:
            rows = [sample_row(group) for group in groups[:MAX_ROWS]]
            self._call("log_samples", step, rows)

    def close(self) -> None:
        """Finish all records."""
        self._call("close")

    def _call(self, method: str, *arguments: Any) -> None:
        """Call all trackers; one that fails is left out from then on."""
        for tracker in list(self._trackers):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:  # libraries raise errors of many kinds
                self._trackers.remove(tracker)
                name = type(tracker).__name__
                message = f"tracker {name} failed and is left out: {summarize(error)}"
                print(f"oreal: {message}", file=sys.stderr, flush=True)


def check_trackers(config: TrainConfig | SftConfig) -> None:
    """Check that the libraries of the trackers are installed.

    Raises:
        InputError: one is not.
    """
    for name in config.trackers:
        if not util.find_spec(MODULES[name]):
            raise InputError(
                f"config: trackers={config.trackers}: {MODULES[name]} is not "
                f"installed: pip install 'oreal-jax[{name}]'"
            )


def record_id(run: Path, name: str) -> str:
    """Return the id of a run's record in one tracker: a new one at its first start."""
    path = run / "trackers.json"
    ids = read_json(path) if path.is_file() else {}
    if name not in ids:
        ids[name] = secrets.token_hex(4)
        write_text(path, json.dumps(ids) + "\n")
    return ids[name]


def sample_row(group: Group) -> list[str]:
    """Return the first completion of a prompt as a row with `COLUMNS`."""
    trajectory = group[0]
    # Decoded text may contain an unpaired surrogate.
    text = trajectory.completion.text.encode("utf-8", "replace").decode()
    return [
        trajectory.prompt.question[:MAX_CHARACTERS],
        trajectory.prompt.gold_answer,
        text[:MAX_CHARACTERS],
        trajectory.verdict.outcome,
        f"{trajectory.advantage:.4f}",
    ]


class TensorBoard:
    """Files in RUN/tensorboard; repeated steps replace their old values."""

    def __init__(self, run: Path, id: str, config: Mapping[str, Any], first: int):
        """Open a file that follows those of earlier starts."""
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=first)
        rows = [[name, str(value)] for name, value in config.items()]
        self._writer.add_text("config", _markdown(("setting", "value"), rows), first)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add scalars."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def log_samples(self, step: int, rows: Sequence[Sequence[str]]) -> None:
        """Add a text."""
        self._writer.add_text("samples", _markdown(COLUMNS, rows), step)

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, with local files in RUN/wandb."""

    def __init__(self, run: Path, id: str, config: Mapping[str, Any], first: int):
        """Begin the run of this id, or continue it."""
        wandb = importlib.import_module("wandb")

        self._table = wandb.Table
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.resolve().name,
            id=id,
            resume="allow",
            dir=str(run),
            config=dict(config),
        )
        # The step of W&B only increases, but a resumed run repeats steps.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log metrics over the metric `step`."""
        self._run.log({"step": step, **metrics})

    def log_samples(self, step: int, rows: Sequence[Sequence[str]]) -> None:
        """Log a table."""
        table = self._table(columns=list(COLUMNS), data=[list(row) for row in rows])
        self._run.log({"step": step, "samples": table})

    def close(self) -> None:
        """Upload pending data, if online."""
        self._run.finish()


class Trackio:
    """A run of Trackio, in its local database."""

    def __init__(self, run: Path, id: str, config: Mapping[str, Any], first: int):
        """Begin the run of this name, or continue it."""
        trackio = importlib.import_module("trackio")

        self._table = trackio.Table
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{run.resolve().name}-{id}",
            resume="allow",
            config=dict(config),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log metrics."""
        self._run.log(dict(metrics), step=step)

    def log_samples(self, step: int, rows: Sequence[Sequence[str]]) -> None:
        """Log a table, whose cells are Markdown."""
        cells = [list(map(_without_markup, row)) for row in rows]
        table = self._table(columns=list(COLUMNS), data=cells)
        self._run.log({"samples": table}, step=step)

    def close(self) -> None:
        """Write pending data."""
        self._run.finish()


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [map(_without_markup, row) for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _without_markup(text: str) -> str:
    """Return a text with Markdown and HTML escaped, because models write both."""
    special = {ord(character): f"&#{ord(character)};" for character in "|`*_[]\\~#"}
    text = html.escape(text, quote=False)  # of quotes it would make "&#..."
    return text.translate(special).replace("\n", "<br>")
