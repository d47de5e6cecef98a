"""Token weights: a factor in [0, 1] on each token's loss.

A *credit* turns raw token scores into q, the probability that a token leads to a
correct answer: `running_credit` or `token_credit`. A *weighting* turns q for correct
completions, and 1 - q for incorrect ones, into weights: `ThresholdWeights`,
`TopKWeights` or `unweighted`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from oreal_jax.losses.scored import PerToken, Scored, TokenMask

Credit = Callable[[PerToken, TokenMask], PerToken]
Weighting = Callable[[PerToken, TokenMask], PerToken]


def token_credit(token_scores: PerToken, where: TokenMask) -> PerToken:
    """Compute sigmoid(w), the credit of each token's own score (Eq. 10 as printed)."""
    return jax.nn.sigmoid(token_scores)


def running_credit(token_scores: PerToken, where: TokenMask) -> PerToken:
    """Compute sigmoid of the mean score up to each token (Eq. 10 as released)."""
    size = jnp.cumsum(where, axis=-1).astype(token_scores.dtype)
    return jax.nn.sigmoid(jnp.cumsum(token_scores, axis=-1) / jnp.maximum(1, size))


def token_weights(
    scored: Scored,
    credit: Credit,
    weight_correct: Weighting,
    weight_incorrect: Weighting,
) -> PerToken:
    """Compute omega+ on correct completions, omega- on incorrect ones (Eq. 10).

    Without gradient: the policy loss never trains the token reward model.
    """
    where = scored.completion
    q = jax.lax.stop_gradient(credit(scored.token_scores, where))
    return jnp.where(
        scored.correct[:, None],
        weight_correct(q, where),
        weight_incorrect(1 - q, where),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThresholdWeights:
    """clip((credit - threshold) / (1 - threshold), 0, 1).

    With threshold 0.5, max(2 credit - 1, 0): omega+ of q, omega- of 1 - q (Eq. 10).
    """

    threshold: float = 0.5

    def __call__(self, credit: PerToken, where: TokenMask) -> PerToken:
        """Compute the weight of every token."""
        return jnp.clip((credit - self.threshold) / (1 - self.threshold), 0, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopKWeights:
    """The top int(ratio * length) credits, min-max normalised; 0 for other tokens.

    All ones if the top credits are equal. At least one token has a weight (the
    release crashes when ratio * length is below 1).
    """

    ratio: float

    def __call__(self, credit: PerToken, where: TokenMask) -> PerToken:
        """Compute the weight of every token."""
        # In double precision, as Python computes it: 0.29 * 100 is below 29.
        sizes = np.maximum(1, np.floor(self.ratio * np.arange(where.shape[-1] + 1)))
        size = jnp.asarray(sizes, jnp.int32)[jnp.sum(where, axis=-1, keepdims=True)]
        order = jnp.argsort(jnp.where(where, -credit, jnp.inf), axis=-1)
        top = where & (jnp.argsort(order, axis=-1) < size)
        low = jnp.min(credit, where=top, initial=jnp.inf, axis=-1, keepdims=True)
        high = jnp.max(credit, where=top, initial=-jnp.inf, axis=-1, keepdims=True)
        # Not high > low: their difference may underflow to 0.
        spread = high - low
        wide = spread > 0
        scaled = jnp.where(wide, (credit - low) / jnp.where(wide, spread, 1), 1)
        return jnp.where(top, scaled, 0)


def unweighted(credit: PerToken, where: TokenMask) -> PerToken:
    """Weight every token by 1: OREAL without token rewards."""
    return jnp.ones_like(credit)
