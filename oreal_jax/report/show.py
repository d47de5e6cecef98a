"""A report on a run in the terminal: curves, evaluations, warnings, completions."""

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from oreal_jax.console import escape, make_table
from oreal_jax.errors import InputError
from oreal_jax.report import charts, findings
from oreal_jax.report.evaluations import Evaluation, read_evaluations
from oreal_jax.report.runs import Run, SavedCompletion, read_completions

BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 24  # of a curve, in characters
HEAD, TAIL = 800, 1200  # characters of a long completion that are shown
DEFAULT = charts.CHARTS[:13]  # without verification and speed
ORDER = {"incorrect": 0, "undecided": 1, "correct": 2}
STYLES = {"incorrect": "red", "undecided": "yellow", "correct": "green"}


def show_run(
    run: Run, metrics: Sequence[str], step: int | None, outcome: str | None, count: int
) -> Iterator[RenderableType]:
    """Yield the parts of the report; `metrics` selects the curves (default: `DEFAULT`).

    Completions are those of `step` (default: the last), `count` of them, only with
    `outcome` if it is set, incorrect ones first.

    Raises:
        InputError: the run has no such metric, or a trajectory file is invalid.
    """
    stored = {name for row in run.rows for name in row} - {"step"}
    for name in metrics:
        if name not in stored:
            raise InputError(
                f"--metric {name}: not in {run.name}; available: "
                f"{', '.join(sorted(stored)) or 'none'}"
            )
    names = charts.present(run.rows, metrics or DEFAULT)
    yield Text(_headline(run), style="bold")
    if names:
        yield _curves(run, names)
    if evaluations := read_evaluations(run.name, run.path, run.settings):
        yield _evaluations(evaluations)
    for finding in findings.find(run.rows):
        yield Text(f"warning: {finding.text} ({finding.metric})", style="yellow")
    if run.files:
        step = max(run.files) if step is None else step
        yield from _completions(run, step, outcome, count)
    for note in run.notes:
        yield Text(escape(note), style="dim")


def _headline(run: Run) -> str:
    finished = run.rows[-1]["step"] + 1 if run.rows else 0
    planned = run.settings.get("steps")
    is_known = isinstance(planned, int) and planned > 0  # 0: as many as `epochs` have
    steps = f"{finished} of {planned}" if is_known else str(finished)
    model = run.settings.get("model")
    return escape(f"{run.name}: {steps} steps" + (f", from {model}" if model else ""))


def _curves(run: Run, names: Sequence[str]) -> Table:
    rows = []
    for name in names:
        values = findings.series(run.rows, name).values
        ends = (f"{x:.4g}" for x in (values[0], values[-1]))
        healthy = charts.describe(name)["healthy"]
        rows.append((escape(name), sparkline(list(values)), *ends, healthy))
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title, cells in zip(
        ("metric", "curve", "first", "last", "healthy"),
        zip(*rows, strict=True),
        strict=True,
    ):
        # All columns in full but the last, which wraps in a narrow terminal.
        wraps = title == "healthy"
        width = 0 if wraps else max(map(len, [title, *cells]))
        justify = "right" if title in ("first", "last") else "left"
        table.add_column(title, no_wrap=not wraps, min_width=width, justify=justify)
    for row in rows:
        table.add_row(*row)
    return table


def sparkline(values: Sequence[float]) -> str:
    """Return a curve of at most `WIDTH` characters, each the mean of some values."""
    count = min(WIDTH, len(values))
    ends = [len(values) * i // count for i in range(count + 1)] if count else [0]
    parts = [values[a:b] for a, b in zip(ends, ends[1:], strict=False)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)


def _evaluations(evaluations: Sequence[Evaluation]) -> Table:
    best = max((e.step or 0 for e in evaluations if e.best), default=None)
    rows = [
        (
            escape(e.set),
            e.measure,
            str(e.step),
            f"{e}{', best' if e.step == best else ''}",
        )
        for e in evaluations
    ]
    columns = ["set", "measure", "after step", "value, 95% interval"]
    return make_table(columns, rows, names=2)


def _completions(
    run: Run, step: int, outcome: str | None, count: int
) -> Iterator[RenderableType]:
    completions = list(read_completions(run, step))
    chosen = [c for c in completions if outcome in (None, c.outcome)]
    chosen.sort(key=lambda c: (ORDER[c.outcome], c.sample, c.group))
    numbers = ", ".join(
        f"{sum(c.outcome == name for c in completions)} {name}" for name in ORDER
    )
    yield Text(f"\nstep {step}: {numbers}", style="bold")
    for completion in chosen[:count]:
        yield _completion(completion)
    if len(chosen) > count:
        yield Text(f"{len(chosen) - count} more: --n {len(chosen)}", style="dim")


def _completion(completion: SavedCompletion) -> Group:
    heading = Text(completion.outcome, style=STYLES[completion.outcome])
    heading.append(
        escape(
            f"  {completion.reason} (by {completion.by})  {completion.tokens} tokens, "
            f"advantage {completion.advantage:+.3g}"
            + (", trained on" if completion.selected else "")
        ),
        style="default",
    )
    question = Text(escape(completion.question or completion.id), style="bold")
    gold = Text(f"gold answer: {escape(completion.gold_answer)}", style="dim")
    body = Group(question, gold, Text(escape(shorten(completion.text))))
    return Group(heading, Padding(body, (0, 0, 1, 2), expand=False))


def shorten(text: str) -> str:
    """Return the beginning and the end of a long text."""
    omitted = len(text) - HEAD - TAIL
    if omitted <= 0:
        return text
    return f"{text[:HEAD]}\n[{omitted} characters omitted]\n{text[-TAIL:]}"
