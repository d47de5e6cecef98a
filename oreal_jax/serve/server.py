"""The server as a process: its port, its engine, its signals and its end."""

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence

import uvicorn

from oreal_jax.data import Chat
from oreal_jax.errors import Failure, InputError, summarize
from oreal_jax.sampling import Request, Sampling
from oreal_jax.sampling.session import Session
from oreal_jax.serve.app import Service
from oreal_jax.serve.worker import Worker

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; port 0 is any free one.

    Raises:
        InputError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        message = f"cannot listen on {host}:{port}: {reason.lower()}"
        raise InputError(f"{message}; choose another --port or --host") from None


def warm_up(session: Session, chat: Chat) -> None:
    """Compile the programs for a short request, which otherwise the first waits for."""
    sampling = Sampling(max_tokens=2, temperature=0.0)
    number = session.add(Request(chat.encode("?"), sampling, key=0), 1)
    while session.is_busy:
        session.step()
    session.remove(number)


def serve(
    name: str,
    chat: Chat,
    session: Session,
    listener: socket.socket,
    *,
    queue_length: int,
    keys: Sequence[str],
    log: Callable[[str], None],
) -> None:
    """Serve until a signal; then finish running requests, unless a second one comes.

    Raises:
        Failure: the engine failed.
        KeyboardInterrupt: at the second signal.
    """
    server: _Server
    worker = Worker(session, queue_length, on_failure=lambda: server.end())
    application = Service(name, chat, worker, keys).app()
    config = uvicorn.Config(
        application, lifespan="off", access_log=False, log_config=None
    )
    server = _Server(config, log)
    worker.start()
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    size = f"{session.slots} slots, {session.length} tokens"
    log(f"serving {name} on http://{host}:{port} ({size})")
    asyncio.run(server.serve(sockets=[listener]))
    worker.stop()
    if worker.failure:
        message = f"the engine failed: {summarize(worker.failure)}"
        raise Failure(message) from worker.failure


class _Server(uvicorn.Server):
    """uvicorn, which ends at once at a second signal of either kind."""

    def __init__(self, config: uvicorn.Config, log: Callable[[str], None]):
        super().__init__(config)
        self.log = log

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
        """Begin to stop, or end at once."""
        if self.should_exit:
            raise KeyboardInterrupt
        self.should_exit = True
        self.log("finishing the running requests; a second signal ends at once")

    def end(self) -> None:
        """Stop without waiting for clients: the engine has failed."""
        self.should_exit = self.force_exit = True
