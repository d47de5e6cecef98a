"""Evaluations of a run, and files of `oreal eval --items`, with intervals."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from oreal_jax import metrics
from oreal_jax.errors import InputError
from oreal_jax.evaluation import PRESETS, load_set, statistics
from oreal_jax.evaluation.compare import read_items
from oreal_jax.evaluation.statistics import Measure


class Evaluation(NamedTuple):
    """A measure of a set, after `step` finished steps (None: from a file of items).

    low, high: the 95% interval; None where the outcome of each problem is unknown.
    """

    source: str
    step: int | None
    set: str
    measure: str
    value: float
    low: float | None
    high: float | None
    problems: int | None
    best: bool = False

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.1%}"
        return str(Measure(self.value, self.low, self.high))


def read_evaluations(
    name: str, run: Path, settings: Mapping[str, Any]
) -> list[Evaluation]:
    """Return the evaluations in RUN/evaluations.jsonl.

    The file has values only. With greedy decoding a value and the number of problems
    determine the interval; the number is read from the set if its file still exists.
    """
    rows = metrics.read(run / "evaluations.jsonl", step=int)
    sizes: dict[str, int] = {}
    if rows and _get(settings, "evaluation", "samples") == 1:
        sizes = _count_problems(settings)
    evaluations = []
    for row in rows:
        for key, value in row.items():
            if not key.startswith("val-core/") or not isinstance(value, int | float):
                continue
            set_name, _, measure = key.removeprefix("val-core/").rpartition("/")
            low, high = _interval(value, sizes.get(set_name), settings.get("seed", 0))
            evaluations.append(
                Evaluation(
                    source=name,
                    step=row.get("step"),
                    set=set_name,
                    measure=measure,
                    value=value,
                    low=low,
                    high=high,
                    problems=sizes.get(set_name),
                    best=bool(row.get("best")),
                )
            )
    return evaluations


def evaluate_items(path: Path) -> list[Evaluation]:
    """Return pass@1 or avg@K of each set in a file of `oreal eval --items`.

    Raises:
        InputError: naming file, line, field and value.
    """
    evaluations = []
    for (set_name, is_greedy), items in read_items(path).items():
        shares = np.array([np.mean(item.correct) for item in items.values()])
        samples = max(len(item.correct) for item in items.values())
        evaluations.append(
            Evaluation(
                str(path),
                None,
                set_name,
                "pass@1" if is_greedy else f"avg@{samples}",
                *statistics.mean(shares),
                len(items),
            )
        )
    return evaluations


def _interval(
    value: float, problems: int | None, seed: int
) -> tuple[float | None, float | None]:
    correct = round(value * problems) if problems else 0
    if not problems or abs(correct / problems - value) > 1e-6:  # another set by now
        return None, None
    measure = statistics.mean((np.arange(problems) < correct).astype(float), seed)
    return measure.low, measure.high


def _count_problems(settings: Mapping[str, Any]) -> dict[str, int]:
    """Return the number of problems by set; sets without a local file are omitted."""
    from oreal_jax.data.builder import source_name, split_source

    folder = Path(str(_get(settings, "evaluation", "folder") or "data"))
    sources, sizes = _get(settings, "evaluation", "data"), {}
    for source in map(str, sources if isinstance(sources, list) else []):
        is_preset = source in PRESETS
        files = [folder / f"{source}{end}" for end in (".jsonl", ".parquet")]
        local = any(file.is_file() for file in files) if is_preset else False
        if not local and not Path(split_source(source)[0]).exists():
            continue  # never download for a report
        try:
            problems = load_set(source, folder)
        except InputError:
            continue
        sizes[source if is_preset else source_name(source)] = len(problems)
    return sizes


def _get(settings: Mapping[str, Any], *names: str) -> Any:
    value: Any = settings
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
