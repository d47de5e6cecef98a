"""The order of prompts across epochs, runs, versions and copies."""

from collections import Counter

import pytest

from oreal_jax.data import Prompt, PromptOrder
from oreal_jax.errors import InputError


def drawn(order: PromptOrder, steps: range) -> list:
    size = order.batch_size
    return [item for step in steps for item, _ in order.batch(step * size)]


def test_another_batch_size_continues_where_the_first_one_stopped():
    sizes = [4, 4, 3, 3, 3, 5]
    taken, batches = 0, []
    for size in sizes:
        order = PromptOrder(range(10), batch=size, seed=1)
        batches += [item for item, _ in order.batch(taken)]
        taken += size
    whole = PromptOrder(range(10), batch=10, seed=1)
    assert batches == drawn(whole, range(3))[: sum(sizes)]


def test_a_batch_across_two_epochs_loses_and_doubles_nothing():
    order = PromptOrder(range(10), batch=4, seed=1)
    assert Counter(drawn(order, range(5))) == Counter({i: 2 for i in range(10)})


def test_an_order_stays_what_it_was_when_a_run_began():
    """Pinned from grain 0.2.18: another order here would break every stopped run."""
    order = PromptOrder(range(8), batch=4, seed=0)
    assert drawn(order, range(4)) == [0, 4, 6, 7, 5, 3, 1, 2, 5, 7, 6, 0, 4, 1, 3, 2]


def test_copies_are_numbered_whether_the_same_object_or_equal():
    """Equal copies have equal random keys, so identity must not decide."""
    read = lambda: [Prompt("a", "q", "1", 0.0), Prompt("b", "q", "1", 0.3)]
    (hard, middle) = read()
    items = [*read(), *read(), *[hard] * 4, *[middle] * 2]
    batch = PromptOrder(items, batch=10, seed=0).batch(0)
    numbers = lambda id: [number for prompt, number in batch if prompt.id == id]
    assert numbers("a") == list(range(6)) and numbers("b") == list(range(4))


def test_a_seed_too_large_is_refused_with_both_numbers():
    PromptOrder(range(2), batch=1, seed=2**32 - 1).batch(0)
    with pytest.raises(InputError, match="seed=4294967297 must be below 4294967296"):
        PromptOrder(range(2), batch=1, seed=2**32 + 1)
