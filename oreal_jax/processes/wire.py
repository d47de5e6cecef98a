"""Messages over a TCP connection: a kind, a number, bytes. Nothing is unpickled."""

import contextlib
import socket
import struct
import time
from typing import NamedTuple

SMALL = 2**16  # bytes of a message that is not data
AGAIN = 0.2  # seconds between two tries to connect
LOST = 45  # seconds without a sign from a host after which it is lost

_HEAD = struct.Struct("!8sIQ")  # kind, number, bytes that follow


class Message(NamedTuple):
    """What one process says to another."""

    kind: str
    number: int = 0
    body: bytes = b""


def send(connection: socket.socket, message: Message) -> None:
    """Sends it whole. Raises OSError where the other end is gone."""
    kind, number, body = message
    connection.sendall(_HEAD.pack(kind.encode(), number, len(body)))
    connection.sendall(body)


def receive(
    connection: socket.socket, most: int | None = None, seconds: float | None = None
) -> Message:
    """The next message, of at most `most` bytes, whole within `seconds`.

    Raises:
        OSError: the other end is gone, is too slow (TimeoutError) or sends no message
            of ours.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    kind, number, size = _HEAD.unpack(_exactly(connection, _HEAD.size, deadline))
    if most is not None and size > most:
        raise ConnectionError("no message of ours")
    body = bytes(_exactly(connection, size, deadline))
    return Message(kind.rstrip(b"\0").decode("ascii", "replace"), number, body)


def _exactly(connection: socket.socket, size: int, deadline: float | None) -> bytearray:
    received = bytearray(size)
    missing = memoryview(received)
    while missing:
        if deadline is not None:  # of the whole: a byte now and then is not enough
            connection.settimeout(max(0.001, deadline - time.monotonic()))
        count = connection.recv_into(missing)
        if not count:
            raise ConnectionError("closed")
        missing = missing[count:]
    return received


def watch(connection: socket.socket) -> None:
    """Lets the kernel notice a host that vanishes: it closes no connections. (A process
    that ends has its closed, however it ends.)"""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in [
        ("TCP_NODELAY", 1),
        ("TCP_KEEPIDLE", LOST // 3),  # seconds
        ("TCP_KEEPINTVL", LOST // 9),
        ("TCP_KEEPCNT", 6),
        ("TCP_USER_TIMEOUT", LOST * 1000),  # what is sent and not acknowledged
    ]:
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def is_closed(connection: socket.socket) -> bool:
    """Whether the other end has gone."""
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def connect(host: str, port: int, patience: float) -> socket.socket:
    """A connection, tried again for `patience` seconds. Raises OSError."""
    deadline = time.monotonic() + patience
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=5)
            connection.settimeout(None)
            return connection
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(AGAIN)


def listen(port: int, host: str = "") -> socket.socket:
    """A socket that takes connections; port 0 is any free one. Raises OSError."""
    if host:
        return socket.create_server((host, port))
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # a kernel without IPv6
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True
            )
    return socket.create_server(("", port))
