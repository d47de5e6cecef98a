"""The scheduler without a model: who decodes where, for rows of given lengths.

Started, it says what a cache that has not room for all rows costs an engine that draws
256 rows of about 6,000 tokens, at most 14,000.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from oreal_jax.sampling.scheduler import Job, Scheduler


class Simulated(NamedTuple):
    """The order in which (prompt, sample) finished, how full the slots were while
    samples were waiting, and all tokens drawn in how many steps; how many rows were
    swapped out, and the most tokens that lay outside the cache at a time."""

    finished: list[tuple[int, int]]
    occupancy: float
    tokens: int
    steps: int
    swapped: int
    most_outside: int


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
    scheduler = Scheduler(
        jobs, shards=shards, slots=slots, pages=pages, size=size, dispatch=dispatch
    )
    owner: dict[int, tuple[int, int]] = {}
    drawn = np.zeros(shards * slots, int)
    outside: dict[tuple[int, int], int] = {}
    finished, busy, offered = [], 0, 0
    tokens = steps_taken = swapped = most_outside = 0
    while scheduler.waiting or scheduler.running:
        _, admissions, returning = scheduler.place()
        for a in admissions + returning:
            place, name = a.shard * slots + a.slot, (a.request, a.sample)
            assert place not in owner
            owner[place], drawn[place] = name, outside.pop(name, 0)
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
        left = np.array([lengths[owner[p]] - drawn[p] for p in places])
        enough = scheduler.enough or len(left)
        steps = min(dispatch, int(np.sort(left)[min(enough, len(left)) - 1]))
        for p, rest in zip(places, left, strict=True):
            drawn[p] += min(steps, rest)
            tokens += min(steps, rest)
            covered = len(tables[p]) * size
            assert covered >= prompt - 1 + drawn[p]  # every token had its page
        steps_taken += steps
        if waiting:
            busy += np.minimum(left, steps).sum()
            offered += steps * slots * shards
        done = np.zeros(shards * slots, bool)
        done[places] = left <= steps
        for place, request, sample, size_ in scheduler.advance(done, drawn):
            assert owner.pop(place) == (request, sample)
            assert size_ == lengths[request, sample]
            finished.append((request, sample))
    occupancy = busy / offered if offered else 1.0
    return Simulated(
        finished, occupancy, int(tokens), steps_taken, swapped, most_outside
    )


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument(
        "--slots", type=int, default=256, help="slots of the engine (256)"
    )
    options.add_argument(
        "--cache-tokens",
        type=int,
        nargs="+",
        default=[131_072, 262_144, 524_288, 4_194_304],
        metavar="N",
        help="sizes of the cache (131072 262144 524288 4194304)",
    )
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a line for each size of the cache."""
    options = parser().parse_args(arguments)
    lengths = heavy_tailed(256, 6500, 14_000).reshape(16, 16)
    page = 64
    for cache_tokens in options.cache_tokens:
        found = simulate(
            lengths,
            slots=options.slots,
            pages=cache_tokens // page + 1,
            size=page,
            prompt=200,
            longest=14_000,
        )
        print(
            f"cache_tokens={cache_tokens}: {found.steps} steps for "
            f"{found.tokens / lengths.sum():.2f} x the tokens, {found.swapped} rows "
            f"swapped out, at most {found.most_outside} tokens outside"
        )


if __name__ == "__main__":
    main()
