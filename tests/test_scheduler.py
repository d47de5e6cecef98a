"""The scheduler alone: nothing is lost, pages are nobody's twice, slots stay full."""

import numpy as np
import pytest
from simulate_slots import published_lengths

from oreal_jax.sampling.scheduler import Job, Scheduler
from oreal_jax.sampling.simulation import heavy_tailed, simulate


def checked(lengths: np.ndarray, *, shards=1, slots=8, **options):
    """Simulated, with an eye on the pages."""
    watch = lambda runs, tables: check_pages(runs, tables, shards)
    return simulate(lengths, shards=shards, slots=slots, watch=watch, **options)


def check_pages(runs, tables, shards):
    """Page 0 is nobody's; a page that two rows have is a shared prompt's."""
    slots = len(runs) // shards  # fewer at the end
    for shard in range(shards):
        own: list[int] = []
        for p in range(shard * slots, (shard + 1) * slots):
            if runs[p]:
                assert 0 not in tables[p]
                own += tables[p][3:]  # 49 stored tokens fill three pages
        assert len(own) == len(set(own))


@pytest.mark.parametrize(("shards", "slots"), [(1, 1), (1, 8), (4, 3)])
def test_every_sample_is_drawn_once(shards, slots):
    lengths = heavy_tailed(60, 200, 1000).reshape(12, 5)
    found = checked(lengths, shards=shards, slots=slots)
    assert sorted(found.finished) == [(n, k) for n in range(12) for k in range(5)]


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dispatch", [7, 64])
@pytest.mark.parametrize("pages", [80, 140])
def test_rows_that_find_no_page_go_on_later(shards, dispatch, pages):
    """Room for about one, or two, of eight rows at their longest: no token is drawn
    twice."""
    lengths = heavy_tailed(120, 300, 900).reshape(24, 5)
    room = {"shards": shards, "pages": pages, "longest": 1000}
    found = checked(lengths, dispatch=dispatch, **room)
    assert sorted(found.finished) == [(n, k) for n in range(24) for k in range(5)]
    assert found.swapped > 0
    assert found.tokens == lengths.sum()


def test_a_round_without_rows_is_not_the_end():
    """The oldest row swaps itself out while samples that wait hold a prompt's pages."""
    lengths = np.random.default_rng(1).integers(1, 1001, (4, 3))
    found = checked(lengths, pages=20, size=64, prompt=200, longest=1000)
    assert sorted(found.finished) == [(n, k) for n in range(4) for k in range(3)]
    assert found.tokens == lengths.sum()


def test_a_row_that_was_swapped_out_goes_on_before_others_begin():
    jobs = [Job(n, 10, 100, (0,)) for n in range(3)]
    scheduler = Scheduler(jobs, shards=1, slots=2, pages=10, size=16, dispatch=16)
    _, admissions, _ = scheduler.place()
    assert [a.request for a in admissions] == [0, 1]
    _, _, leaving = scheduler.grow()
    drawn = 0
    while not leaving:
        drawn += 16
        scheduler.advance(np.zeros(2, bool), np.full(2, drawn))
        _, _, leaving = scheduler.grow()
    (swap,) = leaving
    assert swap.request == 1 and len(swap.pages) == -(-(9 + drawn) // 16)
    assert scheduler.place() == ([], [], [])  # a slot is free, but not for the third
    scheduler.advance(np.array([True, False]), np.full(2, drawn + 5))
    _, admissions, (back,) = scheduler.place()
    assert back.request == 1 and len(back.pages) == len(swap.pages)
    assert [a.request for a in admissions] == [2]


def test_slots_are_over_90_percent_full_on_the_7b_recipes_lengths():
    """1,024 rows, mean about 6,000 tokens, at most 14,000; 256 slots."""
    lengths = published_lengths()
    assert lengths.mean() == pytest.approx(6000, abs=1)
    found = checked(lengths, slots=256, pages=300_000, longest=14_000)
    assert found.occupancy > 0.9


@pytest.mark.parametrize("prompt", [1, 38, 64, 65, 200])
@pytest.mark.parametrize("new", [1, 24, 64, 300])
@pytest.mark.parametrize("samples", [1, 8])
def test_an_engines_pages_are_enough_to_fill_its_slots_at_once(prompt, new, samples):
    """`Engine.size` gives a slot the pages of the longest row and one more."""
    slots, table_pages = 32, -(-(prompt + new) // 64)
    pages = slots * (table_pages + 1) + table_pages + 1
    count = slots // samples
    jobs = [Job(n, prompt, prompt + new, tuple(range(samples))) for n in range(count)]
    scheduler = Scheduler(
        jobs, shards=1, slots=slots, pages=pages, size=64, dispatch=64
    )
    scheduler.place()
    assert scheduler.running == slots and not scheduler.waiting


def test_a_smaller_engine_takes_over_the_rows_that_run():
    jobs = [Job(n, 10, 100, tuple(range(9))) for n in range(2)]
    scheduler = Scheduler(jobs, shards=2, slots=32, pages=100, size=16, dispatch=4)
    scheduler.place()
    _, before, _ = scheduler.grow()
    # Nine rows on a shard; the next smaller engine has eight slots.
    assert scheduler.fitting_slots == []
    assert scheduler.enough == 2
    done = np.zeros(64, bool)
    done[[3, 32]] = True  # a row of each shard
    scheduler.advance(done, np.full(64, 2))
    assert scheduler.fitting_slots == [8]
    old_slots = scheduler.shrink(8)
    assert old_slots.shape == (2, 8)
    runs, tables, _ = scheduler.grow()
    assert runs.all() and scheduler.enough == 0  # no engine is smaller
    for shard in range(2):
        for slot, old in enumerate(old_slots[shard]):
            place = 32 * shard + old
            assert tables[8 * shard + slot] == before[place]
            assert not done[place]


def test_no_slot_goes_while_samples_wait():
    jobs = [Job(n, 10, 100, (0,)) for n in range(2)]
    scheduler = Scheduler(jobs, shards=1, slots=32, pages=3, size=16, dispatch=4)
    scheduler.place()  # pages for one row alone
    assert scheduler.running == 1 and scheduler.waiting
    assert scheduler.fitting_slots == []
    assert scheduler.enough == 1


def test_rows_are_expected_to_double_their_length_up_to_the_limit():
    jobs = [Job(0, 10, 100, (0, 1))]
    scheduler = Scheduler(jobs, shards=1, slots=8, pages=100, size=16, dispatch=4)
    scheduler.place()
    running = np.zeros(8, bool)
    assert scheduler.expected_steps == 0
    for drawn, expected in [((3, 7), 7), ((50, 20), 40), ((89, 88), 2)]:
        scheduler.advance(running, np.array([*drawn, *[0] * 6]))
        assert scheduler.expected_steps == expected
