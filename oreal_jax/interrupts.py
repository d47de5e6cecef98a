"""Ctrl-C and SIGTERM: what they may interrupt, and how an interrupted process exits."""

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

INTERRUPTED = 130  # exit code: 128 + SIGINT

_deferring = False  # whether the main thread is in a `deferred` block


@contextlib.contextmanager
def repeat_lost_interrupts() -> Iterator[None]:
    """Send SIGINT again where Python drops the KeyboardInterrupt.

    It does so in destructors and in callbacks of the garbage collector (JAX has one),
    whose exceptions nobody can catch.
    """
    default_hook = sys.unraisablehook

    def hook(unraisable) -> None:
        if unraisable.exc_type is not KeyboardInterrupt:
            default_hook(unraisable)
            return
        # Later and from another thread: sent from here, it would be dropped again.
        main = threading.main_thread().ident
        threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT)).start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = default_hook


def exit_process(code: int) -> NoReturn:
    """Exit at once; files must be closed before.

    Threads are joined and exit handlers run, but Python does not destroy its objects
    one by one, which would take half a second. An interrupted process does not run exit
    handlers either: Ctrl-C ends the wait for a compilation, not the compilation, whose
    thread uses the devices of XLA's client. The client's destructor frees the devices
    before it joins that thread (SIGSEGV with jaxlib 0.10.2).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # would change the exit code
    if code != INTERRUPTED:
        threading._shutdown()  # pyright: ignore
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the reader of a pipe may have exited
            stream.flush()
    os._exit(code)


@contextlib.contextmanager
def deferred(on_interrupt: Callable[[], None]) -> Iterator[None]:
    """Defer Ctrl-C to the end of the block, so that a step is complete or absent.

    `on_interrupt` is called at once. In an inner block Ctrl-C is deferred to the end of
    the outer one.
    """
    global _deferring
    # Signal handlers run in the main thread only.
    if _deferring or threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupted = False

    def defer(*_) -> None:
        nonlocal interrupted
        if not interrupted:
            os.write(2, b"\nstopping as soon as this step is complete\n")
        interrupted = True
        on_interrupt()

    previous = signal.signal(signal.SIGINT, defer)
    _deferring = True
    try:
        yield
    finally:
        _deferring = False
        signal.signal(signal.SIGINT, previous)
    if interrupted:
        raise KeyboardInterrupt


@contextlib.contextmanager
def ignoring_interrupts(work: str) -> Iterator[None]:
    """Ignore Ctrl-C in the block, with a message that `work` is finished first.

    For a process that exits because of an error, whose message and exit code must not
    be replaced.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    message = f"\nexiting after {work}\n".encode()
    previous = signal.signal(signal.SIGINT, lambda *_: os.write(2, message))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Handle SIGTERM, the notice before a machine is preempted, like Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupt = lambda *_: signal.raise_signal(signal.SIGINT)
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
