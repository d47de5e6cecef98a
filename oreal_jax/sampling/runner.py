"""One call of an engine: runs the scheduler's rounds on the devices.

Letters: E engines, A samples or slots of a batch, R prompts, S tokens of a prompt, M
pages of a block table.
"""

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from oreal_jax import sharding
from oreal_jax.model.decoding import Weights
from oreal_jax.sampling.completion import Completion, Request, Statistics
from oreal_jax.sampling.parameters import SlotSampling
from oreal_jax.sampling.programs import DecodeState, Programs, Size, Starts
from oreal_jax.sampling.scheduler import (
    Admission,
    Finished,
    Job,
    SampleId,
    Schedule,
    Scheduler,
    Swap,
)
from oreal_jax.sampling.stops import MATCHED, Stops
from oreal_jax.shapes import bucket

DISPATCH = 64  # maximum of decoding steps before the host schedules again
PAGE = 64  # tokens
PREFILL = 2048  # maximum per batch of prompts, or one prompt


class Runner:
    """The scheduler and the state on the devices, until all samples are finished."""

    def __init__(
        self,
        programs: Programs,
        weights: Weights,
        stops: Stops,
        requests: Sequence[Request],
        samples: int,
        size: Size,
        *,
        step: int,
        renormalise: bool,
        resumable: bool,
    ):
        """Prepare to generate `samples` completions of each request."""
        self.programs, self.weights, self.requests = programs, weights, requests
        self.size, self.step = size, step
        self.renormalise, self.resumable = renormalise, resumable
        self.stop_tokens = stops.tokens
        self.stops = jax.device_put(stops, sharding.replicated(programs.mesh))
        self.engines = sharding.row_ways(programs.mesh)
        # Prompts of similar length are prefilled together.
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt))
        lengths = [len(request.prompt) for request in requests]
        limits = [request.sampling.max_tokens for request in requests]
        self.scheduler = Scheduler(
            [Job(i, lengths[i], lengths[i] + limits[i], samples) for i in order],
            engines=self.engines,
            slots=size.slots,
            pages=size.pages,
            page_size=PAGE,
            steps=DISPATCH,
        )
        self.state = programs.empty(size)
        self.swapped: dict[SampleId, DecodeState] = {}  # in host memory
        self.prompt_tokens = self.new_tokens = self.swap_outs = 0
        self.prefill_seconds = self.decode_seconds = self.step_seconds = 0.0
        self.used_slots = self.offered_slots = 0  # summed over steps

    def rounds(self) -> Iterator[list[tuple[int, int, Completion]]]:
        """Run all rounds; yields (request, sample, completion) finished in each."""
        while self.scheduler.waiting or self.scheduler.running:
            start = time.perf_counter()
            schedule = self.scheduler.schedule(self._should_shrink)
            self._prefill(schedule.admissions)
            self._admit(schedule.admissions)
            jax.block_until_ready(self.state.slots.done)
            middle = time.perf_counter()
            self._swap_in(schedule.swap_ins)
            self._shrink(schedule)
            self._swap_out(schedule.swap_outs)
            finished = list(self._collect(self._decode(schedule)))
            self.prefill_seconds += middle - start
            self.decode_seconds += time.perf_counter() - middle
            yield finished

    def _put(self, values: Any) -> Any:
        """Put arrays [E, ...] on the engines."""
        return jax.device_put(values, sharding.of_rows(self.programs.mesh))

    def _prefill(self, admissions: list[Admission]) -> None:
        """Run new prompts in batches of similar length."""
        stored = lambda admission: self.requests[admission.sample[0]].prompt[:-1]
        queues = self._by_engine(a for a in admissions if a.prefill)
        while any(queues):
            width = prompt_width(
                max(len(stored(queue[0])) for queue in queues if queue)
            )
            count = prompt_batch(max(1, PREFILL // width))
            fits = lambda admission, width=width: len(stored(admission)) <= width
            batch = [[*itertools.takewhile(fits, queue[:count])] for queue in queues]
            queues = [q[len(taken) :] for q, taken in zip(queues, batch, strict=True)]
            rows = prompt_batch(4 * max(map(len, batch)) - 3)  # at least this many
            prompts = np.zeros((self.engines, rows, width), np.int32)
            lengths = np.ones((self.engines, rows), np.int32)
            table = np.zeros((self.engines, rows, -(-width // PAGE)), np.int32)
            for engine, row, admission in _indexed(batch):
                tokens = stored(admission)
                prompts[engine, row, : len(tokens)] = tokens
                lengths[engine, row] = len(tokens)
                table[engine, row, : len(admission.prefill)] = admission.prefill
                self.prompt_tokens += len(tokens)
            self.state = self.programs.prefill(
                self.weights, self.state, *self._put((prompts, lengths, table))
            )

    def _admit(self, admissions: list[Admission]) -> None:
        count = slot_batch(self.size.slots)
        for batch in self._batches(admissions, count):
            queues = [
                [self._start(admission) for admission in queue] for queue in batch
            ]
            first = next(itertools.chain(*queues))
            padding = first._replace(slot=-1, source=0, target=0)
            rows = [queue + [padding] * (count - len(queue)) for queue in queues]
            stack = lambda *x: np.stack(x).reshape(self.engines, count, *np.shape(x[0]))
            starts = self._put(jax.tree.map(stack, *itertools.chain(*rows)))
            self.state = self.programs.admit(self.state, starts, self.step)

    def _start(self, admission: Admission) -> Starts:
        """Return one entry of `Starts`."""
        request_index, sample = admission.sample
        request = self.requests[request_index]
        prompts = np.full(self.size.table_pages * PAGE, self.programs.config.vocab)
        prompts[: len(request.prompt)] = request.prompt
        return Starts(
            slot=admission.slot,
            token=request.prompt[-1],
            position=len(request.prompt) - 1,
            limit=request.sampling.max_tokens,
            seed=request.seed,
            key=np.uint32(request.key),
            sample=request.first_sample + sample,
            source=admission.source,
            target=admission.target,
            prompts=prompts,
            sampling=SlotSampling.one(
                request.sampling, self.size.biases, self.renormalise
            ),
        )

    def _swap_out(self, swaps: list[Swap]) -> None:
        """Move sequences to host memory, with their slot's whole state."""
        self.swap_outs += len(swaps)
        for batch in self._batches(swaps, 1):
            rows = self.programs.swap_out(self.state, *self._swap_indices(batch))
            rows = jax.device_get(rows)
            for engine, _, swap in _indexed(batch):
                one = lambda x, engine=engine: x[engine].copy()
                used = lambda x, at=(engine, slice(len(swap.pages))): x[at].copy()
                self.swapped[swap.sample] = DecodeState(
                    jax.tree.map(used, rows.cache), jax.tree.map(one, rows.slots)
                )

    def _swap_in(self, swaps: list[Swap]) -> None:
        """Move sequences from host memory to slots."""
        for batch in self._batches(swaps, 1):
            slots, pages = self._swap_indices(batch)
            size = self.size._replace(slots=1, pages=pages.shape[1])
            shapes = self.programs.abstract(size)
            rows = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
            for engine, _, swap in _indexed(batch):
                for x, own in zip(
                    jax.tree.leaves(rows),
                    jax.tree.leaves(self.swapped.pop(swap.sample)),
                    strict=True,
                ):
                    x[engine, : len(own)] = own
            rows = jax.device_put(rows, jax.tree.map(lambda x: x.sharding, shapes))
            self.state = self.programs.swap_in(self.state, rows, slots, pages)

    def _swap_indices(self, batch: list[list[Swap]]) -> tuple[jax.Array, jax.Array]:
        """Return the slot of at most one sequence per engine, and its pages."""
        slots = np.full((self.engines, 1), -1, np.int32)
        length = bucket(max(len(swap.pages) for _, _, swap in _indexed(batch)))
        pages = np.zeros((self.engines, length), np.int32)
        for engine, _, swap in _indexed(batch):
            slots[engine] = swap.slot
            pages[engine, : len(swap.pages)] = swap.pages
        return self._put((slots, pages))

    def _shrink(self, schedule: Schedule) -> None:
        """Continue in smaller engines, with the same pages."""
        if schedule.kept_slots is not None:
            kept = self._put(schedule.kept_slots)
            slots = self.programs.take(self.state.slots, kept)
            self.state = self.state._replace(slots=slots)
            self.size = self.size._replace(slots=schedule.kept_slots.shape[1])

    def _should_shrink(self, slots: int) -> bool:
        """Whether the program of smaller engines is compiled, or saves more time than
        compiling takes (in resumable runs: enough steps)."""
        if self.resumable:
            return self.scheduler.saves_enough(slots)
        if self.size._replace(slots=slots) in self.programs.compiled_sizes(self.stops):
            return True
        saved_seconds = self.scheduler.saved_steps(slots) * self.step_seconds
        return saved_seconds >= self.programs.compile_seconds

    def _decode(self, schedule: Schedule) -> list[Finished]:
        """Run a dispatch of decoding steps; returns the finished sequences."""
        shape = self.engines, self.size.slots
        active = np.zeros(shape, bool)
        tables = np.zeros((*shape, self.size.table_pages), np.int32)
        for at, pages in schedule.block_tables.items():
            active[at] = True
            tables[at][: len(pages)] = pages
        waiting = self.scheduler.waiting
        before = jax.device_get(self.state.slots.generated)
        arguments = (
            self.weights,
            self.state,
            *self._put((tables, active)),
            DISPATCH,
            schedule.min_finished,
            self.stops,
        )
        decode = self.programs.compiled_decode(self.size, *arguments)
        start = time.perf_counter()
        self.state, steps = decode(*arguments)
        done, generated, steps = jax.device_get(
            (self.state.slots.done, self.state.slots.generated, steps)
        )
        self.step_seconds = (time.perf_counter() - start) / max(1, int(steps))
        new_tokens = int((generated - before)[active].sum())
        self.new_tokens += new_tokens
        if waiting:
            self.used_slots += new_tokens
            self.offered_slots += int(steps) * active.size
        return self.scheduler.update(done, generated)

    def _collect(
        self, finished: list[Finished]
    ) -> Iterator[tuple[int, int, Completion]]:
        """Read finished completions from the devices."""
        count = slot_batch(self.size.slots)
        for batch in self._batches(finished, count):
            slots = np.zeros((self.engines, count), np.int32)
            for engine, row, sequence in _indexed(batch):
                slots[engine, row] = sequence.slot
            outputs = self.programs.take(self.state.slots.outputs, self._put(slots))
            outputs = jax.device_get(outputs)
            for engine, row, sequence in _indexed(batch):
                *arrays, stop_state = (x[engine, row] for x in outputs)
                tokens, log_probs, sampled = (x[: sequence.tokens] for x in arrays)
                stopped = tokens[-1] in self.stop_tokens or stop_state == MATCHED
                completion = Completion(
                    tokens.tolist(),
                    log_probs.copy(),
                    sampled.copy() if self.renormalise else None,
                    "stop" if stopped else "length",
                )
                yield (*sequence.sample, completion)

    def statistics(self) -> Statistics:
        """Return the statistics of the call."""
        occupancy = self.used_slots / self.offered_slots if self.offered_slots else 1.0
        return Statistics(
            self.prompt_tokens,
            self.new_tokens,
            self.swap_outs,
            self.prefill_seconds,
            self.decode_seconds,
            occupancy,
        )

    def _by_engine(self, items: Iterable) -> list[list]:
        queues = [[] for _ in range(self.engines)]
        for item in items:
            queues[item.engine].append(item)
        return queues

    def _batches(self, items: Sequence, size: int) -> Iterator[list[list]]:
        """Split items into batches of at most `size` per engine."""
        queues = self._by_engine(items)
        for first in range(0, max(map(len, queues)), size):
            yield [queue[first : first + size] for queue in queues]


def _indexed(batch: list[list]) -> Iterator[tuple[int, int, Any]]:
    """Yield (engine, row, item) of a batch."""
    for engine, queue in enumerate(batch):
        for row, item in enumerate(queue):
            yield engine, row, item


def slot_batch(slots: int) -> int:
    """Return the number of slots written or read at once; constant: one program."""
    return max(1, slots // 16)


def prompt_width(tokens: int) -> int:
    """Return the width that prompts of at most `tokens` tokens are padded to.

    Powers of two, and multiples of 16 below a page.
    """
    if tokens > PAGE:
        return bucket(tokens, PAGE)
    return 16 * max(1, -(-tokens // 16))


def prompt_batch(limit: int) -> int:
    """Return the largest power of four up to `limit`: few sizes, few programs."""
    return 1 << (limit.bit_length() - 1) // 2 * 2
