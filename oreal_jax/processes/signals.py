"""What Ctrl-C and SIGTERM may interrupt."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator


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
