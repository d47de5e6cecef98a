"""From one value a token to one number a batch.

Each sum is over the part of the batch at hand and each denominator a `Count` of the
whole, so the numbers of micro-batches add up to that of the batch. What they divide by
decides how long completions weigh against short ones.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from oreal_jax.losses.scored import Count, Scalar

Aggregate = Callable[[Float[Array, "B T"], Bool[Array, "B T"], Count], Scalar]


def token_mean(
    values: Float[Array, "B T"], where: Bool[Array, "B T"], count: Count
) -> Scalar:
    """Mean over tokens: a long completion weighs more (OREAL as released, DAPO)."""
    return jnp.sum(values, where=where) / count.tokens


def sequence_sum(
    values: Float[Array, "B T"], where: Bool[Array, "B T"], count: Count
) -> Scalar:
    """Mean over completions of their sums: the expectations of OREAL's equations."""
    return jnp.sum(values, where=where) / count.sequences


def sequence_mean(
    values: Float[Array, "B T"], where: Bool[Array, "B T"], count: Count
) -> Scalar:
    """Mean over completions of their means: a token of a long completion weighs less
    (GRPO)."""
    length = jnp.maximum(1, jnp.sum(where, axis=-1))
    return jnp.sum(jnp.sum(values, axis=-1, where=where) / length) / count.sequences


@dataclasses.dataclass(frozen=True)
class FixedLength:
    """Mean over completions of their sums, over a length that is the same for all: the
    longest completion, as a rule (Dr. GRPO, arXiv:2503.20783)."""

    length: int

    def __call__(
        self, values: Float[Array, "B T"], where: Bool[Array, "B T"], count: Count
    ) -> Scalar:
        """The aggregate."""
        return sequence_sum(values, where, count) / self.length
