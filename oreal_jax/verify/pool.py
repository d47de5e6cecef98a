"""A pool of verifying processes that can be killed.

An answer costs at most one deadline. Workers are fresh interpreters that import only
the verifiers and see no accelerator. A worker that hangs or dies loses the answer it
was judging and is replaced. A thread feeds each worker, so that pairs can be submitted
from any thread while completions are still being generated.
"""

import collections
import contextlib
import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from oreal_jax.errors import InputError
from oreal_jax.verify.rule import by_rule
from oreal_jax.verify.verdict import Verdict, Verifier

# A completion, its gold answer and, for verifiers that read it, its prompt's row.
Pair = tuple[str, str] | tuple[str, str, Mapping[str, Any] | None]

MEMORY = 4 * 2**30  # bytes of a worker
CACHE_SIZE = 100_000  # verdicts that are remembered
START_SECONDS = 120.0  # until a worker must be ready
GRACE_SECONDS = 2.0  # after the deadline, until a worker that ignores it is killed


def check_verifiers(verifiers: Sequence[Verifier]) -> None:
    """Raise InputError unless workers can import the verifiers by name."""
    if not verifiers:
        raise InputError("config: verifiers=(): at least one is needed")
    for verifier in verifiers:
        name = getattr(verifier, "__qualname__", repr(verifier))
        module = getattr(verifier, "__module__", "__main__")
        if not name.isidentifier() or module == "__main__":
            raise InputError(
                f"config: verifiers: {name} must be a function at the top level of a "
                "module, which workers import by its name"
            )


class Pool:
    """Worker processes that judge completions; safe from any thread."""

    def __init__(
        self,
        workers: int,
        deadline: float = 5.0,
        verifiers: Sequence[Verifier] = (by_rule,),
        memory_bytes: int = MEMORY,
    ):
        """Start the workers; `deadline` is in seconds per answer, memory per worker.

        The first of the `verifiers` whose verdict is not undecided decides.

        Raises:
            InputError: a verifier cannot be imported by name.
        """
        check_verifiers(verifiers)
        names = ",".join(f"{v.__module__}:{v.__name__}" for v in verifiers)
        command = [sys.executable, "-m", "oreal_jax.verify.worker"]
        command += [names, str(deadline), str(memory_bytes)]
        self._lock = threading.Lock()
        # By digest: a hundred thousand completions would fill the memory.
        self._futures: collections.OrderedDict[bytes, Future[Verdict]] = (
            collections.OrderedDict()
        )
        self._queue: queue.SimpleQueue[tuple[Future, bytes] | None] = (
            queue.SimpleQueue()
        )
        self._failure = "" if workers else "the pool has no workers"
        self._workers = [Worker(command, deadline) for _ in range(workers)]
        self._threads = [
            threading.Thread(target=self._serve, args=(worker,), daemon=True)
            for worker in self._workers
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """Kill the workers; verdicts that are still pending raise RuntimeError."""
        with self._lock:
            self._failure = "the pool is closed"
        for worker in self._workers:
            worker.close()
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def submit(
        self, completion: str, gold: str, prompt: Mapping[str, Any] | None = None
    ) -> Future[Verdict]:
        """Return a future verdict; equal pairs are judged once.

        Verifiers read the row `prompt` with the gold answer as its `gold_answer`.

        A late verdict is undecided by "timeout", one whose worker died by "crash".
        `asyncio.wrap_future` makes the future awaitable.

        Raises:
            RuntimeError: workers cannot be started (by the future), or there are none.
        """
        pair = {"completion": completion, "prompt": {**(prompt or {})}}
        pair["prompt"]["gold_answer"] = gold
        # In ASCII because a text may hold half of a surrogate pair.
        message = json.dumps(pair).encode() + b"\n"
        key = hashlib.sha256(message).digest()
        with self._lock:
            existing = self._futures.get(key)
            if existing and not (existing.done() and existing.exception()):
                self._futures.move_to_end(key)
                return existing
            if self._failure:
                raise RuntimeError(self._failure)
            future = self._futures[key] = Future()
            future.set_running_or_notify_cancel()  # it is shared: nobody may cancel it
            if len(self._futures) > CACHE_SIZE:
                self._futures.popitem(last=False)
            self._queue.put((future, message))
        return future

    def verdicts(
        self,
        pairs: Sequence[Pair],
        on_progress: Callable[[int], None] = lambda count: None,
    ) -> list[Verdict]:
        """Return a verdict for each pair, in order.

        `on_progress(n)` reports n more verdicts.

        Raises:
            RuntimeError: workers cannot be started, or there are none.
        """
        futures = [self.submit(pair[0], pair[1], *pair[2:]) for pair in pairs]
        verdicts = []
        for future in futures:
            verdicts.append(future.result())
            on_progress(1)
        return verdicts

    def _serve(self, worker: "Worker") -> None:
        """Feed a worker until the pool is closed; after a failure, fail all pairs."""
        while task := self._queue.get():
            future, message = task
            try:
                if self._failure:
                    raise RuntimeError(self._failure)
                future.set_result(worker.judge(message))
            except (RuntimeError, OSError) as error:
                with self._lock:
                    self._failure = self._failure or str(error)
                future.set_exception(RuntimeError(self._failure))
        worker.release()


class Worker:
    """One verifying process, replaced when it hangs or dies."""

    def __init__(self, command: Sequence[str], deadline: float):
        self._command, self._deadline = command, deadline
        self._closed = False
        self._lock = threading.Lock()  # between its thread and `close`
        self._start()

    def _start(self) -> None:
        self._ready = False
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "CUDA_VISIBLE_DEVICES": "",
            "JAX_PLATFORMS": "cpu",
        }
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the parent to handle
        )

    def judge(self, message: bytes) -> Verdict:
        """Return a verdict within the deadline, counted once the process is ready.

        Raises:
            RuntimeError: the process does not get ready, or the worker is closed.
        """
        if not self._ready and not self._exchange(b"", START_SECONDS):
            command = " ".join(self._command)
            raise RuntimeError(f"a verifying process was never ready: {command}")
        self._ready = True
        line = self._exchange(message, self._deadline + GRACE_SECONDS)
        if line.endswith(b"\n"):
            return Verdict(**json.loads(line))
        self._replace()
        return Verdict("undecided", "the worker died", "crash")

    def _exchange(self, message: bytes, seconds: float) -> bytes:
        """Send a message and return the line received; cut short if the process dies.

        It is killed after `seconds`, even while this thread is blocked writing.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin and stdout
        alarm = threading.Timer(seconds, self.kill)
        alarm.start()
        try:
            stdin.write(message)
            stdin.flush()
            return stdout.readline()
        except (BrokenPipeError, ValueError):  # it died or was killed
            return b""
        finally:
            alarm.cancel()

    def _replace(self) -> None:
        self.kill()
        self.release()
        with self._lock:
            if self._closed:
                raise RuntimeError("the pool is closed")
            self._start()

    def close(self) -> None:
        """Kill the process and start no other."""
        with self._lock:
            self._closed = True
        self.kill()

    def kill(self) -> None:
        """Kill the process with its child, and wait for its end."""
        with self._lock:
            if self._process.returncode is None:  # later the id may be another's
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()

    def release(self) -> None:
        """Close the pipes of a dead process."""
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # of input that it did not read
                if pipe:
                    pipe.close()
