"""A trace of some steps of a run, to view with xprof or TensorBoard.

Phases of the loop, steps, and the model's scopes (attention, mlp, head, loss,
optimizer) carry their names in it.
"""

import contextlib
from pathlib import Path

import jax

from oreal_jax.console import Screen


class Profile:
    """Traces `steps` steps into a directory, from the second on: the first compiles."""

    def __init__(self, directory: Path, steps: int, screen: Screen):
        """Trace nothing before the first step is finished."""
        self._directory, self._remaining, self._screen = directory, steps, screen
        self._open = contextlib.ExitStack()
        self._tracing = False

    def step_done(self, step: int, *, last: bool) -> None:
        """Record that `step` steps of the run are finished, all of them if `last`."""
        self._open.close()
        if last or not self._remaining:
            self.close()
            return
        if not self._tracing:
            jax.profiler.start_trace(self._directory)
            self._screen.annotate = lambda name: jax.profiler.TraceAnnotation(name)
            self._tracing = True
        self._remaining -= 1
        named = jax.profiler.StepTraceAnnotation("step", step_num=step)
        self._open.enter_context(named)

    def close(self) -> None:
        """Write the trace and log its directory, or that no step was traced."""
        self._open.close()
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
            self._screen.annotate = contextlib.nullcontext
            self._screen.log(f"profile: xprof --logdir {self._directory}")
        elif self._remaining:
            self._screen.log("profile: no step came after the first")
        self._remaining = 0
