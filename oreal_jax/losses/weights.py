"""Token weights: how much of a verdict each token carries, in [0, 1].

Two choices make a weight. A *credit* turns raw token scores into the probability q
that a token lies on the path to a correct answer: `running_credit` or `token_credit`. A
*weighting* turns that probability into a weight; it is given q for correct completions
and 1 - q for incorrect ones: `ThresholdWeights`, `TopKWeights` or `unweighted`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from oreal_jax.losses.terms import running_mean

Credit = Callable[[Float[Array, "B T"], Bool[Array, "B T"]], Float[Array, "B T"]]
Weighting = Callable[[Float[Array, "B T"], Bool[Array, "B T"]], Float[Array, "B T"]]


def running_credit(
    token_scores: Float[Array, "B T"], where: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """Sigmoid of the mean score so far: what the completion up to here is worth (as
    released)."""
    return jax.nn.sigmoid(running_mean(token_scores, where))


def token_credit(
    token_scores: Float[Array, "B T"], where: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """Sigmoid of each token's own score (OREAL eq. 10 as printed)."""
    return jax.nn.sigmoid(token_scores)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThresholdWeights:
    """clip((probability - threshold) / (1 - threshold), 0, 1).

    With threshold 0.5 this is OREAL eq. 10: max(2 probability - 1, 0).
    """

    threshold: float = 0.5

    def __call__(
        self, probability: Float[Array, "B T"], where: Bool[Array, "B T"]
    ) -> Float[Array, "B T"]:
        """The weight of every token."""
        rescaled = (probability - self.threshold) / (1 - self.threshold)
        return jnp.clip(rescaled, 0, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopKWeights:
    """Keeps the top int(ratio * length) tokens, min-max normalised; the rest get 0.

    All ones where the kept probabilities are equal. At least one token is kept (the
    release crashes when ratio * length is below 1).
    """

    ratio: float

    def __call__(
        self, probability: Float[Array, "B T"], where: Bool[Array, "B T"]
    ) -> Float[Array, "B T"]:
        """The weight of every token."""
        length = jnp.sum(where, axis=-1, keepdims=True)
        # In double precision, as Python computes it: 0.29 * 100 is below 29.
        kept_of = np.maximum(1, np.floor(self.ratio * np.arange(where.shape[-1] + 1)))
        keep = jnp.asarray(kept_of, jnp.int32)[length]
        order = jnp.argsort(jnp.where(where, -probability, jnp.inf), axis=-1)
        rank = jnp.argsort(order, axis=-1)
        kept = where & (rank < keep)
        low = jnp.min(probability, where=kept, initial=jnp.inf, axis=-1, keepdims=True)
        high = jnp.max(
            probability, where=kept, initial=-jnp.inf, axis=-1, keepdims=True
        )
        # Not high > low: a difference may be too small for a number of its own.
        spread = high - low
        wide = spread > 0
        scaled = jnp.where(wide, (probability - low) / jnp.where(wide, spread, 1), 1)
        return jnp.where(kept, scaled, 0)


def unweighted(
    probability: Float[Array, "B T"], where: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """Every token counts fully: OREAL without token rewards."""
    return jnp.ones_like(probability)
