"""Metrics of a run: one JSON object per step, and optional TensorBoard files."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import jax

from oreal_jax.files import write_text


class MetricsLog:
    """Appends to `metrics.jsonl`; repeated steps replace their old lines."""

    def __init__(self, run: Path, start: int, *, tensorboard: bool = False):
        """Opens the file of `run` and removes its lines from step `start` on."""
        self._path = run / "metrics.jsonl"
        if self._path.exists():
            rows = [row for row in read(self._path) if row["step"] < start]
            write_text(self._path, "".join(map(_line, rows)))
        self._file = self._path.open("a", encoding="utf-8")
        self._board = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=start)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step to disk."""
        self._file.write(_line({"step": step} | dict(metrics)))
        self._file.flush()
        if self._board:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board:
            self._board.close()


class Compilations:
    """Counts compiled programs, and seconds of tracing, lowering, compiling and
    loading."""

    TRACED = "/jax/core/compile/jaxpr_trace_duration"
    LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
    # JAX also reports this for loaded programs, after `LOADED`.
    COMPILED = "/jax/core/compile/backend_compile_duration"
    LOADED = "/jax/compilation_cache/cache_hits"
    SAVED = "/jax/compilation_cache/compile_time_saved_sec"

    def __init__(self):
        self._count, self._seconds = 0, 0.0
        self.saved_seconds = 0.0  # by loading, since the process began
        jax.monitoring.register_event_duration_secs_listener(self._add_duration)
        jax.monitoring.register_event_listener(self._add_event)

    def _add_duration(
        self, event: str, duration_secs: float, **details: str | int
    ) -> None:
        self._count += event == self.COMPILED
        self.saved_seconds += duration_secs * (event == self.SAVED)
        if event in (self.TRACED, self.LOWERED, self.COMPILED):
            self._seconds += duration_secs

    def _add_event(self, event: str, **details: str | int) -> None:
        self._count -= event == self.LOADED

    def take(self) -> dict[str, float]:
        """Return the metrics since the last call."""
        metrics = {
            "perf/compilations": float(self._count),
            "perf/compile_seconds": self._seconds,
        }
        self._count, self._seconds = 0, 0.0
        return metrics


compilations = Compilations()  # JAX's listeners are global, so is the count


def read(path: Path) -> list[dict]:
    """Return the metrics of all steps, without a last line that a kill has cut."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _line(row: Mapping[str, int | float]) -> str:
    # JSON has no NaN and no infinity; both become null.
    finite = lambda x: None if isinstance(x, float) and not math.isfinite(x) else x
    return json.dumps({name: finite(value) for name, value in row.items()}) + "\n"
