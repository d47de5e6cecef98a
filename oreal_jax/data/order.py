"""The order of prompts: a function of (seed, step), so resuming needs no cursor."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import grain

from oreal_jax.errors import BadInput


class PromptOrder:
    """Shuffled batches without end; each epoch is a permutation of its own."""

    def __init__(self, items: Sequence[Any], *, batch: int, seed: int):
        """Raises BadInput where a batch is larger than the data set."""
        if batch > len(items):
            raise BadInput(
                f"a step takes {batch} prompts, the data set has {len(items)}"
            )
        self._batch = batch
        self._items = grain.MapDataset.source(items).shuffle(seed=seed).repeat()

    def batch(self, step: int) -> list[tuple[Any, int]]:
        """The items of a step; each with how often it came before in this batch."""
        start = step * self._batch
        drawn = [self._items[i] for i in range(start, start + self._batch)]
        seen: Counter[int] = Counter()
        numbered = []
        for item in drawn:
            numbered.append((item, seen[id(item)]))
            seen[id(item)] += 1
        return numbered
