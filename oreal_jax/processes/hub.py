"""Process 0's ear: every process is connected to it, itself included.

It answers what all have said, all at once; it knows who is missing, and tells everybody
when somebody has died.

    to the hub     hello    number = process, body = its host and how many it counts
                   gather   number = which, body = that process's part
                   barrier  number = which, body = what for
                   late     number = a barrier that was waited for long enough
                   overdue  number = a gathering, likewise; body = how long
                   stop     somebody wants all to stop
                   leave    number = exit code, body = why
    from the hub   welcome  body = the hosts, and what process 0 has to tell
                   answer   number = a gathering, body = all parts with their sizes
                   passed   number = a barrier
                   stop     number = the gathering that will not be: all stop before it
                   end      number = exit code, body = what to say
"""

import contextlib
import json
import queue
import selectors
import socket
import struct
import threading
import time
from typing import Any, NamedTuple

from oreal_jax.errors import InputError
from oreal_jax.processes import wire
from oreal_jax.processes.wire import Message

END = "the end"  # the last barrier: behind it a connection may close
HELLO = 10  # seconds for a new connection to say who it is


class Hello(NamedTuple):
    """What a process says of itself: its number, its host, how many it counts."""

    connection: socket.socket
    process: int
    host: str
    processes: int


class Hub:
    """Serves `count` processes, in a thread, until they have ended."""

    def __init__(self, port: int, count: int, patience: float, notice: Any):
        """Listens; the processes have `patience` seconds to come. `notice` is told to
        everyone then.

        Raises:
            InputError: the port is not to be had.
        """
        try:
            self._door = wire.listen(port)
        except OSError as error:
            raise InputError(
                f"--coordinator: port {port} of this host cannot be listened at: "
                f"{error.strerror}"
            ) from None
        self._count, self._patience, self._notice = count, patience, notice
        self._members: dict[int, socket.socket] = {}
        self._hosts = ["a host unknown"] * count
        self._parts: dict[int, dict[int, bytes]] = {}
        self._gathered = 0  # gatherings answered
        self._stopped: int | None = None  # the gathering before which all stop
        self._arrived: dict[int, set[int]] = {}
        self._done = False
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self._assemble()
            self._serve()
        except Exception as error:  # without this thread all would wait for ever
            self._end(1, f"{self._name(0)}: the hub: {type(error).__name__}: {error}")

    def _assemble(self) -> None:
        """Admits connections until everybody is here."""
        deadline = time.monotonic() + self._patience
        hellos: queue.SimpleQueue[Hello] = queue.SimpleQueue()
        assembled = threading.Event()
        threading.Thread(
            target=self._accept, args=(hellos, assembled), daemon=True
        ).start()
        while len(self._members) < self._count and not self._done:
            try:
                seconds = deadline - time.monotonic()
                if seconds < 0:  # however many that are refused still come
                    raise queue.Empty
                hello = hellos.get(timeout=seconds)
            except queue.Empty:
                here = self._members.keys()
                missing = self._names(set(range(self._count)) - here)
                self._end(
                    1, f"waited {self._patience:g} s for {missing}, in vain: --wait"
                )
                continue
            with contextlib.suppress(OSError):
                self._admit(hello)
        assembled.set()
        if not self._done:
            body = json.dumps({"hosts": self._hosts, "notice": self._notice})
            self._tell(Message("welcome", 0, body.encode()))

    def _accept(
        self, hellos: "queue.SimpleQueue[Hello]", assembled: threading.Event
    ) -> None:
        """Takes connections, each received in a thread of its own: whoever is slow, or
        is no process of ours, holds up nobody."""

        def receive(connection: socket.socket) -> None:
            try:
                hellos.put(receive_hello(connection))
            except OSError:
                connection.close()

        self._door.settimeout(wire.AGAIN)
        while not assembled.is_set():
            with contextlib.suppress(OSError):  # nobody came, or went at once
                connection, _ = self._door.accept()
                threading.Thread(
                    target=receive, args=(connection,), daemon=True
                ).start()
        self._door.close()

    def _admit(self, hello: Hello) -> None:
        """Makes a process a member, or tells it why not."""
        connection, process, host, processes = hello
        refusal = ""
        if processes != self._count or process >= self._count:
            refusal = (
                f"process {process} was told of {processes} processes, "
                f"process 0 of {self._count}"
            )
        before = self._members.get(process)
        if before and not wire.is_closed(before):
            refusal = f"process {process} has come twice, from {host} and "
            refusal += self._hosts[process]
        if refusal:
            wire.send(connection, Message("end", 2, refusal.encode()))
            return
        connection.settimeout(None)
        wire.watch(connection)
        self._members[process], self._hosts[process] = connection, host

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            for process, connection in self._members.items():
                selector.register(connection, selectors.EVENT_READ, process)
            while not self._done:
                for ready, _ in selector.select():
                    process, connection = ready.data, self._members[ready.data]
                    connection.settimeout(wire.LOST)  # without any progress
                    try:
                        message = wire.receive(connection)
                    except TimeoutError:
                        self._end(
                            1,
                            f"{self._name(process)} stopped in the middle of a message",
                        )
                        break
                    except OSError:
                        self._end(1, f"{self._name(process)} died")
                        break
                    connection.settimeout(None)
                    self._hear(process, message)

    def _hear(self, process: int, message: Message) -> None:
        kind, number, body = message
        if kind == "gather" and number != self._stopped:
            parts = self._parts.setdefault(number, {})
            parts[process] = body
            if len(parts) == self._count:
                self._gathered = number + 1
                del self._parts[number]
                self._tell(Message("answer", number, joined(parts)))
        elif kind == "stop" and self._stopped is None:
            self._stopped = self._gathered
            self._tell(Message("stop", self._stopped))
        elif kind == "barrier":
            arrived = self._arrived.setdefault(number, set())
            arrived.add(process)
            if len(arrived) == self._count:
                del self._arrived[number]
                self._tell(Message("passed", number))
                self._done = self._done or body == END.encode()
        elif kind == "late" and number in self._arrived:
            missing = self._names(set(range(self._count)) - self._arrived[number])
            self._end(1, f"{missing} did not come to {body.decode()}")
        elif kind == "overdue" and number in self._parts:
            missing = self._names(set(range(self._count)) - self._parts[number].keys())
            self._end(
                1,
                f"{missing} did not reach the gather within {body.decode()} s; "
                "it may be hung",
            )
        elif kind == "leave":
            self._end(number, f"{self._name(process)}: {body.decode()}")

    def _tell(self, message: Message) -> None:
        for process, connection in self._to_all():
            try:
                wire.send(connection, message)
            except OSError:
                self._end(1, f"{self._name(process)} died")
                return

    def _end(self, code: int, text: str) -> None:
        """Ends everybody."""
        if not self._done:
            self._done = True
            for _, connection in self._to_all():
                with contextlib.suppress(OSError):
                    wire.send(connection, Message("end", code, text.encode()))

    def _to_all(self) -> list[tuple[int, socket.socket]]:
        """Process 0 comes last: it may end at once, and the hub with it."""
        return sorted(self._members.items(), reverse=True)

    def _name(self, process: int) -> str:
        return f"process {process} of {self._count} on {self._hosts[process]}"

    def _names(self, processes: set[int]) -> str:
        return ", ".join(map(self._name, sorted(processes)))


def receive_hello(connection: socket.socket) -> Hello:
    """The first message of a process.

    Raises:
        OSError: it is not there in time, or is no hello.
    """
    kind, process, body = wire.receive(connection, wire.SMALL, HELLO)
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        content = None
    match content:
        case {"host": str(host), "count": int(count)} if kind == "hello":
            return Hello(connection, process, host, count)
    raise ConnectionError("no hello")


def joined(parts: dict[int, bytes]) -> bytes:
    """The parts of all processes in one message: their sizes, then they."""
    ordered = [parts[process] for process in range(len(parts))]
    sizes = struct.pack(f"!{len(ordered)}Q", *map(len, ordered))
    return b"".join([sizes, *ordered])


def split(body: bytes, count: int) -> list[bytes]:
    """The parts again."""
    head = struct.Struct(f"!{count}Q")
    parts, start = [], head.size
    for size in head.unpack_from(body):
        parts.append(body[start : start + size])
        start += size
    return parts
