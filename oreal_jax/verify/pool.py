"""Judging in processes that can be killed: one answer costs at most one deadline.

Workers are fresh interpreters that import this room and nothing of the trainer; they
see no accelerator. A stuck or dead one costs the answer it was at and is replaced.
"""

import collections
import contextlib
import hashlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

from oreal_jax.verify.rule import judge as by_rule
from oreal_jax.verify.verdict import Verdict

Judge = Callable[[str, str], Verdict]
Pair = tuple[str, str]

MEMORY = 4 * 2**30
REMEMBERED = 100_000  # verdicts kept
START = 120.0  # seconds a worker may take to be ready


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
        self._deadline = deadline
        name = f"{judge.__module__}:{judge.__qualname__}"
        self._command = [sys.executable, "-m", "oreal_jax.verify.worker"]
        self._command += [name, str(deadline), str(memory_bytes)]
        self._lock = threading.Lock()
        # By digest: a hundred thousand completions would fill the memory.
        self._known: collections.OrderedDict[bytes, Verdict] = collections.OrderedDict()
        self._selector = selectors.DefaultSelector()
        self._workers = [self._start() for _ in range(workers)]

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers."""
        for worker in self._workers:
            self._end(worker)
        self._workers = []
        self._selector.close()

    def verdicts(
        self, pairs: Sequence[Pair], on_done: Callable[[int], None] = lambda count: None
    ) -> list[Verdict]:
        """A verdict for each (completion, gold), in order.

        `on_done(n)` hears of n more verdicts. A late answer is undecided by "timeout",
        one at which a worker died by "crash".

        Raises:
            RuntimeError: workers cannot be started, or there are none.
        """
        with self._lock:
            places: dict[Pair, list[int]] = {}
            for place, pair in enumerate(pairs):
                places.setdefault(pair, []).append(place)
            digests = {pair: digest(pair) for pair in places}
            known = {
                pair: self._known[digests[pair]]
                for pair in places
                if digests[pair] in self._known
            }
            on_done(sum(len(places[pair]) for pair in known))
            waiting = collections.deque(pair for pair in places if pair not in known)
            for pair, verdict in self._judge(waiting):
                known[pair] = verdict
                on_done(len(places[pair]))
            for pair in places:
                self._remember(digests[pair], known[pair])
            return [known[pair] for pair in pairs]

    def _judge(self, waiting: collections.deque[Pair]):
        """Yields verdicts as they come."""
        if waiting and not self._workers:
            raise RuntimeError("the pool has no workers")
        for worker in list(self._workers):
            if worker.pair:  # of a batch that was broken off
                self._replace(worker)
        while waiting or any(worker.pair for worker in self._workers):
            for worker in self._workers:
                if waiting and worker.ready and not worker.pair:
                    pair = waiting.popleft()
                    if not worker.take(pair, self._deadline):
                        self._replace(worker)
                        waiting.appendleft(pair)
                        break
            for key, _ in self._selector.select(timeout=self._patience()):
                worker = key.data
                pair, message = worker.pair, worker.answer()
                if message is None:
                    self._replace(worker)
                    if pair:
                        yield pair, Verdict("undecided", "the worker died", "crash")
                elif pair:
                    yield pair, Verdict(**message)
            now = time.monotonic()
            for worker in list(self._workers):
                if now > worker.until and (worker.pair or not worker.ready):
                    pair = worker.pair
                    self._replace(worker)
                    reason = f"deadline of {self._deadline:g} s passed"
                    if pair:
                        yield pair, Verdict("undecided", reason, "timeout")

    def _patience(self) -> float:
        ends = [worker.until for worker in self._workers if worker.pair]
        return (
            max(0.0, min(ends, default=time.monotonic() + 1) - time.monotonic()) + 0.01
        )

    def _remember(self, key: bytes, verdict: Verdict) -> None:
        self._known[key] = verdict
        self._known.move_to_end(key)
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)

    def _start(self) -> "Worker":
        worker = Worker(self._command)
        self._selector.register(worker.stdout, selectors.EVENT_READ, worker)
        return worker

    def _replace(self, worker: "Worker") -> None:
        if not worker.ready:
            raise RuntimeError(
                f"a judging process was never ready: {' '.join(self._command)}"
            )
        self._end(worker)
        self._workers[self._workers.index(worker)] = self._start()

    def _end(self, worker: "Worker") -> None:
        self._selector.unregister(worker.stdout)
        worker.end()


def digest(pair: Pair) -> bytes:
    """What a pair is remembered by; repr because a text may hold half a surrogate."""
    return hashlib.sha256(repr(pair).encode()).digest()


class Worker:
    """One judging process and the pair it is at."""

    def __init__(self, command: Sequence[str]):
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "CUDA_VISIBLE_DEVICES": "",
            "JAX_PLATFORMS": "cpu",
        }
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )
        assert self.process.stdin and self.process.stdout
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.ready = False
        self.pair: Pair | None = None
        self.until = time.monotonic() + START

    def take(self, pair: Pair, deadline: float) -> bool:
        """Gives the process a pair; False where it is dead."""
        message = {"completion": pair[0], "gold": pair[1]}
        try:
            self.stdin.write(json.dumps(message).encode() + b"\n")
            self.stdin.flush()
        except BrokenPipeError:
            return False
        self.pair, self.until = pair, time.monotonic() + deadline
        return True

    def answer(self) -> dict | None:
        """What the process says; None where it has died."""
        line = self.stdout.readline()
        self.pair = None
        if not line.endswith(b"\n"):
            return None
        self.ready = True
        return json.loads(line)

    def end(self) -> None:
        """Kills the process and collects it."""
        self.process.kill()
        with contextlib.suppress(OSError):  # what it did not read is lost with it
            self.stdin.close()
        self.stdout.close()
        self.process.wait()
