"""Tables of evaluations and comparisons."""

import sys
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from oreal_jax.console import make_table
from oreal_jax.evaluation.compare import Comparison
from oreal_jax.evaluation.report import Report
from oreal_jax.evaluation.sets import PRESETS

# The paper's greedy pass@1 in percent, zero-shot, by OpenCompass; by preset.
SETS = ("math500", "aime2024", "aime2025-i", "livemathbench", "olympiadbench")

PASS_AT_1: dict[str, tuple[float, float, float, float, float]] = {
    "OREAL-7B-SFT (start)": (86.4, 26.7, 26.7, 54.2, 56.0),
    "OREAL-7B": (91.0, 33.3, 33.3, 62.6, 59.9),
    "DeepSeek-R1-Distill-Qwen-7B (start)": (92.8, 55.5, 40.0, 65.6, 64.1),
    "OREAL-DSR1-Distill-Qwen-7B": (94.0, 50.0, 40.0, 65.6, 66.1),
    "OREAL-32B": (95.0, 60.0, 46.7, 74.8, 72.4),
}

FILE_WIDTH = 200  # columns of a file or pipe


def show(*items: Table | str) -> None:
    """Print to standard output."""
    width = None if sys.stdout.isatty() else FILE_WIDTH
    console = Console(highlight=False, markup=False, width=width)
    for item in items:
        console.print(item, soft_wrap=isinstance(item, str))


def show_reports(model: str, reports: Mapping[str, Report]) -> None:
    """Print a line for each set, then the tables."""
    show(*(f"{name}: {report}" for name, report in reports.items()))
    show(measure_table(reports))
    for name, report in reports.items():
        for field, values in report.breakdown.items():
            if values:
                show(breakdown_table(name, report, field))
    if any(name in SETS for name in reports):
        show(published_table(model, reports))


def measure_table(reports: Mapping[str, Report]) -> Table:
    """Show every measure of every set, with its 95% interval."""
    each = list(reports.values())
    measures = dict.fromkeys(name for report in each for name in report.measures)
    table = make_table(
        ["", *reports],
        [(name, *(str(r.measures.get(name, "")) for r in each)) for name in measures],
        title="share of problems solved, with 95% intervals",
    )
    table.add_section()
    length = lambda value: "" if value is None else f"{value:.1f}"
    for name, cell in [
        ("problems", lambda r: str(r.problems)),
        ("without stop token", lambda r: f"{r.truncated:.1%}"),
        ("undecided", lambda r: str(r.undecided)),
        ("tokens of a correct one", lambda r: length(r.tokens_correct)),
        ("tokens of an incorrect one", lambda r: length(r.tokens_incorrect)),
    ]:
        table.add_row(name, *map(cell, each))
    return table


def breakdown_table(name: str, report: Report, field: str) -> Table:
    """Show the main measure for each value of a field."""
    values = report.breakdown[field].items()
    return make_table(
        [field, "problems", report.name],
        [(value, str(count), str(measure)) for value, (count, measure) in values],
        title=f"{name}: {report.name} by {field}",
    )


def published_table(model: str, reports: Mapping[str, Report]) -> Table:
    """Show the paper's results on those of our sets that it reports, and ours.

    Ours is greedy pass@1 if that was measured, else avg@K, as named in the row.
    """
    names = [name for name in SETS if name in reports]
    table = make_table(
        ["model", *(PRESETS[name].title for name in names)],
        [
            (row, *(f"{values[SETS.index(name)]:.1f}" for name in names))
            for row, values in PASS_AT_1.items()
        ],
        title="pass@1 compared with arXiv:2502.06781 (greedy, its own prompts)",
    )
    table.add_section()
    measures = ", ".join(sorted({reports[name].name for name in names}))
    ours = (f"{100 * reports[name].accuracy:.1f}" for name in names)
    table.add_row(f"{model} ({measures})", *ours)
    return table


def comparison_table(
    first: str, second: str, comparisons: Sequence[Comparison]
) -> Table:
    """Show both models on each set, and the significance of their difference."""
    points = lambda share: f"{100 * share:+.1f}"
    gain = lambda d: f"{points(d.value)} ({points(d.low)} to {points(d.high)})"
    columns = {
        "set": lambda c: c.name,
        "measure": lambda c: c.measure,
        "problems": lambda c: str(c.paired.problems),
        "A": lambda c: f"{c.paired.first:.1%}",
        "B": lambda c: f"{c.paired.second:.1%}",
        "B - A (95% interval)": lambda c: gain(c.paired.difference),
        "B better": lambda c: str(c.paired.better),
        "B worse": lambda c: str(c.paired.worse),
        "p": lambda c: f"{c.paired.p_value:.2g}",
    }
    rows = [[cell(each) for cell in columns.values()] for each in comparisons]
    caption = "p: exact sign-flip test over problems, two-sided"
    if left_out := sum(each.left_out for each in comparisons):
        caption += f"; {left_out} problems that only one file has are left out"
    title = f"A = {first}, B = {second}"
    return make_table(columns, rows, names=2, title=title, caption=caption)
