"""One call of the engines: runs the scheduler's rounds on the devices."""

import dataclasses
import itertools
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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
PAGE = 64  # tokens per page
PREFILL = 2048  # maximum of prompt tokens that an engine runs at once, or one prompt


@dataclasses.dataclass
class Runner:
    """Generates `samples` completions of each request on engines of `size`.

    The scheduler plans rounds on the host; the state of slots and cache stays on the
    devices. A `Session` begins without requests, and adds and cancels them.
    """

    programs: Programs
    weights: Weights
    stops: Stops
    requests: dict[int, Request]
    samples: int
    size: Size
    step: int
    renormalise: bool
    resumable: bool

    def __post_init__(self):
        self.stop_tokens = self.stops.tokens
        self.stops = jax.device_put(self.stops, sharding.replicated(self.programs.mesh))
        self.engines = sharding.count_row_shards(self.programs.mesh)
        jobs = [make_job(i, r, self.samples) for i, r in self.requests.items()]
        self.scheduler = Scheduler(
            # Prompts of similar length are prefilled together.
            sorted(jobs, key=lambda job: job.prompt_tokens),
            engines=self.engines,
            slots=self.size.slots,
            pages=self.size.pages,
            page_size=PAGE,
            steps=DISPATCH,
        )
        self.state = self.programs.empty(self.size)
        self.swapped: dict[SampleId, DecodeState] = {}  # in host memory
        self.prompt_tokens = self.new_tokens = self.swap_outs = 0
        self.prefill_seconds = self.decode_seconds = self.step_seconds = 0.0
        self.used_slots = self.offered_slots = 0  # summed over steps

    def rounds(self) -> Iterator[list[tuple[int, int, Completion]]]:
        """Run all rounds; yields (request, sample, completion) finished in each."""
        while self.scheduler.waiting or self.scheduler.running:
            yield self.run_round(self._should_shrink)

    def run_round(
        self, should_shrink: Callable[[int], bool], max_steps: int = DISPATCH
    ) -> list[tuple[int, int, Completion]]:
        """Run a round of at most `max_steps` decoding steps, at most `DISPATCH`."""
        start = time.perf_counter()
        schedule = self.scheduler.schedule(should_shrink)
        self._prefill(schedule.admissions)
        self._admit(schedule.admissions)
        jax.block_until_ready(self.state.slots.done)
        middle = time.perf_counter()
        self._swap_in(schedule.swap_ins)
        self._shrink(schedule)
        self._swap_out(schedule.swap_outs)
        finished = list(self._collect(self._decode(schedule, max_steps)))
        self.prefill_seconds += middle - start
        self.decode_seconds += time.perf_counter() - middle
        return finished

    def unfinished(self) -> Iterator[tuple[SampleId, np.ndarray, np.ndarray]]:
        """Yield samples in slots, their tokens so far and the log-probabilities."""
        slots = self.state.slots
        arrays = slots.generated, slots.tokens, slots.log_probs
        counts, tokens, log_probs = map(np.asarray, jax.device_get(arrays))
        for at, sample in self.scheduler.in_slots.items():
            yield sample, tokens[at][: counts[at]], log_probs[at][: counts[at]]

    def add(self, number: int, request: Request, samples: int) -> None:
        """Append a request to the queue; between rounds."""
        self.requests[number] = request
        self.scheduler.add(make_job(number, request, samples))

    def remove(self, request: int, sample: int | None = None) -> None:
        """Remove a request, or one of its started samples; between rounds."""
        self.scheduler.remove(request, sample)
        if sample is None:
            self.requests.pop(request, None)
        for swapped in [id for id in self.swapped if id[0] == request]:
            if sample in (None, swapped[1]):
                del self.swapped[swapped]

    def _prefill(self, admissions: list[Admission]) -> None:
        """Run new prompts, without their last tokens, in batches of similar length."""
        stored = lambda admission: len(self.requests[admission.sample[0]].prompt) - 1
        new = [admission for admission in admissions if admission.prefill]
        self.prompt_tokens += sum(map(stored, new))
        queues = self._by_engine(new)
        while any(queues):
            width = prompt_width(max(stored(queue[0]) for queue in queues if queue))
            count = prompt_batch(max(1, PREFILL // width))
            fits = lambda admission, width=width: stored(admission) <= width
            batch = [[*itertools.takewhile(fits, queue[:count])] for queue in queues]
            queues = [
                q[len(admitted) :] for q, admitted in zip(queues, batch, strict=True)
            ]
            self._prefill_batch(batch, width)

    def _prefill_batch(self, batch: list[list[Admission]], width: int) -> None:
        pages = -(-width // PAGE)

        def entry(admission: Admission):
            prompt = self.requests[admission.sample[0]].prompt[:-1]
            return _pad(prompt, width), len(prompt), _pad(admission.prefill, pages)

        rows = prompt_batch(4 * max(map(len, batch)) - 3)  # at least this many
        padding = _pad([], width), 1, _pad([], pages)
        prompts = self._stack(batch, rows, entry, padding)
        self.state = self.programs.prefill(self.weights, self.state, *prompts)

    def _admit(self, admissions: list[Admission]) -> None:
        count = slot_batch(self.size.slots)
        for batch in self._batches(admissions, count):
            some = next(itertools.chain(*batch))
            padding = self._start(some)._replace(slot=-1, source=0, target=0)
            starts = self._stack(batch, count, self._start, padding)
            self.state = self.programs.admit(self.state, starts, self.step)

    def _start(self, admission: Admission) -> Starts:
        """Return one entry of `Starts`."""
        index, sample = admission.sample
        prompt, sampling, key, first_sample, seed = self.requests[index]
        return Starts(
            slot=admission.slot,
            token=prompt[-1],
            position=len(prompt) - 1,
            limit=sampling.max_tokens,
            seed=seed,
            key=np.uint32(key),
            sample=first_sample + sample,
            source=admission.source,
            target=admission.target,
            prompts=_pad(
                prompt, self.size.table_pages * PAGE, self.programs.config.vocab
            ),
            sampling=SlotSampling.one(sampling, self.size.biases, self.renormalise),
        )

    def _swap_out(self, swaps: list[Swap]) -> None:
        """Move sequences to host memory, with their slot's whole state."""
        self.swap_outs += len(swaps)
        for batch in self._batches(swaps, 1):
            slots, pages = self._swap_indices(batch)
            rows = jax.device_get(self.programs.swap_out(self.state, slots, pages))
            for engine, _, swap in _indexed(batch):
                used = operator.itemgetter((engine, slice(max(1, len(swap.pages)))))
                row = jax.tree.map(np.copy, jax.tree.map(used, rows))
                self.swapped[swap.sample] = row

    def _swap_in(self, swaps: list[Swap]) -> None:
        """Move sequences from host memory to slots."""
        for batch in self._batches(swaps, 1):
            slots, pages = self._swap_indices(batch)
            size = self.size._replace(slots=1, pages=pages.shape[-1])
            shapes = self.programs.abstract(size)
            rows = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
            for engine, _, swap in _indexed(batch):
                row = self.swapped.pop(swap.sample)
                for x, own in zip(*map(jax.tree.leaves, (rows, row)), strict=True):
                    x[engine, : len(own)] = own
            rows = jax.device_put(rows, jax.tree.map(lambda x: x.sharding, shapes))
            self.state = self.programs.swap_in(self.state, rows, slots, pages)

    def _swap_indices(self, batch: list[list[Swap]]) -> tuple[jax.Array, jax.Array]:
        """Return the slot of at most one sequence per engine, and its pages."""
        length = bucket(max(len(swap.pages) for _, _, swap in _indexed(batch)))
        entry = lambda swap: (swap.slot, _pad(swap.pages, length))
        return self._stack(batch, 1, entry, padding=(-1, _pad([], length)))

    def _shrink(self, schedule: Schedule) -> None:
        """Continue in smaller engines, with the same pages."""
        if schedule.kept_slots is not None:
            kept = self._put(schedule.kept_slots)
            slots = self.programs.take(self.state.slots, kept)
            self.state = self.state._replace(slots=slots)
            self.size = self.size._replace(slots=schedule.kept_slots.shape[1])

    def _should_shrink(self, slots: int) -> bool:
        """Whether smaller engines save more time than compiling their program takes.

        In resumable runs: enough steps.
        """
        if self.resumable:
            return self.scheduler.saves_enough(slots)
        if self.size._replace(slots=slots) in self.programs.compiled_sizes(self.stops):
            return True
        saved_seconds = self.scheduler.saved_steps(slots) * self.step_seconds
        return saved_seconds >= self.programs.compile_seconds

    def _decode(self, schedule: Schedule, max_steps: int) -> list[Finished]:
        """Run a dispatch of decoding steps; returns the finished sequences."""
        shape = self.engines, self.size.slots
        active = np.zeros(shape, bool)
        tables = np.zeros((*shape, self.size.table_pages), np.int32)
        for at, pages in schedule.block_tables.items():
            active[at], tables[at][: len(pages)] = True, pages
        waiting = self.scheduler.waiting
        before = jax.device_get(self.state.slots.generated)
        arguments = (
            self.weights,
            self.state,
            *self._put((tables, active)),
            max_steps,
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
            slots = self._stack(batch, count, lambda sequence: sequence.slot, 0)
            outputs = self.programs.take(self.state.slots.outputs, slots)
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

    def _stack(
        self, batch: list[list], rows: int, entry: Callable[[Any], Any], padding: Any
    ) -> Any:
        """Put the entries of a batch on the engines, as arrays [engines, rows, ...]."""
        entries = [
            [*map(entry, queue), *[padding] * (rows - len(queue))] for queue in batch
        ]
        stack = lambda *x: np.stack(x).reshape(self.engines, rows, *np.shape(x[0]))
        return self._put(jax.tree.map(stack, *itertools.chain(*entries)))

    def _put(self, values: Any) -> Any:
        """Put arrays [engines, ...] on the engines."""
        return jax.device_put(
            values, sharding.make_sharding(self.programs.mesh, "rows")
        )


def make_job(number: int, request: Request, samples: int) -> Job:
    """Return the scheduler's view of a request."""
    tokens = len(request.prompt)
    return Job(number, tokens, tokens + request.sampling.max_tokens, samples)


def _pad(values: Sequence[int], size: int, fill: int = 0) -> np.ndarray:
    padded = np.full(size, fill, np.int32)
    padded[: len(values)] = values
    return padded


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

    Powers of two, and multiples of 8 below a page.
    """
    if tokens > PAGE:
        return bucket(tokens, PAGE)
    return 8 * max(1, -(-tokens // 8))


def prompt_batch(limit: int) -> int:
    """Return the largest power of four up to `limit`: few sizes, few programs."""
    return 1 << (limit.bit_length() - 1) // 2 * 2
