"""What a person sees: a bar for the phase at work, and lines that stay.

On a terminal the bar is redrawn; in a file or a pipe only the lines appear.
"""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

Advance = Callable[..., None]  # advance(done=1, tokens=0)


class Screen:
    """A console, and how long each phase took (`timing_s/<phase>`)."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False)
        self.timings: dict[str, float] = {}
        # A phase's context by its name: a profiler may want to see it.
        self.annotate: Callable[[str], contextlib.AbstractContextManager] = (
            contextlib.nullcontext
        )

    @classmethod
    def on_stderr(cls) -> "Screen":
        """For verbs whose output is meant for a pipe."""
        return cls(Console(stderr=True, highlight=False))

    @classmethod
    def silent(cls) -> "Screen":
        """For processes that leave talking to process 0."""
        return cls(Console(quiet=True))

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def phase(
        self, name: str, total: int | None = None, label: str = ""
    ) -> Iterator[Advance]:
        """Shows the phase while it runs; yields `advance(done, tokens)`."""
        start, tokens_seen = time.perf_counter(), 0
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
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
                nonlocal tokens_seen
                tokens_seen += tokens
                seconds = max(1e-9, time.perf_counter() - start)
                rate = f"{tokens_seen / seconds:,.0f} tokens/s" if tokens_seen else ""
                progress.update(task, advance=done, rate=rate)

            try:
                yield advance
            finally:
                elapsed = time.perf_counter() - start
                self.timings[name] = self.timings.get(name, 0.0) + elapsed

    def take_timings(self) -> dict[str, float]:
        """Seconds per phase since the last call, in the field's metric names."""
        taken = {f"timing_s/{name}": value for name, value in self.timings.items()}
        self.timings = {}
        return taken
