"""Requests that join and leave an engine during decoding, for a server."""

import itertools
from typing import NamedTuple

import numpy as np

from oreal_jax.model.decoding import Weights
from oreal_jax.sampling.completion import Request
from oreal_jax.sampling.engine import Engine
from oreal_jax.sampling.runner import DISPATCH, Runner
from oreal_jax.sampling.scheduler import SampleId

ROUND_SECONDS = 0.1  # of decoding, before requests join and leave again


class Piece(NamedTuple):
    """Tokens of a sample since its last piece, with their log-probabilities.

    `finish_reason` is "stop" or "length" in the last piece of a sample, else None.
    """

    request: int
    sample: int
    tokens: list[int]
    log_probs: np.ndarray
    finish_reason: str | None


class Session:
    """An engine that decodes a changing set of requests, in rounds of about 0.1 s.

    Not thread-safe. The number of slots does not change with the load: a completion
    depends on its request alone, up to the last bits of its log-probabilities.
    """

    def __init__(self, engine: Engine, weights: Weights, length: int, biases: int):
        """Allocate the cache.

        `length` is the maximum number of tokens of a prompt and its completion,
        `biases` the maximum number of biased tokens of a request.
        """
        self.engine, self.length, self.biases = engine, length, biases
        self.slots = engine.slots * engine.engines
        self._runner = Runner(
            engine.programs,
            weights,
            engine.stops,
            requests={},
            samples=0,
            size=engine.size(self.slots, 0, length, biases),
            step=0,
            renormalise=False,
            resumable=False,
        )
        self._numbers = itertools.count()
        self._reported: dict[SampleId, int] = {}  # tokens in earlier pieces

    @property
    def is_busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.running or self._runner.scheduler.waiting)

    @property
    def running(self) -> int:
        """The number of slots in use."""
        return self._runner.scheduler.running

    def add(self, request: Request, samples: int) -> int:
        """Queue a request, which must be valid; returns its number for `remove`."""
        number = next(self._numbers)
        self._runner.add(number, request, samples)
        return number

    def remove(self, number: int, sample: int | None = None) -> None:
        """Remove a request, finished or not, or one of its started samples.

        Its slots are free for the next round.
        """
        self._runner.remove(number, sample)
        for id in [id for id in self._reported if id[0] == number]:
            if sample in (None, id[1]):
                del self._reported[id]

    def step(self) -> list[Piece]:
        """Admit requests to free slots and decode a round; returns new tokens."""
        steps = int(ROUND_SECONDS / max(self._runner.step_seconds, 1e-3))
        steps = max(1, min(DISPATCH, steps))
        finished = self._runner.run_round(lambda slots: False, steps)
        pieces = [
            self._piece((request, sample), c.tokens, c.log_probs, c.finish_reason)
            for request, sample, c in finished
        ]
        for sample, tokens, log_probs in self._runner.unfinished():
            pieces.append(self._piece(sample, tokens.tolist(), log_probs, None))
        return [piece for piece in pieces if piece.tokens]

    def _piece(
        self,
        id: SampleId,
        tokens: list[int],
        log_probs: np.ndarray,
        finish_reason: str | None,
    ) -> Piece:
        start = self._reported.pop(id, 0)
        if finish_reason is None:
            self._reported[id] = len(tokens)
        return Piece(*id, tokens[start:], log_probs[start:].copy(), finish_reason)
