"""The one room that knows that there are several processes.

A run on several hosts is one program in N processes. JAX computes on the devices of all
as on one mesh, and every process must ask for the same computations in the same order.
What is on the hosts is exchanged here, between two computations:

    share      a process's part of what is to be done
    all_of     the parts of all, in the order of the whole
    barrier    what process 0 writes is there for everyone
    meet       a barrier after an error, which some may never reach
    agree      all processes see the same config and the same files

Ctrl-C and SIGTERM reach one process, but all must stop at the same place: a gathering
(in `all_of`, `agree`, `together`) is answered for all or, once somebody was asked to
stop, raises KeyboardInterrupt in all. Elsewhere KeyboardInterrupt may come at any time,
so that a gathering and the computations that follow it belong into one block that is
`uninterrupted`. Whatever else ends one process, ends all, with a line that names it;
so does a process that lives and does not come to a gathering for `HUNG` seconds.

With one process nothing is exchanged and nothing costs anything.
"""

import contextlib
import json
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

from oreal_jax.errors import Failure, InputError
from oreal_jax.processes import wire
from oreal_jax.processes.hub import Hub
from oreal_jax.processes.link import Link
from oreal_jax.processes.place import Place, place_of
from oreal_jax.processes.signals import deferred, ignoring_interrupts, preemptible

__all__ = [
    "Place",
    "agree",
    "all_of",
    "ask_to_stop",
    "barrier",
    "count",
    "gathered",
    "ignoring_interrupts",
    "index",
    "is_first",
    "joined",
    "meet",
    "place_of",
    "preemptible",
    "report",
    "share",
    "together",
    "uninterrupted",
]

PATIENCE = 600.0  # seconds at a barrier: what process 0 writes there is small
# Seconds that processes may be apart where they gather: the slowest still compiles, or
# samples and judges its share, while the others have done so. Steps take minutes.
HUNG = 3600.0
DEVICES = 60  # seconds for JAX to connect processes that are there
INTERRUPTED = 60.0  # seconds for the others to be interrupted, too
CULPRIT = 5.0  # seconds in which an error may turn out to be another's death

T = TypeVar("T")

_link: Link | None = None  # the processes are those of the program, so is the link
_reported: BaseException | None = None  # the error that `report` has printed


@contextlib.contextmanager
def joined(place: Place | None, patience: float = 300.0) -> Iterator[None]:
    """The block runs in all processes together. Must begin before JAX has looked for
    devices; the processes have `patience` seconds to come.

    Raises:
        InputError: process 0 cannot listen at its port.
        Failure: process 0 is not reached.
    """
    global _link
    if place is None:
        yield
        return
    if place.index == 0:
        with wire.listen(0) as free:
            service = free.getsockname()[1]
        Hub(place.port, place.count, patience, {"service": service})
    _link = Link(place, patience)
    _join_devices(place, _link.notice["service"])
    try:
        yield
    except KeyboardInterrupt:
        _link.ask_to_stop()
        _link.close(INTERRUPTED)
        raise
    except BaseException as error:
        _leave(_link, error)
    _link.close(PATIENCE)


def _join_devices(place: Place, service: int) -> None:
    """Makes JAX see the devices of all processes."""
    import jax

    # We hear of SIGTERM ourselves.
    jax.config.update("jax_enable_preemption_service", False)
    address = f"localhost:{service}"
    if place.index:
        address = f"localhost:{_tunnel(place.host, service)}"
    anywhere = "[::]" if socket.has_dualstack_ipv6() else "0.0.0.0"
    jax.distributed.initialize(
        address,
        place.count,
        place.index,
        place.devices,
        cluster_detection_method="deactivate",
        coordinator_bind_address=f"{anywhere}:{service}",
        initialization_timeout=DEVICES,
    )


def _tunnel(host: str, port: int) -> int:
    """A port here that leads to one of process 0's, and stays open when that closes.

    When process 0 dies, JAX aborts the others within a millisecond, without naming it;
    so it does not see that, and the link has the time to.
    """
    door = wire.listen(0, "localhost")

    def copy(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(wire.SMALL):
                sink.sendall(data)

    def serve() -> None:
        while True:
            near, _ = door.accept()
            try:
                far = wire.connect(host, port, patience=DEVICES)
            except OSError:  # JAX connects again
                near.close()
                continue
            for ends in ((near, far), (far, near)):
                threading.Thread(target=copy, args=ends, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    return door.getsockname()[1]


def report(error: BaseException) -> None:
    """Prints an error of this process, for use before it waits for the others: they may
    end it meanwhile. A process that is alone prints it at its end, in `cli.main`."""
    global _reported
    if not _link or error is _reported:
        return
    _reported = error
    if isinstance(error, InputError | Failure):
        warn(str(error))
    else:
        time.sleep(CULPRIT)  # a collective fails where another process has died
        traceback.print_exception(error)


def _leave(link: Link, error: BaseException) -> NoReturn:
    """Ends all processes for an error of this one."""
    if isinstance(error, InputError | Failure):
        link.leave(2 if isinstance(error, InputError) else 1, str(error))
    report(error)
    said = str(error).partition("\n")[0]
    link.leave(1, f"{type(error).__name__}: {said}")


def count() -> int:
    """How many processes there are."""
    return _link.place.count if _link else 1


def index() -> int:
    """The number of this one."""
    return _link.place.index if _link else 0


def is_first() -> bool:
    """Whether this is the process that writes plain files and talks to people."""
    return index() == 0


def warn(text: str) -> None:
    """Says something that must be heard, whichever process it is."""
    name = f"process {index()} of {count()} on {socket.gethostname()}"
    print(f"oreal: {name}: {text}", file=sys.stderr, flush=True)


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part: every `count()`-th item, so that all have like many."""
    return items[index() :: count()]


def all_of(
    mine: list[T],
    encode: Callable[[list[T]], bytes],
    decode: Callable[[bytes], list[T]],
) -> list[T]:
    """What all processes have made of their `share`, in the order of the whole."""
    if not _link:
        return mine
    parts = [decode(part) for part in _link.gather(encode(mine), HUNG)]
    total = sum(map(len, parts))
    return [parts[i % len(parts)][i // len(parts)] for i in range(total)]


def gathered(value: Any) -> list[Any]:
    """A JSON value of every process, in their order."""
    if not _link:
        return [value]
    parts = _link.gather(json.dumps(value).encode(), HUNG)
    return [json.loads(part) for part in parts]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block that all processes enter, or none where one was asked to stop; then all
    have a KeyboardInterrupt. It is `uninterrupted`."""
    with uninterrupted():
        if _link:
            _link.gather(b"", HUNG)
        yield


def agree(what: str, value: Any) -> None:
    """Raises InputError where a JSON value is not the same on all processes."""
    values = gathered(value)
    for process, other in enumerate(values):
        if other != values[0]:
            raise InputError(
                f"{what}: {values[0]} for process 0, {other} for process {process}"
            )


def barrier(what: str) -> None:
    """Returns when all processes have come to it; those that do not come within
    `PATIENCE` seconds are named, and all end."""
    if _link:
        _link.barrier(what, PATIENCE)


def meet(what: str) -> None:
    """A barrier after an error of this process, which the others leave what they do to
    come to. It ends nobody.

    Raises:
        TimeoutError: not all have come within `INTERRUPTED` seconds: some wait for this
            process in a collective.
    """
    if _link:
        _link.meet(what, INTERRUPTED)


def ask_to_stop() -> None:
    """Lets all processes stop at the next gathering; may be called by a signal."""
    if _link:
        _link.ask_to_stop()


def uninterrupted() -> contextlib.AbstractContextManager[None]:
    """Lets what is inside finish before Ctrl-C is heeded: a step is whole or absent.
    Only a gathering within it may stop it, in all processes."""
    return deferred(ask_to_stop)
