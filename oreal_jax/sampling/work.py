"""One call of an engine: slots are filled, rows decoded, what is finished taken out.

The scheduler decides who goes where, programs.py is what runs on the devices; here they
meet. Letters: A slots or starts, R prompts, S tokens a prompt, M pages.
"""

import functools
import itertools
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from oreal_jax import sharding
from oreal_jax.model.decoding import Weights
from oreal_jax.sampling.completion import Completion, Request, Statistics
from oreal_jax.sampling.parameters import SlotSampling
from oreal_jax.sampling.programs import Decoding, Programs, Size, Starts, Stops
from oreal_jax.sampling.scheduler import Admission, Job, Prefill, Scheduler, Swap
from oreal_jax.shapes import bucket

DISPATCH = 64  # tokens decoded per row between two looks of the host, at most
PAGE = 64  # tokens a page
PREFILL = 2048  # prompt tokens an engine runs at a time, or one prompt


class Work:
    """The scheduler and the devices' state of a call, until all jobs are done."""

    def __init__(
        self,
        programs: Programs,
        weights: Weights,
        stops: Stops,
        requests: Sequence[Request],
        jobs: Sequence[Job],
        size: Size,
        step: int,
        renormalise: bool,
        resumable: bool,
    ):
        """`jobs` are the samples of `requests` to draw."""
        self.programs, self.weights, self.requests = programs, weights, requests
        self.size, self.step = size, step
        self.renormalise, self.resumable = renormalise, resumable
        self.stop_tokens = stops.tokens
        self.stops = jax.device_put(stops, sharding.replicated(programs.mesh))
        self.engines = sharding.count_row_shards(programs.mesh)
        self.scheduler = Scheduler(
            jobs,
            shards=self.engines,
            slots=size.slots,
            pages=size.pages,
            size=PAGE,
            dispatch=DISPATCH,
        )
        self.state = self.programs.empty(size)
        self.swapped: dict[tuple[int, int], Decoding] = {}  # in the host's memory
        self.prompt_tokens = self.drawn_tokens = self.swapped_rows = 0
        self.prefill_seconds = self.decode_seconds = self.step_seconds = 0.0
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
        return jax.device_put(
            values, sharding.make_sharding(self.programs.mesh, "rows")
        )

    def _prefill(self, prefills: list[Prefill]) -> None:
        """Runs prompts, those of like length together."""
        waiting: list[list[Prefill]] = [[] for _ in range(self.engines)]
        for prefill in prefills:
            waiting[prefill.shard].append(prefill)
        while any(waiting):
            heads = [prefill.request for queue in waiting for prefill in queue[:1]]
            stored = max(len(self.requests[i].prompt) - 1 for i in heads)
            length = prompt_width(stored)
            count = prompt_batch(max(1, PREFILL // length))
            taken = [[] for _ in waiting]
            for shard, queue in enumerate(waiting):
                while queue and len(taken[shard]) < count:
                    if len(self.requests[queue[0].request].prompt) - 1 > length:
                        break
                    taken[shard].append(queue.pop(0))
            self._prefill_batch(taken, length)

    def _prefill_batch(self, taken: list[list[Prefill]], length: int) -> None:
        size = prompt_batch(4 * max(map(len, taken)) - 3)  # at least this many
        prompts = np.zeros((len(taken), size, length), np.int32)
        lengths = np.ones((len(taken), size), np.int32)
        table = np.zeros((len(taken), size, -(-length // PAGE)), np.int32)
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
        queues = [[a for a in admissions if a.shard == i] for i in range(self.engines)]
        for batch in _batches(queues, slot_batch(self.size.slots)):
            self._admit_batch(batch)

    def _admit_batch(self, queues: list[list[Admission]]) -> None:
        shape = (self.engines, slot_batch(self.size.slots))
        zeros = lambda *shape: np.zeros(shape, np.int32)
        starts = Starts(
            *(zeros(*shape) for _ in Starts._fields[:-2]),
            prompts=np.full(
                (*shape, self.size.table_pages * PAGE),
                self.programs.config.vocab,
                np.int32,
            ),
            sampling=SlotSampling.off(shape, self.size.biases),
        )._replace(slot=np.full(shape, -1, np.int32), key=np.zeros(shape, np.uint32))
        for engine, queue in enumerate(queues):
            for row, admission in enumerate(queue):
                at, request = (engine, row), self.requests[admission.request]
                starts.slot[at] = admission.slot
                starts.token[at] = request.prompt[-1]
                starts.position[at] = len(request.prompt) - 1
                starts.limit[at] = request.sampling.max_tokens
                starts.seed[at] = request.seed
                starts.key[at] = request.key
                starts.sample[at] = request.first_sample + admission.sample
                starts.source[at] = admission.source
                starts.target[at] = admission.target
                starts.prompts[at][: len(request.prompt)] = request.prompt
                starts.sampling.put(at, request.sampling, self.renormalise)
        starts = jax.tree.map(self._place, starts)
        self.state = self.programs.admit(self.state, starts, self.step)

    def _decode(self) -> list[tuple[int, int, Completion]]:
        """Decodes at most `DISPATCH` tokens per slot; returns finished completions."""
        self._shrink()
        enough = self.scheduler.enough
        runs, tables, leaving = self.scheduler.grow()
        self._swap_out(leaving)
        table = np.zeros((len(runs), self.size.table_pages), np.int32)
        for slot, pages in enumerate(tables):
            table[slot, : len(pages)] = pages
        waiting = self.scheduler.waiting
        before = np.asarray(jax.device_get(self.state.drawn)).reshape(-1)
        each = lambda x: self._place(x.reshape(-1, self.size.slots, *x.shape[1:]))
        decode = self.programs.decoder(
            self.size,
            self.weights,
            self.state,
            each(table),
            each(runs),
            DISPATCH,
            enough,
            self.stops,
        )
        start = time.perf_counter()
        self.state, steps = decode()
        done, drawn, steps = jax.device_get((self.state.done, self.state.drawn, steps))
        self.step_seconds = (time.perf_counter() - start) / max(1, int(steps))
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
            size = self.size._replace(slots=1, pages=pages.shape[1])
            shapes = self.programs.abstract(size)
            rows = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
            for swap in swaps:
                row = self.swapped.pop((swap.request, swap.sample))
                jax.tree.map(functools.partial(_put, swap.shard), rows, row)
            shardings = jax.tree.map(lambda x: x.sharding, shapes)
            rows = jax.device_put(rows, shardings)
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
        """Continues in a smaller engine, with the same pages, if no sample waits, the
        rows fit, and its program is compiled or saves more time than compiling takes
        (resumable engines: if enough steps are saved)."""
        for slots in self.scheduler.fitting_slots:
            smaller = self.size._replace(slots=slots)
            if self._pays(smaller):
                old_slots = self.scheduler.shrink(slots)
                rows = self.state._replace(cache=())
                rows = self.programs.shrink(rows, self._place(old_slots))
                self.state, self.size = rows._replace(cache=self.state.cache), smaller
                return

    def _pays(self, smaller: Size) -> bool:
        if self.resumable:
            return self.scheduler.saves_enough(smaller.slots)
        if smaller in self.programs.sizes(self.stops):
            return True
        saved_seconds = self.scheduler.saved_steps(smaller.slots) * self.step_seconds
        return saved_seconds >= self.programs.compile_seconds

    def _collect(self, finished) -> list[tuple[int, int, Completion]]:
        rows_by_engine: list[list] = [[] for _ in range(self.engines)]
        for place, *rest in finished:
            engine, slot = divmod(place, self.size.slots)
            rows_by_engine[engine].append((slot, *rest))
        batches = _batches(rows_by_engine, slot_batch(self.size.slots))
        return list(itertools.chain.from_iterable(map(self._collect_batch, batches)))

    def _collect_batch(self, rows_by_engine) -> list[tuple[int, int, Completion]]:
        slots = np.zeros((self.engines, slot_batch(self.size.slots)), np.int32)
        for engine, rows in enumerate(rows_by_engine):
            slots[engine, : len(rows)] = [slot for slot, *_ in rows]
        *arrays, stop_strings = jax.device_get(
            self.programs.take(self.state, self._place(slots))
        )
        completions = []
        for engine, rows in enumerate(rows_by_engine):
            for row, (_, request, sample, size) in enumerate(rows):
                tokens, log_probs, sampled = (x[engine, row, :size] for x in arrays)
                stopped = tokens[-1] in self.stop_tokens or stop_strings[engine, row]
                completion = Completion(
                    tokens.tolist(),
                    log_probs.copy(),
                    sampled.copy() if self.renormalise else None,
                    "stop" if stopped else "length",
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


def slot_batch(slots: int) -> int:
    """The number of an engine's slots that are written or read at once; constant, so
    that one program suffices."""
    return max(1, slots // 16)


def _batches(queues: list[list], size: int) -> Iterator[list[list]]:
    """Splits the queues of all engines into parts of at most `size` each."""
    for first in range(0, max(map(len, queues)), size):
        yield [queue[first : first + size] for queue in queues]


def prompt_width(tokens: int) -> int:
    """The width that prompts of at most `tokens` tokens are padded to: powers of two,
    and multiples of 16 below a page."""
    return bucket(tokens, PAGE) if tokens > PAGE else 16 * max(1, -(-tokens // 16))


def prompt_batch(limit: int) -> int:
    """The largest power of four up to `limit`: few sizes, few programs."""
    return 1 << (limit.bit_length() - 1) // 2 * 2


def _row_of(rows: Decoding, swap: Swap) -> Decoding:
    """A copy of one engine's row among those of all, with no more pages than it has."""
    row = jax.tree.map(lambda x: x[swap.shard], rows)
    used = jax.tree.map(lambda x: x[: len(swap.pages)], row.cache)
    return jax.tree.map(np.copy, row._replace(cache=used))


def _put(engine: int, rows: np.ndarray, row: np.ndarray) -> None:
    """Puts an engine's row among those of all, in place."""
    rows[engine, : len(row)] = row
