"""From one value per token to one number per batch.

Sums are over the completions that a loss receives, denominators are `Count`s of the
whole batch, so the numbers of micro-batches add up to that of the batch. The
denominator decides how much long completions weigh against short ones.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from oreal_jax.losses.scored import Count, PerToken, Scalar, TokenMask
from oreal_jax.losses.terms import completion_mean

Aggregate = Callable[[PerToken, TokenMask, Count], Scalar]


def token_mean(values: PerToken, where: TokenMask, count: Count) -> Scalar:
    """Average over tokens: long completions weigh more (OREAL as released, DAPO)."""
    return jnp.sum(values, where=where) / count.tokens


def sequence_sum(values: PerToken, where: TokenMask, count: Count) -> Scalar:
    """Average sums over completions: the expectations of OREAL's equations."""
    return jnp.sum(values, where=where) / count.sequences


def sequence_mean(values: PerToken, where: TokenMask, count: Count) -> Scalar:
    """Average means over completions: tokens of long ones weigh less (GRPO)."""
    return jnp.sum(completion_mean(values, where)) / count.sequences


@dataclasses.dataclass(frozen=True)
class FixedLength:
    """Mean over completions of their sums / `length`, the same for all (Dr. GRPO)."""

    length: int

    def __call__(self, values: PerToken, where: TokenMask, count: Count) -> Scalar:
        """Aggregate values."""
        return sequence_sum(values, where, count) / self.length
