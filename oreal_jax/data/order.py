"""The order of prompts: a function of (seed, step), so resuming needs no cursor."""

from collections.abc import Sequence
from typing import Any

from oreal_jax.errors import BadInput


class PromptOrder:
    """Shuffled batches without end; each epoch is a permutation of its own."""

    def __init__(self, items: Sequence[Any], *, batch: int, seed: int):
        """Raises BadInput where a batch is larger than the data set, or the seed than
        grain takes."""
        if batch > len(items):
            raise BadInput(
                f"a step takes {batch} prompts, the data set has {len(items)}"
            )
        if seed >= 2**32:
            raise BadInput(f"seed={seed} must be below {2**32}")
        import grain  # half a second, which `oreal --help` need not wait for

        self._batch = batch
        self._items = grain.MapDataset.source(items).shuffle(seed=seed).repeat()

    def batch(self, step: int) -> list[tuple[Any, int]]:
        """The items of a step; each with how often it came before in this batch.

        Copies of a prompt have the same random key, so their samples are numbered on
        from this.
        """
        start = step * self._batch
        drawn = [self._items[i] for i in range(start, start + self._batch)]
        return [(item, drawn[:place].count(item)) for place, item in enumerate(drawn)]
