"""The HTML page of one or several runs: one file that loads nothing else.

Its template, style and scripts are files of this package. Data is one JSON object in
the page; lists of completions and their contents are in the form of `embed`.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any, NamedTuple

import numpy as np

from oreal_jax.console import Advance
from oreal_jax.errors import InputError
from oreal_jax.report import charts, findings
from oreal_jax.report.diagnostics import ScoredCompletion, diagnose, summarise
from oreal_jax.report.embed import MAX_LISTED, QUANTITIES, Entry, embed, pack
from oreal_jax.report.evaluations import Evaluation, read_evaluations
from oreal_jax.report.runs import Run, SavedCompletion, read_completions
from oreal_jax.report.weights import TokenWeights, read_weights

RECENT = 10  # newest steps, whose completions the diagnostics use
ROWS_BYTES = 100  # reserved per run for the JSON of its list
MAX_NOTES = 20  # of a run
DIGITS = 6  # of numbers in the page
SCRIPTS = ("charts.js", "contents.js", "browser.js", "page.js")


class Report(NamedTuple):
    """A page, its completions with content, and all completions in the files."""

    html: str
    contained: int
    total: int


def make_report(
    runs: Sequence[Run], items: Sequence[Evaluation], size: int, advance: Advance
) -> Report:
    """Return the page of these runs, of at most `size` bytes.

    `items` are further evaluations. Completions that do not fit are omitted;
    those trained on, of the newest and of evenly spread steps, are omitted last.
    `advance` is called after each trajectory file.

    Raises:
        InputError: a trajectory file is invalid, or `size` is too small for the page.
    """
    parts = [_describe_run(run) for run in runs]
    names = list(dict.fromkeys(n for part in parts for n in part["metrics"]))
    data: dict[str, Any] = {
        "charts": [charts.describe(n) for n in charts.CHARTS if n in names],
        "quantities": [quantity._asdict() for quantity in QUANTITIES],
        "items": [each._asdict() for each in items],
        "differences": _differences(runs),
        "runs": parts,
    }
    share = size // max(1, len(runs))
    entries = []
    for run, part in zip(runs, parts, strict=True):
        completions, part["total"], part["diagnostics"] = _read(run, share, advance)
        entries.append(completions)
        part["notes"] = run.notes[:MAX_NOTES]
    overhead = len(_fill(data, []).encode()) + ROWS_BYTES * len(runs)
    if overhead > size:
        raise InputError(
            f"--max-size {size / 1e6:g}: the page without completions takes "
            f"{overhead / 1e6:.2f} MB"
        )
    share = (size - overhead) // max(1, len(runs))
    embedded = [embed(completions, share) for completions in entries]
    for part, lists in zip(parts, embedded, strict=True):
        part["rows"], part["listed"] = lists.rows, lists.listed
    contents = [each.contents for each in embedded]
    html, total = _fill(data, contents), sum(part["total"] for part in parts)
    return Report(html, sum(map(len, contents)), total)


def _describe_run(run: Run) -> dict[str, Any]:
    """Return the part of a run's data that needs no completions."""
    names = charts.present(run.rows, charts.CHARTS)
    settings, planned = run.settings, run.settings.get("steps")
    evaluations = read_evaluations(run.name, run.path, settings)
    return {
        "name": run.name,
        "model": settings.get("model"),
        "steps": [row["step"] for row in run.rows],
        "planned": planned if isinstance(planned, int) else None,
        "metrics": {n: [_number(row.get(n)) for row in run.rows] for n in names},
        "findings": [finding._asdict() for finding in findings.find(run.rows)],
        "evaluations": [each._asdict() for each in evaluations],
    }


def _read(
    run: Run, size: int, advance: Advance
) -> tuple[list[Entry], int, dict[str, Any] | None]:
    """Return the completions of a run, their number, and the diagnostics.

    The most important ones come first and are at most `MAX_LISTED`, trained on or not.
    Beyond `size` bytes, only the fields of the list are kept.
    """
    weigh, steps = read_weights(run.settings), list(run.files)
    recent = set(steps[-RECENT:])
    entries: list[list[Entry]] = [[], []]  # trained on, others
    sizes, total = [0, 0], 0
    scored: list[ScoredCompletion] = []
    for index in spread(len(steps)):
        completions = list(read_completions(run, steps[index]))
        total += len(completions)
        for completion, weight in _weighted(completions, weigh):
            if steps[index] in recent and "token_scores" in completion.per_token:
                scored.append(summarise(completion, weight))
            content, kind = None, int(not completion.selected)
            if len(entries[kind]) == MAX_LISTED:
                continue
            if sizes[kind] < size:
                content = pack(completion, weight)
                sizes[kind] += len(content)
            # The list does not need these, and they would fill the memory.
            completion = completion._replace(per_token={}, pieces=None, text="")
            entries[kind].append(Entry(completion, content))
        advance()
    return entries[0] + entries[1], total, diagnose(scored)


def _weighted(
    completions: list[SavedCompletion], weigh: TokenWeights | None
) -> Iterator[tuple[SavedCompletion, np.ndarray | None]]:
    """Yield completions with their token weights, None for those without scores."""
    scored = [c for c in completions if "token_scores" in c.per_token]
    weights: Iterator[np.ndarray | None] = iter([None] * len(scored))
    if weigh:
        scores = [c.per_token["token_scores"] for c in scored]
        weights = iter(weigh(scores, [c.correct for c in scored]))
    for completion in completions:
        has_scores = "token_scores" in completion.per_token
        yield completion, next(weights) if has_scores else None


def spread(count: int) -> Iterator[int]:
    """Yield 0 to count - 1 from the last on, so that each prefix is spread evenly."""
    bits = max(1, (count - 1).bit_length())
    for number in range(2**bits):
        reversed_bits = int(f"{number:0{bits}b}"[::-1], 2)
        if reversed_bits < count:
            yield count - 1 - reversed_bits


def _differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the settings in which runs differ, with the value of each run."""
    flat = [_flatten(run.settings) for run in runs]
    names = dict.fromkeys(name for settings in flat for name in settings)
    rows = [(name, [settings.get(name, "") for settings in flat]) for name in names]
    return [{"name": name, "values": v} for name, v in rows if len(set(v)) > 1]


def _flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = str(value)
    return flat


def _fill(data: dict[str, Any], contents: Sequence[Sequence[str]]) -> str:
    """Return the template with style, scripts and data in it."""
    files = resources.files("oreal_jax.report")
    read = lambda *names: "\n".join(files.joinpath(n).read_text("utf-8") for n in names)
    parts = {
        "style": read("page.css"),
        "contents": "\n\n".join("\n".join(each) for each in contents),
        "data": to_script_json(data),
        "scripts": read(*SCRIPTS),
    }
    # In one pass, because data may contain a placeholder.
    return re.sub(r"/\* (\w+) \*/", lambda mark: parts[mark[1]], read("page.html"))


def to_script_json(data: Any) -> str:
    """Return JSON that may be within <script>: without "<", NaN and infinity."""
    text = json.dumps(_finite(data), ensure_ascii=False, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text.encode(errors="replace").decode()  # no lone surrogates


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return _number(value) if isinstance(value, float) else value


def _number(value: Any) -> Any:
    """Return a number of `DIGITS` digits; None for anything that is not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
