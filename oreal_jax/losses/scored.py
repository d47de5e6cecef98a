"""Arrays that a loss receives, and the denominators of its means."""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

Scalar = Float[Array, ""]
Metrics = dict[str, Float[Array, ""]]
PerToken = Float[Array, "B T"]  # a number per token of B completions
TokenMask = Bool[Array, "B T"]
# Advantages of K samples of each of N prompts, from their rewards (+1 or -1).
Advantage = Callable[[Float[np.ndarray, "N K"]], Float[np.ndarray, "N K"]]


class Scored(NamedTuple):
    """B completions of at most T tokens, with one entry per completion token.

    log_probs: of the policy that is trained.
    old_log_probs: of the policy that generated the tokens, from the sampler.
    reference_log_probs: of the fixed initial model, over the full vocabulary.
    token_scores: of the token reward model, raw, for the states that predict tokens.
    entropy: of the policy's distribution at each token.
    completion: True at the tokens of completions; a row without any is padding.
    correct, advantage: of each completion.
    full_log_probs: the policy's over the full vocabulary, where those above are of
        the distribution sampled from (`TrainConfig.log_probs="sampled"`); else None.

    Entries outside completions are 0 (`masked` is called once, before the loss), so
    terms need no masks; means take the mask of the tokens they are over.
    """

    log_probs: PerToken
    old_log_probs: PerToken
    reference_log_probs: PerToken
    token_scores: PerToken
    entropy: PerToken
    completion: TokenMask
    correct: Bool[Array, "B"]
    advantage: Float[Array, "B"]
    full_log_probs: PerToken | None = None

    def masked(self) -> "Scored":
        """Set entries outside completions to 0; convert to float32 at least.

        With `where`, because 0 times NaN is NaN, in values and in gradients. Sums of
        bfloat16 numbers would lose tokens.
        """

        def clean(x):
            if x.dtype == bool:
                return x
            inside = self.completion if x.ndim == 2 else self.completion.any(axis=-1)
            x = jnp.where(inside, x, 0)
            return x.astype(jnp.promote_types(x.dtype, jnp.float32))

        return jax.tree.map(clean, self)

    @property
    def kl_log_probs(self) -> PerToken:
        """The policy's full log-probabilities, for a KL to `reference_log_probs`.

        With those of the distribution sampled from, the KL of a policy to itself would
        not be 0.
        """
        return self.log_probs if self.full_log_probs is None else self.full_log_probs

    @property
    def correct_tokens(self) -> TokenMask:
        """The tokens of correct completions."""
        return self.completion & self.correct[:, None]

    @property
    def incorrect_tokens(self) -> TokenMask:
        """The tokens of incorrect completions."""
        return self.completion & ~self.correct[:, None]


class Count(NamedTuple):
    """Numbers of tokens and completions; at least 1, so that an empty sum adds 0."""

    tokens: Scalar
    sequences: Scalar

    @classmethod
    def of(cls, where: Bool[Array, "*batch T"]) -> "Count":
        """Count the tokens of a mask and the completions that have any."""
        size = lambda mask: jnp.maximum(1, jnp.sum(mask)).astype(jnp.float32)
        return cls(size(where), size(jnp.any(where, axis=-1)))


class Counts(NamedTuple):
    """Denominators of the whole batch, of which a loss may receive a part."""

    correct: Count
    incorrect: Count
    all: Count

    @classmethod
    def of(
        cls, completion: Bool[Array, "*batch T"], correct: Bool[Array, "*batch"]
    ) -> "Counts":
        """Count correct, incorrect and all completions and their tokens."""
        correct = correct[..., None]
        masks = (completion & correct, completion & ~correct, completion)
        return cls(*map(Count.of, masks))


@runtime_checkable
class PolicyLoss(Protocol):
    """The form of a loss: as a rule, a frozen dataclass."""

    @property
    def advantage(self) -> Advantage:
        """Computes `Scored.advantage` from the rewards of each group."""
        ...

    def __call__(self, scored: Scored, counts: Counts) -> tuple[Scalar, Metrics]:
        """Compute the loss of these completions, and its metrics."""
        ...
