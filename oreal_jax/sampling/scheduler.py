"""Who decodes where: the queue, the slots and the pages. Host-side, without JAX.

A shard is one data-parallel engine: so many slots, each decoding one completion, and so
many pages of cache. A prompt is prefilled once, on the shard that takes it; its samples
share its full pages there and copy the one that is not full. A finished row's slot is
free for the next sample at once. Rows get pages as they grow. Where pages run out, the
row that came last is swapped out, with all it has, and goes on when there is room
again, before any sample that has not begun.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

HAND_BACK = 32  # rows of so many are waited for before free slots are filled
# When no sample waits, the last rows go on in so much smaller an engine, down to a few.
SHRINK, FEWEST = 4, 8


class Job(NamedTuple):
    """A prompt and the samples still to be drawn of it.

    `request` is its place in the caller's list, `length` its tokens; `longest` bounds
    prompt and completion together.
    """

    request: int
    length: int
    longest: int
    samples: tuple[int, ...]


class Prefill(NamedTuple):
    """A prompt to be run on a shard, all but its last token, into these pages."""

    shard: int
    request: int
    pages: list[int]


class Admission(NamedTuple):
    """A sample that starts in a slot; `source` is a page to copy to `target`, or both
    are 0."""

    shard: int
    slot: int
    request: int
    sample: int
    source: int
    target: int


class Swap(NamedTuple):
    """A row that leaves its slot for now, or comes back to one: its keys and values are
    read from these pages, or written to them."""

    shard: int
    slot: int
    request: int
    sample: int
    pages: list[int]


@dataclasses.dataclass(eq=False)
class Shared:
    """The pages of a prompt, in use by `users` rows and samples that wait."""

    job: Job
    pages: list[int]
    waiting: list[int]
    users: int


@dataclasses.dataclass(eq=False)
class Row:
    """A completion being decoded: `position` is where its next token is fed."""

    prompt: Shared
    sample: int
    position: int
    pages: list[int]
    age: int


class Shard:
    """Slots and pages of one engine. Page 0 is never given out."""

    def __init__(self, slots: int, pages: int):
        self.rows: list[Row | None] = [None] * slots
        self.free = list(range(pages - 1, 0, -1))
        self.reserved = 0  # pages that the running rows may take in the next round
        self.current: Shared | None = None

    @property
    def running(self) -> int:
        """Slots in use."""
        return sum(row is not None for row in self.rows)


def smaller(slots: int) -> int:
    """The slots of the next smaller engine, 0 if there is none."""
    return slots // SHRINK if slots // SHRINK >= FEWEST else 0


class Scheduler:
    """Plans one round at a time: `place`, then `grow`, then decode, then `advance`."""

    def __init__(
        self,
        jobs: Sequence[Job],
        *,
        shards: int,
        slots: int,
        pages: int,
        size: int,
        dispatch: int,
    ):
        """`slots` and `pages` of each shard; `size` tokens a page, at most `dispatch`
        decoded a round."""
        self._queue = collections.deque(jobs)
        self._shards = [Shard(slots, pages) for _ in range(shards)]
        self._size, self._slots, self._dispatch = size, slots, dispatch
        self._swapped: list[Row] = []  # to go on, the oldest first
        self._age = 0

    @property
    def waiting(self) -> bool:
        """Whether samples wait for a slot."""
        held = any(s.current and s.current.waiting for s in self._shards)
        return bool(self._queue or self._swapped) or held

    @property
    def running(self) -> int:
        """Slots in use, on all shards."""
        return sum(shard.running for shard in self._shards)

    def place(self) -> tuple[list[Prefill], list[Admission], list[Swap]]:
        """Fills free slots: the prompts to run first, then the samples that start; and
        the rows that come back."""
        placed: tuple[list[Prefill], list[Admission], list[Swap]] = [], [], []
        for shard in self._shards:
            rows = filter(None, shard.rows)
            growth = (self._growth(r.prompt.job, len(self._table(r))) for r in rows)
            shard.reserved = sum(growth)
        open_shards = list(range(len(self._shards)))
        while open_shards:
            # The emptiest shard takes next, so that the load is even.
            number = min(open_shards, key=lambda i: self._shards[i].running)
            if not self._place_one(number, *placed):
                open_shards.remove(number)
        return placed

    def _place_one(
        self,
        number: int,
        prefills: list[Prefill],
        admissions: list[Admission],
        returning: list[Swap],
    ) -> bool:
        """Whether the shard took a row."""
        shard = self._shards[number]
        if shard.running == len(shard.rows):
            return False
        if self._swapped:
            row = self._swapped[0]
            if self._fits(shard, row.prompt.job, self._pages(row.position)):
                returning.append(self._swap_in(number, self._swapped.pop(0)))
                return True
            if shard.running:
                return False  # what comes free is kept for that row
        admission = self._admit(number, prefills)
        admissions += [admission] if admission else []
        return admission is not None

    def _swap_in(self, number: int, row: Row) -> Swap:
        """A row goes on, in pages that are all its own."""
        shard, job = self._shards[number], row.prompt.job
        pages = [shard.free.pop() for _ in range(self._pages(row.position))]
        slot = shard.rows.index(None)
        shard.reserved += self._growth(job, len(pages))
        prompt = Shared(job, [], [], 1)
        shard.rows[slot] = Row(prompt, row.sample, row.position, pages, row.age)
        return Swap(number, slot, job.request, row.sample, list(pages))

    def _admit(self, number: int, prefills: list[Prefill]) -> Admission | None:
        shard = self._shards[number]
        if not (shard.current and shard.current.waiting):
            if not self._queue:
                return None
            stored = self._queue[0].length - 1  # the last token is fed by decoding
            need = self._pages(stored)
            if not self._fits(shard, self._queue[0], need):
                return None
            job = self._queue.popleft()
            pages = [shard.free.pop() for _ in range(need)]
            shard.current = Shared(job, pages, list(job.samples), len(job.samples))
            if pages:
                prefills.append(Prefill(number, job.request, pages))
        elif not self._fits(shard, shard.current.job, 0):
            return None
        prompt = shard.current
        sample = prompt.waiting.pop(0)
        slot = shard.rows.index(None)
        stored = prompt.job.length - 1
        target = shard.free.pop()
        shard.reserved += self._growth(prompt.job, stored // self._size + 1)
        source = prompt.pages[-1] if stored % self._size else 0
        self._age += 1
        shard.rows[slot] = Row(prompt, sample, stored, [target], self._age)
        return Admission(
            number, slot, prompt.job.request, sample, source, target if source else 0
        )

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self._size)

    def _growth(self, job: Job, pages: int) -> int:
        """Pages that a row of so many may take in a round; none beyond its end."""
        return min(self._pages(self._dispatch), self._pages(job.longest) - pages)

    def _fits(self, shard: Shard, job: Job, pages: int) -> bool:
        """Whether so many pages are free, and those that this row and all others may
        take in a round."""
        shared = (job.length - 1) // self._size
        growth = self._growth(job, shared)
        return len(shard.free) >= pages + growth + shard.reserved

    def grow(self) -> tuple[np.ndarray, np.ndarray, list[Swap]]:
        """Gives every row the pages for the tokens of its next round.

        Returns which slots run, [shards * slots], and their tables of pages, as lists
        of page numbers, in an object array; and the rows that leave, which must be read
        before anything is written.
        """
        leaving: list[Swap] = []
        for number, shard in enumerate(self._shards):
            for row in sorted(filter(None, shard.rows), key=lambda row: row.age):
                if not leaving or row in shard.rows:  # not swapped out for an older one
                    self._grow_row(number, row, leaving)
        slots = [row for shard in self._shards for row in shard.rows]
        tables = np.empty(len(slots), object)
        for i, row in enumerate(slots):
            tables[i] = self._table(row) if row else []
        return np.array([row is not None for row in slots]), tables, leaving

    def _grow_row(self, number: int, row: Row, leaving: list[Swap]) -> None:
        shard = self._shards[number]
        last = min(row.position + self._dispatch, row.prompt.job.longest)
        need = self._pages(last) - len(self._table(row))
        while need > len(shard.free):
            youngest = max(filter(None, shard.rows), key=lambda row: row.age)
            leaving.append(self._swap_out(number, youngest))
            if youngest is row:
                return
        row.pages += [shard.free.pop() for _ in range(need)]

    def _shared(self, row: Row) -> list[int]:
        """The prompt's full pages."""
        return row.prompt.pages[: (row.prompt.job.length - 1) // self._size]

    def _table(self, row: Row) -> list[int]:
        return self._shared(row) + row.pages

    def _swap_out(self, number: int, row: Row) -> Swap:
        """A row leaves its slot, to go on later."""
        shard = self._shards[number]
        pages = self._table(row)[: self._pages(row.position)]
        slot = shard.rows.index(row)
        self._release(shard, row)
        self._swapped.append(row)
        self._swapped.sort(key=lambda row: row.age)
        return Swap(number, slot, row.prompt.job.request, row.sample, pages)

    def _release(self, shard: Shard, row: Row) -> None:
        shard.rows[shard.rows.index(row)] = None
        shard.free += row.pages
        row.prompt.users -= 1
        if not row.prompt.users:
            shard.free += row.prompt.pages
            if shard.current is row.prompt:
                shard.current = None

    @property
    def enough(self) -> int:
        """How many rows must finish until the next round is worth its while; 0: all.

        While samples wait, a few of the slots; then as many as let the rest go on in a
        smaller engine.
        """
        if self.waiting:
            return max(1, self._slots * len(self._shards) // HAND_BACK)
        fit = smaller(self._slots) * len(self._shards)
        return max(1, self.running - fit) if fit else 0

    @property
    def fitting_slots(self) -> list[int]:
        """Slots of the smaller engines that hold the running rows, ascending; none
        while samples wait."""
        sizes: list[int] = []
        if not self.waiting:
            rows, slots = max(shard.running for shard in self._shards), self._slots
            while (slots := smaller(slots)) >= max(1, rows):
                sizes.insert(0, slots)
        return sizes

    @property
    def expected_steps(self) -> int:
        """Steps until the last row is expected to finish. A row is expected to double
        its length, up to its limit, as usual for heavy-tailed lengths."""
        rows = [row for shard in self._shards for row in shard.rows if row]
        drawn = lambda row: row.position - row.prompt.job.length + 1
        remaining = lambda row: (
            row.prompt.job.longest - row.prompt.job.length - drawn(row)
        )
        return max((min(drawn(row), remaining(row)) for row in rows), default=0)

    def saved_steps(self, slots: int) -> float:
        """Steps of the present size whose time an engine of `slots` slots is expected
        to save."""
        return self.expected_steps * (1 - slots / self._slots)

    def shrink(self, slots: int) -> np.ndarray:
        """Continues with `slots` slots on each shard; returns the old slots of their
        rows, [shards, slots]."""
        old_slots = np.zeros((len(self._shards), slots), np.int32)
        for row, shard in zip(old_slots, self._shards, strict=True):
            order = sorted(range(self._slots), key=lambda slot: not shard.rows[slot])
            row[:] = order[:slots]
            shard.rows = [shard.rows[slot] for slot in row.tolist()]
        self._slots = slots
        return old_slots

    def advance(
        self, done: np.ndarray, drawn: np.ndarray
    ) -> list[tuple[int, int, int, int]]:
        """Takes note of what was decoded: `done` and tokens `drawn` of every slot.

        Returns (place of the slot, request, sample, tokens) of finished rows, whose
        slots are free from now on.
        """
        finished = []
        for number, shard in enumerate(self._shards):
            for slot, row in enumerate(shard.rows):
                if row is None:
                    continue
                place = number * self._slots + slot
                row.position = row.prompt.job.length - 1 + int(drawn[place])
                if done[place]:
                    name = (row.prompt.job.request, row.sample, int(drawn[place]))
                    finished.append((place, *name))
                    self._release(shard, row)
        return finished
