"""Console output: lines of text, and a progress bar for the current phase.

In a file or a pipe, a line per minute replaces the bar.
"""

import contextlib
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

Advance = Callable[..., None]  # advance(done=1, tokens=0)
INTERVAL = 60.0  # seconds between progress lines in a file
ESCAPED = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # Unicode's categories
KEPT = "\n\t\u200c\u200d"


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Continue without output.

        rich would exit. But Ctrl-C also ends the reader (`oreal train ... | tee log`),
        and the run has yet to be saved.
        """
        self.quiet = True


class Screen:
    """A console that also records the seconds of each phase (`timing_s/<phase>`)."""

    def __init__(self, console: Console | None = None):
        self.console = console or _Console(highlight=False)
        self.timings: dict[str, float] = {}
        # Returns a context for a phase's name, e.g. a profiler's annotation.
        self.annotate: Callable[[str], contextlib.AbstractContextManager] = (
            contextlib.nullcontext
        )

    @classmethod
    def on_stderr(cls) -> "Screen":
        """Return a screen for commands whose standard output is data."""
        return cls(_Console(stderr=True, highlight=False))

    @classmethod
    def silent(cls) -> "Screen":
        """Return a screen for processes other than process 0."""
        return cls(Console(quiet=True))

    def log(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def phase(
        self, name: str, total: int | None = None, label: str = ""
    ) -> Iterator[Advance]:
        """Show the progress of a phase; yields `advance(done, tokens)`."""
        start, finished, total_tokens = time.perf_counter(), 0, 0
        next_line = start + INTERVAL
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[rate]}"),
        )
        with (
            self.annotate(name),
            Progress(
                *columns,
                console=self.console,
                transient=True,
                disable=not self.console.is_terminal,
            ) as progress,
        ):
            task = progress.add_task(f"{label}{name}", total=total, rate="")

            def advance(done: int = 1, tokens: int = 0) -> None:
                nonlocal finished, total_tokens, next_line
                finished, total_tokens = finished + done, total_tokens + tokens
                now = time.perf_counter()
                seconds = max(1e-9, now - start)
                rate = f"{total_tokens / seconds:,.0f} tokens/s" if total_tokens else ""
                progress.update(task, advance=done, rate=rate)
                if not self.console.is_terminal and now >= next_line:
                    next_line = now + INTERVAL
                    remaining = ""
                    if total and finished:
                        remaining = time_text(seconds / finished * (total - finished))
                        remaining = f"about {remaining} left"
                    count = f"{finished}/{total}" if total else f"{finished}"
                    parts = filter(None, (f"{label}{name} {count}", rate, remaining))
                    self.log(", ".join(parts))

            try:
                yield advance
            finally:
                elapsed = time.perf_counter() - start
                self.timings[name] = self.timings.get(name, 0.0) + elapsed

    def take_timings(self) -> dict[str, float]:
        """Return the seconds per phase since the last call, by metric name."""
        seconds = {f"timing_s/{name}": value for name, value in self.timings.items()}
        self.timings = {}
        return seconds


def time_text(seconds: float) -> str:
    """Return a readable duration: "50 s", "12 min", "3.4 h" or "9.1 d"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    if seconds < 172_800:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86_400:.1f} d"


def make_table(
    columns: Iterable[str], rows: Iterable[Iterable[str]], names: int = 1, **titles: str
) -> Table:
    """Make a table; the first `names` columns are aligned left, the others right."""
    table = Table(**titles)  # pyright: ignore[reportArgumentType]
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position < names else "right")
    for row in rows:
        table.add_row(*row)
    return table


def escape(text: str) -> str:
    """Return text with control and formatting characters as escapes.

    Control characters would move the cursor, change colours or the window's title;
    formatting characters may reverse the order of letters. Line breaks, tabs and the
    joiners of emoji and of some scripts are kept.
    """
    return "".join(
        letter.encode("unicode_escape").decode()
        if unicodedata.category(letter) in ESCAPED and letter not in KEPT
        else letter
        for letter in text
    )
