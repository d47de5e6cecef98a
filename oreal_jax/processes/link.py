"""A process's connection to the hub: what it says, and what it hears at any time.

Bad news comes when the process is busy: in a collective that waits for the dead, in
sampling, in judging. The thread that hears it says it and ends the process.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from typing import Any, NoReturn

from oreal_jax.errors import Failure
from oreal_jax.processes import wire
from oreal_jax.processes.hub import END, split
from oreal_jax.processes.place import Place
from oreal_jax.processes.wire import Message

ANSWER = 30  # seconds for the hub to end everybody once it was asked to
MAIN = threading.main_thread().ident or 0


class Link:
    """An open connection to the hub, and the thread that listens to it."""

    def __init__(self, place: Place, patience: float):
        """Connects, and waits until all processes have come.

        Raises:
            Failure: process 0 is not reached for `patience` seconds.
        """
        self.place = place
        self._news = threading.Condition()
        self._saying = threading.Lock()
        self._answers: dict[tuple[str, int], bytes] = {}
        self._numbers = {"gather": 0, "barrier": 0}
        self._waits_for: int | None = None  # the gathering that it waits for
        self._stopped: int | None = None  # the gathering that will not be
        self._asked = False  # for that
        self._closing = self._closed = False  # behind the last barrier links may break
        self._hub = f"process 0 of {place.count} on {place.host}"
        self._connection = self._connect(patience)
        wire.watch(self._connection)
        hello = {"host": socket.gethostname(), "count": place.count}
        self.say("hello", place.index, json.dumps(hello).encode())
        threading.Thread(target=self._listen, daemon=True).start()
        welcome = json.loads(self._await_hub(("welcome", 0), patience))
        self.notice: Any = welcome["notice"]
        self._hub = f"process 0 of {place.count} on {welcome['hosts'][0]}"

    def _connect(self, patience: float) -> socket.socket:
        host, port = self.place.host, self.place.port
        try:
            there = "localhost" if self.place.index == 0 else host
            return wire.connect(there, port, patience)
        except OSError as error:
            raise Failure(
                f"--coordinator {host}:{port} does not answer for {patience:g} s: "
                f"{error}; does process 0 run there?"
            ) from None

    def say(self, kind: str, number: int = 0, body: bytes = b"") -> None:
        """Sends a message to the hub."""
        try:
            with self._saying:
                wire.send(self._connection, Message(kind, number, body))
        except OSError:
            time.sleep(ANSWER)  # the listening thread knows more
            self.end(1, f"{self._hub} died")

    def gather(self, part: bytes, patience: float) -> list[bytes]:
        """The parts of all processes, in their order; after `patience` seconds all are
        ended, with the names of those whose part is missing.

        Raises:
            KeyboardInterrupt: in all of them, where one was asked to stop.
        """
        number = self._next("gather")
        key = ("answer", number)
        with self._news:
            self._waits_for = number
        self.say("gather", number, part)
        try:
            answer = self._await(key, patience, unless_stopped=number)
        except TimeoutError:
            self.say("overdue", number, f"{patience:g}".encode())
            answer = self._await_hub(key, unless_stopped=number)
        self._waits_for = None
        return split(answer, self.place.count)

    def barrier(self, what: str, patience: float) -> None:
        """Returns when all have come; after `patience` seconds all are ended, with the
        names of those who have not."""
        number = self._numbers["barrier"]
        try:
            self.meet(what, patience)
        except TimeoutError:
            self.say("late", number, f"{what}, for {patience:g} s".encode())
            self._await_hub(("passed", number))

    def meet(self, what: str, patience: float) -> None:
        """A barrier that ends nobody.

        Raises:
            TimeoutError: not all have come after `patience` seconds.
        """
        number = self._next("barrier")
        self.say("barrier", number, what.encode())
        try:
            self._await(("passed", number), patience)
        except TimeoutError:
            text = f"not all processes came to {what} within {patience:g} s"
            raise TimeoutError(text) from None

    def ask_to_stop(self) -> None:
        """Lets all processes stop before the next gathering. Safe in signal handlers,
        which may come while another message is being sent. This one stops itself."""
        self._asked = True
        threading.Thread(target=self.say, args=("stop",), daemon=True).start()

    def leave(self, code: int, why: str) -> NoReturn:
        """Ends all processes."""
        self.say("leave", code, why.encode("utf-8", "backslashreplace"))
        time.sleep(ANSWER)  # the hub's answer ends this one
        self.end(code, why)

    def end(self, code: int, text: str) -> NoReturn:
        """Ends this process from any thread, whatever it is at: no clean-up could be
        trusted to come to its end without the others."""
        sys.stdout.flush()
        print(f"oreal: {text}", file=sys.stderr, flush=True)
        os._exit(code)

    def _next(self, kind: str) -> int:
        number = self._numbers[kind]
        self._numbers[kind] += 1
        return number

    def _await(
        self,
        key: tuple[str, int],
        patience: float,
        unless_stopped: int | None = None,
    ) -> bytes:
        """The hub's message.

        Raises:
            TimeoutError: it has not come after `patience` seconds.
            KeyboardInterrupt: the gathering `unless_stopped` will not be.
        """
        stopped = lambda: self._stopped is not None and self._stopped == unless_stopped
        with self._news:
            there = lambda: key in self._answers or stopped()
            if not self._news.wait_for(there, patience):
                raise TimeoutError
            if key not in self._answers:
                raise KeyboardInterrupt
            return self._answers.pop(key)

    def _await_hub(
        self,
        key: tuple[str, int],
        patience: float = 0.0,
        unless_stopped: int | None = None,
    ) -> bytes:
        """The hub's message, due within `patience` seconds and those that the hub may
        take to end all. A hub that sends neither hangs, and this process ends."""
        seconds = patience + ANSWER
        try:
            return self._await(key, seconds, unless_stopped)
        except TimeoutError:
            self.end(
                1, f"{self._hub} did not answer within {seconds:g} s; it may be hung"
            )

    def _listen(self) -> None:
        while True:
            try:
                kind, number, body = wire.receive(self._connection)
            except OSError:
                if self._closed:
                    return
                self.end(1, f"{self._hub} died")
            if kind == "end":
                self.end(number, body.decode())
            with self._news:
                if kind == "stop":
                    self._stopped = number
                    if self._waits_for != number and not self._asked:
                        signal.pthread_kill(MAIN, signal.SIGINT)
                else:
                    self._answers[kind, number] = body
                    self._closed = self._closing and kind == "passed"
                self._news.notify_all()

    def close(self, patience: float) -> None:
        """Waits until all have come to the end."""
        self._closing = True
        self.barrier(END, patience)
