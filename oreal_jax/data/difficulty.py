"""Hard prompts more often: repetition by measured pass rate, as published."""

from collections.abc import Sequence

from oreal_jax.data.prompts import Prompt
from oreal_jax.errors import InputError

# (low, high, times): a prompt with low <= pass rate < high is taken `times` times.
Bands = tuple[tuple[float, float, int], ...]

PUBLISHED_BANDS: Bands = (
    (0.0, 0.2, 6),
    (0.2, 0.4, 4),
    (0.4, 0.6, 4),
    (0.6, 0.8, 2),
)


def repeat_by_difficulty(prompts: Sequence[Prompt], bands: Bands) -> list[Prompt]:
    """The prompts, each as often as its band says; outside all bands it is dropped.

    A prompt without a pass rate is taken once.

    Raises:
        InputError: nothing is left.
    """
    repeated = [prompt for prompt in prompts for _ in range(times(prompt, bands))]
    if not repeated:
        raise InputError(
            f"all {len(prompts)} prompts have a pass_rate outside every difficulty "
            f"band {bands}"
        )
    return repeated


def times(prompt: Prompt, bands: Bands) -> int:
    """How often a prompt is taken."""
    if prompt.pass_rate is None:
        return 1
    inside = (n for low, high, n in bands if low <= prompt.pass_rate < high)
    return next(inside, 0)
