"""What a loss may look at, and the denominators it divides by."""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

Scalar = Float[Array, ""]
Metrics = dict[str, Float[Array, ""]]
# Advantages of K samples for each of N prompts, from their rewards (+1 or -1).
Advantage = Callable[[Float[np.ndarray, "N K"]], Float[np.ndarray, "N K"]]


class Scored(NamedTuple):
    """B completions of at most T tokens, one entry per completion token.

    Entry t belongs to completion token t: its log-probability under the policy, under
    the policy that drew it (the sampler's word) and under the reference model; the raw
    score that the token reward model gives the state that predicts it; and the entropy
    of the policy's distribution there. `completion` is False behind a completion's end;
    a row without any is padding.

    `full_log_probs` is None where `log_probs` are of the model's whole distribution.
    Where they are of the distribution sampled from (`TrainConfig.log_probs` "sampled"),
    as `old_log_probs` and `entropy` then are, it has those of the whole: the reference
    model's are always of the whole.
    """

    log_probs: Float[Array, "B T"]
    old_log_probs: Float[Array, "B T"]
    reference_log_probs: Float[Array, "B T"]
    token_scores: Float[Array, "B T"]
    entropy: Float[Array, "B T"]
    completion: Bool[Array, "B T"]
    correct: Bool[Array, "B"]
    advantage: Float[Array, "B"]
    full_log_probs: Float[Array, "B T"] | None = None

    def masked(self) -> "Scored":
        """Zeros behind every completion's end, and float32 at least.

        A mask on a sum alone would let NaN or infinity there into the gradient, as
        zero times NaN; sums of bfloat16 numbers would lose tokens.
        """
        precise = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))
        inside = lambda x: precise(jnp.where(self.completion, x, 0))
        full = self.full_log_probs
        return self._replace(
            log_probs=inside(self.log_probs),
            old_log_probs=inside(self.old_log_probs),
            reference_log_probs=inside(self.reference_log_probs),
            token_scores=inside(self.token_scores),
            entropy=inside(self.entropy),
            advantage=precise(self.advantage),
            full_log_probs=None if full is None else inside(full),
        )

    @property
    def kl_log_probs(self) -> Float[Array, "B T"]:
        """The policy's log-probabilities of the whole distribution, to compare with
        `reference_log_probs`. The KL of a policy to itself is 0 with these alone."""
        return self.log_probs if self.full_log_probs is None else self.full_log_probs

    @property
    def correct_tokens(self) -> Bool[Array, "B T"]:
        """The tokens of correct completions."""
        return self.completion & self.correct[:, None]

    @property
    def incorrect_tokens(self) -> Bool[Array, "B T"]:
        """The tokens of incorrect completions."""
        return self.completion & ~self.correct[:, None]


class Count(NamedTuple):
    """How many tokens and completions there are of a kind; at least 1 each, so that an
    absent kind adds 0."""

    tokens: Scalar
    sequences: Scalar

    @classmethod
    def of(cls, where: Bool[Array, "*batch T"]) -> "Count":
        """Counts what a mask over completion tokens leaves."""
        size = lambda mask: jnp.maximum(1, jnp.sum(mask)).astype(jnp.float32)
        return cls(size(where), size(jnp.any(where, axis=-1)))


class Counts(NamedTuple):
    """Denominators of the whole batch, whatever part of it a loss is given."""

    correct: Count
    incorrect: Count
    all: Count

    @classmethod
    def of(
        cls, completion: Bool[Array, "*batch T"], correct: Bool[Array, "*batch"]
    ) -> "Counts":
        """Counts correct, incorrect and all completions and their tokens."""
        correct = correct[..., None]
        return cls(
            Count.of(completion & correct),
            Count.of(completion & ~correct),
            Count.of(completion),
        )


@runtime_checkable
class PolicyLoss(Protocol):
    """Any object of this form is a loss: a frozen dataclass, as a rule."""

    @property
    def advantage(self) -> Advantage:
        """What the loss wants in `Scored.advantage`, from the rewards of a group."""
        ...

    def __call__(self, scored: Scored, counts: Counts) -> tuple[Scalar, Metrics]:
        """The loss of these completions, and what to report about it."""
        ...
