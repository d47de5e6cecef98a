"""What a loss may look at, and the denominators it divides by."""

from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Scalar = Float[Array, ""]
Metrics = dict[str, Float[Array, ""]]


class Scored(NamedTuple):
    """B completions of at most T tokens, one entry per completion token.

    Entry t belongs to completion token t: its log-probability, the reference model's,
    and the raw score that the token reward model gives the state that predicts it.
    `completion` is False behind a completion's end; a row without any is padding.
    """

    log_probs: Float[Array, "B T"]
    reference_log_probs: Float[Array, "B T"]
    token_scores: Float[Array, "B T"]
    completion: Bool[Array, "B T"]
    correct: Bool[Array, "B"]
    advantage: Float[Array, "B"]

    def masked(self) -> "Scored":
        """Zeros behind every completion's end.

        A mask on a sum alone would let NaN or infinity there into the gradient, as
        zero times NaN.
        """
        inside = lambda values: jnp.where(self.completion, values, 0)
        return self._replace(
            log_probs=inside(self.log_probs),
            reference_log_probs=inside(self.reference_log_probs),
            token_scores=inside(self.token_scores),
        )


class Counts(NamedTuple):
    """Denominators of the whole batch; at least 1 each, so an absent kind adds 0."""

    positive: Scalar
    negative: Scalar
    completion: Scalar
    sequences: Scalar

    @classmethod
    def of(
        cls, completion: Bool[Array, "*batch T"], correct: Bool[Array, "*batch"]
    ) -> "Counts":
        """Counts tokens of right, of wrong and of all completions, and completions."""
        size = lambda mask: jnp.maximum(1, jnp.sum(mask)).astype(jnp.float32)
        right = correct[..., None]
        return cls(
            positive=size(completion & right),
            negative=size(completion & ~right),
            completion=size(completion),
            sequences=size(jnp.any(completion, axis=-1)),
        )


@runtime_checkable
class PolicyLoss(Protocol):
    """Any callable of this form is a loss."""

    def __call__(self, scored: Scored, counts: Counts) -> tuple[Scalar, Metrics]:
        """The loss of these completions, and what to report about it."""
        ...
