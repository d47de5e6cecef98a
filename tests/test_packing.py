"""Training batches have few shapes: each one is a compilation of the train step."""

from collections.abc import Callable

import numpy as np
import oreal_7b
import pytest
import smollm2_arithmetic
import tiny as tiny_config

from oreal_jax.config import TrainConfig
from oreal_jax.data.packing import Example, Shape, SizeLimits, arrange, fill_rows, pack
from oreal_jax.sampling.simulation import heavy_tailed
from oreal_jax.train.programs import step_size_limits

Lengths = Callable[[np.random.Generator, int], np.ndarray]


def steps(
    config: TrainConfig, prompts: Lengths, completions: Lengths
) -> list[list[tuple[int, int]]]:
    """Yield the (prompt, completion) lengths of the pairs of each step.

    The model improves: more and more prompts have only correct completions.
    """
    random = np.random.default_rng(0)
    batches = []
    for step in range(config.steps):
        pass_rate = random.normal(0.4 + 0.4 * step / config.steps, 0.3, size=(64,))
        rates = np.clip(pass_rate[: config.prompts_per_step], 0, 1)
        correct = random.binomial(config.samples_per_prompt, rates)
        pairs = int(((correct > 0) & (correct < config.samples_per_prompt)).sum())
        prompt_lengths = np.repeat(prompts(random, pairs), 2).tolist()
        completion_lengths = completions(random, 2 * pairs).tolist()
        batches.append(list(zip(prompt_lengths, completion_lengths, strict=True)))
    return batches


def published(random: np.random.Generator, count: int) -> np.ndarray:
    """Completions of about 6,000 tokens, at most 14,000; their mean varies."""
    mean, seed = int(random.uniform(4_000, 8_000)), int(random.integers(2**31))
    return heavy_tailed(count, mean, 14_000, seed)


def shapes(config: TrainConfig, lengths, shards: int) -> list[tuple[Shape, int]]:
    """Return the batch shape and the number of micro-batches of each step."""
    packing = config.packing
    limits = step_size_limits(
        config, min(prompt for step in lengths for prompt, _ in step)
    )
    batches = []
    for step in lengths:
        groups, shape = arrange(
            step,
            rows=packing.rows * shards,
            row_length=packing.row_length,
            limits=limits,
        )
        batches.append((shape, len(groups)))
    return batches


@pytest.mark.parametrize("shards", [1, 4, 16, 32])
def test_the_published_recipe_compiles_its_step_at_most_three_times(shards):
    config = oreal_7b.config
    lengths = steps(config, lambda r, n: r.integers(150, 800, n), published)
    assert len(lengths) == 90 and 80 < max(map(len, lengths)) <= 128
    batches = shapes(config, lengths, shards)
    compiled = {
        (shape, step < config.freeze_steps) for step, (shape, _) in enumerate(batches)
    }
    assert len(compiled) <= 3
    assert len({shape for shape, _ in batches}) <= 2  # of the reference's scorer
    # The vocabulary head computes few columns beyond those of completions.
    answers = sum(answer for step in lengths for _, answer in step)
    used = sum(count * shards * shape.columns for shape, count in batches)
    sizes = [[prompt + answer for prompt, answer in step] for step in lengths]
    rows = sum(len(fill_rows(step, config.packing.row_length)) for step in sizes)
    full_rows = sum(count * shards for _, count in batches)
    assert used <= full_rows * config.packing.row_length
    assert used * rows / full_rows < 1.25 * answers


@pytest.mark.parametrize(
    "config, prompts, completions",
    [
        (smollm2_arithmetic.config, (40, 46), (12, 23)),
        (tiny_config.config, (18, 20), (2, 9)),
    ],
)
def test_small_configs_compile_their_step_once(config, prompts, completions):
    uniform = lambda low, high: lambda r, n: r.integers(low, high, n)
    lengths = steps(config, uniform(*prompts), uniform(*completions))
    batches = shapes(config, lengths, 1)
    assert len({shape for shape, _ in batches}) == 1
    # Not the full row: columns of prompts are never predicted.
    assert batches[0][0].columns <= 0.4 * config.packing.row_length


def test_limits_change_the_shape_and_nothing_else():
    examples = [Example([1] * 9, [2] * size) for size in (3, 8, 5)]
    limits = SizeLimits(16, 40, 20, 4)
    batch, slots = pack(examples, rows=1, row_length=40, limits=limits)
    alone, same_slots = pack(examples, rows=1, row_length=40)
    assert slots == same_slots
    assert batch.length.shape == (8, 16) and batch.old_log_probs.shape[-1] == 32
    for name, values in batch._asdict().items():
        own = alone._asdict()[name]
        inside = tuple(slice(size) for size in own.shape)
        np.testing.assert_array_equal(values[inside], own)
        assert np.count_nonzero(values) == np.count_nonzero(own)


@pytest.mark.parametrize("seed", range(20))
def test_batches_within_the_limits_fit_the_shape(seed):
    random = np.random.default_rng(seed)
    row_length, rows = int(random.integers(40, 400)), int(random.integers(1, 5))
    prompts = random.integers(1, 20, size=(30,))
    answers = random.integers(1, 20, size=(30,))
    lengths = list(zip(prompts.tolist(), answers.tolist(), strict=True))
    limits = SizeLimits(30, 40, 20, int(prompts.min()))
    groups, shape = arrange(lengths, rows=rows, row_length=row_length, limits=limits)
    assert len(groups) <= shape.micros
    for group in groups:
        assert sum(map(len, group)) <= shape.completions
        for row in group:
            assert sum(lengths[i][1] for i in row) <= shape.columns
        assert shape.columns == limits.shape(rows, row_length).columns
    assert max(answers) <= shape.tokens
    assert sorted(i for group in groups for row in group for i in row) == [*range(30)]
