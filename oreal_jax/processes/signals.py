"""What Ctrl-C and SIGTERM may interrupt, and how an interrupted process ends."""

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

INTERRUPTED = 130  # the exit code: 128 + SIGINT


@contextlib.contextmanager
def insistent() -> Iterator[None]:
    """Ctrl-C comes again where Python drops it: in a destructor or a callback of the
    garbage collector (JAX has one), whose exceptions reach nobody."""
    usual = sys.unraisablehook

    def again(dropped) -> None:
        if dropped.exc_type is not KeyboardInterrupt:
            usual(dropped)
            return
        # From another thread and later: from here it would be dropped again.
        main = threading.main_thread().ident
        threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT)).start()

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = usual


def leave(code: int) -> NoReturn:
    """Ends the process with an exit code.

    Threads are joined and exit handlers run, but Python's objects are not destroyed one
    by one, which takes half a second. An interrupted process ends without the handlers
    too: Ctrl-C ends the wait for a compilation, not the compilation. Its thread uses
    the devices of XLA's client, whose destructor frees them before it joins that thread
    (SIGSEGV with jaxlib 0.10.2; 0.12.0 does not end the wait). So files must be closed
    before.
    """
    if code == INTERRUPTED:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # an impatient second one
    else:
        threading._shutdown()  # pyright: ignore
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # its reader may have gone
            stream.flush()
    os._exit(code)


@contextlib.contextmanager
def deferred(on_signal: Callable[[], None]) -> Iterator[None]:
    """Lets what is inside finish before Ctrl-C is heeded: a step is whole or absent.
    `on_signal` hears of it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread hears signals
        return
    pending = []

    def note(*_) -> None:
        if not pending:
            os.write(2, b"\nstopping as soon as this step is whole\n")
        pending.append(True)
        on_signal()

    usual = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if pending:
        raise KeyboardInterrupt


@contextlib.contextmanager
def ignoring_interrupts(work: str) -> Iterator[None]:
    """Ignores Ctrl-C inside, with a line that says that `work` comes first: for the end
    of a process that an error ends, whose message and exit code must stay."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    text = f"\nending after {work}\n".encode()
    usual = signal.signal(signal.SIGINT, lambda *_: os.write(2, text))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


@contextlib.contextmanager
def preemptible() -> Iterator[None]:
    """SIGTERM, which a machine sends before it is taken away, is heeded as Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heed = lambda *_: signal.raise_signal(signal.SIGINT)
    usual = signal.signal(signal.SIGTERM, heed)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, usual)
