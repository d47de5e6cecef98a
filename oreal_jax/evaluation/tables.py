"""Evaluations as tables for a person."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from oreal_jax.evaluation.compare import Comparison
from oreal_jax.evaluation.published import PASS_AT_1, SETS, published
from oreal_jax.evaluation.report import Report
from oreal_jax.evaluation.sets import PRESETS

WIDE = 200  # columns of a file or pipe, which need not fit a screen


def say(*shown: Table | str) -> None:
    """Prints to standard output."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=WIDE)
    for each in shown:
        console.print(each, soft_wrap=isinstance(each, str))


def measured(reports: Mapping[str, Report]) -> Table:
    """Every measure of every set, with its 95% interval."""
    table = Table(title="share of problems solved, with 95% intervals")
    table.add_column("")
    for name in reports:
        table.add_column(name, justify="right")
    measures = dict.fromkeys(m for report in reports.values() for m in report.measures)
    for name in measures:
        table.add_row(name, *(str(r.measures.get(name, "")) for r in reports.values()))
    table.add_section()
    number = lambda value: "" if value is None else f"{value:.1f}"
    for name, cell in [
        ("problems", lambda r: str(r.problems)),
        ("without stop token", lambda r: f"{r.truncated:.1%}"),
        ("undecided", lambda r: str(r.undecided)),
        ("tokens of a correct one", lambda r: number(r.tokens_correct)),
        ("tokens of an incorrect one", lambda r: number(r.tokens_incorrect)),
    ]:
        table.add_row(name, *(cell(report) for report in reports.values()))
    return table


def broken_down(name: str, report: Report, field: str) -> Table:
    """The main measure for each value of a field."""
    table = Table(title=f"{name}: {report.name} by {field}")
    table.add_column(field)
    table.add_column("problems", justify="right")
    table.add_column(report.name, justify="right")
    for value, (count, measure) in report.breakdown[field].items():
        table.add_row(value, str(count), str(measure))
    return table


def beside_the_paper(model: str, reports: Mapping[str, Report]) -> Table | None:
    """The paper's table with a row of ours; None where it has none of the sets.

    Ours is greedy pass@1 where that was measured, else avg@K, and says which.
    """
    known = [name for name in SETS if name in reports]
    if not known:
        return None
    table = Table(title="pass@1 beside arXiv:2502.06781 (greedy, its own prompts)")
    table.add_column("model")
    for name in known:
        table.add_column(PRESETS[name].title, justify="right")
    for row in PASS_AT_1:
        table.add_row(row, *(f"{published(row, name):.1f}" for name in known))
    table.add_section()
    ours = {reports[name].name for name in known}
    table.add_row(
        f"{model} ({', '.join(sorted(ours))})",
        *(f"{100 * reports[name].accuracy:.1f}" for name in known),
    )
    return table


def compared(first: str, second: str, comparisons: Sequence[Comparison]) -> Table:
    """Both models on each set, and how sure the difference is."""
    table = Table(title=f"A = {first}, B = {second}")
    for column in ("set", "measure"):
        table.add_column(column)
    for column in (
        *("problems", "A", "B", "B - A (95% interval)"),
        *("B better", "B worse", "p"),
    ):
        table.add_column(column, justify="right")
    points = lambda share: f"{100 * share:+.1f}"
    for one in comparisons:
        pair, gain = one.paired, one.paired.difference
        table.add_row(
            one.name,
            one.measure,
            str(pair.problems),
            f"{pair.first:.1%}",
            f"{pair.second:.1%}",
            f"{points(gain.value)} ({points(gain.low)} to {points(gain.high)})",
            str(pair.better),
            str(pair.worse),
            f"{pair.p_value:.2g}",
        )
    left_out = sum(one.left_out for one in comparisons)
    table.caption = "p: exact sign-flip test over problems, two-sided"
    if left_out:
        table.caption += f"; {left_out} problems that only one file has are left out"
    return table
