"""The thread that runs the engine, and requests to it from the event loop."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence

from oreal_jax.sampling import Request
from oreal_jax.sampling.session import Piece, Session
from oreal_jax.serve.errors import ApiError


class Worker:
    """Runs a session in a thread; public methods are called from the event loop.

    Requests join and leave between rounds of decoding. At most `queue_length`
    completions wait for a slot. `pending` counts unfinished completions, `running`
    slots in use.
    """

    def __init__(
        self,
        session: Session,
        queue_length: int,
        on_failure: Callable[[], None] = lambda: None,
    ):
        """Prepare; `on_failure` is called in the thread if the engine fails."""
        self.session, self.on_failure = session, on_failure
        self.capacity = session.slots + queue_length
        self.pending = self.running = 0
        self.failure: BaseException | None = None
        self._commands: queue.SimpleQueue[Callable[[], None] | None]
        self._commands = queue.SimpleQueue()
        self._receivers: dict[int, tuple[Generation, int]] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the current round."""
        self._commands.put(None)
        self._thread.join()

    def generate(self, requests: Sequence[Request], samples: int) -> "Generation":
        """Queue `samples` completions of each request; close the result when done.

        Raises:
            ApiError: the queue is too short for them, or the engine has failed.
        """
        if self.failure:
            raise ApiError("the engine has failed", status=503)
        count = len(requests) * samples
        if count > self.capacity:
            message = f"{count} completions; this server accepts {self.capacity}"
            raise ApiError(f"n: the request has {message}", param="n")
        if self.pending + count > self.capacity:
            message = f"{self.pending} completions are running or waiting; try later"
            raise ApiError(message, status=429, code="rate_limit_exceeded")
        self.pending += count
        generation = Generation(self, count)
        self._commands.put(lambda: self._add(generation, requests, samples))
        return generation

    def remove(self, generation: "Generation", choice: int | None = None) -> None:
        """Remove a generation, or one choice of it, which has started."""
        self.pending -= len(generation.unfinished) if choice is None else 1
        self._commands.put(lambda: self._remove(generation, choice))

    def _run(self) -> None:
        try:
            while True:
                while self._commands.qsize() or not self.session.is_busy:
                    command = self._commands.get()
                    if command is None:
                        return
                    command()
                    self.running = self.session.running
                pieces = self.session.step()
                self.running = self.session.running
                for piece in pieces:
                    generation, first = self._receivers[piece.request]
                    generation.deliver((first + piece.sample, piece))
        except BaseException as error:
            self.failure = error
            for generation, _ in self._receivers.values():
                generation.deliver(error)
            self.on_failure()

    def _add(
        self, generation: "Generation", requests: Sequence[Request], samples: int
    ) -> None:
        for index, request in enumerate(requests):
            number = self.session.add(request, samples)
            generation.numbers.append(number)
            self._receivers[number] = generation, index * samples

    def _remove(self, generation: "Generation", choice: int | None) -> None:
        if choice is not None:
            per_request = generation.count // len(generation.numbers)
            index, sample = divmod(choice, per_request)
            self.session.remove(generation.numbers[index], sample)
            return
        for number in generation.numbers:
            self.session.remove(number)
            del self._receivers[number]


class Generation:
    """The completions of one HTTP request, numbered as its choices.

    Iteration yields (choice, piece) until all are finished. `close` frees the slots.
    """

    def __init__(self, worker: Worker, count: int):
        self.count, self.unfinished = count, set(range(count))
        # Request numbers in the session; used by the engine's thread.
        self.numbers: list[int] = []
        self._worker, self._loop = worker, asyncio.get_running_loop()
        self._pieces: asyncio.Queue[tuple[int, Piece] | BaseException]
        self._pieces = asyncio.Queue()

    def deliver(self, item: tuple[int, Piece] | BaseException) -> None:
        """Pass a piece, or the engine's error, to the event loop."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, item)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        """Yield pieces of unfinished choices."""
        while self.unfinished:
            item = await self._pieces.get()
            if isinstance(item, BaseException):
                raise ApiError("the engine has failed", status=500)
            choice, piece = item
            if choice not in self.unfinished:
                continue
            if piece.finish_reason:
                self.unfinished.remove(choice)
                self._worker.pending -= 1
            yield choice, piece

    def finish(self, choice: int) -> None:
        """End a choice early, as after a stop string."""
        if choice in self.unfinished:
            self._worker.remove(self, choice)
            self.unfinished.remove(choice)

    def close(self) -> None:
        """Free all slots; must be called once."""
        self._worker.remove(self)
        self.unfinished.clear()
