"""One call of an engine: slots are filled, rows decoded, what is finished taken out.

The scheduler decides who goes where, programs.py is what runs on the devices; here they
meet. Letters: A slots or starts, R prompts, S tokens a prompt, M pages.
"""

import functools
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from oreal_jax import sharding
from oreal_jax.data.packing import bucket
from oreal_jax.model.decoding import Weights
from oreal_jax.sampling.completion import Completion, Request, Statistics
from oreal_jax.sampling.programs import Decoding, Programs
from oreal_jax.sampling.scheduler import Admission, Job, Prefill, Scheduler, Swap

DISPATCH = 64  # tokens decoded per row between two looks of the host, at most
PAGE = 64  # tokens a page
PREFILL = 2048  # prompt tokens an engine runs at a time, or one prompt


class Size(NamedTuple):
    """Static shapes of a call, on each engine; powers of two, so that programs are few.

    `table_pages` is the longest row's, `pages` the cache's.
    """

    slots: int
    longest_prompt: int
    table_pages: int
    pages: int


class Work:
    """The scheduler and the devices' state of a call, until all jobs are done."""

    def __init__(
        self,
        programs: Programs,
        weights: Weights,
        requests: Sequence[Request],
        jobs: Sequence[Job],
        size: Size,
        seed_and_step: tuple[int, int],
    ):
        """`jobs` are the samples of `requests` to draw."""
        self.programs, self.weights, self.requests = programs, weights, requests
        self.seed_and_step = seed_and_step
        self.engines = sharding.row_ways(programs.mesh)
        self.slots, self.longest_prompt, self.table_pages, pages = size
        self.scheduler = Scheduler(
            jobs,
            shards=self.engines,
            slots=self.slots,
            pages=pages,
            size=PAGE,
            dispatch=DISPATCH,
        )
        self.state = self.programs.empty(self.slots, pages)
        self.swapped: dict[tuple[int, int], Decoding] = {}  # in the host's memory
        self.prompt_tokens = self.drawn_tokens = self.swapped_rows = 0
        self.prefill_seconds = self.decode_seconds = 0.0
        self.slot_steps = self.busy_steps = 0

    def rounds(self) -> Iterator[list[tuple[int, int, Completion]]]:
        """Fills slots and decodes, again and again; what has finished each time."""
        while self.scheduler.waiting or self.scheduler.running:
            start = time.perf_counter()
            prefills, admissions, returning = self.scheduler.place()
            self._prefill(prefills)
            self._admit(admissions)
            jax.block_until_ready(self.state.done)
            between = time.perf_counter()
            self._swap_in(returning)
            finished = self._decode()
            self.prefill_seconds += between - start
            self.decode_seconds += time.perf_counter() - between
            yield finished

    def _place(self, values: np.ndarray) -> jax.Array:
        """Puts [engines, ...] where the engines are."""
        return jax.device_put(values, sharding.of_rows(self.programs.mesh))

    def _prefill(self, prefills: list[Prefill]) -> None:
        """Runs prompts, those of like length together."""
        waiting: list[list[Prefill]] = [[] for _ in range(self.engines)]
        for prefill in prefills:
            waiting[prefill.shard].append(prefill)
        while any(waiting):
            heads = [prefill.request for queue in waiting for prefill in queue[:1]]
            stored = max(len(self.requests[i].prompt) - 1 for i in heads)
            length = bucket(stored, PAGE)
            count = max(1, PREFILL // length)
            taken = [[] for _ in waiting]
            for shard, queue in enumerate(waiting):
                while queue and len(taken[shard]) < count:
                    if len(self.requests[queue[0].request].prompt) - 1 > length:
                        break
                    taken[shard].append(queue.pop(0))
            self._prefill_batch(taken, length)

    def _prefill_batch(self, taken: list[list[Prefill]], length: int) -> None:
        size = bucket(max(map(len, taken)))
        prompts = np.zeros((len(taken), size, length), np.int32)
        lengths = np.ones((len(taken), size), np.int32)
        table = np.zeros((len(taken), size, length // PAGE), np.int32)
        for shard, queue in enumerate(taken):
            for row, prefill in enumerate(queue):
                tokens = self.requests[prefill.request].prompt[:-1]
                prompts[shard, row, : len(tokens)] = tokens
                lengths[shard, row] = len(tokens)
                table[shard, row, : len(prefill.pages)] = prefill.pages
                self.prompt_tokens += len(tokens)
        self.state = self.programs.prefill(
            self.weights, self.state, *map(self._place, (prompts, lengths, table))
        )

    def _admit(self, admissions: list[Admission]) -> None:
        if not admissions:
            return
        count = [0] * self.engines
        most = max(np.bincount([a.shard for a in admissions]))
        starts = np.zeros((len(count), bucket(int(most)), 7), np.int32)
        starts[:, :, 0] = -1
        longest = self.longest_prompt if self.programs.sampling.penalises else 0
        prompts = np.full((*starts.shape[:2], longest), self.programs.config.vocab)
        for a in admissions:
            request = self.requests[a.request]
            starts[a.shard, count[a.shard]] = (
                a.slot,
                request.prompt[-1],
                len(request.prompt) - 1,
                np.uint32(request.key).view(np.int32),
                request.first_sample + a.sample,
                a.source,
                a.target,
            )
            if longest:
                prompts[a.shard, count[a.shard], : len(request.prompt)] = request.prompt
            count[a.shard] += 1
        arrays = self._place(starts), self._place(prompts.astype(np.int32))
        self.state = self.programs.admit(self.state, *arrays, *self.seed_and_step)

    def _decode(self) -> list[tuple[int, int, Completion]]:
        """Decodes for a while; what has finished."""
        self._shrink()
        runs, tables, leaving = self.scheduler.grow()
        self._swap_out(leaving)
        table = np.zeros((len(runs), self.table_pages), np.int32)
        for slot, pages in enumerate(tables):
            table[slot, : len(pages)] = pages
        waiting = self.scheduler.waiting
        before = np.asarray(jax.device_get(self.state.drawn)).reshape(-1)
        each = lambda x: self._place(x.reshape(-1, self.slots, *x.shape[1:]))
        self.state, steps = self.programs.decode(
            self.weights,
            self.state,
            each(table),
            each(runs),
            DISPATCH,
            self.scheduler.enough,
        )
        done, drawn, steps = jax.device_get((self.state.done, self.state.drawn, steps))
        done, drawn = done.reshape(-1), drawn.reshape(-1)
        new = int((drawn - before)[runs].sum())
        self.drawn_tokens += new
        if waiting:
            self.busy_steps += new
            self.slot_steps += int(steps) * len(runs)
        return self._collect(self.scheduler.advance(done, drawn))

    def _swap_out(self, leaving: list[Swap]) -> None:
        """Brings rows to the host, with all that is known of them."""
        self.swapped_rows += len(leaving)
        for swaps, slots, pages in self._one_an_engine(leaving):
            rows = jax.device_get(self.programs.swap_out(self.state, slots, pages))
            for swap in swaps:
                self.swapped[swap.request, swap.sample] = _row_of(rows, swap)

    def _swap_in(self, returning: list[Swap]) -> None:
        """Puts such rows where they go on."""
        for swaps, slots, pages in self._one_an_engine(returning):
            shapes = self.programs.abstract(1, pages.shape[1])
            rows = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
            for swap in swaps:
                row = self.swapped.pop((swap.request, swap.sample))
                jax.tree.map(functools.partial(_put, swap.shard), rows, row)
            lies = jax.tree.map(lambda x: x.sharding, shapes)
            rows = jax.device_put(rows, lies)
            self.state = self.programs.swap_in(self.state, rows, slots, pages)

    def _one_an_engine(
        self, swaps: list[Swap]
    ) -> Iterator[tuple[list[Swap], jax.Array, jax.Array]]:
        """At most one row of each engine at a time, their slots and pages."""
        while swaps:
            first = list({swap.shard: swap for swap in reversed(swaps)}.values())
            swaps = [swap for swap in swaps if swap not in first]
            slots = np.full((self.engines, 1), -1, np.int32)
            length = bucket(max(len(swap.pages) for swap in first))
            pages = np.zeros((self.engines, length), np.int32)
            for swap in first:
                slots[swap.shard] = swap.slot
                pages[swap.shard, : len(swap.pages)] = swap.pages
            yield first, self._place(slots), self._place(pages)

    def _shrink(self) -> None:
        """Goes on in a smaller engine where the scheduler says so; pages stay."""
        kept = self.scheduler.shrink()
        if kept is not None:
            self.slots = kept.shape[1]
            rows = self.state._replace(cache=())
            rows = self.programs.shrink(rows, self._place(kept))
            self.state = rows._replace(cache=self.state.cache)

    def _collect(self, finished) -> list[tuple[int, int, Completion]]:
        if not finished:
            return []
        taken: list[list] = [[] for _ in range(self.engines)]
        for place, *rest in finished:
            taken[place // self.slots].append((place % self.slots, *rest))
        slots = np.zeros((len(taken), bucket(max(map(len, taken)))), np.int32)
        for shard, rows in enumerate(taken):
            slots[shard, : len(rows)] = [slot for slot, *_ in rows]
        taken_out = self.programs.take(self.state, self._place(slots))
        *arrays, found = jax.device_get(taken_out)
        stops = np.asarray(self.programs.stop_tokens)
        completions = []
        for shard, rows in enumerate(taken):
            for row, (_, request, sample, size) in enumerate(rows):
                tokens, log_probs, sampled = (x[shard, row, :size] for x in arrays)
                ended = tokens[-1] in stops or found[shard, row]
                completion = Completion(
                    tokens.tolist(),
                    log_probs.copy(),
                    sampled.copy() if self.programs.renormalise else None,
                    "stop" if ended else "length",
                )
                completions.append((request, sample, completion))
        return completions

    def statistics(self) -> Statistics:
        """What this call came to."""
        return Statistics(
            self.prompt_tokens,
            self.drawn_tokens,
            self.swapped_rows,
            self.prefill_seconds,
            self.decode_seconds,
            self.busy_steps / self.slot_steps if self.slot_steps else 1.0,
        )


def _row_of(rows: Decoding, swap: Swap) -> Decoding:
    """A copy of one engine's row among those of all, with no more pages than it has."""
    row = jax.tree.map(lambda x: x[swap.shard], rows)
    used = jax.tree.map(lambda x: x[: len(swap.pages)], row.cache)
    return jax.tree.map(np.copy, row._replace(cache=used))


def _put(engine: int, rows: np.ndarray, row: np.ndarray) -> None:
    """Puts an engine's row among those of all, in place."""
    rows[engine, : len(row)] = row
