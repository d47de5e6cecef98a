"""The server process: port, signals, start and shutdown."""

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn

from oreal_jax.data import Chat
from oreal_jax.errors import Failure, InputError, summarize
from oreal_jax.sampling import Request, Sampling
from oreal_jax.sampling.session import Session
from oreal_jax.serve.app import Service

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 means any free port.

    Raises:
        InputError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=1024)
        # Connections inherit it; without it, each reply waits 40 ms for a delayed ACK.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        return listener
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        reason = reason.partition(" (while")[0].lower()
        raise InputError(
            f"cannot listen on {host}:{port}: {reason}; choose another --port or --host"
        ) from None


def warm_up(session: Session, chat: Chat) -> None:
    """Compile the programs of a short request, so that the first need not wait."""
    sampling = Sampling(max_tokens=2, temperature=0.0)
    number = session.add(Request(chat.encode("?"), sampling, key=0), 1)
    while session.is_busy:
        session.step()
    session.remove(number)


class Server(uvicorn.Server):
    """A server of one model, which runs until a signal."""

    def __init__(self, service: Service, log: Callable[[str], None]):
        """Prepare; the service's worker must not have started."""
        settings = {"lifespan": "off", "access_log": False, "log_config": None}
        super().__init__(uvicorn.Config(service.app(), **settings))
        self.service, self.log = service, log
        service.worker.on_failure = self.end

    def run_on(self, listener: socket.socket) -> None:
        """Serve until a signal; then finish the running requests.

        Raises:
            Failure: the engine failed.
            KeyboardInterrupt: at a second signal, at once.
        """
        worker = self.service.worker
        worker.start()
        host, port = listener.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        size = f"{worker.session.slots} slots, {worker.session.length} tokens"
        self.log(f"serving {self.service.name} on http://{host}:{port} ({size})")
        asyncio.run(self.serve(sockets=[listener]))
        worker.stop()
        if worker.failure:
            message = f"the engine failed: {summarize(worker.failure)}"
            raise Failure(message) from worker.failure

    def end(self) -> None:
        """Stop without waiting for clients: the engine has failed."""
        self.should_exit = self.force_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals in the block; Python allows it in the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {each: signal.signal(each, self.handle_exit) for each in SIGNALS}
        try:
            yield
        finally:
            for each, handler in previous.items():
                signal.signal(each, handler)

    def handle_exit(self, sig: int, frame: object) -> None:
        """Begin to stop; at a second signal, exit at once."""
        if self.should_exit:
            raise KeyboardInterrupt
        self.should_exit = True
        self.log("finishing running requests; a second signal exits at once")
