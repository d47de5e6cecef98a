"""The scheduler without a model: who decodes where, for completions of given lengths.

`oreal plan` prices its rounds; tools/simulate_slots.py shows what a small cache costs.

Letters: N prompts, K completions of each, E engines of a process.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from oreal_jax.sampling.scheduler import Job, Scheduler

SIGMA = 0.8  # of the logarithm of a completion's length


class Round(NamedTuple):
    """`steps` tokens of each row between two looks of the host, by engines of `slots`
    slots: the rows of each engine that decode, and the tokens of cache that they read,
    both in a step on average."""

    steps: int
    slots: int
    rows: Float[np.ndarray, "E"]
    cached: Float[np.ndarray, "E"]


class Simulated(NamedTuple):
    """The order in which (prompt, sample) finished, how full the slots were while
    samples were waiting, and all tokens drawn in how many steps; how many rows were
    swapped out, and the most tokens that lay outside the cache at a time; and every
    round."""

    finished: list[tuple[int, int]]
    occupancy: float
    tokens: int
    steps: int
    swapped: int
    most_outside: int
    rounds: list[Round]


def heavy_tailed(
    count: int, mean: int, longest: int, seed: int = 0
) -> Int[np.ndarray, "N"]:
    """Log-normal lengths, cut at `longest`, `mean` on average after the cut."""
    draw = np.random.default_rng(seed)
    lengths = draw.lognormal(0, SIGMA, count)
    cut = lambda scale: np.clip(lengths * scale, 1, longest)
    low, high = mean / lengths.mean(), longest / lengths.min()
    for _ in range(50 if cut(low).mean() < mean else 0):
        middle = np.sqrt(low * high)
        low, high = (middle, high) if cut(middle).mean() < mean else (low, middle)
    return cut(low).astype(int)


def simulate(
    lengths: Int[np.ndarray, "N K"],
    *,
    shards: int = 1,
    slots: int = 8,
    pages: int = 10_000,
    size: int = 16,
    dispatch: int = 64,
    prompt: int = 50,
    longest: int = 2000,
    watch: Callable = lambda runs, tables: None,
) -> Simulated:
    """Decodes completions of given lengths as an engine of a training run does
    (work.py), on `shards` engines; their prompts have `prompt` tokens. `watch` sees
    which slots run and their tables of pages, each round."""
    N, K = lengths.shape
    jobs = [Job(n, prompt, prompt + longest, tuple(range(K))) for n in range(N)]
    scheduler = Scheduler(
        jobs, shards=shards, slots=slots, pages=pages, size=size, dispatch=dispatch
    )
    owner: dict[int, tuple[int, int]] = {}
    drawn = np.zeros(shards * slots, int)
    outside: dict[tuple[int, int], int] = {}
    finished, rounds, busy, offered = [], [], 0, 0
    tokens = steps_taken = swapped = most_outside = 0
    while scheduler.waiting or scheduler.running:
        _, admissions, returning = scheduler.place()
        for a in admissions + returning:
            place, name = a.shard * slots + a.slot, (a.request, a.sample)
            assert place not in owner
            owner[place], drawn[place] = name, outside.pop(name, 0)
        if fewer := next(filter(scheduler.saves_enough, scheduler.fitting_slots), None):
            old = scheduler.shrink(fewer) + slots * np.arange(shards)[:, None]
            new = {place: i for i, place in enumerate(old.reshape(-1).tolist())}
            owner = {new[place]: name for place, name in owner.items()}
            drawn, slots = drawn[old.reshape(-1)], fewer
        enough = scheduler.enough
        runs, tables, leaving = scheduler.grow()
        for swap in leaving:
            place = swap.shard * slots + swap.slot
            assert len(swap.pages) * size >= prompt - 1 + drawn[place]
            outside[owner.pop(place)] = int(drawn[place])
        swapped += len(leaving)
        most_outside = max(most_outside, sum(outside.values()))
        watch(runs, tables)
        waiting = scheduler.waiting
        places = np.flatnonzero(runs).tolist()
        if not places:  # the oldest row made room for itself: prompts held its pages
            continue
        left = np.array([lengths[owner[p]] - drawn[p] for p in places])
        enough = min(enough or len(left), len(left))
        steps = min(dispatch, int(np.sort(left)[enough - 1]))
        taken = np.minimum(left, steps)
        read = taken * (prompt + drawn[places]) + taken * (taken - 1) // 2
        engine = np.array(places) // slots
        rows, cached = (np.bincount(engine, x, shards) for x in (taken, read))
        rounds.append(Round(steps, slots, rows / steps, cached / steps))
        tokens += int(taken.sum())
        for p, more in zip(places, taken, strict=True):
            drawn[p] += more
            covered = len(tables[p]) * size
            assert covered >= prompt - 1 + drawn[p]  # every token had its page
        steps_taken += steps
        if waiting:
            busy += taken.sum()
            offered += steps * slots * shards
        done = np.zeros(shards * slots, bool)
        done[places] = left <= steps
        for place, request, sample, size_ in scheduler.advance(done, drawn):
            assert owner.pop(place) == (request, sample)
            assert size_ == lengths[request, sample]
            finished.append((request, sample))
    occupancy = busy / offered if offered else 1.0
    return Simulated(
        finished, occupancy, tokens, steps_taken, swapped, most_outside, rounds
    )
