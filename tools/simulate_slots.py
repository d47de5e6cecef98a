"""The scheduler without a model: who decodes where, for rows of given lengths."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from oreal_jax.sampling.scheduler import Job, Scheduler


class Simulated(NamedTuple):
    """The order in which (prompt, sample) finished, and how full the slots were while
    samples were waiting."""

    finished: list[tuple[int, int]]
    occupancy: float


def heavy_tailed(count: int, mean: float, longest: int, seed=0) -> np.ndarray:
    """Log-normal lengths, cut at `longest`."""
    draw = np.random.default_rng(seed)
    lengths = draw.lognormal(0, 0.8, count)
    return np.clip(lengths * mean / lengths.mean(), 1, longest).astype(int)


def published_lengths() -> np.ndarray:
    """Like the 7B recipe's: 64 prompts x 16, mean about 6,000, at most 14,000."""
    return heavy_tailed(1024, 6500, 14_000).reshape(64, 16)


def simulate(
    lengths: np.ndarray,
    *,
    shards=1,
    slots=8,
    pages=10_000,
    size=16,
    dispatch=64,
    prompt=50,
    longest=2000,
    watch: Callable = lambda runs, tables: None,
) -> Simulated:
    """Decodes rows of given lengths [N, K]; `watch` sees which slots run and their
    tables of pages, each round."""
    N, K = lengths.shape
    jobs = [Job(n, prompt, prompt + longest, tuple(range(K))) for n in range(N)]
    scheduler = Scheduler(jobs, shards=shards, slots=slots, pages=pages, size=size)
    remaining: dict[tuple[int, int], int] = {}
    owner: dict[int, tuple[int, int]] = {}
    drawn = np.zeros(shards * slots, int)
    finished, busy, offered = [], 0, 0
    while scheduler.waiting or scheduler.running:
        _, admissions = scheduler.place()
        for a in admissions:
            place = a.shard * slots + a.slot
            owner[place], drawn[place] = (a.request, a.sample), 0
            remaining[a.request, a.sample] = int(lengths[a.request, a.sample])
        runs, tables = scheduler.grow(dispatch)
        watch(runs, tables)
        waiting = scheduler.waiting
        places = np.flatnonzero(runs).tolist()
        left = np.array([remaining[owner[p]] - drawn[p] for p in places])
        enough = scheduler.enough or len(left)
        steps = min(dispatch, int(np.sort(left)[min(enough, len(left)) - 1]))
        for p, rest in zip(places, left, strict=True):
            drawn[p] += min(steps, rest)
            covered = len(tables[p]) * size
            assert covered >= prompt - 1 + drawn[p]  # every token had its page
        if waiting:
            busy += np.minimum(left, steps).sum()
            offered += steps * slots * shards
        done = np.zeros(shards * slots, bool)
        done[places] = left <= steps
        for _, request, sample, size_ in scheduler.advance(done, drawn):
            assert size_ == lengths[request, sample]
            finished.append((request, sample))
    return Simulated(finished, busy / offered if offered else 1.0)
