"""A trace of some steps of a run, to be looked at with xprof or TensorBoard.

Phases of the loop, steps, and the model's scopes (attention, mlp, head, loss,
optimizer) carry their names in it.
"""

import contextlib
from pathlib import Path

import jax

from oreal_jax.console import Screen


class Profile:
    """Traces `steps` steps into a directory: those behind the first, which compiles."""

    def __init__(self, directory: Path, steps: int, screen: Screen):
        """Nothing is traced before a step has been finished."""
        self._directory, self._left, self._screen = directory, steps, screen
        self._open = contextlib.ExitStack()
        self._tracing = False

    def step_done(self, step: int, *, last: bool) -> None:
        """Hears that `step` steps of the run are finished, and whether that is all."""
        self._open.close()
        if last or not self._left:
            self.close()
            return
        if not self._tracing:
            jax.profiler.start_trace(self._directory)
            self._screen.annotate = lambda name: jax.profiler.TraceAnnotation(name)
            self._tracing = True
        self._left -= 1
        named = jax.profiler.StepTraceAnnotation("step", step_num=step)
        self._open.enter_context(named)

    def close(self) -> None:
        """Writes what has been traced; says so, or that there was nothing."""
        self._open.close()
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
            self._screen.annotate = contextlib.nullcontext
            self._screen.say(f"profile: xprof --logdir {self._directory}")
        elif self._left:
            self._screen.say("profile: no step came after the first")
        self._left = 0
