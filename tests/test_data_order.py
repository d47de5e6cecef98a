"""The order of prompts across epochs, runs, versions and copies."""

from collections import Counter

import pytest

from oreal_jax.data import Prompt, PromptOrder
from oreal_jax.errors import InputError


def items_of(order: PromptOrder, steps: range) -> list:
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
    assert batches == items_of(reference, range(3))[: sum(sizes)]


def test_batches_across_epochs_neither_skip_nor_repeat_items():
    order = PromptOrder(range(10), batch=4, seed=1)
    assert Counter(items_of(order, range(5))) == Counter({i: 2 for i in range(10)})


def test_the_order_is_pinned():
    """Pinned from grain 0.2.18: another order here would break every stopped run."""
    order = PromptOrder(range(8), batch=4, seed=0)
    assert items_of(order, range(4)) == [0, 4, 6, 7, 5, 3, 1, 2, 5, 7, 6, 0, 4, 1, 3, 2]


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
