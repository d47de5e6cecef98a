"""Scheduling of slots and cache pages (continuous batching); on the host, without JAX.

A process has one or more engines (copies of the model). Each has a fixed number of
slots, which decode one sequence each, and a pool of cache pages. A prompt is prefilled
once, on the engine that admits it; its samples share its full pages and copy the page
that is partly filled. The slot of a finished sequence is free for the next sample.
Sequences get pages as they grow. If an engine runs out of pages, its youngest sequence
is preempted: it is swapped out to host memory, and swapped in before any new sample is
admitted. When no sample waits, the last sequences continue in smaller engines.
"""

import bisect
import collections
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

REFILL = 32  # while samples wait, a round ends when 1/32 of the slots have finished
SHRINK, MIN_SLOTS = 4, 8  # engines shrink to a quarter of their slots, at least 8
MIN_SAVED_STEPS = 16  # for which the engines of a resumable run shrink


class Job(NamedTuple):
    """A prompt and its number of samples.

    `request` is its index in the caller's list; `max_length` bounds the tokens of
    prompt and completion together.
    """

    request: int
    prompt_tokens: int
    max_length: int
    samples: int


SampleId = tuple[int, int]  # request, sample


class Admission(NamedTuple):
    """A sample that starts in a slot.

    Before it, the prompt without its last token is prefilled into pages `prefill`
    (none for later samples), and page `source` is copied to `target` (0: no copy).
    """

    engine: int
    slot: int
    sample: SampleId
    prefill: list[int]
    source: int
    target: int


class Swap(NamedTuple):
    """A sequence to move from a slot and these pages to host memory, or back."""

    engine: int
    slot: int
    sample: SampleId
    pages: list[int]


class Finished(NamedTuple):
    """A finished sequence and the number of tokens generated."""

    engine: int
    slot: int
    sample: SampleId
    tokens: int


@dataclasses.dataclass
class Schedule:
    """A round's work, in the order in which the devices must do it.

    `kept_slots` are the old slots that smaller engines continue with (None: no change).
    Then the slots of `block_tables`, by (engine, slot), are decoded until
    `min_finished` sequences have finished (0: all of them).
    """

    admissions: list[Admission]
    swap_ins: list[Swap]
    kept_slots: Int[np.ndarray, "E B"] | None
    swap_outs: list[Swap]
    block_tables: dict[tuple[int, int], list[int]]
    min_finished: int


@dataclasses.dataclass
class SharedPrompt:
    """The pages of a prompt, in use by `users` samples, waiting ones included."""

    job: Job
    pages: list[int]
    users: int
    admitted: int = 0


@dataclasses.dataclass(eq=False)
class SequenceState:
    """A completion that is decoded or swapped out.

    `position` is where its next token is fed: the number of tokens in the cache. The
    first `shared` pages of its block table are those of `prompt` (None after a swap).
    """

    job: Job
    sample: SampleId
    age: int
    position: int
    block_table: list[int]
    shared: int
    prompt: SharedPrompt | None


class EngineState:
    """Slots and free pages of an engine; page 0 is never allocated."""

    def __init__(self, index: int, slots: int, pages: int):
        self.index = index
        self.slots: list[SequenceState | None] = [None] * slots
        self.free = list(range(pages - 1, 0, -1))
        self.reserved = 0  # pages that running sequences may take in the next round
        self.prompt: SharedPrompt | None = None  # with samples that wait

    @property
    def running(self) -> list[SequenceState]:
        """The sequences in slots."""
        return [sequence for sequence in self.slots if sequence]

    def allocate(self, pages: int) -> list[int]:
        """Take free pages."""
        return [self.free.pop() for _ in range(pages)]

    def release(self, slot: int) -> None:
        """Free a slot and the pages that no other sequence uses."""
        sequence, self.slots[slot] = self.slots[slot], None
        assert sequence
        self.free += sequence.block_table[sequence.shared :]
        if prompt := sequence.prompt:
            prompt.users -= 1
            self.free += [] if prompt.users else prompt.pages


def smaller_engines(slots: int) -> list[int]:
    """Return the slots of the engines that `slots` slots shrink to, descending."""
    sizes = []
    while (slots := slots // SHRINK) >= MIN_SLOTS:
        sizes.append(slots)
    return sizes


class Scheduler:
    """Plans rounds: `schedule` one, run it on the devices, then `update`."""

    def __init__(
        self,
        jobs: Sequence[Job],
        *,
        engines: int,
        slots: int,
        pages: int,
        page_size: int,
        steps: int,
    ):
        """Schedule `jobs` on engines of `slots` slots and `pages` pages each.

        A page holds `page_size` tokens; a round decodes at most `steps` per slot.
        """
        self._queue = collections.deque(jobs)
        self._engines = [EngineState(i, slots, pages) for i in range(engines)]
        self._page_size, self._slots, self._steps = page_size, slots, steps
        self._swapped: list[SequenceState] = []  # oldest first
        self._ages = itertools.count()

    def add(self, job: Job) -> None:
        """Append a job to the queue; between rounds."""
        self._queue.append(job)

    def remove(self, request: int, sample: int | None = None) -> None:
        """Remove a request, or one of its started samples; between rounds.

        Its slots and the pages that no other sequence uses are free for the next round.
        """
        matches = lambda s: s.sample[0] == request and sample in (None, s.sample[1])
        for engine in self._engines:
            for slot, sequence in enumerate(engine.slots):
                if sequence and matches(sequence):
                    engine.release(slot)
        self._swapped = [s for s in self._swapped if not matches(s)]
        if sample is not None:
            return
        remaining = (job for job in self._queue if job.request != request)
        self._queue = collections.deque(remaining)
        for engine in self._engines:
            if (prompt := engine.prompt) and prompt.job.request == request:
                engine.prompt = None
                prompt.users -= prompt.job.samples - prompt.admitted
                engine.free += [] if prompt.users else prompt.pages

    @property
    def in_slots(self) -> dict[tuple[int, int], SampleId]:
        """The samples in slots, by (engine, slot)."""
        return {
            (engine.index, slot): sequence.sample
            for engine in self._engines
            for slot, sequence in enumerate(engine.slots)
            if sequence
        }

    @property
    def waiting(self) -> bool:
        """Whether samples wait for a slot, new or swapped out."""
        partly_admitted = any(engine.prompt for engine in self._engines)
        return bool(self._queue or self._swapped or partly_admitted)

    @property
    def running(self) -> int:
        """The number of slots in use, on all engines."""
        return sum(len(engine.running) for engine in self._engines)

    def schedule(self, should_shrink: Callable[[int], bool]) -> Schedule:
        """Plan the next round.

        Fills free slots, shrinks the engines to the fewest slots for which
        `should_shrink(slots)` holds, and allocates pages for new tokens.
        """
        schedule = Schedule([], [], None, [], {}, 0)
        self._fill_slots(schedule)
        schedule.kept_slots = self._shrink(should_shrink)
        schedule.min_finished = self._min_finished()
        for engine in self._engines:
            for sequence in sorted(engine.running, key=lambda s: s.age):
                if not schedule.swap_outs or sequence in engine.slots:
                    self._grow(engine, sequence, schedule)
        schedule.block_tables = {
            (engine.index, slot): list(sequence.block_table)
            for engine in self._engines
            for slot, sequence in enumerate(engine.slots)
            if sequence
        }
        return schedule

    def update(
        self, done: Bool[np.ndarray, "E B"], generated: Int[np.ndarray, "E B"]
    ) -> list[Finished]:
        """Record a round: `done`, and the tokens `generated` so far, of every slot.

        Returns the finished sequences, whose slots are free now.
        """
        finished = []
        for engine in self._engines:
            for slot, sequence in enumerate(engine.slots):
                if sequence is None:
                    continue
                at = engine.index, slot
                tokens = int(generated[at])
                sequence.position = sequence.job.prompt_tokens - 1 + tokens
                if done[at]:
                    finished.append(Finished(*at, sequence.sample, tokens))
                    engine.release(slot)
        return finished

    def _fill_slots(self, schedule: Schedule) -> None:
        for engine in self._engines:
            growths = (self._growth(s.job, len(s.block_table)) for s in engine.running)
            engine.reserved = sum(growths)
        candidates = list(self._engines)
        while candidates:
            # The engine with the fewest sequences gets the next: the load is even.
            engine = min(candidates, key=lambda engine: len(engine.running))
            if not self._fill_slot(engine, schedule):
                candidates.remove(engine)

    def _fill_slot(self, engine: EngineState, schedule: Schedule) -> bool:
        """Put a sequence into a free slot; returns whether it was possible."""
        if None not in engine.slots:
            return False
        if self._swapped:
            oldest = self._swapped[0]
            if self._fits(engine, oldest.job, self._pages(oldest.position)):
                self._swap_in(engine, schedule)
                return True
            if engine.running:
                return False  # pages that become free are kept for the oldest
        return self._admit(engine, schedule)

    def _swap_in(self, engine: EngineState, schedule: Schedule) -> None:
        """Resume the oldest sequence that is swapped out."""
        sequence, slot = self._swapped.pop(0), engine.slots.index(None)
        pages = engine.allocate(self._pages(sequence.position))
        sequence.block_table = list(pages)
        engine.reserved += self._growth(sequence.job, len(pages))
        engine.slots[slot] = sequence
        schedule.swap_ins.append(Swap(engine.index, slot, sequence.sample, pages))

    def _admit(self, engine: EngineState, schedule: Schedule) -> bool:
        """Start the next sample in a free slot; returns whether it was possible."""
        prompt = engine.prompt
        if not prompt and not self._queue:
            return False
        job = prompt.job if prompt else self._queue[0]
        stored = job.prompt_tokens - 1  # the last token is fed by decoding
        need = 0 if prompt else self._pages(stored)
        if not self._fits(engine, job, need):
            return False
        prefill = engine.allocate(need)
        prompt = prompt or SharedPrompt(self._queue.popleft(), prefill, job.samples)
        slot, (page,) = engine.slots.index(None), engine.allocate(1)
        shared, partial = divmod(stored, self._page_size)
        table = [*prompt.pages[:shared], page]
        copy = (prompt.pages[-1], page) if partial else (0, 0)
        at, sample = (engine.index, slot), (job.request, prompt.admitted)
        prompt.admitted += 1
        engine.prompt = prompt if prompt.admitted < job.samples else None
        engine.reserved += self._growth(job, len(table))
        engine.slots[slot] = SequenceState(
            job, sample, next(self._ages), stored, table, shared, prompt
        )
        schedule.admissions.append(Admission(*at, sample, prefill, *copy))
        return True

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self._page_size)

    def _growth(self, job: Job, pages: int) -> int:
        """Return the pages that a sequence of `pages` pages may take in a round."""
        return min(self._pages(self._steps), self._pages(job.max_length) - pages)

    def _fits(self, engine: EngineState, job: Job, pages: int) -> bool:
        """Whether pages are free for a sequence of this job and a round of all."""
        growth = self._growth(job, (job.prompt_tokens - 1) // self._page_size)
        return len(engine.free) >= pages + growth + engine.reserved

    def _grow(
        self, engine: EngineState, sequence: SequenceState, schedule: Schedule
    ) -> None:
        """Allocate a round's pages; if too few are free, preempt the youngest."""
        length = min(sequence.position + self._steps, sequence.job.max_length)
        need = self._pages(length) - len(sequence.block_table)
        while need > len(engine.free):
            youngest = max(engine.running, key=lambda s: s.age)
            schedule.swap_outs.append(self._swap_out(engine, youngest))
            if youngest is sequence:
                return
        sequence.block_table += engine.allocate(need)

    def _swap_out(self, engine: EngineState, sequence: SequenceState) -> Swap:
        slot = engine.slots.index(sequence)
        pages = sequence.block_table[: self._pages(sequence.position)]
        engine.release(slot)
        sequence.block_table, sequence.shared, sequence.prompt = [], 0, None
        bisect.insort(self._swapped, sequence, key=lambda s: s.age)
        return Swap(engine.index, slot, sequence.sample, pages)

    def _min_finished(self) -> int:
        """Return how many sequences must finish before the next round pays; 0: all.

        While samples wait, a fraction of the slots; then as many as let the others fit
        into smaller engines, or all where they fit already but shrinking does not pay.
        """
        if self.waiting:
            return max(1, self._slots * len(self._engines) // REFILL)
        sizes = smaller_engines(self._slots)
        if not sizes or self.fitting_slots:
            return 0
        return max(1, self.running - sizes[0] * len(self._engines))

    @property
    def fitting_slots(self) -> list[int]:
        """Slots of the smaller engines that fit all sequences, ascending."""
        if self.waiting:
            return []
        needed = max(len(engine.running) for engine in self._engines)
        return [n for n in reversed(smaller_engines(self._slots)) if n >= needed]

    def _shrink(
        self, should_shrink: Callable[[int], bool]
    ) -> Int[np.ndarray, "E B"] | None:
        slots = next(filter(should_shrink, self.fitting_slots), None)
        if slots is None:
            return None
        kept = []
        for engine in self._engines:
            is_free = [sequence is None for sequence in engine.slots]
            kept.append(sorted(range(self._slots), key=is_free.__getitem__)[:slots])
            engine.slots = [engine.slots[slot] for slot in kept[-1]]
        self._slots = slots
        return np.array(kept, np.int32)

    def saved_steps(self, slots: int) -> float:
        """Return the steps whose time engines of `slots` slots are expected to save.

        Steps are of the present engines. A completion is expected to double its length,
        up to its limit, as usual for heavy-tailed lengths.
        """
        generated = lambda s: s.position + 1 - s.job.prompt_tokens
        remaining = lambda s: s.job.max_length - s.position - 1
        running = [s for engine in self._engines for s in engine.running]
        expected = max((min(generated(s), remaining(s)) for s in running), default=0)
        return expected * (1 - slots / self._slots)

    def saves_enough(self, slots: int) -> bool:
        """Whether the engines of a resumable run shrink to `slots` slots.

        A rule without clock, so that a resumed run shrinks after the same steps.
        """
        return self.saved_steps(slots) >= MIN_SAVED_STEPS
