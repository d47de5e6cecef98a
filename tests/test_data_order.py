"""Repetition of prompts by difficulty; their order across epochs, runs and copies."""

from collections import Counter

import pytest

from oreal_jax.data import (
    PUBLISHED_BANDS,
    Prompt,
    PromptOrder,
    repeat_by_difficulty,
)
from oreal_jax.errors import InputError


def read_items(order: PromptOrder, steps: range) -> list:
    size = order.batch_size
    return [item for step in steps for item, _ in order.batch(step * size)]


def test_the_order_continues_with_another_batch_size():
    sizes = [4, 4, 3, 3, 3, 5]
    start, batches = 0, []
    for size in sizes:
        order = PromptOrder(range(10), batch=size, seed=1)
        batches += [item for item, _ in order.batch(start)]
        start += size
    reference = PromptOrder(range(10), batch=10, seed=1)
    assert batches == read_items(reference, range(3))[: sum(sizes)]


def test_batches_across_epochs_neither_skip_nor_repeat_items():
    order = PromptOrder(range(10), batch=4, seed=1)
    assert Counter(read_items(order, range(5))) == Counter({i: 2 for i in range(10)})


def test_the_order_is_pinned():
    """Pinned from grain 0.2.18: another order here would break every stopped run."""
    order = PromptOrder(range(8), batch=4, seed=0)
    assert read_items(order, range(4)) == [
        0,
        4,
        6,
        7,
        5,
        3,
        1,
        2,
        5,
        7,
        6,
        0,
        4,
        1,
        3,
        2,
    ]


def test_equal_copies_are_numbered_like_identical_ones():
    """Equal copies have equal random keys, so identity must not decide."""
    read = lambda: [Prompt("a", "q", "1", 0.0), Prompt("b", "q", "1", 0.3)]
    (hard, middle) = read()
    items = [*read(), *read(), *[hard] * 4, *[middle] * 2]
    batch = PromptOrder(items, batch=10, seed=0).batch(0)
    numbers = lambda id: [number for prompt, number in batch if prompt.id == id]
    assert numbers("a") == list(range(6)) and numbers("b") == list(range(4))


def test_a_seed_above_32_bits_is_rejected():
    PromptOrder(range(2), batch=1, seed=2**32 - 1).batch(0)
    with pytest.raises(InputError, match="seed=4294967297 must be below 4294967296"):
        PromptOrder(range(2), batch=1, seed=2**32 + 1)


def test_every_epoch_is_another_permutation():
    order = PromptOrder(list(range(10)), batch=5, seed=3)
    epochs = [
        [item for start in (10 * e, 10 * e + 5) for item, _ in order.batch(start)]
        for e in range(3)
    ]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_order_depends_on_seed_and_start_only():
    items = [Prompt(str(i), "q", "a") for i in range(7)]
    first, second = (PromptOrder(items, batch=3, seed=5) for _ in range(2))
    for start in (27, 6, 16):  # in any order, from a fresh start
        assert first.batch(start) == second.batch(start)
    another = PromptOrder(items, batch=3, seed=6)
    assert any(first.batch(start) != another.batch(start) for start in range(5))


def test_a_batch_larger_than_the_data_set_is_rejected():
    with pytest.raises(InputError, match="takes 4 prompts, the data set has 3"):
        PromptOrder([1, 2, 3], batch=4, seed=0)


def test_prompts_are_repeated_by_the_published_difficulty_bands():
    rates = [0.0, 0.1, 0.2, 0.39, 0.4, 0.5, 0.6, 0.79, 0.8, 1.0, None]
    prompts = [Prompt(str(i), "q", "a", rate) for i, rate in enumerate(rates)]
    times = Counter(p.id for p in repeat_by_difficulty(prompts, PUBLISHED_BANDS))
    expected = [6, 6, 4, 4, 4, 4, 2, 2, 0, 0, 1]
    assert [times[str(i)] for i in range(len(rates))] == expected


def test_prompts_outside_all_difficulty_bands_are_rejected():
    with pytest.raises(InputError, match="all 2 prompts have a pass_rate outside"):
        repeat_by_difficulty([Prompt("a", "q", "a", 0.9)] * 2, PUBLISHED_BANDS)
