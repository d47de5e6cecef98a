"""The scheduler without a model: no sample or page is lost, and slots stay full."""

import numpy as np
import pytest
from simulate_slots import published_lengths

from oreal_jax.sampling.scheduler import Job, Schedule, Scheduler
from oreal_jax.sampling.simulation import Simulation, heavy_tailed, simulate

never = lambda slots: False
always = lambda slots: True


def simulate_checked(lengths: np.ndarray, **options) -> Simulation:
    """Simulate, checking the pages of every round."""
    return simulate(lengths, watch=check_pages, **options)


def check_pages(schedule: Schedule) -> None:
    """Check that page 0 is not used, and shared pages only within a prompt."""
    own: dict[int, list[int]] = {}
    for (engine, _), table in schedule.block_tables.items():
        assert 0 not in table
        own.setdefault(engine, []).extend(table[3:])  # 49 tokens fill three pages
    for pages in own.values():
        assert len(pages) == len(set(pages))


def make_scheduler(jobs: list[Job], **options) -> Scheduler:
    """Return a scheduler of one engine with pages of 16 tokens, unless overridden."""
    return Scheduler(jobs, **({"engines": 1, "page_size": 16, "steps": 4} | options))


@pytest.mark.parametrize(("engines", "slots"), [(1, 1), (1, 8), (4, 3)])
def test_every_sample_finishes_once(engines, slots):
    lengths = heavy_tailed(60, 200, 1000).reshape(12, 5)
    simulation = simulate_checked(lengths, engines=engines, slots=slots)
    assert sorted(simulation.finished) == [(n, k) for n in range(12) for k in range(5)]


@pytest.mark.parametrize("engines", [1, 3])
@pytest.mark.parametrize("steps", [7, 64])
@pytest.mark.parametrize("pages", [80, 140])
def test_preempted_sequences_resume_where_they_were(engines, steps, pages):
    """No token is generated twice.

    There are pages for about one, or two, of eight sequences at their longest.
    """
    lengths = heavy_tailed(120, 300, 900).reshape(24, 5)
    cache = {"engines": engines, "pages": pages, "longest": 1000}
    simulation = simulate_checked(lengths, steps=steps, **cache)
    assert sorted(simulation.finished) == [(n, k) for n in range(24) for k in range(5)]
    assert simulation.swap_outs > 0
    assert simulation.tokens == lengths.sum()


def test_a_round_without_sequences_is_not_the_end():
    """The oldest sequence is preempted while waiting samples hold a prompt's pages."""
    lengths = np.random.default_rng(1).integers(1, 1001, (4, 3))
    cache = {"pages": 20, "page_size": 64, "prompt": 200, "longest": 1000}
    simulation = simulate_checked(lengths, **cache)
    assert sorted(simulation.finished) == [(n, k) for n in range(4) for k in range(3)]
    assert simulation.tokens == lengths.sum()


def test_a_swapped_out_sequence_resumes_before_new_samples_start():
    jobs = [Job(n, 10, 100, 1) for n in range(3)]
    scheduler = make_scheduler(jobs, slots=2, pages=10, steps=16)
    schedule = scheduler.schedule(never)
    assert [a.sample for a in schedule.admissions] == [(0, 0), (1, 0)]
    generated = 0
    while not schedule.swap_outs:
        generated += 16
        scheduler.update(np.zeros((1, 2), bool), np.full((1, 2), generated))
        schedule = scheduler.schedule(never)
    (swap_out,) = schedule.swap_outs
    assert swap_out.sample == (1, 0)
    assert len(swap_out.pages) == -(-(9 + generated) // 16)
    # A slot is free, but not for the third.
    scheduler.update(np.zeros((1, 2), bool), np.full((1, 2), generated))
    schedule = scheduler.schedule(never)
    assert not schedule.admissions and not schedule.swap_ins
    scheduler.update(np.array([[True, False]]), np.full((1, 2), generated + 5))
    schedule = scheduler.schedule(never)
    (swap_in,) = schedule.swap_ins
    assert swap_in.sample == (1, 0) and len(swap_in.pages) == len(swap_out.pages)
    assert [a.sample for a in schedule.admissions] == [(2, 0)]


def test_slots_are_over_90_percent_full_on_the_7b_recipes_lengths():
    """1,024 completions, mean about 6,000 tokens, at most 14,000; 256 slots."""
    lengths = published_lengths()
    assert lengths.mean() == pytest.approx(6000, abs=1)
    simulation = simulate_checked(lengths, slots=256, pages=300_000, longest=14_000)
    assert simulation.occupancy > 0.9


@pytest.mark.parametrize("prompt", [1, 38, 64, 65, 200])
@pytest.mark.parametrize("new", [1, 24, 64, 300])
@pytest.mark.parametrize("samples", [1, 8])
def test_an_engines_pages_are_enough_to_fill_its_slots_at_once(prompt, new, samples):
    """`Engine.size` gives a slot the pages of the longest sequence and one more."""
    slots, table_pages = 32, -(-(prompt + new) // 64)
    pages = slots * (table_pages + 1) + table_pages + 1
    jobs = [Job(n, prompt, prompt + new, samples) for n in range(slots // samples)]
    scheduler = make_scheduler(jobs, slots=slots, pages=pages, page_size=64, steps=64)
    schedule = scheduler.schedule(never)
    assert len(schedule.block_tables) == scheduler.running == slots
    assert not scheduler.waiting and not schedule.swap_outs


def test_smaller_engines_continue_the_running_sequences():
    jobs = [Job(n, 10, 100, 9) for n in range(2)]
    scheduler = make_scheduler(jobs, engines=2, slots=32, pages=100)
    before = scheduler.schedule(always)
    # Nine sequences on an engine; the next smaller engine has eight slots.
    assert before.kept_slots is None and before.min_finished == 2
    done = np.zeros((2, 32), bool)
    done[0, 3] = done[1, 0] = True
    scheduler.update(done, np.full((2, 32), 2))
    assert scheduler.fitting_slots == [8]
    after = scheduler.schedule(always)
    assert after.kept_slots is not None and after.kept_slots.shape == (2, 8)
    assert len(after.block_tables) == 16
    assert after.min_finished == 0  # no engine is smaller
    for (engine, slot), table in after.block_tables.items():
        old = int(after.kept_slots[engine, slot])
        assert table == before.block_tables[engine, old]
        assert not done[engine, old]


def test_engines_do_not_shrink_while_samples_wait():
    jobs = [Job(n, 10, 100, 1) for n in range(2)]
    scheduler = make_scheduler(jobs, slots=32, pages=3)  # pages for one sequence
    schedule = scheduler.schedule(always)
    assert scheduler.running == 1 and scheduler.waiting
    assert schedule.kept_slots is None and schedule.min_finished == 1


def test_completions_are_expected_to_double_their_length_up_to_the_limit():
    scheduler = make_scheduler([Job(0, 10, 100, 2)], slots=8, pages=100)
    scheduler.schedule(never)
    assert scheduler.saved_steps(0) == 0
    for generated, expected in [((3, 7), 7), ((50, 20), 40), ((89, 88), 2)]:
        done = np.zeros((1, 8), bool)
        scheduler.update(done, np.array([[*generated, *[0] * 6]]))
        assert scheduler.saved_steps(0) == expected
        assert scheduler.saved_steps(2) == expected * 0.75


@pytest.mark.parametrize("engines", [1, 2])
@pytest.mark.parametrize("pages", [24, 60])
def test_requests_that_join_and_leave_lose_no_page(engines, pages):
    """Whatever is removed: waiting, in slots, swapped out, or single samples."""
    generator = np.random.default_rng(0)
    scheduler = make_scheduler([], engines=engines, slots=4, pages=pages)
    lengths: dict[tuple[int, int], int] = {}
    generated: dict[tuple[int, int], int] = {}
    joined, removed, finished, swap_outs = 0, set(), set(), 0
    while joined < 200 or scheduler.waiting or scheduler.running:
        if joined < 200 and generator.random() < 0.5:
            prompt, samples = int(generator.integers(1, 60)), 1 + joined % 5
            scheduler.add(Job(joined, prompt, prompt + 100, samples))
            for sample in range(samples):
                lengths[joined, sample] = int(generator.integers(1, 101))
            joined += 1
        if joined and generator.random() < 0.3:
            request = int(generator.integers(joined))
            sample = int(generator.integers(3)) if generator.random() < 0.5 else None
            gone = {s for s in lengths if s[0] == request and sample in (None, s[1])}
            scheduler.remove(request, sample)
            # A sample alone is removed only if it has started.
            removed |= gone if sample is None else gone & generated.keys()
            assert not removed & set(scheduler.in_slots.values())
        schedule = scheduler.schedule(never)
        swap_outs += len(schedule.swap_outs)
        for start in schedule.admissions:
            assert start.sample not in removed | generated.keys()
            generated[start.sample] = 0
        assert not any(0 in table for table in schedule.block_tables.values())
        done, counts = np.zeros((engines, 4), bool), np.zeros((engines, 4), int)
        for at in schedule.block_tables:
            sample = scheduler.in_slots[at]
            generated[sample] = min(generated[sample] + 4, lengths[sample])
            done[at] = generated[sample] == lengths[sample]
            counts[at] = generated[sample]
        ended = {end.sample for end in scheduler.update(done, counts)}
        assert not ended & (removed | finished)
        finished |= ended
    assert removed | finished == set(lengths) and bool(swap_outs) == (pages == 24)
    for engine in scheduler._engines:
        assert sorted(engine.free) == list(range(1, pages))
