"""The scheduler alone: nothing is lost, pages are nobody's twice, slots stay full."""

import numpy as np
import pytest

from oreal_jax.sampling.scheduler import Job, Scheduler


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
):
    """Decodes rows of given lengths [N, K]; the order of finishing, and occupancy."""
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
        check_pages(runs, tables, shards, slots)
        waiting = scheduler.waiting
        places = np.flatnonzero(runs).tolist()
        left = np.array([remaining[owner[p]] - drawn[p] for p in places])
        # The device hands back when a 32nd of the slots is done, or after `dispatch`.
        enough = max(1, slots * shards // 32) if waiting else len(left)
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
    return finished, busy / offered if offered else 1.0


def check_pages(runs, tables, shards, slots):
    """Page 0 is nobody's; a page that two rows have is a shared prompt's."""
    for shard in range(shards):
        own: list[int] = []
        for p in range(shard * slots, (shard + 1) * slots):
            if runs[p]:
                assert 0 not in tables[p]
                own += tables[p][3:]  # 49 stored tokens fill three pages
        assert len(own) == len(set(own))


def heavy_tailed(count: int, mean: float, longest: int, seed=0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    lengths = draw.lognormal(0, 0.8, count)
    return np.clip(lengths * mean / lengths.mean(), 1, longest).astype(int)


@pytest.mark.parametrize(("shards", "slots"), [(1, 1), (1, 8), (4, 3)])
def test_every_sample_is_drawn_once(shards, slots):
    lengths = heavy_tailed(60, 200, 1000).reshape(12, 5)
    finished, _ = simulate(lengths, shards=shards, slots=slots)
    assert sorted(finished) == [(n, k) for n in range(12) for k in range(5)]


def test_rows_that_find_no_page_come_back_later():
    """Room for about two of eight rows at their longest."""
    lengths = heavy_tailed(40, 300, 900).reshape(8, 5)
    finished, _ = simulate(lengths, pages=140, longest=1000)
    assert sorted(finished) == [(n, k) for n in range(8) for k in range(5)]


def test_slots_are_over_90_percent_full_on_the_7b_recipes_lengths():
    """1,024 rows, mean about 6,000 tokens, at most 14,000; 256 slots."""
    lengths = heavy_tailed(1024, 6500, 14_000).reshape(64, 16)
    assert 5500 < lengths.mean() < 6500
    _, occupancy = simulate(lengths, slots=256, pages=300_000, longest=14_000)
    assert occupancy > 0.9
