"""Repetition of prompts by difficulty, and their order by seed."""

from collections.abc import Sequence
from typing import Any

from oreal_jax.data.prompts import Prompt
from oreal_jax.errors import InputError

# (low, high, repeats): used `repeats` times where low <= pass rate < high.
Bands = tuple[tuple[float, float, int], ...]

PUBLISHED_BANDS: Bands = (
    (0.0, 0.2, 6),
    (0.2, 0.4, 4),
    (0.4, 0.6, 4),
    (0.6, 0.8, 2),
)


def repeat_by_difficulty(prompts: Sequence[Prompt], bands: Bands) -> list[Prompt]:
    """Repeat each prompt as often as its band requires; drop those outside all bands.

    Prompts without a pass rate are used once.

    Raises:
        InputError: no prompt remains.
    """
    repeats = lambda rate: next((n for low, high, n in bands if low <= rate < high), 0)
    repeated = [
        prompt
        for prompt in prompts
        for _ in range(1 if prompt.pass_rate is None else repeats(prompt.pass_rate))
    ]
    if not repeated:
        raise InputError(
            f"all {len(prompts)} prompts have a pass_rate outside every difficulty "
            f"band {bands}"
        )
    return repeated


class PromptOrder:
    """Endless shuffled batches; each epoch is another permutation.

    A function of the seed and the number of prompts used before, so that a run may
    resume with another number of prompts per step.
    """

    def __init__(self, items: Sequence[Any], *, batch: int, seed: int):
        """Shuffle the items.

        Raises:
            InputError: `batch` is larger than the data set, or the seed too large.
        """
        if batch > len(items):
            raise InputError(
                f"a step takes {batch} prompts, the data set has {len(items)}"
            )
        if seed >= 2**32:
            raise InputError(f"seed={seed} must be below {2**32}")
        import grain  # half a second, too long for `oreal --help`

        self.batch_size = batch
        self._items = grain.MapDataset.source(items).shuffle(seed=seed).repeat()

    def batch(self, start: int) -> list[tuple[Any, int]]:
        """Return the next items after `start`, each with its copy number in the batch.

        Copies of a prompt have the same random key; the number distinguishes samples.
        """
        batch = [self._items[i] for i in range(start, start + self.batch_size)]
        return [(item, batch[:index].count(item)) for index, item in enumerate(batch)]
