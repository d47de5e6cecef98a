"""Judging in processes that can be killed: one answer costs at most one deadline.

Workers are fresh interpreters that import this room and nothing of the trainer; they
see no accelerator. A stuck or dead one costs the answer it was at and is replaced. Each
worker has a thread that feeds it, so that pairs can be handed in one at a time, from
any thread, while completions are still being drawn.
"""

import collections
import contextlib
import hashlib
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from oreal_jax.verify.rule import judge as by_rule
from oreal_jax.verify.verdict import Verdict

Judge = Callable[[str, str], Verdict]
Pair = tuple[str, str]

MEMORY = 4 * 2**30
REMEMBERED = 100_000  # verdicts kept
START = 120.0  # seconds a worker may take to be ready
GRACE = 2.0  # seconds past the deadline after which a process is not waited for


class Pool:
    """Workers that judge (completion, gold) pairs; safe from any thread."""

    def __init__(
        self,
        workers: int,
        deadline: float = 5.0,
        judge: Judge = by_rule,
        memory_bytes: int = MEMORY,
    ):
        """Starts the workers. `deadline` in seconds an answer, memory for each worker.

        `judge` is a function at the top of a module that workers can import.
        """
        name = f"{judge.__module__}:{judge.__qualname__}"
        command = [sys.executable, "-m", "oreal_jax.verify.worker"]
        command += [name, str(deadline), str(memory_bytes)]
        self._lock = threading.Lock()
        # By digest: a hundred thousand completions would fill the memory.
        self._known: collections.OrderedDict[bytes, Verdict] = collections.OrderedDict()
        self._pending: dict[bytes, Future[Verdict]] = {}
        self._failure = ""
        self._waiting: queue.SimpleQueue = queue.SimpleQueue()
        self._workers = [Worker(command) for _ in range(workers)]
        self._threads = [
            threading.Thread(target=self._serve, args=(worker, deadline), daemon=True)
            for worker in self._workers
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers; what they have not judged is cancelled."""
        for worker in self._workers:
            worker.closed = True
            worker.end()
            self._waiting.put(None)
        for thread in self._threads:
            thread.join()
        for worker in self._workers:
            worker.release()
        self._workers, self._threads = [], []
        self._abandon(RuntimeError("the pool is closed"))

    def submit(self, completion: str, gold: str) -> Future[Verdict]:
        """A verdict to come; the same pair is judged once.

        A late answer is undecided by "timeout", one at which a worker died by "crash".
        `asyncio.wrap_future` makes of it one to await.

        Raises:
            RuntimeError: workers cannot be started (by the future), or there are none.
        """
        pair = completion, gold
        key = digest(pair)
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                done: Future[Verdict] = Future()
                done.set_result(self._known[key])
                return done
            if self._failure or not self._workers:
                raise RuntimeError(self._failure or "the pool has no workers")
            if key in self._pending:
                return self._pending[key]
            future: Future[Verdict] = Future()
            future.set_running_or_notify_cancel()  # others may wait for it too
            self._pending[key] = future
        self._waiting.put((key, pair))
        return future

    def verdicts(
        self, pairs: Sequence[Pair], on_done: Callable[[int], None] = lambda count: None
    ) -> list[Verdict]:
        """A verdict for each (completion, gold), in order.

        `on_done(n)` hears of n more verdicts.

        Raises:
            RuntimeError: workers cannot be started, or there are none.
        """
        futures = [self.submit(*pair) for pair in pairs]
        verdicts = []
        for future in futures:
            verdicts.append(future.result())
            on_done(1)
        return verdicts

    def _serve(self, worker: "Worker", deadline: float) -> None:
        """Feeds one worker until the pool is closed."""
        while (task := self._waiting.get()) is not None and not worker.closed:
            key, pair = task
            try:
                verdict = worker.judge(pair, deadline)
            except (RuntimeError, OSError) as error:
                if not worker.closed:
                    self._abandon(RuntimeError(str(error)))
                return
            with self._lock:
                self._known[key] = verdict
                if len(self._known) > REMEMBERED:
                    self._known.popitem(last=False)
                future = self._pending.pop(key, None)
            if future:
                future.set_result(verdict)

    def _abandon(self, error: RuntimeError) -> None:
        """Tells all that wait why they wait in vain."""
        with self._lock:
            self._failure = str(error)
            waiting, self._pending = list(self._pending.values()), {}
        for future in waiting:
            future.set_exception(error)


def digest(pair: Pair) -> bytes:
    """What a pair is remembered by; repr because a text may hold half a surrogate."""
    return hashlib.sha256(repr(pair).encode()).digest()


class Worker:
    """One judging process, replaced when it is stuck or dead."""

    def __init__(self, command: Sequence[str]):
        self.closed = False
        self._command = list(command)
        self._lock = threading.Lock()  # between its thread and who closes it
        self._process = self._start()
        self._ready = False

    def _start(self) -> subprocess.Popen:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "CUDA_VISIBLE_DEVICES": "",
            "JAX_PLATFORMS": "cpu",
        }
        return subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )

    def judge(self, pair: Pair, deadline: float) -> Verdict:
        """A verdict within `deadline` seconds once the process is ready.

        The process keeps the deadline itself; it is replaced where it does not.

        Raises:
            RuntimeError: a process cannot be made ready.
        """
        if not self._ready:
            self._await_ready()
        message = json.dumps({"completion": pair[0], "gold": pair[1]}).encode() + b"\n"
        # It is ended even where it does not read and this thread is stuck in writing.
        alarm = threading.Timer(deadline + GRACE, self.end)
        alarm.start()
        try:
            line = self._exchange(message)
        finally:
            alarm.cancel()
        if line.endswith(b"\n"):
            return Verdict(**json.loads(line))
        self._replace()
        return Verdict("undecided", "the worker died", "crash")

    def _exchange(self, message: bytes) -> bytes:
        """Its answer's line; cut short where it died."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin and stdout
        try:
            stdin.write(message)
            stdin.flush()
            return stdout.readline()
        except (BrokenPipeError, ValueError):  # it is dead, or has been ended
            return b""

    def _await_ready(self) -> None:
        stdout = self._process.stdout
        assert stdout
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            heard = selector.select(START) and stdout.readline()
        if not heard:
            command = " ".join(self._command)
            raise RuntimeError(f"a judging process was never ready: {command}")
        self._ready = True

    def _replace(self) -> None:
        self.end()
        self.release()
        with self._lock:
            if not self.closed:
                self._process, self._ready = self._start(), False

    def end(self) -> None:
        """Kills the process with its child and collects it."""
        with self._lock:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def release(self) -> None:
        """Closes the pipes of a process that has ended."""
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # what it did not read is lost with it
                if pipe:
                    pipe.close()
