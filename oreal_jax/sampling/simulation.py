"""The scheduler without a model, for completions of given lengths.

`oreal plan` estimates decoding from its rounds; tools/simulate_slots.py shows the cost
of a small cache. Letters: N prompts, K completions of each, E engines, B slots.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from oreal_jax.sampling.scheduler import Job, SampleId, Schedule, Scheduler

SIGMA = 0.8  # of the logarithm of a completion's length


class Round(NamedTuple):
    """A dispatch of `steps` decoding steps of engines with `slots` slots.

    `running` sequences of each engine and `cached` tokens that they read are means over
    the steps.
    """

    steps: int
    slots: int
    running: Float[np.ndarray, "E"]
    cached: Float[np.ndarray, "E"]


class Simulation(NamedTuple):
    """Samples in the order in which they finished, rounds, and totals.

    `occupancy` is that of slots while samples waited; `max_swapped_tokens` the maximum
    of tokens in host memory.
    """

    finished: list[SampleId]
    rounds: list[Round]
    occupancy: float
    steps: int
    tokens: int
    swap_outs: int
    max_swapped_tokens: int


def heavy_tailed(
    count: int, mean: int, longest: int, seed: int = 0
) -> Int[np.ndarray, "N"]:
    """Return log-normal lengths, cut at `longest`, with this mean after the cut."""
    generator = np.random.default_rng(seed)
    lengths = generator.lognormal(0, SIGMA, count)
    cut = lambda scale: np.clip(lengths * scale, 1, longest)
    low, high = mean / lengths.mean(), longest / lengths.min()
    for _ in range(50 if cut(low).mean() < mean else 0):
        middle = np.sqrt(low * high)
        low, high = (middle, high) if cut(middle).mean() < mean else (low, middle)
    return cut(low).astype(int)


def simulate(
    lengths: Int[np.ndarray, "N K"],
    *,
    engines: int = 1,
    slots: int = 8,
    pages: int = 10_000,
    page_size: int = 16,
    steps: int = 64,
    prompt: int = 50,
    longest: int = 2000,
    watch: Callable[[Schedule], None] = lambda schedule: None,
) -> Simulation:
    """Schedule completions of these lengths as the engines of a training run do.

    Prompts have `prompt` tokens, completions at most `longest`; the other options are
    those of `Scheduler`. `watch` is called with each round's schedule.
    """
    N, K = lengths.shape
    scheduler = Scheduler(
        [Job(n, prompt, prompt + longest, K) for n in range(N)],
        engines=engines,
        slots=slots,
        pages=pages,
        page_size=page_size,
        steps=steps,
    )
    samples = np.full((engines, slots), -1)  # in each slot, n * K + k; -1: free
    index = lambda sample: sample[0] * K + sample[1]
    generated, swapped = np.zeros(N * K, int), np.zeros(N * K, bool)
    finished, rounds = [], []
    tokens = swap_outs = max_swapped_tokens = used_slots = offered_slots = 0
    while scheduler.waiting or scheduler.running:
        schedule = scheduler.schedule(scheduler.saves_enough)
        watch(schedule)
        # Slots, as the devices would change them.
        for start in [*schedule.admissions, *schedule.swap_ins]:
            assert samples[start.engine, start.slot] == -1
            samples[start.engine, start.slot] = index(start.sample)
            swapped[index(start.sample)] = False
        generated[[index(start.sample) for start in schedule.admissions]] = 0
        if schedule.kept_slots is not None:
            samples = np.take_along_axis(samples, schedule.kept_slots, axis=1)
        for swap in schedule.swap_outs:
            stored = prompt - 1 + generated[index(swap.sample)]
            assert len(swap.pages) * page_size >= stored
            assert samples[swap.engine, swap.slot] == index(swap.sample)
            samples[swap.engine, swap.slot] = -1
            swapped[index(swap.sample)] = True
        swap_outs += len(schedule.swap_outs)
        max_swapped_tokens = max(max_swapped_tokens, int(generated[swapped].sum()))
        waiting, tables = scheduler.waiting, schedule.block_tables
        if not tables:  # the oldest was preempted: waiting samples hold the pages
            continue
        # Decoding: `remaining` is what each running sequence has yet to generate.
        running = samples[tuple(np.transpose(list(tables)))]
        remaining = lengths.reshape(-1)[running] - generated[running]
        ending = min(schedule.min_finished or len(remaining), len(remaining))
        round_steps = min(steps, int(np.sort(remaining)[ending - 1]))
        new = np.minimum(remaining, round_steps)
        read = new * (prompt + generated[running]) + new * (new - 1) // 2
        engine = np.array([engine for engine, _ in tables])
        totals = (np.bincount(engine, x, engines) for x in (new, read))
        rounds.append(
            Round(round_steps, samples.shape[1], *(x / round_steps for x in totals))
        )
        generated[running] += new
        tokens += int(new.sum())
        for sample, table in zip(running, tables.values(), strict=True):
            assert len(table) * page_size >= prompt - 1 + generated[sample]
        if waiting:
            used_slots += int(new.sum())
            offered_slots += round_steps * samples.size
        done = (generated >= lengths.reshape(-1))[samples] & (samples >= 0)
        for end in scheduler.update(done, generated[samples]):
            assert samples[end.engine, end.slot] == index(end.sample)
            assert end.tokens == lengths[end.sample]
            samples[end.engine, end.slot] = -1
            finished.append(end.sample)
    occupancy = used_slots / offered_slots if offered_slots else 1.0
    total = sum(round.steps for round in rounds)
    counts = total, tokens, swap_outs, max_swapped_tokens
    return Simulation(finished, rounds, occupancy, *counts)
