"""The order of prompts: a function of the seed and of how many were taken before, so a
run may resume with another number of prompts per step."""

from collections.abc import Sequence
from typing import Any

from oreal_jax.errors import InputError


class PromptOrder:
    """Shuffled batches without end; each epoch is a permutation of its own."""

    def __init__(self, items: Sequence[Any], *, batch: int, seed: int):
        """Raises InputError where a batch is larger than the data set, or the seed than
        grain takes."""
        if batch > len(items):
            raise InputError(
                f"a step takes {batch} prompts, the data set has {len(items)}"
            )
        if seed >= 2**32:
            raise InputError(f"seed={seed} must be below {2**32}")
        import grain  # half a second, which `oreal --help` need not wait for

        self.batch_size = batch
        self._items = grain.MapDataset.source(items).shuffle(seed=seed).repeat()

    def batch(self, start: int) -> list[tuple[Any, int]]:
        """The items of a step before which `start` were taken; each with how often it
        came before in this batch.

        Copies of a prompt have the same random key, so their samples are numbered on
        from this.
        """
        batch = [self._items[i] for i in range(start, start + self.batch_size)]
        return [(item, batch[:place].count(item)) for place, item in enumerate(batch)]
